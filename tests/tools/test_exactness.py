"""A packed file computes what was calibrated, tensor by tensor.

On drawn data always; at full size on a COCO folder that COCO_ROOT names.
"""
import json
import os
from pathlib import Path

import pytest
import torch
from mmdet.apis import init_detector
from mmdet.structures.bbox import bbox2roi
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from isvit_det.commands.quantize_det import configure, parse_args
from isvit_det.engine.run import QuantizationRun
from isvit_det.registry import MODELS
from tests.engine.tiny import FLOAT_DEIT, REPO, make_tiny
from tests.marks import slow

COCO_ROOT = os.getenv('COCO_ROOT')
OURS = 'configs/isvit/mask-rcnn_swin-t-p4-w7_fpn_isvit-w4a4_coco.py'
FLOAT = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'


def drawn(folder, **kwargs):
    """Arguments of the tool for a tiny detector on tiny drawn data."""
    tiny = make_tiny(folder, **kwargs)
    return [
        tiny.config, tiny.checkpoint, '--calib-images', '5', '--iters', '3'
    ]


def drawn_deit(folder):
    """The same with a DeiT."""
    return drawn(folder, float_config=FLOAT_DEIT)


def coco(folder):
    """Arguments for Swin-T at 800x1333 with fixed random weights."""
    if not COCO_ROOT:
        pytest.skip('COCO_ROOT is not set: give a COCO 2017 folder')
    init_default_scope('mmdet')
    cfg = get_config(FLOAT)
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), folder / 'float.pth')
    root = str(Path(COCO_ROOT).resolve()) + os.sep
    (folder / 'val.json').write_text(
        first_images(root + 'annotations/instances_val2017.json', 8))
    options = {
        'train_dataloader.dataset.data_root': root,
        'test_dataloader.dataset.data_root': root,
        'test_dataloader.dataset.ann_file': folder / 'val.json',
        'test_evaluator.ann_file': folder / 'val.json',
        'test_dataloader.num_workers': 0,
        'test_dataloader.persistent_workers': False,
    }
    return [
        str(REPO / OURS),
        str(folder / 'float.pth'), '--calib-images', '16', '--iters', '10',
        '--cfg-options', *(f'{key}={value}' for key, value in options.items())
    ]


def first_images(path, num):
    """A COCO file cut to its first images."""
    content = json.loads(Path(path).read_text())
    content['images'] = content['images'][:num]
    kept = {image['id'] for image in content['images']}
    content['annotations'] = [
        one for one in content['annotations'] if one['image_id'] in kept
    ]
    return json.dumps(content)


@pytest.fixture(
    scope='module',
    params=[drawn, drawn_deit,
            pytest.param(coco, marks=pytest.mark.slow)])
def argv(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp('data'))


def outputs(model, image):
    """Every tensor between the image and the detections, by name."""
    maps = model.backbone(image)
    levels = model.neck(maps)
    scores, deltas = model.rpn_head(levels)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(20, 2, generator=generator)
    corners = corners * torch.tensor([image.shape[-1], image.shape[-2]]) * .7
    sides = 8 + 100 * torch.rand(20, 2, generator=generator)
    rois = bbox2roi([torch.cat([corners, corners + sides], 1)])
    boxes = model.roi_head._bbox_forward(levels, rois)
    masks = model.roi_head._mask_forward(levels, rois)
    found = dict(
        classes=boxes['cls_score'],
        boxes=boxes['bbox_pred'],
        masks=masks['mask_preds'])
    for name, several in dict(
            backbone=maps, neck=levels, scores=scores, deltas=deltas).items():
        for index, value in enumerate(several):
            found[f'{name}.{index}'] = value
    return found


@pytest.mark.parametrize('scope', [slow('backbone'), 'detector'])
def test_packed_and_calibrated_agree_on_every_tensor(argv, scope, tmp_path,
                                                     capsys):
    args = parse_args([
        argv[0], argv[1], '--scope', scope, '--no-float-eval', '--work-dir',
        str(tmp_path), *argv[2:]
    ])
    run = QuantizationRun(configure(args))
    result = run.run(float_eval=False)
    cfg = run.runner.cfg
    model = init_detector(cfg, str(run.packed), device='cpu')
    compared = 0
    with torch.no_grad():
        for batch in run.loader:
            image = model.data_preprocessor(batch, False)['inputs']
            one, other = outputs(run.model, image), outputs(model, image)
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert torch.equal(value, other[name]), name
                assert value.unique().numel() > 1, name
                compared += 1
            if compared > 40:
                break
    seconds = [unit['seconds'] for unit in result['units']]
    with capsys.disabled():
        print(f'\n{scope}: {compared} tensors equal; {len(seconds)} units, '
              f'{sum(seconds) / len(seconds):.1f} s each; calibration '
              f'{result["seconds"]["calibration"]:.0f} s, peak '
              f'{result["peak_memory"]["host"] / 1e9:.1f} GB')
