"""Arithmetic of every quantizer: encode, decode, straight-through rounding.

Codes are integer-valued tensors in the dtype of the values, so that the same
functions work in float32 and in float64. ``bit_packing`` turns codes into
bytes.
"""
from typing import Any, Tuple

import torch
from torch import Tensor


def uniform_encode(x: Tensor, scale: Tensor, zero_point: Tensor,
                   bits: int) -> Tensor:
    """Map reals to codes: ``clamp(round(x / scale) + zero_point)``.

    Args:
        x: any shape.
        scale: positive, broadcastable to ``x``.
        zero_point: integers, same shape as ``scale``; may be outside of
            the code range.
        bits: width b of the codes.

    Returns:
        Integers in ``[0, 2**bits - 1]``, in the dtype of ``x``
        (I&S-ViT, Eq. 1, with exactly 2**b codes).
    """
    codes = torch.div(x, scale).round_()
    return codes.add_(zero_point).clamp_(0, 2**bits - 1)


def uniform_decode(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Map codes back to reals: ``(codes - zero_point) * scale``.

    Args:
        codes: integers in ``[0, 2**bits)``, any shape.
        scale: positive, broadcastable to ``codes``.
        zero_point: integers, same shape as ``scale``.
    """
    return torch.sub(codes, zero_point).mul_(scale)


def range_to_affine(low: Tensor, high: Tensor,
                    bits: int) -> Tuple[Tensor, Tensor]:
    """Scale and integer zero point that spread 2**bits codes over a range.

    Args:
        low: lower ends, any shape.
        high: upper ends, same shape, not below ``low``.
        bits: width of the codes.

    Returns:
        ``scale`` and ``zero_point`` (integer-valued, dtype of ``low``).
    """
    tiny = torch.finfo(low.dtype).tiny
    # The zero point of a range that is narrow and far from 0 would exceed
    # int32. A constant is represented as well with a coarser scale.
    reach = torch.maximum(low.abs(), high.abs())
    span = torch.maximum(high - low, reach * 1e-4)
    scale = (span / (2**bits - 1)).clamp(min=tiny)
    return scale, torch.round(-low / scale)


def log_position(x: Tensor, shift: Tensor, low: Tensor,
                 step: Tensor) -> Tensor:
    """The codes of ``log_encode`` before they are rounded and clipped.

    Args:
        x: attention probabilities, any shape, not negative.
        shift: eta, scalar.
        low: exponent of code 0, scalar.
        step: difference of the exponents of adjacent codes, scalar.
    """
    return torch.add(x, shift).log2_().neg_().sub_(low).div_(step)


def log_encode(x: Tensor, shift: Tensor, low: Tensor, step: Tensor,
               bits: int) -> Tensor:
    """Codes of ``-log2(x + shift)`` spread uniformly from ``low`` by ``step``.

    With ``shift`` > 0 this is SULQ's encoder (I&S-ViT, Eq. 7); with shift 0
    and step 1 or 1/2 that of log2 and log-sqrt2.

    Args:
        x, shift, low, step: as for ``log_position``.
        bits: width of the codes.

    Returns:
        Integers in ``[0, 2**bits - 1]``, in the dtype of ``x``.
    """
    return log_position(x, shift, low, step).round_().clamp_(0, 2**bits - 1)


def sulq_table(shift: Tensor, low: Tensor, step: Tensor, bits: int,
               exponent: str) -> Tensor:
    """Value of every SULQ code, shape (2**bits,).

    ``2**-(low + step * code) - shift``, with the exponent rounded for
    ``exponent='integer'`` (I&S-ViT, Eq. 8, decoding by bit shifts), at least
    0: no attention is negative.
    """
    codes = torch.arange(2**bits, dtype=low.dtype, device=low.device)
    exponents = low + step * codes
    if exponent == 'integer':
        exponents = exponents.round()
    return (torch.exp2(-exponents) - shift).clamp(min=0)


def log_table(low: Tensor, step: Tensor, bits: int) -> Tensor:
    """Value of every log2 or log-sqrt2 code, shape (2**bits,).

    The last code is 0. RepQ-ViT's released code also has a 0, but as an
    additional code beyond 2**bits.
    """
    codes = torch.arange(2**bits, dtype=low.dtype, device=low.device)
    table = torch.exp2(-(low + step * codes))
    table[-1] = 0
    return table


def table_decode(codes: Tensor, table: Tensor) -> Tensor:
    """Look the codes up, ``table[codes]``, keeping their shape.

    NaN, which converting makes negative, counts as the first code.
    """
    index = codes.flatten().int().clamp_(min=0)
    return table.index_select(0, index).view_as(codes)


class StraightThrough(torch.autograd.Function):
    """The straight-through estimator of the gradient of fake quantization.

    ``apply(x, decoded, inside)`` returns ``decoded``. The gradient of ``x``
    is that of the output where ``inside`` is true, and 0 elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, decoded: Tensor,
                inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return decoded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None, None]:
        inside, = ctx.saved_tensors
        return grads[0] * inside, None, None
