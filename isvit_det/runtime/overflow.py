"""The overflow proof: how long a lane of 16 bits may sum products of codes.

AVX2 multiplies codes (unsigned, 8 bits) by weights (signed, 8 bits) and adds
the products of two neighbouring inputs in 16 bits (vpmaddubsw), clipping
silently what does not fit. Such pairs are added in lanes of 16 bits as well. A
lane holds one output and every other pair of inputs. Codes lie between 0 and
``top``, so whatever they are, the sum of a lane lies between ``top`` times the
sum of its negative weights and ``top`` times the sum of its positive ones.
While both fit 16 bits, so does every partial sum, and the lane is exact.
"""
from typing import Callable, List, NamedTuple, Optional

import torch
from torch import Tensor

# Inputs of which two neighbouring ones make a pair, two pairs a group.
GROUP = 4
# Groups of a run: their weights for 16 outputs, 64 bytes each, leave half of
# a first-level cache of 32 KB to the codes.
MAX_GROUPS = 256
LOW, HIGH = -2**15, 2**15 - 1


class Run(NamedTuple):
    """Inputs that a lane sums before it is widened to 32 bits.

    A row of inputs consists of segments of equal length. A run covers
    ``groups`` groups from group ``first`` on in each of ``segments``
    segments, beginning with ``segment``.
    """
    segment: int
    segments: int
    first: int
    groups: int


def split_runs(weight: Tensor, top: int) -> Optional[List[Run]]:
    """Cut the inputs of a layer into runs that provably stay in 16 bits.

    Args:
        weight: integers, shape (outputs, segments, inputs of a segment); the
            last is a multiple of 4.
        top: the largest code.

    Returns:
        The runs in order, as few as possible up to ``MAX_GROUPS`` groups
        each; None if the four products of one group are too much already.

    >>> weight = torch.full((1, 1, 64), -8)
    >>> split_runs(weight, top=255)
    [Run(segment=0, segments=1, first=0, groups=8), \
Run(segment=0, segments=1, first=8, groups=8)]
    """
    outputs, segments, inputs = weight.shape
    groups = inputs // GROUP
    pairs = weight.long().view(outputs, segments, groups, 2, 2)
    # Largest and smallest sum of every lane up to every group.
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
    """Sums of all groups before each, (outputs, segments * groups + 1, 2)."""
    flat = values.flatten(1, 2)
    return torch.cat([torch.zeros_like(flat[:, :1]), flat.cumsum(1)], 1)


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest n up to ``limit`` for which ``holds``, which is monotone."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
