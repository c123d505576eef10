"""What the tests of the commands share."""
import pytest

from tests.engine.tiny import pack_tiny


@pytest.fixture(scope='module')
def packed(tiny, tmp_path_factory):
    """Path of the packed file of the tiny detector, as commands take it."""
    return str(pack_tiny(tiny, tmp_path_factory.mktemp('packed')))
