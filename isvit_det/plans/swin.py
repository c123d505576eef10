"""Description of a calibrated Swin block or patch merging."""
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Tuple

import torch
from mmdet.models.backbones.swin import SwinBlock
from mmdet.models.layers import PatchMerging
from torch import Tensor, nn
from torch.nn import functional as F

from isvit_det.backbones.swin import QuantShiftWindowMSA, QuantWindowMSA
from isvit_det.plans.block import (BlockParts, BlockPlan, NormPlan, is_gelu,
                                   plan_named, plan_norm, plan_parts)
from isvit_det.plans.layer import LayerPlan, Unsupported


def plan_swin_block(block: SwinBlock) -> BlockPlan:
    """Describe a calibrated block.

    Raises:
        Unsupported: if the block is not as described, with the reason.
    """
    attn = block.attn
    if type(block) is not SwinBlock or not (
            isinstance(attn, QuantShiftWindowMSA)
            and isinstance(attn.w_msa, QuantWindowMSA)):
        raise Unsupported('it is not a Swin block as MMDetection builds it')
    fc1, fc2 = _mlp(block.ffn)
    msa = attn.w_msa
    parts = BlockParts(block.norm1, block.norm2, ('attn.w_msa.qkv', msa.qkv),
                       ('attn.w_msa.proj', msa.proj), ('ffn.layers.0.0', fc1),
                       ('ffn.layers.1', fc2), msa.query_key,
                       msa.attention_value, msa.num_heads, msa.scale,
                       attn.padding_value)
    return plan_parts(
        parts,
        window=attn.window_size,
        shift=attn.shift_size,
        position_bias=_position_bias(msa))


def _mlp(ffn: Any) -> Tuple[Any, Any]:
    """The two layers of an MLP, between which there is only a GELU."""
    layers = ffn.layers
    if not (len(layers) == 3 and len(layers[0]) == 3 and ffn.add_identity
            and isinstance(getattr(ffn, 'gamma2', nn.Identity()), nn.Identity)
            and is_gelu(layers[0][1])):
        raise Unsupported('its MLP is more than two layers with GELU')
    return layers[0][0], layers[1]


def _position_bias(msa: QuantWindowMSA) -> Tensor:
    with torch.no_grad():
        bias = F.embedding(msa.relative_position_index,
                           msa.relative_position_bias_table)
        return bias.permute(2, 0, 1).float()


@dataclass(frozen=True)
class MergingPlan:
    """Patch merging.

    Attributes:
        norm: of the concatenated tokens of a patch.
        reduction: the linear layer, with inputs in the same order.
        kernel: height and width of a patch in tokens.
        stride: distance between patches, downwards and to the right.
    """
    norm: NormPlan
    reduction: LayerPlan
    kernel: Tuple[int, int]
    stride: Tuple[int, int]


def plan_merging(merging: PatchMerging) -> MergingPlan:
    """Describe a calibrated patch merging.

    Raises:
        Unsupported: if it is not as described, with the reason.
    """
    sampler = merging.sampler
    if (type(merging) is not PatchMerging or merging.adap_padding is None
            or merging.adap_padding.padding != 'corner'
            or tuple(sampler.dilation) != (1, 1)):
        raise Unsupported('it is not a patch merging as Swin has it')
    plan = plan_named('reduction', merging.reduction)
    kernel = (int(sampler.kernel_size[0]), int(sampler.kernel_size[1]))
    positions = kernel[0] * kernel[1]
    inputs = plan.weight.shape[1]
    # nn.Unfold puts the tokens of each channel side by side, a gathered patch
    # has the channels of each token side by side.
    order = torch.arange(inputs).view(-1, positions).t().flatten()
    return MergingPlan(
        plan_norm(merging.norm, order),
        dataclasses.replace(plan, weight=plan.weight[:, order].contiguous()),
        kernel, (int(sampler.stride[0]), int(sampler.stride[1])))


@functools.lru_cache(maxsize=256)
def merged_tokens(size: Tuple[int, int], kernel: Tuple[int, int],
                  stride: Tuple[int, int]) -> Tuple[Tensor, Tuple[int, int]]:
    """Indices of the tokens of each patch, and the grid of patches.

    The indices are int32, shape (patches, kernel height * width); padding at
    the right and the bottom has the index ``H * W``.
    """
    grid = (-(-size[0] // stride[0]), -(-size[1] // stride[1]))
    index = torch.arange(size[0] * size[1], dtype=torch.int32).view(*size)
    bottom, right = (max(
        (number - 1) * step + reach - length,
        0) for number, step, reach, length in zip(grid, stride, kernel, size))
    index = F.pad(index, (0, right, 0, bottom), value=size[0] * size[1])
    patches = index.unfold(0, kernel[0],
                           stride[0]).unfold(1, kernel[1], stride[1])
    return patches.reshape(grid[0] * grid[1], -1).contiguous(), grid
