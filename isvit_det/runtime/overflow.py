"""The overflow proof: how many products of codes 16-bit sums can hold.

AVX2's ``vpmaddubsw`` multiplies unsigned 8-bit codes by signed 8-bit weights
and adds the products of two neighbouring inputs in 16 bits; it saturates
silently where the sum does not fit. The kernels add further such pairs in the
same 16-bit lane. A lane belongs to one output and sums every other pair of its
inputs.

All codes lie in 0..``top``. Whatever they are, the sum of a lane is therefore
at least ``top`` times the sum of the lane's negative weights, and at most
``top`` times the sum of its positive weights. As long as both bounds fit
16 bits, so does every partial sum, and the lane is exact.
"""
from typing import Callable, List, NamedTuple, Optional

import torch
from torch import Tensor

# Inputs of a group: two pairs of neighbours, one for each of two lanes.
GROUP = 4
# Most groups of a run. Their weights for 16 outputs, 64 bytes each, fill half
# of an L1 cache of 32 KB and leave the other half to the codes.
MAX_GROUPS = 256
LOW, HIGH = -2**15, 2**15 - 1


class Run(NamedTuple):
    """Inputs whose products are summed in 16 bits before they are widened.

    A row of inputs consists of segments of equal length. A run covers the same
    groups in one or more successive segments.

    Attributes:
        segment: the first segment.
        segments: the number of segments.
        first: the first group in each of these segments.
        groups: the number of groups in each of them.
    """
    segment: int
    segments: int
    first: int
    groups: int


def split_runs(weight: Tensor, top: int) -> Optional[List[Run]]:
    """Divide the inputs of a layer into runs whose sums fit 16 bits.

    Args:
        weight: integers, shape (outputs, segments, inputs of a segment), the
            last a multiple of 4.
        top: the largest code.

    Returns:
        The runs in order, each as long as possible up to ``MAX_GROUPS``
        groups; None if even a single group might overflow.

    >>> weight = torch.full((1, 1, 64), -8)
    >>> split_runs(weight, top=255)
    [Run(segment=0, segments=1, first=0, groups=8), \
Run(segment=0, segments=1, first=8, groups=8)]
    """
    outputs, segments, inputs = weight.shape
    groups = inputs // GROUP
    pairs = weight.long().view(outputs, segments, groups, 2, 2)
    # Upper and lower bounds of the sums of every lane, before each group.
    bounds = [
        _running_sums(top * pairs.clamp(min=0).sum(-1)),
        _running_sums(top * pairs.clamp(max=0).sum(-1))
    ]

    def fits(start: int, stop: int) -> bool:
        high, low = (b[:, stop] - b[:, start] for b in bounds)
        return int(high.max()) <= HIGH and int(low.min()) >= LOW

    runs = []
    start = 0
    while start < segments * groups:
        segment, first = divmod(start, groups)
        whole = 0
        if first == 0:
            limit = min(segments - segment, MAX_GROUPS // groups)
            whole = _largest(limit, lambda n: fits(start, start + n * groups))
        if whole:
            runs.append(Run(segment, whole, 0, groups))
            start += whole * groups
            continue
        limit = min(groups - first, MAX_GROUPS)
        length = _largest(limit, lambda n: fits(start, start + n))
        if length == 0:
            return None
        runs.append(Run(segment, 1, first, length))
        start += length
    return runs


def _running_sums(values: Tensor) -> Tensor:
    """Cumulative sums, from 0, shape (outputs, segments * groups + 1, 2)."""
    flat = values.flatten(1, 2)
    return torch.cat([torch.zeros_like(flat[:, :1]), flat.cumsum(1)], 1)


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest n up to ``limit`` for which ``holds(n)``, by bisection.

    Where ``holds(n)``, it holds for all smaller n; 0 if it never does.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
