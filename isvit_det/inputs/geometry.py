"""Plausibility checks of the boxes and masks in annotations."""
import itertools
import math
from typing import Any, List, Mapping, Optional

import numpy as np

# Coordinates may be outside of an image, up to a multiple of its longer side.
# For polygons far outside, pycocotools writes beyond its memory.
MULTIPLE = 10
# In pixels, if the size of the image is not known.
FARTHEST = 1e6
INSIDE = f"within {MULTIPLE} times the image's longer side"
NUMBERS = {int, float}


def farthest(image: Optional[Mapping[str, Any]]) -> float:
    """The largest plausible coordinate of an annotation, in pixels.

    Args:
        image: entry of the image.

    >>> farthest(dict(height=30, width=40))
    400.0
    """
    sizes = [
        size for size in map((image or {}).get, ('height', 'width'))
        if isinstance(size, (int, float)) and 0 < size < FARTHEST
    ]
    return float(MULTIPLE * max(sizes)) if len(sizes) == 2 else FARTHEST


def lies_inside(numbers: Any, limit: float) -> bool:
    """Whether a value is a list of numbers with absolute values up to a limit.

    >>> lies_inside([1, 2.5], 3), lies_inside([1, '2'], 3)
    (True, False)
    >>> lies_inside([1, float('nan')], 3), lies_inside([4], 3)
    (False, False)
    """
    if not isinstance(numbers, list) or not set(map(type, numbers)) <= NUMBERS:
        return False
    # NaN may be lost in min and max, but not in a sum.
    return not numbers or (-limit <= min(numbers) and max(numbers) <= limit
                           and math.isfinite(sum(numbers)))


def mask_fault(mask: Any, limit: float, is_drawn: bool) -> Optional[str]:
    """What is expected instead of a wrong segmentation; None if it is right.

    Args:
        mask: segmentation of an annotation.
        limit: largest coordinate, in pixels.
        is_drawn: whether pycocotools gets it unchanged. MMDetection's
            ``LoadAnnotations`` drops polygons of less than three points.
    """
    if isinstance(mask, Mapping):
        return _runs_fault(mask)
    if not isinstance(mask, list) or (is_drawn and not mask):
        return 'polygons, or a dict with size and counts'
    if not all(isinstance(polygon, list) for polygon in mask):
        return 'a list of polygons [x1, y1, x2, y2, ...]'
    if not lies_inside(list(itertools.chain(*mask)), limit):
        return f'polygons of numbers {INSIDE} ({limit:g} pixels)'
    # pycocotools takes a first polygon of four numbers for a box, and
    # ignores a later one.
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
    """Decode the run lengths of a compressed mask of pycocotools.

    Args:
        code: ``counts`` of the mask.

    Returns:
        The run lengths, or None if it is no valid code.

    >>> run_lengths('05S1'), run_lengths('zzz')
    ([0, 5, 35], None)
    """
    if not isinstance(code, str) or not code.isascii() or not code:
        return None
    signs = np.frombuffer(code.encode(), np.uint8).astype(np.int64) - 48
    if signs.min() < 0 or signs.max() > 63 or signs[-1] & 32:
        return None
    # Each run is coded in characters of five bits, the lowest first. The sixth
    # bit says that another character follows.
    ends = np.flatnonzero(signs & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return None
    shifts = 5 * (np.arange(len(signs)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((signs & 31) << shifts, starts)
    runs -= np.where(signs[ends] & 16, 1 << (5 * lengths), 0)
    # From the fourth on, the difference to the last but one is coded.
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs.tolist()
