"""Small classifiers under names of timm, and pictures for them."""
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import _create_swin_transformer

from benchmarks.torture_models import vit_torture_patch8_32

CLASSES = 3
SIZES = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
NAMES = ('vit_small_drawn_32', 'vit_small_drawn_mean_32', 'deit_drawn_32',
         'deit_drawn_distilled_32', 'swin_drawn_32')


@register_model
def vit_small_drawn_32(pretrained=False, **kwargs):
    """Under a name that no benchmark has."""
    return vit_torture_patch8_32(pretrained, **kwargs)


@register_model
def vit_small_drawn_mean_32(pretrained=False, **kwargs):
    return vit_small_drawn_32(
        pretrained, global_pool='avg', class_token=False, **kwargs)


@register_model
def deit_drawn_32(pretrained=False, **kwargs):
    """With layer scale, as DeiT-III has it."""
    return vit_small_drawn_32(pretrained, init_values=.5, **kwargs)


@register_model
def deit_drawn_distilled_32(pretrained=False, **kwargs):
    for key in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'):
        kwargs.pop(key, None)
    model = VisionTransformerDistilled(**SIZES, **kwargs)
    model.pretrained_cfg = dict(input_size=(3, 32, 32))
    return model


@register_model
def swin_drawn_32(pretrained=False, **kwargs):
    overlay = dict(
        kwargs.pop('pretrained_cfg_overlay', None) or {},
        input_size=(3, 32, 32))
    sizes = dict(
        img_size=32,
        patch_size=1,
        window_size=4,
        embed_dim=16,
        depths=(2, 1, 1, 1),
        num_heads=(1, 2, 2, 2))
    sizes.update(kwargs)
    return _create_swin_transformer(
        'swin_tiny_patch4_window7_224',
        pretrained,
        pretrained_cfg_overlay=overlay,
        **sizes)


def make_weights(name: str, path: Path) -> Any:
    """Write random weights of a classifier; the classifier."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    for param in model.parameters():
        param.data += torch.randn_like(param) * .2
    torch.save(dict(model=model.state_dict()), path)
    return model.eval()
