"""Quantizers of what a function makes, as step functions of its argument.

The code of a softmax probability is a step function of the probability, the
code of a GELU's output one of its input. The kernels compare with the limits
of the steps, which are found here by bisection among all float32 numbers, so
that a code is exactly the one that float64 gives.
"""
import copy
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from isvit_det.core.quantizers import (AttentionQuantizer, Quantizer,
                                       UniformQuantizer)
from isvit_det.runtime.plan import InputCodes, Unsupported

# Steps that the kernels hold in registers: 2**4.
SMALL_DEPTH = 4
# Argument and value of the minimum of GELU, left of which it falls.
GELU_MINIMUM = -.7517915
LARGEST = 3e38


@dataclass(frozen=True)
class Steps:
    """``isvit_steps`` of csrc/blocks.h.

    Attributes:
        limits: a heap of ``2**depth - 1`` numbers, the first entry unused,
            float32, shape (2**depth,).
        values: from the lowest to the highest step, likewise.
        depth: at least 4.
    """
    limits: Tensor
    values: Tensor
    depth: int


def make_steps(limits: Tensor, values: Tensor) -> Steps:
    """Steps of ascending limits and their values, one more.

    >>> steps = make_steps(torch.tensor([.5]), torch.tensor([3., 4.]))
    >>> steps.depth, steps.limits[8].item(), steps.values[:3].tolist()
    (4, 0.5, [3.0, 4.0, 4.0])
    """
    depth = max(SMALL_DEPTH, (len(values) - 1).bit_length())
    num_missing = 2**depth - len(values)
    limits = F.pad(limits, (0, num_missing), value=torch.inf)
    values = torch.cat([values, values[-1:].expand(num_missing)])
    heap = torch.full((2**depth, ), torch.inf)
    for level in range(depth):
        stride = 2**(depth - level)
        heap[2**level:2**(level + 1)] = limits[stride // 2 - 1::stride]
    return Steps(heap, values.float().contiguous(), depth)


def attention_steps(quantizer: Quantizer) -> Steps:
    """Decoded value of a probability, by any quantizer of attention.

    Raises:
        Unsupported: if it is of no known kind, or off.
    """
    if not (quantizer.is_fitted and quantizer.enabled):
        raise Unsupported('its attention is not quantized')
    codes = torch.arange(2.**quantizer.bits)
    exact = copy.deepcopy(quantizer).double()
    if isinstance(quantizer, AttentionQuantizer):
        # Their codes fall where probabilities rise.
        limits = find_limits(lambda p: codes[-1] - exact.encode(p), 0., 2.,
                             quantizer.bits)
        return make_steps(limits, quantizer.decode(codes.flip(0)))
    if isinstance(quantizer, UniformQuantizer):
        limits = find_limits(exact.encode, 0., 2., quantizer.bits)
        return make_steps(limits, quantizer.decode(codes))
    raise Unsupported(f'its attention is coded by a '
                      f'{type(quantizer).__name__}')


class GeluCodes(NamedTuple):
    """``isvit_gelu`` of csrc/blocks.h.

    Attributes:
        codes: of the outputs.
        steps: codes, or their entries, of inputs above ``left``; None where
            there are more than 16, or several left of the minimum.
        left: below it, the code, or its entry, is ``left_code``.
        left_code: that of a small negative output.
    """
    codes: InputCodes
    steps: Optional[Steps] = None
    left: float = 0.
    left_code: int = 0


def gelu_codes(codes: InputCodes) -> GeluCodes:
    """Codes of a GELU's outputs, as steps where they are few."""

    def encode(x: Tensor) -> Tensor:
        return codes.encode(F.gelu(x))

    if codes.bits > SMALL_DEPTH:
        return GeluCodes(codes)
    far = encode(torch.tensor([-LARGEST], dtype=torch.float64))
    lowest = encode(torch.tensor([GELU_MINIMUM], dtype=torch.float64))
    num_falls = int(far - lowest)
    if num_falls > 1:
        return GeluCodes(codes)
    limits = find_limits(encode, GELU_MINIMUM, LARGEST, codes.bits)
    left = -torch.inf
    if num_falls:
        left = find_limits(lambda x: far - encode(x), -LARGEST, GELU_MINIMUM,
                           1).item()
    stored = codes.stored(torch.arange(2**codes.bits))
    return GeluCodes(codes, make_steps(limits, stored), left,
                     int(codes.stored(far)))


def find_limits(encode: Callable[[Tensor], Tensor], low: float, high: float,
                bits: int) -> Tensor:
    """Smallest float32 numbers whose codes are at least 1, 2, ...

    Args:
        encode: codes of float64 arguments; never falls between ``low`` and
            ``high``.
        low: least argument.
        high: greatest argument.
        bits: of the codes.

    Returns:
        float32, shape (2**bits - 1,): -inf where ``low`` has reached the
        code already, inf where ``high`` has not.
    """
    codes = torch.arange(1, 2**bits)
    ends = [_rank(torch.tensor(end)).expand(len(codes)) for end in (low, high)]
    below, reached = ends[0].clone(), ends[1].clone()
    while bool((reached - below > 1).any()):
        middle = (below + reached).div(2, rounding_mode='floor')
        is_reached = encode(_number(middle).double()) >= codes
        reached = torch.where(is_reached, middle, reached)
        below = torch.where(is_reached, below, middle)
    limits = _number(reached)
    limits[encode(_number(ends[0]).double()) >= codes] = -torch.inf
    limits[encode(_number(ends[1]).double()) < codes] = torch.inf
    return limits


def _rank(x: Tensor) -> Tensor:
    """Integers in the order of float32 numbers, one for each."""
    bits = x.float().abs().view(torch.int32).long()
    return torch.where(x < 0, -bits, bits)


def _number(rank: Tensor) -> Tensor:
    """The float32 numbers of ranks."""
    size = rank.abs().int().view(torch.float32)
    return torch.where(rank < 0, -size, size)
