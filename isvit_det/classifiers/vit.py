"""Quantized versions of timm's ViT and DeiT classifiers."""
from typing import Any

from torch import nn

from isvit_det.backbones.quant_vit import QuantVisionTransformer
from isvit_det.backbones.vit_weights import fit_weights
from isvit_det.classifiers.head import ClassifierHead, QuantClassifier
from isvit_det.core.settings import QuantConfig


def quantize_vit(source: Any, config: QuantConfig) -> QuantClassifier:
    """Build the quantized version of a timm ``VisionTransformer``.

    Args:
        source: plain or distilled, with class token or mean pooling. Other
            parts of it are ignored.
        config: bits and quantizers.
    """
    block = source.blocks[0]
    backbone = QuantVisionTransformer(
        arch=dict(
            embed_dims=source.embed_dim,
            depth=len(source.blocks),
            num_heads=block.attn.num_heads),
        patch_size=source.patch_embed.patch_size[0],
        pretrain_img_size=source.patch_embed.img_size[0],
        num_prefix_tokens=source.num_prefix_tokens,
        mlp_ratio=block.mlp.fc1.out_features / source.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=not isinstance(block.ls1, nn.Identity),
        final_norm=False,
        quant=config)
    weights = fit_weights(source.state_dict(), backbone)
    backbone.load_state_dict(weights, strict=False)
    linears = [source.head]
    if hasattr(source, 'head_dist'):
        linears.append(source.head_dist)
    head = ClassifierHead(linears, source.global_pool,
                          source.num_prefix_tokens, source.norm,
                          getattr(source, 'fc_norm', nn.Identity()), config)
    return QuantClassifier(backbone, head, config)
