"""pip install . brings this package and leaves the host's as they are."""
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what a build reads, so that it leaves nothing here."""
    folder = tmp_path_factory.mktemp('source')
    for name in ('isvit_det', 'requirements'):
        shutil.copytree(
            REPO / name,
            folder / name,
            ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(REPO / name, folder)
    return folder


def pip(*args):
    done = subprocess.run([sys.executable, '-m', 'pip', *args],
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_this_package_would_be_installed(source):
    report = json.loads(
        pip('install', '--quiet', '--no-index', '--no-build-isolation',
            '--dry-run', '--report', '-', str(source)))
    names = [item['metadata']['name'] for item in report['install']]
    assert names == ['isvit_det']


def test_the_wheel_holds_every_module(source, tmp_path):
    pip('wheel', '--no-index', '--no-build-isolation', '--no-deps',
        '--wheel-dir', str(tmp_path), str(source))
    wheel, = tmp_path.glob('*.whl')
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(REPO))
        for path in (REPO / 'isvit_det').rglob('*.py')
    }
    assert len(modules) > 30 and modules <= packed
    assert not any(name.startswith('tests') for name in packed)
    assert any(name.endswith('LICENSE') for name in packed)
