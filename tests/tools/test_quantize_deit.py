"""tools/quantize_det.py on a DeiT: sites, packed files, repeatability."""
import json
import runpy
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.apis import init_detector
from mmengine.fileio import load

from isvit_det.backbones.quant_vit import QuantDeiT
from isvit_det.commands.quantize_det import main
from tests.engine.tiny import FLOAT_DEIT, make_tiny, same_file_state

TEST_TOOL = Path(mmdet.__path__[0]) / '.mim/tools/test.py'
SHORT = ['--iters', '3', '--calib-images', '5', '--bits', 'w4a5']


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp('deit'), float_config=FLOAT_DEIT)


@pytest.fixture(scope='module', params=['backbone', 'detector'])
def done(request, tiny, tmp_path_factory):
    """Work directory of a whole run on a float config."""
    work_dir = tmp_path_factory.mktemp(request.param)
    assert main([
        tiny.config, tiny.checkpoint, '--scope', request.param, '--work-dir',
        str(work_dir), *SHORT
    ]) == 0
    return work_dir


def report(work_dir, name='result.json'):
    return json.loads((work_dir / name).read_text())


def test_every_site_of_the_backbone_ran_quantized(done):
    result = report(done)
    assert result['float']['box_ap'] > .5
    assert result['quantized']['box_ap'] is not None
    assert [unit['name'] for unit in result['units']
            ] == ['patch_embed', 'blocks.0', 'blocks.1', 'blocks.2']
    sites = [
        site for site in result['sites']
        if site['name'].startswith('backbone.')
    ]
    assert len(sites) == 3 * (4 * 2 + 4) + 2
    assert all(site['num_calls'] for site in sites)
    kept = [module['type'] for module in result['float_modules']]
    assert 'ConvTranspose2d' in kept


def test_the_packed_file_is_the_model_that_was_scored(done, tiny, tmp_path,
                                                      monkeypatch):
    config = str(done / 'tiny.py')
    model = init_detector(config, str(done / 'packed.pth'), device='cpu')
    assert isinstance(model.backbone, QuantDeiT)
    monkeypatch.setattr(sys, 'argv', [
        str(TEST_TOOL), config,
        str(done / 'packed.pth'), '--work-dir',
        str(tmp_path), '--out',
        str(tmp_path / 'out.pkl')
    ])
    runpy.run_path(str(TEST_TOOL), run_name='__main__')
    assert load(tmp_path / 'out.pkl')
    metrics = load(next(tmp_path.glob('*/*.json')))
    quantized = report(done)['quantized']
    assert metrics['coco/bbox_mAP'] == quantized['metrics']['coco/bbox_mAP']
    assert metrics['coco/segm_mAP'] == quantized['metrics']['coco/segm_mAP']
    # A float config takes bits and scope from the file.
    assert main(
        [tiny.config,
         str(done / 'packed.pth'), '--work-dir',
         str(tmp_path)]) == 0
    again = report(tmp_path, 'result_packed.json')
    assert again['quantized']['metrics'] == quantized['metrics']


@pytest.mark.slow
def test_a_run_elsewhere_ends_with_the_same_codes(done, tiny, tmp_path):
    first = torch.load(done / 'packed.pth', weights_only=True)
    argv = [
        tiny.config, tiny.checkpoint, '--scope', first['quant']['scope'],
        '--work-dir',
        str(tmp_path), '--no-float-eval', *SHORT
    ]
    assert main(argv) == 0
    assert same_file_state(done / 'packed.pth', tmp_path / 'packed.pth')
