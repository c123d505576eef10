"""The host check names every unfit package in one line."""
import pytest

from isvit_det import host


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Make packages of a name nobody else has, from their source."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, source):
        (tmp_path / f'{name}.py').write_text(source)

    return make


def complaint(monkeypatch, **oldest):
    monkeypatch.setattr(host, 'OLDEST', oldest)
    with pytest.raises(ImportError) as caught:
        host.check_host()
    message = str(caught.value)
    assert '\n' not in message
    assert 'requirements/' in message
    return message


def test_the_packages_the_tests_run_with_pass():
    host.check_host()


def test_all_that_is_wrong_is_named_at_once(packages, monkeypatch):
    packages('isvit_fake_old', '__version__ = "0.9.1"')
    packages('isvit_fake_new', '__version__ = "0.10.7"')
    packages('isvit_fake_unfit',
             'assert False, "mmcv==9 is incompatible.\\nReally."')
    message = complaint(
        monkeypatch,
        isvit_fake_missing='3.3',
        isvit_fake_old='0.10',
        isvit_fake_new='0.10',
        isvit_fake_unfit='1.0')
    assert 'isvit_fake_missing is not installed (needs >= 3.3)' in message
    assert 'isvit_fake_old 0.9.1 is too old (needs >= 0.10)' in message
    assert 'AssertionError: mmcv==9 is incompatible.)' in message
    assert 'isvit_fake_new' not in message


def test_mmcv_without_operators_is_refused(monkeypatch):
    real = host.importlib.util.find_spec
    monkeypatch.setattr(
        host.importlib.util, 'find_spec', lambda name: None
        if name == 'mmcv._ext' else real(name))
    assert 'lacks its compiled operators' in complaint(
        monkeypatch, mmcv='2.0.1')
