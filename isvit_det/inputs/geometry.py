"""Boxes and masks of annotations: whether their numbers can be meant."""
import itertools
import math
from typing import Any, List, Mapping, Optional

import numpy as np

# Coordinates may lie outside of an image by a multiple of its longer side.
# Far outside, pycocotools draws polygons beyond the memory.
MULTIPLE = 10
# In pixels, where the size of an image is not known.
FARTHEST = 1e6
INSIDE = f"within {MULTIPLE} times the image's longer side"
NUMBERS = {int, float}


def farthest(image: Optional[Mapping[str, Any]]) -> float:
    """The largest coordinate of an annotation, in pixels.

    Args:
        image: entry of its image.

    >>> farthest(dict(height=30, width=40))
    400.0
    """
    sizes = [
        size for size in map((image or {}).get, ('height', 'width'))
        if isinstance(size, (int, float)) and 0 < size < FARTHEST
    ]
    return float(MULTIPLE * max(sizes)) if len(sizes) == 2 else FARTHEST


def lies_inside(numbers: Any, limit: float) -> bool:
    """Whether a list holds numbers alone, none farther from 0 than a limit.

    >>> lies_inside([1, 2.5], 3), lies_inside([1, '2'], 3)
    (True, False)
    >>> lies_inside([1, float('nan')], 3), lies_inside([4], 3)
    (False, False)
    """
    if not isinstance(numbers, list) or not set(map(type, numbers)) <= NUMBERS:
        return False
    # A NaN may pass min and max, but no sum.
    return not numbers or (-limit <= min(numbers) and max(numbers) <= limit
                           and math.isfinite(sum(numbers)))


def mask_fault(mask: Any, limit: float, is_drawn: bool) -> Optional[str]:
    """What was expected instead of a segmentation; None if it is one.

    Args:
        mask: of an annotation.
        limit: of its coordinates, in pixels.
        is_drawn: whether pycocotools draws it as it is. MMDetection's
            ``LoadAnnotations`` leaves out polygons of less than three points.
    """
    if isinstance(mask, Mapping):
        return _runs_fault(mask)
    if not isinstance(mask, list) or (is_drawn and not mask):
        return 'polygons, or a dict with size and counts'
    if not all(isinstance(polygon, list) for polygon in mask):
        return 'a list of polygons [x1, y1, x2, y2, ...]'
    if not lies_inside(list(itertools.chain(*mask)), limit):
        return f'polygons of numbers {INSIDE} ({limit:g} pixels)'
    # pycocotools takes four numbers in the first place for a box, and draws
    # nothing for them in another one.
    lengths = [len(polygon) for polygon in mask]
    if is_drawn and (lengths[0] < 6 or min(lengths) < 4
                     or any(length % 2 for length in lengths)):
        return 'polygons of pairs of numbers, the first of three or more'
    return None


def _runs_fault(mask: Mapping[str, Any]) -> Optional[str]:
    size, counts = mask.get('size'), mask.get('counts')
    if not (isinstance(size, list) and len(size) == 2 and all(
            type(length) is int and 0 < length < 2**31 for length in size)):
        return 'a dict with size [height, width] in pixels, and counts'
    runs = counts if isinstance(counts, list) else run_lengths(counts)
    if runs is None or not all(isinstance(run, int) for run in runs):
        return 'counts that are a list of whole numbers, or their code'
    total = size[0] * size[1]
    if min(runs, default=0) < 0 or sum(runs) != total:
        return (f'counts of 0 or more whose sum is height times width, '
                f'{total}')
    return None


def run_lengths(code: Any) -> Optional[List[int]]:
    """The run lengths that a text of pycocotools stands for.

    Args:
        code: ``counts`` of a compressed mask.

    Returns:
        None if it is no such text.

    >>> run_lengths('05S1'), run_lengths('zzz')
    ([0, 5, 35], None)
    """
    if not isinstance(code, str) or not code.isascii() or not code:
        return None
    signs = np.frombuffer(code.encode(), np.uint8).astype(np.int64) - 48
    if signs.min() < 0 or signs.max() > 63 or signs[-1] & 32:
        return None
    # Each run has some signs of five bits, the lowest first, and the sixth
    # bit says that another one follows.
    ends = np.flatnonzero(signs & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return None
    shifts = 5 * (np.arange(len(signs)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((signs & 31) << shifts, starts)
    runs -= np.where(signs[ends] & 16, 1 << (5 * lengths), 0)
    # From the fourth on, they say how much longer than the last but one.
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs.tolist()
