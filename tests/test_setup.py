"""tools/setup_env.sh, with a Python that only pretends to install."""
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'tools' / 'setup_env.sh'
pytestmark = pytest.mark.skipif(
    shutil.which('flock') is None, reason='needs flock of util-linux')

# It notes how it is called, and stops at its "pip install" while FAKE/hold is
# there. With FAKE/no-wheel there is no wheel of mmcv.
PYTHON = '''#!/usr/bin/env bash
case "$*" in
    *python_version*) cat "$FAKE/version"; exit ;;
    *sysconfig*) echo "$FAKE/include"; exit ;;
esac
echo "$*" >>"$FAKE/calls"
case "$*" in
    '-m venv '*) mkdir "$3/bin" && cp "$0" "$3/bin/python" ;;
    *--dry-run*) [ ! -e "$FAKE/no-wheel" ] ;;
    '-m pip wheel '*)
        while [ "$1" != --wheel-dir ]; do shift; done
        echo '[10/20] c++ some_operator.cpp'
        touch "$2/onedl_mmcv-2.whl" ;;
    '-m pip install '*)
        touch "$FAKE/installing"
        while [ -e "$FAKE/hold" ]; do sleep .02; done
        [ ! -e "$FAKE/broken" ] || { echo 'no such release'; exit 1; } ;;
    '- onedl-mmcv=='*) echo "${2/==/-}_torch-9" ;;
esac
'''
FREE_SPACE = '''#!/usr/bin/env bash
printf 'Filesystem Size Used Free\\ndisk 9 9 %s\\n' "$(cat "$FAKE/free-kib")"
'''


class Setup:
    """The script and the fake world it runs in."""

    def __init__(self, folder):
        self.fake = folder / 'fake'
        self.env = folder / 'env'
        self.fake.mkdir()
        self.program('python', PYTHON)
        self.program('df', FREE_SPACE)
        self.program('c++', '#!/usr/bin/env bash\n')
        self.write('version', '3.11.4\n')
        self.write('free-kib', str(10 << 20))
        self.write('include/Python.h', '')

    def program(self, name, text):
        path = self.fake / name
        path.write_text(text)
        path.chmod(0o755)

    def write(self, name, text=''):
        path = self.fake / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def start(self, **variables):
        environment = {
            **os.environ, 'PATH': f'{self.fake}:{os.environ["PATH"]}',
            'FAKE': str(self.fake),
            'PYTHON': str(self.fake / 'python'),
            'ISVIT_ENV': str(self.env),
            'XDG_CACHE_HOME': str(self.fake.parent / 'cache'),
            'WHEELHOUSE': '',
            'STACK': '',
            'CXX': '',
            **variables
        }
        return subprocess.Popen(['bash', str(SCRIPT)],
                                env=environment,
                                stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE,
                                text=True)

    def run(self, **variables):
        process = self.start(**variables)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def fails(self, **variables):
        """Run, expect failure, and return the one line that says why."""
        code, out, err = self.run(**variables)
        assert (code, out) == (1, '')
        assert err.splitlines()[-1].startswith('setup_env: error: ')
        return err.splitlines()[-1]

    def calls(self, part):
        path = self.fake / 'calls'
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if part in line]

    def wait_for(self, name):
        deadline = time.monotonic() + 20
        while not (self.fake / name).exists():
            assert time.monotonic() < deadline, f'{name} never came'
            time.sleep(.01)


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


def test_second_run_only_prints_the_path(setup):
    path = f'{setup.env}\n'
    code, out, err = setup.run()
    assert (code, out) == (0, path), err
    calls = setup.calls('')
    assert setup.run() == (0, path, '')
    assert setup.calls('') == calls


def test_torch_torchvision_and_timm_come_in_one_install(setup):
    setup.run()
    torch, rest = setup.calls('pip install --no-input')[:2]
    assert 'requirements/torch.txt' in torch
    assert 'requirements/openmmlab.txt' in rest
    assert '--no-build-isolation' in rest


