"""What all tests share."""
import functools
import gc

import pytest
from mmengine.config import config
from mmengine.runner import runner
from yapf.yapflib import yapf_api


@pytest.fixture(scope='session', autouse=True)
def cheap_runners():
    """What a runner spends most of a tiny run on, and no test looks at.

    MMEngine formats every config four times, asks compilers for their version
    in each run, and collects garbage for every data set, for which Python
    walks over all that was imported.
    """
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        # Where MMEngine finds it depends on its version.
        for module in (yapf_api, config):
            patch.setattr(
                module,
                'FormatCode',
                lambda text, **_: (text, True),
                raising=False)
        patch.setattr(runner, 'collect_env',
                      functools.lru_cache(runner.collect_env))
        yield
