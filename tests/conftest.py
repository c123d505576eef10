"""What all tests share."""
import contextlib
import functools
import gc

import pytest
from mmengine.config import config, utils
from mmengine.runner import runner
from yapf.yapflib import yapf_api


@contextlib.contextmanager
def cheap_host():
    """What MMEngine spends most of a tiny run on, and no test looks at.

    It reads a hundred metafiles for every inherited config of MMDetection,
    formats every config four times, asks compilers for their versions in each
    run, and collects garbage for every data set, for which Python walks over
    all that was imported.
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
        for module, name in ((runner, 'collect_env'), (utils, 'load')):
            cached = functools.lru_cache(maxsize=None)(getattr(module, name))
            patch.setattr(module, name, cached)
        yield


@pytest.fixture(scope='session', autouse=True)
def host():
    """MMEngine as the tests have it."""
    with cheap_host():
        yield
