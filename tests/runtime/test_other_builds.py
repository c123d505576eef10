"""The kernels' tests on the library as sanitizers and an emulation have it."""
import subprocess

import pytest

from tests.engine.tiny import REPO


def make(*args):
    """What a target prints; skips where it does."""
    done = subprocess.run(['make', *args],
                          cwd=REPO,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    if done.stdout.startswith('skipped: '):
        pytest.skip(done.stdout.strip())
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('target', ['test-sanitizers', 'test-vnni'])
def test_native_tests_pass(target):
    lines = make(target, 'ARGS=-n 0 -x').splitlines()
    assert ' passed' in lines[-1] and 'failed' not in lines[-1]


@pytest.mark.slow
def test_an_emulation_runs_the_kernels_for_vnni():
    assert ('on AVX512VNNI, AVXVNNI, AVX2, PORTABLE: all equal'
            in make('fuzz', 'VNNI=1', 'ARGS=--seed 0'))
