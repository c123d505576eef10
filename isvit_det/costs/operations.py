"""Bit operations (BOPs): multiplications times the widths of both factors."""
import contextlib
import math
from typing import Any, Callable, Dict, Iterator, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from isvit_det.core.hooks import forward_hooks
from isvit_det.core.layers import QuantConv2d, QuantLinear, QuantMatMul
from isvit_det.core.quantizers import (Quantizer, ShiftUniformLog2Quantizer,
                                       UniformQuantizer)
from isvit_det.core.table_quantizer import TableQuantizer

# Width of a float32.
FLOAT_BITS = 32
FLOAT_LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class Operations(NamedTuple):
    """Multiplications of one layer or product in one prediction.

    Attributes:
        macs: number of multiplications with an addition.
        quantized: whether the layer or product is quantized.
    """
    macs: int
    quantized: bool


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Dict[str, Operations]]:
    """Count the multiplications of a model's predictions in this context.

    Those of quantized layers and products, and of the Linear, Conv2d and
    ConvTranspose2d layers that are in float, are counted; other products in
    float (deformable convolutions, attention of heads) are not.
    The model has to be simulated meanwhile, since a block that runs natively
    as a whole calls no layers.

    Yields:
        What each layer and product does, by name; filled as the model runs.
    """
    found: Dict[str, Operations] = {}

    def noting(name: str, quantized: bool) -> Callable[..., None]:

        def note(module: Any, args: Tuple[Tensor, ...], out: Tensor) -> None:
            macs = multiplications(module, args, out)
            earlier = found[name].macs if name in found else 0
            found[name] = Operations(earlier + macs, quantized)

        return note

    hooks = []
    for name, module in model.named_modules():
        quantized = isinstance(module, (QuantLinear, QuantConv2d, QuantMatMul))
        if quantized or isinstance(module, FLOAT_LAYERS):
            hooks.append((module, noting(name, quantized)))
    with forward_hooks(hooks), torch.no_grad():
        yield found


def multiplications(module: Any, args: Tuple[Tensor, ...], out: Tensor) -> int:
    """Multiplications with an addition in one call of a layer or product.

    Args:
        module: quantized, or one of ``FLOAT_LAYERS``.
        args: its inputs.
        out: its output.
    """
    if isinstance(module, QuantMatMul):
        return out.numel() * args[0].shape[-1]
    if isinstance(module, nn.ConvTranspose2d):
        # Each input meets the whole kernel.
        return args[0].numel() * math.prod(module.weight.shape[1:])
    return out.numel() * math.prod(module.weight.shape[1:])


def multiplied_bits(quantizer: Quantizer) -> int:
    """Width of what a quantizer gives to a multiplication.

    Evenly spaced codes are multiplied themselves, up to a constant, and
    powers of two by shifting as their codes say. Of a table of integers the
    entries are multiplied, in ``entry_bits``, unless it is calibrated and
    its entries are the codes. SULQ's table of real numbers is multiplied in
    float32.
    """
    if isinstance(quantizer, UniformQuantizer):
        return quantizer.bits
    if isinstance(quantizer, TableQuantizer):
        even = quantizer.is_fitted and quantizer.is_even
        return quantizer.bits if even else quantizer.entry_bits
    is_real = (
        isinstance(quantizer, ShiftUniformLog2Quantizer)
        and quantizer.config.exponent == 'table')
    return FLOAT_BITS if is_real else quantizer.bits


def factor_bits(part: Any) -> int:
    """Product of the widths of both factors of a layer or product.

    Args:
        part: of ``named_parts``.
    """
    if isinstance(part, QuantMatMul):
        pair = (part.left_quantizer, part.right_quantizer)
    else:
        pair = (part.input_quantizer, part.weight_quantizer)
    return math.prod(map(multiplied_bits, pair))


def bops(model: nn.Module, operations: Dict[str, Operations]) -> int:
    """Bit operations of a prediction: ``sum(macs * bits * bits)``.

    Layers in float count 32 by 32 bits.

    Args:
        model: quantized; its present widths count.
        operations: of ``counting``.
    """
    modules = dict(model.named_modules())
    return sum(one.macs *
               (factor_bits(modules[name]) if one.quantized else FLOAT_BITS**2)
               for name, one in operations.items())
