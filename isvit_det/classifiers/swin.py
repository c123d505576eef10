"""Quantized versions of timm's Swin classifiers, on MMDetection's Swin."""
import re
from typing import Any

from mmdet.models.backbones.swin import swin_converter
from torch import nn

from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.classifiers.head import ClassifierHead, QuantClassifier
from isvit_det.core.settings import QuantConfig


def quantize_swin(source: Any, config: QuantConfig) -> QuantClassifier:
    """Build the quantized version of a timm ``SwinTransformer``.

    Args:
        source: with the same window size in all stages.
        config: bits and quantizers.
    """
    blocks = [stage.blocks for stage in source.layers]
    first = blocks[0][0]
    backbone = QuantSwinTransformer(
        embed_dims=source.patch_embed.proj.out_channels,
        depths=[len(stage) for stage in blocks],
        num_heads=[stage[0].attn.num_heads for stage in blocks],
        window_size=first.window_size[0],
        patch_size=source.patch_embed.patch_size[0],
        strides=(source.patch_embed.patch_size[0], 2, 2, 2),
        mlp_ratio=first.mlp.fc1.out_features // first.mlp.fc1.in_features,
        qkv_bias=first.attn.qkv.bias is not None,
        out_indices=(),
        quant=config)
    weights = {
        _at_end_of_stage(key): value
        for key, value in source.state_dict().items()
        if not key.startswith(('norm.', 'head.'))
    }
    weights = {
        key[len('backbone.'):]: value
        for key, value in swin_converter(weights).items()
    }
    backbone.load_state_dict(weights, strict=False)
    for stage, others in zip(backbone.stages, blocks):
        for block, other in zip(stage.blocks, others):
            # Unlike MMDetection, timm does not shift a map of one window.
            block.attn.shift_size = other.shift_size[0]
    head = ClassifierHead([source.head.fc], source.head.global_pool.pool_type,
                          0, source.norm, nn.Identity(), config)
    return QuantClassifier(backbone, head, config)


def _at_end_of_stage(key: str) -> str:
    """timm merges patches at the start of a stage, the original at its end."""
    return re.sub(r'layers\.(\d+)\.downsample',
                  lambda match: f'layers.{int(match[1]) - 1}.downsample', key)
