"""Data sets: own classes go in."""
import json

import torch
from mmdet.apis import init_detector

from isvit_det.commands.quantize_det import main
from isvit_det.datasets.drawing import CLASSES
from tests.engine.shrunk import RETINANET, Source, draw_coco, make_shrunk

OWN = CLASSES[4:7]
OWN_CONFIG = """
_base_ = {base!r}
dataset = dict(metainfo=dict(classes={classes!r}))
model = dict(bbox_head=dict(num_classes={num}))
train_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
"""


def test_classes_of_ones_own(tmp_path):
    data = draw_coco(tmp_path / 'data')
    for split in ('train', 'val'):
        drawn = data / f'annotations/instances_{split}.json'
        drawn.replace(drawn.with_name(f'instances_{split}2017.json'))
    config = tmp_path / 'own.py'
    config.write_text(
        OWN_CONFIG.format(base=RETINANET.name, classes=OWN, num=len(OWN)))
    source = make_shrunk(
        Source(str(config), RETINANET.options), data, tmp_path)
    work_dir = tmp_path / 'work'
    argv = ['--calib-images', '2', '--method', 'minmax', '--bits', 'w6a6']
    assert main([*source.words(), *argv, '--work-dir', str(work_dir)]) == 0
    result = json.loads((work_dir / 'result.json').read_text())
    assert 0 < result['quantized']['box_ap'] < result['float']['box_ap']
    packed = work_dir / 'packed.pth'
    meta = torch.load(packed, weights_only=True)['meta']['dataset_meta']
    assert tuple(meta['classes']) == OWN
    model = init_detector(str(work_dir / 'own.py'), str(packed), device='cpu')
    assert tuple(model.dataset_meta['classes']) == OWN
    again = tmp_path / 'again'
    assert main([*source.words(packed), '--work-dir', str(again)]) == 0
    again = json.loads((again / 'result_packed.json').read_text())
    assert again['quantized'] == result['quantized']
