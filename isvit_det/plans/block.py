"""Description of a calibrated transformer block in integers."""
import dataclasses
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from isvit_det.core.layers import QuantLinear
from isvit_det.core.quantizers import Quantizer
from isvit_det.plans.layer import (InputCodes, LayerPlan, Unsupported,
                                   plan_layer)

Order = Union[slice, Tensor]


@dataclass(frozen=True)
class NormPlan:
    """A LayerNorm.

    Attributes:
        weight, bias: float32, shape (C,).
        eps: added to the variance.
    """
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class BlockPlan:
    """A transformer block.

    Attributes:
        names: names of the layers ``qkv``, ``proj``, ``fc1`` and ``fc2``
            within the block.
        heads: number of heads.
        window: height and width of a window; 0 for global attention.
        shift: of the windows, downwards and to the right.
        norm1, norm2: the norms before attention and MLP.
        query, key, value, proj, fc1, fc2: the linear layers.
        query_codes: how the query layer's outputs are quantized. The scale is
            divided by the attention's own, since these outputs come before
            the multiplication by it.
        key_codes, value_codes: how the outputs of these layers are quantized.
        padding: codes of a padding token after ``norm1``, uint8, shape (C,).
        logit_scale: scale of integer products of queries and keys.
        attention: the quantizer of the probabilities.
        position_bias: added to the logits, float32, shape (heads, N, N) for N
            positions in a window; None if there is none.
        relative_positions: decomposed relative positions by row and by
            column, each of shape (2 L - 1, C / heads) for some L; None if
            there are none.
    """
    names: Mapping[str, str]
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
    padding: Tensor
    logit_scale: float
    attention: Quantizer
    position_bias: Optional[Tensor] = None
    relative_positions: Optional[Tuple[Tensor, Tensor]] = None

    @property
    def key_center(self) -> int:
        """Subtracted from the codes of keys before they are multiplied.

        This is the zero point if that is a code, and the nearest code
        otherwise. The choice changes the logits of a query by a constant, and
        therefore not their softmax; near the zero point, products are small.
        """
        return min(max(self.key_codes.zero_point, 0), self.key_codes.top)


@dataclass(frozen=True)
class BlockParts:
    """The modules of a block, independent of their names in a backbone.

    Attributes:
        norm1, norm2: the norms before attention and MLP.
        qkv, proj, fc1, fc2: name within the block and layer of each.
        query_key, attention_value: the ``QuantMatMul`` of queries and keys,
            and that of attention and values.
        heads: number of heads.
        scale: factor of the queries.
        padding: value of a padding token after ``norm1``, shape (C,); None if
            there is no padding.
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
    """Describe a block.

    Args:
        parts: the block's calibrated modules.
        **more: attributes of ``BlockPlan`` that these do not determine.

    Raises:
        Unsupported: if the block is not as described, with the reason.
    """
    qkv = plan_named(*parts.qkv)
    channels = len(qkv.weight) // 3
    width = channels // parts.heads
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
    layers = dict(qkv=parts.qkv, proj=parts.proj, fc1=parts.fc1, fc2=parts.fc2)
    return BlockPlan(
        names={
            key: name
            for key, (name, _) in layers.items()
        },
        heads=parts.heads,
        norm1=plan_norm(parts.norm1),
        norm2=plan_norm(parts.norm2),
        query=query,
        key=key,
        value=value,
        proj=plan_named(*parts.proj),
        fc1=plan_named(*parts.fc1),
        fc2=plan_named(*parts.fc2),
        query_codes=dataclasses.replace(
            query_codes, scale=query_codes.scale / parts.scale),
        key_codes=key_codes,
        value_codes=value_codes,
        padding=padding,
        logit_scale=query_codes.scale * key_codes.scale,
        attention=parts.attention_value.left_quantizer,
        **more)


def plan_named(name: str, layer: Any) -> LayerPlan:
    """Describe an inner layer; errors begin with its name."""
    if not isinstance(layer, QuantLinear):
        raise Unsupported(f'{name} is not quantized')
    try:
        return plan_layer(layer)
    except Unsupported as error:
        raise Unsupported(f'{name}: {error}') from error


def is_gelu(module: Any) -> bool:
    """Whether a module is GELU without approximation."""
    return type(module) is nn.GELU and module.approximate == 'none'


def _rows(plan: LayerPlan, first: int, count: int) -> LayerPlan:
    """The layer of ``count`` outputs from ``first`` on."""
    rows = slice(first, first + count)
    return dataclasses.replace(
        plan,
        weight=plan.weight[rows],
        scale=plan.scale[rows],
        bias=plan.bias[rows])


def plan_norm(norm: Any, order: Order = slice(None)) -> NormPlan:
    """Describe a norm.

    Args:
        norm: the module.
        order: new order of its channels.

    Raises:
        Unsupported: if it is not a LayerNorm with weight and bias.
    """
    if type(norm) is not nn.LayerNorm or norm.bias is None:
        raise Unsupported(f'its norm is {norm}')
    with torch.no_grad():
        weight, bias = (
            values[order].float().clone()
            for values in (norm.weight, norm.bias))
    return NormPlan(weight, bias, norm.eps)
