"""Description of a calibrated ViT block."""
import dataclasses
from typing import Any

import torch
from torch import nn

from isvit_det.backbones.vit_layers import Attention, Block, LayerScale
from isvit_det.core.layers import QuantMatMul
from isvit_det.plans.block import BlockParts, BlockPlan, is_gelu, plan_parts
from isvit_det.plans.layer import LayerPlan, Unsupported


def plan_vit_block(block: Block) -> BlockPlan:
    """Describe a calibrated block.

    Raises:
        Unsupported: if the block is not as described, with the reason.
    """
    attn, mlp = block.attn, block.mlp
    if (type(block) is not Block or type(attn) is not Attention
            or not isinstance(attn.query_key, QuantMatMul)):
        raise Unsupported('it is not a block of a quantized ViT')
    if not (is_gelu(mlp.act) and isinstance(mlp.norm, nn.Identity)):
        raise Unsupported('its MLP is more than two layers with GELU')
    parts = BlockParts(block.norm1, block.norm2, ('attn.qkv', attn.qkv),
                       ('attn.proj', attn.proj), ('mlp.fc1', mlp.fc1),
                       ('mlp.fc2', mlp.fc2), attn.query_key,
                       attn.attention_value, attn.num_heads, attn.scale,
                       block.padding_value if block.window_size else None)
    relative = None
    if attn.has_rel_pos:
        relative = (attn.rel_pos_h.detach(), attn.rel_pos_w.detach())
    plan = plan_parts(
        parts, window=block.window_size, shift=0, relative_positions=relative)
    return dataclasses.replace(
        plan,
        proj=_scaled(plan.proj, block.ls1),
        fc2=_scaled(plan.fc2, block.ls2))


def _scaled(plan: LayerPlan, layer_scale: Any) -> LayerPlan:
    """A layer whose scale and bias include the layer scale after it."""
    if isinstance(layer_scale, nn.Identity):
        return plan
    if type(layer_scale) is not LayerScale:
        raise Unsupported(f'its layer scale is {layer_scale}')
    with torch.no_grad():
        gamma = layer_scale.gamma.double()
    return dataclasses.replace(
        plan, scale=plan.scale * gamma, bias=plan.bias * gamma)