def test_changed_python_is_another_environment(setup):
    default = {'ISVIT_ENV': ''}
    first = setup.run(**default)[1]
    setup.write('version', '3.11.5\n')
    second = setup.run(**default)[1]
    assert first != second
    assert first.startswith(f'{setup.fake.parent}/cache/isvit_det/env-')


def test_outdated_named_environment_is_redone(setup):
    setup.run()
    setup.write('version', '3.11.5\n')
    code, _, err = setup.run()
    assert code == 0
    assert 'clearing' in err
    assert len(setup.calls('-m venv')) == 2


def test_wheelhouse_is_handed_to_pip(setup, tmp_path):
    setup.run(WHEELHOUSE=str(tmp_path))
    installs = setup.calls('pip install')
    assert len(installs) == 4
    assert all(f'--find-links {tmp_path}' in call for call in installs)


def test_missing_wheelhouse(setup, tmp_path):
    assert f'WHEELHOUSE={tmp_path}/none is not a folder' in setup.fails(
        WHEELHOUSE=f'{tmp_path}/none')


def test_python_of_another_version(setup):
    setup.write('version', '3.9.18\n')
    assert 'is Python 3.9.18; give one of version 3.11' in setup.fails()


def test_python_that_does_not_run(setup, tmp_path):
    assert 'is not a Python that runs' in setup.fails(
        PYTHON=str(tmp_path / 'none'))


def test_full_disk(setup):
    setup.write('free-kib', str(5 << 20))
    assert 'needs 10 GiB, but only 5 GiB are free' in setup.fails()


def test_folder_of_someone_else_is_left_alone(setup):
    setup.env.mkdir()
    (setup.env / 'thesis.tex').write_text('42')
    assert 'was not made by this script' in setup.fails()
    assert (setup.env / 'thesis.tex').read_text() == '42'


def test_failed_install_shows_pips_words_and_is_redone(setup):
    setup.write('broken')
    code, out, err = setup.run()
    assert (code, out) == (1, '')
    assert 'no such release' in err
    (setup.fake / 'broken').unlink()
    assert setup.run()[0] == 0


def test_set_up_killed_half_way_is_redone(setup):
    setup.write('hold')
    killed = setup.start()
    setup.wait_for('installing')
    killed.send_signal(signal.SIGKILL)
    (setup.fake / 'hold').unlink()
    # The killed run's pip may still hold its pipes: do not read them.
    assert killed.wait() == -signal.SIGKILL
    code, out, err = setup.run()
    assert (code, out) == (0, f'{setup.env}\n')
    assert 'clearing' in err
    killed.communicate()


def test_two_at_once_make_one_environment(setup):
    setup.write('hold')
    first = setup.start()
    setup.wait_for('installing')
    second = setup.start()
    assert 'waiting' in second.stderr.readline()
    (setup.fake / 'hold').unlink()
    for process in (first, second):
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, f'{setup.env}\n'), err
    assert len(setup.calls('-m venv')) == 1


def test_mmcv_is_built_once_for_two_environments(setup, tmp_path):
    setup.write('no-wheel')
    code, _, err = setup.run()
    assert code == 0, err
    assert 'about 20 minutes' in err
    assert '10 of 20 files' in err
    code, _, err = setup.run(ISVIT_ENV=str(tmp_path / 'second'))
    assert code == 0, err
    assert 'about 20 minutes' not in err
    assert len(setup.calls('pip wheel')) == 1
    wheels = tmp_path / 'cache' / 'isvit_det' / 'wheels'
    built, = wheels.rglob('*.whl')
    assert len(setup.calls(f'--find-links {built.parent}')) == 4


@pytest.mark.parametrize('kind', ['compiler', 'header'])
def test_a_build_that_cannot_work_is_refused_at_once(setup, kind):
    setup.write('no-wheel')
    if kind == 'compiler':
        message = setup.fails(CXX='no-such-compiler')
        assert 'no C++ compiler (no-such-compiler)' in message
    else:
        (setup.fake / 'include/Python.h').unlink()
        assert 'Python.h is missing' in setup.fails()
    assert setup.calls('requirements/torch.txt') == []
