"""A tiny detector on tiny drawn data, as config and files in a folder."""
import copy
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from pycocotools import mask as coco_mask

from isvit_det.commands.quantize_det import main
from isvit_det.datasets.drawn import generate
from isvit_det.packed.header import HEADER

REPO = Path(__file__).parents[2]
FLOAT = REPO / 'configs/drawn/mask-rcnn_swin-mini_fpn_drawn.py'
FLOAT_DEIT = REPO / 'configs/drawn/mask-rcnn_deit-mini_sfpn_drawn.py'
NUM_PICTURES = dict(train=6, val=4)
# Detections of the float model that become a picture's annotations.
NUM_OBJECTS = 12


class Tiny(NamedTuple):
    """Paths of a float config, of its checkpoint, and the data's root."""
    config: str
    checkpoint: str
    data: Path

    def variant(self, path: Path, change: Callable[[Config], Any]) -> str:
        """Write a changed copy of the config; its path."""
        cfg = Config.fromfile(self.config)
        change(cfg)
        cfg.dump(path)
        return str(path)


def make_tiny(folder: Path, seed: int = 0, float_config: Path = FLOAT) -> Tiny:
    """Write config, checkpoint and data of a detector into a folder."""
    data = folder / 'data'
    generate(data, NUM_PICTURES)
    cfg = Config.fromfile(str(float_config))
    shrink_(cfg, data)
    config = folder / 'tiny.py'
    cfg.dump(config)
    init_default_scope('mmdet')
    torch.manual_seed(seed)
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    model.init_weights()
    for value in model.parameters():
        value.data += .03 * torch.randn_like(value)
    annotate(model, cfg, data / 'annotations/instances_val.json')
    checkpoint = folder / 'float.pth'
    torch.save(
        dict(
            state_dict=model.state_dict(),
            meta=dict(dataset_meta=dict(classes=('a', 'b')))), checkpoint)
    return Tiny(str(config), str(checkpoint), data)


def shrink_(cfg: Config, data: Path) -> None:
    """Make everything about a drawn config small, in place."""
    root = str(data) + os.sep
    model = cfg.model
    if model.backbone.type == 'SwinTransformer':
        model.backbone.update(embed_dims=16, depths=[1] * 4)
        model.neck.update(in_channels=[16, 32, 64, 128], out_channels=16)
    else:
        model.backbone.update(
            arch=dict(embed_dims=32, depth=3, num_heads=2),
            window_size=4,
            global_blocks=[1])
        model.neck.update(in_channels=32, out_channels=16)
    model.backbone.drop_path_rate = .3
    model.rpn_head.update(in_channels=16, feat_channels=16)
    heads = model.roi_head
    heads.bbox_roi_extractor.out_channels = 16
    heads.bbox_head.update(in_channels=16, fc_out_channels=32)
    heads.mask_roi_extractor.out_channels = 16
    heads.mask_head.update(num_convs=1, in_channels=16, conv_out_channels=16)
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=30)
    model.test_cfg.rcnn.update(max_per_img=24)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = root
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = (96, 80)
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = str(
            data / 'annotations/instances_val.json')
    cfg.load_from = None


def annotate(model: Any, cfg: Config, path: Path) -> None:
    """Make what random weights detect the truth, so that AP means much."""
    dataset = DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset))
    annotations: List[Dict[str, Any]] = []
    for index in range(len(dataset)):
        batch = pseudo_collate([dataset[index]])
        with torch.no_grad():
            sample = model.test_step(batch)[0]
        found = sample.pred_instances[:NUM_OBJECTS]
        for place, box in enumerate(found.bboxes):
            left, top, right, bottom = box.tolist()
            annotation = dict(
                id=len(annotations) + 1,
                image_id=sample.img_id,
                category_id=dataset.cat_ids[found.labels[place]],
                bbox=[left, top, right - left, bottom - top],
                area=(right - left) * (bottom - top),
                iscrowd=0)
            if 'masks' in found:
                segment = coco_mask.encode(
                    np.asfortranarray(found.masks[place].numpy().astype(
                        np.uint8)))
                annotation['segmentation'] = dict(
                    size=segment['size'], counts=segment['counts'].decode())
            annotations.append(annotation)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(content, annotations=annotations)))


def same_file_state(one: Path, other: Path) -> bool:
    """Whether two packed files hold the same tensors.

    Their headers tell of what they were made from.
    """
    first, second = (
        torch.load(path, weights_only=True)['state_dict']
        for path in (one, other))
    for state in (first, second):
        del state[HEADER]
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first)


def pack_tiny(tiny, folder):
    """Path of a packed file of all of the detector, made in a folder."""
    assert main([
        tiny.config, tiny.checkpoint, '--scope', 'detector', '--method',
        'minmax', '--calib-images', '2', '--no-float-eval', '--work-dir',
        str(folder)
    ]) == 0
    return folder / 'packed.pth'
