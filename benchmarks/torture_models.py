"""A detector and a classifier so small that they can be killed often."""
import copy
import os
from pathlib import Path
from typing import Any, Callable, List, NamedTuple

import timm
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from timm.models import register_model
from timm.models.vision_transformer import _create_vision_transformer

from isvit_det.commands import quantize_cls, quantize_det
from isvit_det.datasets.drawn import generate

FLOAT = Path(__file__).parents[1] / (
    'configs/drawn/mask-rcnn_swin-mini_fpn_drawn.py')
CLASSIFIER = 'vit_torture_patch8_32'


class Task(NamedTuple):
    """A command that calibrates, as it is told what to do.

    Attributes:
        name: for people.
        main: of the command.
        argv: its arguments, the work directory aside.
    """
    name: str
    main: Callable[[List[str]], int]
    argv: List[str]

    def run(self, work_dir: Path, *more: str) -> int:
        """Do it in this process; the exit status."""
        return self.main([*self.argv, *more, '--work-dir', str(work_dir)])


@register_model
def vit_torture_patch8_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """A ViT of two blocks for images of 32 pixels."""
    overlay = dict(
        kwargs.pop('pretrained_cfg_overlay', None) or {},
        input_size=(3, 32, 32))
    return _create_vision_transformer(
        'vit_tiny_patch16_224',
        pretrained,
        pretrained_cfg_overlay=overlay,
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        **kwargs)


def make_detector(folder: Path,
                  num_train: int = 4,
                  scale: Any = (64, 48)) -> List[str]:
    """Write config, data and random weights; arguments that name them.

    Args:
        folder: to write to, unless it is there.
        num_train: pictures to calibrate on.
        scale: of the pictures, at most.
    """
    config, checkpoint = folder / 'tiny.py', folder / 'float.pth'
    generate(folder / 'data', dict(train=num_train, val=2))
    if not checkpoint.exists():
        cfg = Config.fromfile(str(FLOAT))
        _shrink_(cfg, folder / 'data', scale)
        cfg.dump(config)
        init_default_scope('mmdet')
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(cfg.model))
        model.init_weights()
        for value in model.parameters():
            value.data += .03 * torch.randn_like(value)
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
    return [str(config), str(checkpoint)]


def _shrink_(cfg: Config, data: Path, scale: Any) -> None:
    model, heads = cfg.model, cfg.model.roi_head
    model.backbone.update(embed_dims=16, depths=[1] * 4)
    model.neck.update(in_channels=[16, 32, 64, 128], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    for extractor in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        extractor.out_channels = 16
    heads.bbox_head.update(in_channels=16, fc_out_channels=32)
    heads.mask_head.update(num_convs=1, in_channels=16, conv_out_channels=16)
    model.test_cfg.rpn.update(nms_pre=20, max_per_img=10)
    model.test_cfg.rcnn.update(score_thr=0., max_per_img=5)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data) + os.sep
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = scale
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = str(
            data / 'annotations/instances_val.json')
    cfg.load_from = None


def make_classifier(folder: Path) -> List[str]:
    """Write data and random weights; arguments that name them."""
    weights = folder / 'weights.pth'
    generate(folder / 'data', dict(train=8, val=4))
    if not weights.exists():
        torch.manual_seed(0)
        model = timm.create_model(CLASSIFIER, num_classes=3)
        for value in model.parameters():
            value.data += .05 * torch.randn_like(value)
        torch.save(model.state_dict(), weights)
    return [
        CLASSIFIER, '--weights',
        str(weights), '--calib',
        str(folder / 'data/train'), '--val',
        str(folder / 'data/val'), '--device', 'cpu'
    ]


def detector_task(folder: Path, scope: str, processes: int = 1) -> Task:
    """``quantize_det`` in a scope, by one process or by several."""
    argv = make_detector(folder)
    argv += ['--scope', scope, '--iters', '2', '--calib-images', '2']
    if processes > 1:
        argv += ['--launcher', 'pytorch']
    return Task(f'quantize_det, scope {scope}', quantize_det.main, argv)


def classifier_task(folder: Path) -> Task:
    """``quantize_cls``."""
    argv = make_classifier(folder)
    argv += ['--iters', '8', '--calib-images', '6']
    return Task('quantize_cls', quantize_cls.main, argv)
