"""What all tests share."""
import contextlib
import functools
import gc
import sys

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
        _leave_out_reports(patch)
        yield


def _leave_out_reports(patch):
    """Runs in this process write no report for people, which takes seconds.

    What runs anything has been imported by now.
    """
    for part in ('engine', 'classifiers'):
        module = sys.modules.get(f'isvit_det.{part}.run')
        if module is not None:
            for step in ('keep_statistics', 'write_page_or_warn'):
                patch.setattr(module, step, lambda *_: None)


@pytest.fixture(scope='session', autouse=True)
def host():
    """MMEngine as the tests have it."""
    with cheap_host():
        yield


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A tiny float detector with its data, which each module has anew."""
    # What a test of the core alone must not import.
    from tests.engine.tiny import make_tiny
    return make_tiny(tmp_path_factory.mktemp('tiny'))
