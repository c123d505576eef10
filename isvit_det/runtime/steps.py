"""Quantizers as step functions, which are evaluated by comparing.

Whatever its quantizer, the code of a softmax probability is a step function of
the probability. The code of a GELU's output is a step function of the GELU's
input, and an entry of a table one of the number that it stands for. Instead of
computing logarithms, GELU or cells of tables, the kernels compare with the
limits of the steps. These are float32 numbers for which each code is exactly
the one computed in float64.
"""
import copy
from dataclasses import dataclass
from typing import Callable, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from isvit_det.core.quantizers import (AttentionQuantizer, Quantizer,
                                       UniformQuantizer)
from isvit_det.plans.layer import InputCodes, Unsupported

# The kernels keep between 2**4 and 2**5 steps in registers.
SMALL_DEPTH, LARGE_DEPTH = 4, 5
# Where GELU has its minimum: it decreases to the left of it.
GELU_MINIMUM = -.7517915
# Nearly the largest float32.
LARGEST = 3e38


@dataclass(frozen=True)
class Steps:
    """A step function, ``isvit_steps`` of csrc/runtime.h.

    Attributes:
        limits: where each step begins, as a binary search tree in heap order
            whose root is ``limits[1]``, float32, shape (2**depth,);
            ``limits[0]`` is unused.
        values: value of each step, the lowest step first, float32, shape
            (2**depth,).
        depth: of the tree, at least 4.
    """
    limits: Tensor
    values: Tensor
    depth: int


def make_steps(limits: Tensor, values: Tensor) -> Steps:
    """Build a step function.

    Args:
        limits: where each step but the lowest begins, ascending, shape (n,).
        values: value of each step, shape (n + 1,).

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
    """The decoded value of a probability as a step function of it.

    Raises:
        Unsupported: if the kind of quantizer is not known, or if it is not
            fitted or disabled.
    """
    if not (quantizer.is_fitted and quantizer.enabled):
        raise Unsupported('its attention is not quantized')
    codes = torch.arange(2.**quantizer.bits)
    exact = copy.deepcopy(quantizer).double()
    if isinstance(quantizer, AttentionQuantizer):
        # Their codes decrease as probabilities increase.
        limits = find_limits(lambda p: codes[-1] - exact.encode(p), 0., 2.,
                             quantizer.bits)
        return make_steps(limits, quantizer.decode(codes.flip(0)))
    if isinstance(quantizer, UniformQuantizer):
        limits = find_limits(exact.encode, 0., 2., quantizer.bits)
        return make_steps(limits, quantizer.decode(codes))
    raise Unsupported(f'its attention is quantized by a '
                      f'{type(quantizer).__name__}')


def table_steps(codes: InputCodes) -> Optional[Steps]:
    """The entry in a table as a step function of the quantized number.

    Returns:
        None without a table.
    """
    if codes.entries is None:
        return None
    entries = torch.tensor(codes.entries, dtype=torch.float64)
    # The middle of each two neighbours.
    steps = (entries[:-1] + entries[1:]) / 2 - codes.zero_point
    exact = steps * codes.scale
    limits = exact.float()
    up = torch.nextafter(limits, torch.full_like(limits, torch.inf))
    return make_steps(torch.where(limits < exact, up, limits), entries)


def gelu_steps(codes: InputCodes) -> Optional[Steps]:
    """The code of a GELU's output, or its entry, as a step function.

    To the left of GELU's minimum codes decrease, to the right they increase.

    Args:
        codes: how the output is quantized.

    Returns:
        None where GELU is computed: without a table, if there are more than
        32 steps.
    """

    def encode(x: Tensor) -> Tensor:
        return codes.encode(F.gelu(x))

    ends = torch.tensor([-LARGEST, GELU_MINIMUM], dtype=torch.float64)
    far, lowest = (int(code) for code in encode(ends))
    order = torch.cat(
        [torch.arange(far, lowest, -1),
         torch.arange(lowest, 2**codes.bits)])
    if codes.entries is None and len(order) > 2**LARGE_DEPTH:
        return None
    falls = find_limits(lambda x: far - encode(x), -LARGEST, GELU_MINIMUM,
                        codes.bits)[:far - lowest]
    rises = find_limits(encode, GELU_MINIMUM, LARGEST, codes.bits)[lowest:]
    return make_steps(torch.cat([falls, rises]), codes.stored(order))


def find_limits(encode: Callable[[Tensor], Tensor], low: float, high: float,
                bits: int) -> Tensor:
    """Find the smallest float32 numbers whose codes are at least 1, 2, ...

    Args:
        encode: maps float64 arguments to codes; must not decrease between
            ``low`` and ``high``.
        low: the smallest argument.
        high: the largest argument.
        bits: width of the codes.

    Returns:
        float32, shape (2**bits - 1,): -inf where the code of ``low`` is large
        enough already, inf where that of ``high`` is not.
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
    """Number float32 numbers in ascending order, 0 for zero."""
    bits = x.float().abs().view(torch.int32).long()
    return torch.where(x < 0, -bits, bits)


def _number(rank: Tensor) -> Tensor:
    """The float32 number of a rank, the inverse of ``_rank``."""
    size = rank.abs().int().view(torch.float32)
    return torch.where(rank < 0, -size, size)
