"""Any of MMDetection's detectors with a supported backbone goes in."""
import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import mmdet
import pytest
import torch
from mmdet.apis import init_detector
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.fileio import load
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isvit_det.commands.quantize_det import main
from isvit_det.core.layers import QuantConv2d, QuantLinear, QuantMatMul
from isvit_det.detector import float_modules
from isvit_det.packed.header import read_header
from tests.engine.shrunk import (DINO, DYHEAD, MASK2FORMER, MASK_RCNN,
                                 RETINANET, Shrunk, draw_coco, make_shrunk)
from tests.engine.tiny import NUM_PICTURES, REPO, same_file_state
from tests.marks import slow

TEST_TOOL = Path(mmdet.__path__[0]) / '.mim/tools/test.py'
MINMAX = ['--bits', 'w6a6', '--calib-images', '2', '--method', 'minmax']
SHORT = ['--bits', 'w6a6', '--calib-images', '2', '--iters', '1']
# Detector, scope, arguments.
RUNS: Dict[str, tuple] = {
    'retinanet-backbone': (RETINANET, 'backbone', MINMAX),
    'retinanet': (RETINANET, 'detector', SHORT),
    'mask2former': (MASK2FORMER, 'detector', SHORT),
    'dino': (DINO, 'detector', SHORT),
    'dyhead': (DYHEAD, 'detector', MINMAX),
}
# Classes of what stays in float outside of the backbone, by run.
ATTENTION = {'MultiheadAttention', 'Linear'}
KEPT = {
    'retinanet-backbone': {'Conv2d'},
    'retinanet': set(),
    'mask2former':
    {'MultiScaleDeformableAttention', 'Mask2FormerHead', *ATTENTION},
    'dino': {'MultiScaleDeformableAttention', *ATTENTION},
    'dyhead': {'ModulatedDeformConv2d'},
}


class Done(NamedTuple):
    """A run: its name, its detector, and what it left."""
    name: str
    source: Shrunk
    work_dir: Path
    report: Dict[str, Any]

    @property
    def config(self) -> str:
        return str(self.work_dir / self.source.name.split('/')[-1])

    @property
    def packed(self) -> str:
        return str(self.work_dir / 'packed.pth')


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return draw_coco(tmp_path_factory.mktemp('coco') / 'data')


@pytest.fixture(scope='module')
def finish(coco, tmp_path_factory):
    """Quantize one of the detectors, once."""

    @functools.lru_cache(maxsize=None)
    def finish_once(name):
        source, scope, argv = RUNS[name]
        work_dir = tmp_path_factory.mktemp(name)
        shrunk = make_shrunk(source, coco, work_dir)
        assert quantize(shrunk.words(), work_dir, scope, argv) == 0
        return Done(name, shrunk, work_dir, read(work_dir / 'result.json'))

    return finish_once


@pytest.fixture(
    scope='module',
    params=[slow(name) if name == 'dino' else name for name in RUNS])
def done(request, finish):
    return finish(request.param)


def quantize(words, work_dir, scope, argv):
    return main([*words, '--scope', scope, '--work-dir', str(work_dir), *argv])


def read(path):
    return json.loads(path.read_text())


def test_both_models_are_scored(done):
    before, after = done.report['float'], done.report['quantized']
    assert 0 < after['box_ap'] < before['box_ap']
    assert before['box_ap'] > .9
    has_masks = done.name == 'mask2former'
    assert (before['mask_ap'] is not None) == has_masks
    assert (after['mask_ap'] is not None) == has_masks


def test_every_site_ran(done):
    sites = done.report['sites']
    assert all(site['num_calls'] >= NUM_PICTURES['val'] for site in sites)
    inside = [site['name'].startswith('backbone.') for site in sites]
    # Patch embedding, four blocks of six layers and products, three mergings.
    assert sum(inside) == 2 * (1 + 4 * 6 + 3)
    assert all(inside) == (RUNS[done.name][1] == 'backbone')


def test_what_stays_in_float_is_listed(done):
    kept = done.report['float_modules']
    assert {module['type'] for module in kept} == KEPT[done.name]
    assert not any(m['name'].startswith('backbone.') for m in kept)


def test_what_was_turned_back_is_named_everywhere(done):
    layers = done.report['float_layers']
    kept = {m['name']: m['type'] for m in done.report['float_modules']}
    turned_back = {
        name
        for name, kind in kept.items()
        if kind in ('Linear', 'Conv2d') and RUNS[done.name][1] == 'detector'
    }
    assert layers.keys() == turned_back
    assert bool(layers) == (done.name in ('mask2former', 'dino'))
    content = torch.load(done.packed, weights_only=True)
    assert read_header(content['state_dict'])['float_layers'] == layers
    assert Config.fromfile(done.config).model.get('float_layers', {}) == layers


class Multiplications(TorchDispatchMode):
    """Collects the modules in whose forward matrices are multiplied."""
    packets = {
        getattr(torch.ops.aten, name)
        for name in ('mm', 'addmm', 'bmm', 'baddbmm', 'convolution')
    }

    def __init__(self) -> None:
        super().__init__()
        self.running: List[nn.Module] = []
        self.found: List[nn.Module] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.packets:
            self.found.append(self.running[-1])
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        hooks = nn.modules.module
        self.handles = [
            hooks.register_module_forward_pre_hook(
                lambda module, _: self.running.append(module)),
            hooks.register_module_forward_hook(self.leave)
        ]
        return super().__enter__()

    def leave(self, module, inputs, output):
        assert self.running.pop() is module

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)


