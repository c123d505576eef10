"""What a calibrated transformer block computes, for the kernels."""
import dataclasses
from dataclasses import dataclass
from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from isvit_det.core.layers import QuantLinear
from isvit_det.runtime.packing import BLOCK
from isvit_det.runtime.plan import (InputCodes, LayerPlan, Unsupported,
                                    plan_layer)
from isvit_det.runtime.steps import (GeluCodes, Steps, attention_steps,
                                     gelu_codes)

Order = Union[slice, Tensor]
# What the kernels have memory for.
MAX_HEAD = 256


@dataclass(frozen=True)
class NormPlan:
    """LayerNorm: weight and bias (C,), float32, and what is added to the
    variance."""
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class BlockPlan:
    """A transformer block, see ``isvit_block`` of csrc/blocks.h.

    Attributes:
        heads: their number.
        window: height and width of a window; 0 where all tokens of a map
            attend to each other.
        shift: of the windows, down and to the right.
        norm1, norm2: the norms before attention and MLP.
        query, key, value, proj, fc1, fc2: layers with the codes of their
            inputs.
        query_codes: codes of the query layer's outputs; their scale is that
            of queries before they are scaled.
        key_codes, value_codes: of the other layers' outputs.
        fc2_codes: of what GELU makes of the outputs of ``fc1``.
        padding: codes of a padding token, uint8, shape (C,).
        logit_scale: of products of query and key codes.
        attention: steps of a probability.
        position_bias: added to the logits, float32, shape (heads, N, N); None
            for none.
        relative_positions: decomposed ones by row and by column, each
            (2 L - 1, C / heads) for some L; None for none.
    """
    heads: int
    window: int
    shift: int
    norm1: NormPlan
    norm2: NormPlan
    query: LayerPlan
    key: LayerPlan
    value: LayerPlan
    proj: LayerPlan
    fc1: LayerPlan
    fc2: LayerPlan
    query_codes: InputCodes
    key_codes: InputCodes
    value_codes: InputCodes
    fc2_codes: GeluCodes
    padding: Tensor
    logit_scale: float
    attention: Steps
    position_bias: Optional[Tensor] = None
    relative_positions: Optional[Tuple[Tensor, Tensor]] = None

    @property
    def key_center(self) -> int:
        """What is taken off the codes of keys before they are multiplied.

        Products with ``code - zero point`` are the simulation's; where the
        zero point is no code, they differ by what is equal for all keys of
        a query, and softmax is the same.
        """
        return min(max(self.key_codes.zero_point, 0), self.key_codes.top)


@dataclass(frozen=True)
class BlockParts:
    """The modules of a block, whatever its backbone calls them.

    Attributes:
        norm1, norm2: the norms before attention and MLP.
        qkv, proj, fc1, fc2: each a layer and its name in the block.
        query_key, attention_value: the ``QuantMatMul`` of queries and keys
            and of attention and values.
        heads: their number.
        scale: of the queries.
        padding: value of a padding token after the norm, shape (C,); None
            where there is no padding.
    """
    norm1: nn.Module
    norm2: nn.Module
    qkv: Tuple[str, Any]
    proj: Tuple[str, Any]
    fc1: Tuple[str, Any]
    fc2: Tuple[str, Any]
    query_key: Any
    attention_value: Any
    heads: int
    scale: float
    padding: Optional[Tensor]


def plan_parts(parts: BlockParts, **more: Any) -> BlockPlan:
    """Plan of a block.

    Args:
        parts: its calibrated modules.
        **more: the other attributes of ``BlockPlan``.

    Raises:
        Unsupported: if the kernels cannot run it, with the reason.
    """
    qkv = plan_named(*parts.qkv)
    channels = len(qkv.weight) // 3
    width = channels // parts.heads
    if channels % BLOCK or width % 4 or width > MAX_HEAD:
        raise Unsupported(f'it has {channels} channels and heads of {width}; '
                          f'they are to be multiples of {BLOCK} and 4, and '
                          f'heads no wider than {MAX_HEAD}')
    query, key, value = (_rows(qkv, i * channels, channels) for i in range(3))
    query_codes = InputCodes.of(parts.query_key.left_quantizer)
    key_codes = InputCodes.of(parts.query_key.right_quantizer)
    value_codes = InputCodes.of(parts.attention_value.right_quantizer)
    if abs(query_codes.zero_point) * width * 255 >= 2**30:
        raise Unsupported(f'the zero point {query_codes.zero_point} of its '
                          'queries is too large')
    if not parts.scale > 0:
        raise Unsupported(f'its queries are scaled by {parts.scale}')
    padding = torch.zeros(channels, dtype=torch.uint8)
    if parts.padding is not None:
        quantizer = parts.qkv[1].input_quantizer
        padding = qkv.input.stored(quantizer.encode(parts.padding))
    fc2 = plan_named(*parts.fc2)
    return BlockPlan(
        heads=parts.heads,
        norm1=plan_norm(parts.norm1),
        norm2=plan_norm(parts.norm2),
        query=query,
        key=key,
        value=value,
        proj=plan_named(*parts.proj),
        fc1=plan_named(*parts.fc1),
        fc2=fc2,
        query_codes=dataclasses.replace(
            query_codes, scale=query_codes.scale / parts.scale),
        key_codes=key_codes,
        value_codes=value_codes,
        fc2_codes=gelu_codes(fc2.input),
        padding=padding,
        logit_scale=query_codes.scale * key_codes.scale,
        attention=attention_steps(parts.attention_value.left_quantizer),
        **more)


def plan_named(name: str, layer: Any) -> LayerPlan:
    """Plan of an inner layer; an error says which it is."""
    if not isinstance(layer, QuantLinear):
        raise Unsupported(f'{name} is not quantized')
    try:
        return plan_layer(layer)
    except Unsupported as error:
        raise Unsupported(f'{name}: {error}') from error


def is_gelu(module: Any) -> bool:
    """Whether a module is the exact GELU."""
    return type(module) is nn.GELU and module.approximate == 'none'


def _rows(plan: LayerPlan, first: int, count: int) -> LayerPlan:
    """A layer with some of the outputs."""
    rows = slice(first, first + count)
    return dataclasses.replace(
        plan,
        weight=plan.weight[rows],
        scale=plan.scale[rows],
        bias=plan.bias[rows])


def plan_norm(norm: Any, order: Order = slice(None)) -> NormPlan:
    """Plan of a norm, whose channels are taken in an order.

    Raises:
        Unsupported: if it is no LayerNorm with weight and bias.
    """
    if type(norm) is not nn.LayerNorm or norm.bias is None:
        raise Unsupported(f'its norm is {norm}')
    with torch.no_grad():
        weight, bias = (
            values[order].float().clone()
            for values in (norm.weight, norm.bias))
    return NormPlan(weight, bias, norm.eps)
