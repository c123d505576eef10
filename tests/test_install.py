"""pip install . brings this package and leaves the host's as they are."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from isvit_det.runtime.build import SOURCES

REPO = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what a build reads, so that it leaves nothing here."""
    folder = tmp_path_factory.mktemp('source')
    for name in ('isvit_det', 'requirements'):
        shutil.copytree(
            REPO / name,
            folder / name,
            ignore=shutil.ignore_patterns('__pycache__', '*deit*.pth',
                                          'cascade*.pth'))
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


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    pip('wheel', '--no-index', '--no-build-isolation', '--no-deps',
        '--wheel-dir', str(folder), str(source))
    path, = folder.glob('*.whl')
    return path


def test_the_wheel_holds_every_module_and_config(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(REPO))
        for path in (REPO / 'isvit_det').rglob('*.py')
    }
    assert len(modules) > 30 and modules <= packed
    assert not any(name.startswith('tests') for name in packed)
    assert any(name.endswith('LICENSE') for name in packed)
    sources = {f'isvit_det/csrc/{path.name}' for path in SOURCES.iterdir()}
    assert len(sources) > 5 and sources <= packed
    templates = {
        str(path.relative_to(REPO))
        for path in (REPO / 'isvit_det/page/templates').iterdir()
    }
    assert len(templates) > 4 and templates <= packed
    configs = {
        f'isvit_det/.mim/{path.relative_to(REPO)}'
        for kind in ('py', 'yml')
        for path in (REPO / 'configs').rglob(f'*.{kind}')
    }
    assert len(configs) > 80 and configs <= packed
    weights, = (name for name in packed if name.endswith('.pth'))
    assert weights.endswith('drawn/mask-rcnn_swin-mini_fpn_drawn.pth')


@pytest.mark.slow
def test_the_wheel_runs_the_demo_without_a_clone(wheel, tmp_path):
    """A command by its name, on a config by its name; and one of its own."""
    site, folder = tmp_path / 'site', tmp_path / 'empty'
    folder.mkdir()
    pip('install', '--quiet', '--no-index', '--no-deps', '--target', str(site),
        str(wheel))
    env = dict(os.environ, PYTHONPATH=str(site))
    name = 'isvit_det::drawn/mask-rcnn_swin-mini_fpn_isvit-w4a4_drawn.py'
    own = folder / 'own.py'
    own.write_text(f"_base_ = '{name}'\nmodel = dict(quant=dict(bits='w6a6'))")
    for config, bits in ((name, 'w4a4'), (own, 'w6a6')):
        done = subprocess.run([
            site / 'bin/isvit_det', 'quantize_det', config, '--method',
            'minmax', '--calib-images', '2', '--work-dir', bits,
            '--cfg-options', 'test_dataloader.dataset.indices=8'
        ],
                              cwd=folder,
                              env=env,
                              capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        assert bits in done.stdout and 'float' in done.stdout
        result = json.loads((folder / bits / 'result.json').read_text())
        assert result['float']['metrics']['coco/bbox_mAP'] > 0
        assert 'sources' not in str(result['engine'])
    kept = (folder / 'w4a4' / 'mask-rcnn_swin-mini_fpn_isvit-w4a4_drawn.py')
    assert str(REPO) not in kept.read_text()
    assert (folder / 'data/drawn/version').is_file()


RUN_LAYER = '''
import torch
from torch import nn
from isvit_det.core.layers import QuantLinear, fit_weights_, set_precision_
from isvit_det.core.settings import QuantConfig
from isvit_det.runtime import build
from isvit_det.runtime.engine import attach_runtime_, describe_engine

config = QuantConfig.from_dict(dict(bits='w4a4'))
model = nn.Sequential(QuantLinear(nn.Linear(20, 8), config)).eval()
x = torch.rand(5, 20)
fit_weights_(model)
model[0].input_quantizer.fit_tensor_(x)
set_precision_(model, True, True)
attach_runtime_(model, 'native')
with torch.no_grad():
    model(x)
found = describe_engine(model)
print(found['native_layers'], found['reason'], build.PACKAGED.exists())
'''


@pytest.mark.slow
def test_a_platform_wheel_needs_no_compiler(wheel, tmp_path):
    """The pure one says that there is none, and simulates."""
    packed = tmp_path / 'packed'
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    subprocess.run([REPO / 'tools/platform_wheel.sh', wheel, packed],
                   check=True,
                   env=dict(os.environ, PATH=path))
    for_platform, = packed.glob('*.whl')
    assert '-py3-none-' in for_platform.name
    assert for_platform.name.endswith(f'_{os.uname().machine}.whl')
    found = {}
    for name, file in (('pure', wheel), ('platform', for_platform)):
        site, home = tmp_path / name, tmp_path / f'{name}_home'
        home.mkdir()
        pip('install', '--quiet', '--no-index', '--no-deps', '--target',
            str(site), str(file))
        done = subprocess.run([sys.executable, '-c', RUN_LAYER],
                              cwd=home,
                              env=dict(
                                  PATH=str(home),
                                  HOME=str(home),
                                  PYTHONPATH=str(site)),
                              capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout.splitlines()[-1]
        assert not (home / '.cache/isvit_det').exists()
    assert found['platform'] == "1 model.engine is 'native' True"
    assert found['pure'].startswith('0 there is no native library: no C++ '
                                    'compiler was found')
