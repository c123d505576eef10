"""What a calibrated Swin block or patch merging computes, for the kernels."""
import dataclasses
from dataclasses import dataclass
from typing import Any, Tuple, Union

import torch
from mmdet.models.backbones.swin import SwinBlock
from mmdet.models.layers import PatchMerging
from torch import Tensor, nn
from torch.nn import functional as F

from isvit_det.backbones.swin import QuantShiftWindowMSA, QuantWindowMSA
from isvit_det.core.layers import QuantLinear
from isvit_det.core.quantizers import Quantizer, UniformQuantizer
from isvit_det.runtime.packing import BLOCK
from isvit_det.runtime.plan import (InputCodes, LayerPlan, Unsupported,
                                    plan_layer)
from isvit_det.runtime.steps import (GeluCodes, Steps, attention_steps,
                                     gelu_codes)

# What the kernels have memory for.
MAX_HEAD = 256
# Stands for minus infinity where a window has no position.
NOWHERE = -1e30


@dataclass(frozen=True)
class NormPlan:
    """LayerNorm: weight and bias (C,), float32, and what is added to the
    variance."""
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class SwinBlockPlan:
    """A Swin block, see ``isvit_swin_block`` of csrc/swin.h.

    Attributes:
        heads: their number.
        window: height and width of a window.
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
        position_bias: float32, shape (heads, N, N filled up to whole blocks).
        attention: steps of a probability.
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
    position_bias: Tensor
    attention: Steps

    @property
    def key_center(self) -> int:
        """What is taken off the codes of keys before they are multiplied.

        Products with ``code - zero point`` are the simulation's; where the
        zero point is no code, they differ by what is equal for all keys of
        a query, and softmax is the same.
        """
        return min(max(self.key_codes.zero_point, 0), self.key_codes.top)


def plan_block(block: SwinBlock) -> SwinBlockPlan:
    """Plan of a calibrated block.

    Raises:
        Unsupported: if the kernels cannot run it, with the reason.
    """
    attn, ffn = block.attn, block.ffn
    if type(block) is not SwinBlock or not (
            isinstance(attn, QuantShiftWindowMSA)
            and isinstance(attn.w_msa, QuantWindowMSA)):
        raise Unsupported('it is no Swin block as mmdet builds it')
    fc1, fc2 = _mlp(ffn)
    msa = attn.w_msa
    channels = msa.embed_dims
    width = channels // msa.num_heads
    if channels % BLOCK or width % 4 or width > MAX_HEAD:
        raise Unsupported(f'it has {channels} channels and heads of {width}; '
                          f'they are to be multiples of {BLOCK} and 4, and '
                          f'heads no wider than {MAX_HEAD}')
    qkv = _named('attn.w_msa.qkv', msa.qkv)
    query, key, value = (_rows(qkv, i * channels, channels) for i in range(3))
    query_codes = _codes(msa.query_key.left_quantizer)
    key_codes = _codes(msa.query_key.right_quantizer)
    value_codes = _codes(msa.attention_value.right_quantizer)
    if abs(query_codes.zero_point) * width * 255 >= 2**30:
        raise Unsupported(f'the zero point {query_codes.zero_point} of its '
                          'queries is too large')
    if not msa.scale > 0:
        raise Unsupported(f'its queries are scaled by {msa.scale}')
    fc2_plan = _named('ffn.layers.1', fc2)
    return SwinBlockPlan(
        msa.num_heads,
        attn.window_size,
        attn.shift_size,
        _norm(block.norm1),
        _norm(block.norm2),
        query,
        key,
        value,
        _named('attn.w_msa.proj', msa.proj),
        _named('ffn.layers.0.0', fc1),
        fc2_plan,
        dataclasses.replace(query_codes, scale=query_codes.scale / msa.scale),
        key_codes,
        value_codes,
        gelu_codes(fc2_plan.input),
        msa.qkv.input_quantizer.encode(attn.padding_value).to(torch.uint8),
        query_codes.scale * key_codes.scale,
        _position_bias(msa),
        attention_steps(msa.attention_value.left_quantizer),
    )


def _codes(quantizer: Quantizer) -> InputCodes:
    """Codes of an operand of a product of activations."""
    assert isinstance(quantizer, UniformQuantizer)
    return InputCodes.of(quantizer)


def _named(name: str, layer: Any) -> LayerPlan:
    """Plan of an inner layer; an error says which it is."""
    if not isinstance(layer, QuantLinear):
        raise Unsupported(f'{name} is not quantized')
    try:
        return plan_layer(layer)
    except Unsupported as error:
        raise Unsupported(f'{name}: {error}') from error


def _mlp(ffn: Any) -> Tuple[Any, Any]:
    """Both layers of an MLP with GELU between them and nothing else."""
    layers = ffn.layers
    if not (len(layers) == 3 and len(layers[0]) == 3 and ffn.add_identity
            and isinstance(getattr(ffn, 'gamma2', nn.Identity()), nn.Identity)
            and type(layers[0][1]) is nn.GELU
            and layers[0][1].approximate == 'none'):
        raise Unsupported('its MLP is more than two layers with GELU')
    return layers[0][0], layers[1]


def _rows(plan: LayerPlan, first: int, count: int) -> LayerPlan:
    """A layer with some of the outputs."""
    rows = slice(first, first + count)
    return dataclasses.replace(
        plan,
        weight=plan.weight[rows],
        scale=plan.scale[rows],
        bias=plan.bias[rows])


def _norm(norm: Any, order: Union[slice, Tensor] = slice(None)) -> NormPlan:
    """Plan of a norm, whose channels are taken in an order."""
    if type(norm) is not nn.LayerNorm or norm.bias is None:
        raise Unsupported(f'its norm is {norm}')
    with torch.no_grad():
        weight, bias = (
            values[order].float().clone()
            for values in (norm.weight, norm.bias))
    return NormPlan(weight, bias, norm.eps)


def _position_bias(msa: QuantWindowMSA) -> Tensor:
    with torch.no_grad():
        bias = F.embedding(msa.relative_position_index,
                           msa.relative_position_bias_table).permute(2, 0, 1)
        filling = -bias.shape[-1] % BLOCK
        return F.pad(
            bias, (0, filling),
            value=NOWHERE).float().clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class MergingPlan:
    """Patch merging, see ``isvit_merging`` of csrc/swin.h.

    Attributes:
        norm: of the tokens of a patch, one after another.
        reduction: the layer, inputs in the same order.
        kernel: height and width of a patch.
        stride: from a patch to the next, down and to the right.
    """
    norm: NormPlan
    reduction: LayerPlan
    kernel: Tuple[int, int]
    stride: Tuple[int, int]


def plan_merging(merging: PatchMerging) -> MergingPlan:
    """Plan of a calibrated patch merging.

    Raises:
        Unsupported: if the kernels cannot run it, with the reason.
    """
    sampler = merging.sampler
    if (type(merging) is not PatchMerging or merging.adap_padding is None
            or merging.adap_padding.padding != 'corner'
            or tuple(sampler.dilation) != (1, 1)):
        raise Unsupported('it is no patch merging as Swin has it')
    plan = _named('reduction', merging.reduction)
    kernel = (int(sampler.kernel_size[0]), int(sampler.kernel_size[1]))
    positions = kernel[0] * kernel[1]
    inputs, outputs = plan.weight.shape[1], len(plan.weight)
    if inputs % BLOCK or outputs % BLOCK:
        raise Unsupported(f'it has {inputs} inputs and {outputs} outputs; '
                          f'they are to be multiples of {BLOCK}')
    # nn.Unfold orders by channel first, the kernels by token.
    order = torch.arange(inputs).view(-1, positions).t().flatten()
    return MergingPlan(
        _norm(merging.norm, order),
        dataclasses.replace(plan, weight=plan.weight[:, order].contiguous()),
        kernel, (int(sampler.stride[0]), int(sampler.stride[1])))