def test_whatever_multiplies_is_quantized_or_listed(done):
    model = init_detector(done.config, done.packed, device='cpu')
    dataset = DATASETS.build(model.cfg.test_dataloader.dataset)
    with torch.no_grad(), Multiplications() as seen:
        model.test_step(pseudo_collate([dataset[0]]))
    names = {module: name for name, module in model.named_modules()}
    assert len(seen.found) > 30
    listed = {name for name, _ in float_modules(model)}
    quantized = QuantLinear, QuantConv2d, QuantMatMul
    assert not [
        names[module] for module in seen.found
        if not isinstance(module, quantized) and names[module] not in listed
    ]


def test_the_packed_file_gives_the_same_ap(done, tmp_path):
    assert main([*done.source.words(done.packed), '--work-dir',
                 str(tmp_path)]) == 0
    again = read(tmp_path / 'result_packed.json')
    assert again['quantized'] == done.report['quantized']
    assert again['float_modules'] == done.report['float_modules']


def run_test_tool(done, folder, *argv):
    """MMDetection's tools/test.py from a folder; its metrics."""
    words = [
        str(TEST_TOOL), done.config, done.packed, '--work-dir', 'out', *argv
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', words)
        runpy.run_path(str(TEST_TOOL), run_name='__main__')
    metrics, = folder.glob('out/*/2*.json')
    return load(metrics)


def pictures(folder):
    return list(folder.glob('out/*/shown/*.png'))


def test_mmdets_test_tool_gives_the_same_ap_and_draws(done, tmp_path):
    metrics = run_test_tool(done, tmp_path, '--show-dir', 'shown')
    expected = done.report['quantized']['metrics']
    assert {key: metrics[key] for key in expected} == expected
    assert len(pictures(tmp_path)) == NUM_PICTURES['val']


def test_augmentation_at_test_time_is_for_boxes_only(done, tmp_path):
    if done.name == 'mask2former':
        with pytest.raises(AssertionError, match='TTA of instance segm'):
            run_test_tool(done, tmp_path, '--tta')
    else:
        metrics = run_test_tool(done, tmp_path, '--tta')
        assert metrics['coco/bbox_mAP'] > 0
        plain = done.report['quantized']['metrics']
        assert metrics['coco/bbox_mAP'] != plain['coco/bbox_mAP']


ELSEWHERE = """
import runpy, sys
from mmdet.apis import DetInferencer, inference_detector, init_detector
config, packed, picture, tool = sys.argv[1:]
model = init_detector(config, packed, device='cpu')
found = inference_detector(model, picture).pred_instances
infer = DetInferencer(config, packed, device='cpu', show_progress=False)
shown = infer(picture, out_dir='vis', pred_score_thr=0.)['predictions'][0]
assert shown['bboxes'] == found.bboxes.tolist()
assert shown['scores'] == found.scores.tolist() != []
sys.argv = [tool, config, packed, '--work-dir', 'out', '--tta', '--show-dir',
            'shown']
runpy.run_path(tool, run_name='__main__')
"""


@pytest.mark.slow
def test_mmdets_tools_need_our_package_installed_and_nothing_more(
        coco, finish, tmp_path):
    """Without custom_imports, and from another directory."""
    retinanet = finish('retinanet')
    picture = next((coco / 'val').iterdir())
    process = subprocess.run([
        sys.executable, '-c', ELSEWHERE, retinanet.config, retinanet.packed,
        picture, TEST_TOOL
    ],
                             cwd=tmp_path,
                             env=dict(os.environ, PYTHONPATH=str(REPO)),
                             capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'vis/vis' / picture.name).exists()
    assert len(pictures(tmp_path)) == NUM_PICTURES['val']
    metrics, = tmp_path.glob('out/*/2*.json')
    assert load(metrics)['coco/bbox_mAP'] > 0


@pytest.mark.slow
def test_settings_of_training_change_nothing(coco, tmp_path):
    """And nobody asks for the weights that training starts from."""
    source = make_shrunk(MASK_RCNN, coco, tmp_path)
    plain = quantize(
        source._replace(
            options={
                **source.options, 'model.backbone.convert_weights': False,
                'model.backbone.init_cfg': None
            }).words(), tmp_path / 'plain', 'detector', SHORT)
    frozen = quantize(
        source._replace(
            options={
                **source.options, 'model.backbone.frozen_stages': 2,
                'model.backbone.with_cp': True,
                'model.backbone.init_cfg.checkpoint': 'http://localhost:9/a'
            }).words(), tmp_path / 'frozen', 'detector', SHORT)
    assert plain == frozen == 0
    first, second = (
        read(tmp_path / name / 'result.json') for name in ('plain', 'frozen'))
    assert 0 < second['quantized']['mask_ap'] < second['float']['mask_ap']
    assert second['quantized'] == first['quantized']
    assert same_file_state(tmp_path / 'plain/packed.pth',
                           tmp_path / 'frozen/packed.pth')
    done = Done('mask-rcnn', source, tmp_path / 'frozen', second)
    assert 'frozen_stages=2' in Path(done.config).read_text()
    run_test_tool(done, tmp_path, '--show-dir', 'shown')
    assert len(pictures(tmp_path)) == NUM_PICTURES['val']
