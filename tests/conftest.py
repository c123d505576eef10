"""What all tests share."""
import pytest
from mmengine.config import config
from yapf.yapflib import yapf_api


@pytest.fixture(scope='session', autouse=True)
def unformatted_configs():
    """MMEngine formats every config four times; that takes most of a run."""
    with pytest.MonkeyPatch.context() as patch:
        # Where MMEngine finds it depends on its version.
        for module in (yapf_api, config):
            patch.setattr(
                module,
                'FormatCode',
                lambda text, **_: (text, True),
                raising=False)
        yield
