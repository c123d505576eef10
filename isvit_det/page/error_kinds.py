"""What kinds of errors detections have, after TIDE (arXiv 2008.08115).

Each wrong detection has one kind, by its IoU with the annotated objects; an
object that is missed, and that no wrong detection nearly found, is a kind by
itself. What a kind costs is what AP at IoU .5 would gain if its errors alone
were mended. IoU is of boxes; TIDE's thresholds of .5 and .1 are taken.
"""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Tuple

import numpy as np

from isvit_det.page.detections import Objects, Prediction
from isvit_det.page.matching import box_iou
from isvit_det.page.truth import Truth

FOREGROUND, BACKGROUND = .5, .1
MAX_DETECTIONS = 100
KINDS = {
    'classification': 'right place (IoU of .5 or more), wrong class',
    'localisation': 'right class, place is near (IoU from .1 to .5)',
    'both': 'wrong class, and place is near only',
    'duplicate': 'right class and place, but a detection of higher score has '
    'that object already',
    'background': 'no object there (IoU below .1)',
    'missed': 'an object that no detection found, or nearly found',
}


@dataclass
class ErrorKinds:
    """Errors of one model.

    Attributes:
        counts: number of errors by kind.
        costs: what AP at IoU .5 would gain without them, by kind, as a
            fraction.
        ap: AP at IoU .5, as a fraction.
    """
    counts: Dict[str, int]
    costs: Dict[str, float]
    ap: float


@dataclass
class _Found:
    """A detection that counts: its class, and what mends it.

    Attributes:
        kind: of its error, or '' if it is right.
        mended: class and key of the object that it would find if mended; None
            if it would vanish.
    """
    label: int
    score: float
    kind: str
    mended: Any = None


@dataclass
class _Sorted:
    found: List[_Found] = field(default_factory=list)
    num: Dict[int, int] = field(default_factory=dict)
    matched: set = field(default_factory=set)
    missed: List[int] = field(default_factory=list)


def find_error_kinds(truth: Truth,
                     predictions: Mapping[Any, Prediction]) -> ErrorKinds:
    """Sort the errors of all detections of a model by kind.

    Args:
        truth: of the images.
        predictions: by id of the image.
    """
    every = _Sorted()
    for image, prediction in predictions.items():
        if image in truth.images:
            _sort_image(image, prediction.objects.take(slice(MAX_DETECTIONS)),
                        truth.images[image], every)
    base = _precision(every, '')
    counts = {
        kind: sum(one.kind == kind for one in every.found)
        for kind in KINDS
    }
    counts['missed'] = len(every.missed)
    costs = {kind: _precision(every, kind) - base for kind in KINDS}
    return ErrorKinds(counts, costs, base)


def _sort_image(image: Any, found: Objects, there: Objects,
                every: _Sorted) -> None:
    crowd = there.crowd if there.crowd is not None else np.zeros(0, bool)
    for label in there.labels[~crowd].tolist():
        every.num[label] = every.num.get(label, 0) + 1
    iou = box_iou(found, there)
    same = found.labels[:, None] == there.labels[None]
    taken: set = set()
    nearly: set = set()
    # Detections come in the order of their scores.
    for place in range(len(found)):
        label, score = int(found.labels[place]), float(found.scores[place])
        kind, mended = _kind_of(iou[place], same[place], crowd, taken)
        if kind == 'ignored':
            continue
        if mended is not None:
            (taken if not kind else nearly).add(mended)
            mended = (int(there.labels[mended]), (image, mended))
        every.found.append(_Found(label, score, kind, mended))
        if not kind:
            every.matched.add(mended[1])
    every.missed += [
        int(there.labels[place]) for place in range(len(there))
        if not crowd[place] and place not in taken | nearly
    ]


def _kind_of(iou: np.ndarray, same: np.ndarray, crowd: np.ndarray,
             taken: set) -> Tuple[str, Any]:
    """Kind of a detection's error, and the object that it is about."""
    if not len(iou):
        return 'background', None
    free = np.array([place not in taken for place in range(len(iou))])
    real = ~crowd

    def best(where: np.ndarray) -> int:
        return int(np.argmax(np.where(where, iou, -1.)))

    def largest(where: np.ndarray) -> float:
        return float(np.where(where, iou, -1.).max())

    right = same & real
    if largest(right & free) >= FOREGROUND:
        return '', best(right & free)
    if largest(same & crowd) >= FOREGROUND:
        return 'ignored', None
    if largest(right) >= FOREGROUND:
        return 'duplicate', None
    wrong = ~same & real
    if largest(wrong) >= FOREGROUND:
        return 'classification', best(wrong)
    if largest(right) >= BACKGROUND:
        return 'localisation', best(right)
    if largest(wrong) >= BACKGROUND:
        return 'both', None
    return 'background', None


def _precision(every: _Sorted, mended: str) -> float:
    """AP at IoU .5, with the errors of one kind mended."""
    num = dict(every.num)
    if mended == 'missed':
        for label in every.missed:
            num[label] -= 1
    by_class: Dict[int, List[Tuple[float, bool]]] = {
        label: []
        for label in num
    }
    taken = set(every.matched)
    for one in sorted(every.found, key=lambda one: -one.score):
        label, is_right = one.label, not one.kind
        if one.kind and one.kind == mended:
            if one.mended is None or one.mended[1] in taken:
                continue
            label, is_right = one.mended[0], True
            taken.add(one.mended[1])
        if label in by_class:
            by_class[label].append((one.score, is_right))
    values = [
        average_precision(
            np.array([is_right for _, is_right in found], bool), num[label])
        for label, found in by_class.items() if num[label] > 0
    ]
    return float(np.mean(values)) if values else 0.


def average_precision(is_right: np.ndarray, num: int) -> float:
    """COCO's AP of one class at one IoU, over 101 values of recall.

    Args:
        is_right: of the detections in the order of their scores, shape (N,).
        num: number of objects, at least 1.

    >>> round(average_precision(np.array([True, False, True]), 2), 6)
    0.834983
    """
    if not len(is_right):
        return 0.
    right = np.cumsum(is_right)
    precision = right / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(right / num, np.linspace(0, 1, 101), 'left')
    known = places < len(precision)
    return float(precision[places[known]].sum() / 101)
