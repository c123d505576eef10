"""How much two models disagree on an image, and what it consists of."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from isvit_det.page.detections import Objects, Prediction
from isvit_det.page.matching import SAME, box_iou, mask_iou, match

# Least score of a detection that counts and is drawn.
SHOWN = .3
# Most detections of an image that count and are drawn.
MAX_SHOWN = 60
# A pair whose boxes or masks have a smaller IoU is drawn as moved.
MOVED = .7

EXPLAINED = (
    f'Detections with a score of {SHOWN:g} or more count. Those of the two '
    f'models are the same object if class and place (IoU of {SAME:g} or more) '
    'agree. The score of an image is the sum of the scores of the objects '
    'that one model alone has, lost or found, and of (1 - IoU of the boxes) + '
    '(1 - IoU of the masks) + (difference of the scores) of each object that '
    'both have.')


@dataclass
class Disagreement:
    """What differs on an image.

    Attributes:
        score: as ``EXPLAINED``.
        before: detections of the first model that are shown.
        after: detections of the second model that are shown.
        before_marks: a kind for each: ``'same'``, ``'moved'``, ``'class'``
            (the other model has another class there) or ``'lost'``.
        after_marks: the same, with ``'found'`` instead of ``'lost'``.
    """
    score: float
    before: Objects
    after: Objects
    before_marks: List[str] = field(default_factory=list)
    after_marks: List[str] = field(default_factory=list)

    def describe(self) -> str:
        """What differs in words.

        >>> none = Objects(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
        >>> Disagreement(.9, none, none, ['lost'], ['same']).describe()
        '1 lost'
        """
        counts = {
            'lost': self.before_marks.count('lost'),
            'found': self.after_marks.count('found'),
            'moved': self.after_marks.count('moved'),
            'of another class': self.after_marks.count('class')
        }
        parts = [f'{num} {kind}' for kind, num in counts.items() if num]
        return ', '.join(parts) or 'no difference that is marked'


def shown(objects: Objects) -> Objects:
    """The detections that count, best first."""
    return objects.take(objects.scores >= SHOWN).take(slice(MAX_SHOWN))


def compare(before: Objects, after: Objects) -> Disagreement:
    """Compare the detections of two models on one image."""
    before, after = shown(before), shown(after)
    pairs = match(before, after)
    found = Disagreement(0., before, after, ['lost'] * len(before),
                         ['found'] * len(after))
    boxes, masks = box_iou(before, after), mask_iou(before, after, pairs)
    for (i, j), of_masks in zip(pairs, masks):
        least = min(boxes[i, j], of_masks)
        found.before_marks[i] = found.after_marks[j] = ('same' if least
                                                        >= MOVED else 'moved')
        found.score += (2 - boxes[i, j] - of_masks +
                        abs(before.scores[i] - after.scores[j]))
    _mark_classes_(found, boxes)
    for objects, marks in ((before, found.before_marks), (after,
                                                          found.after_marks)):
        alone = [mark not in ('same', 'moved') for mark in marks]
        found.score += float(objects.scores[np.array(alone, bool)].sum())
    return found


def _mark_classes_(found: Disagreement, iou: np.ndarray) -> None:
    """Mark what one model has in the place of the other, of another class."""
    for i, mark in enumerate(found.before_marks):
        if mark != 'lost':
            continue
        free = [
            j for j, other in enumerate(found.after_marks)
            if other == 'found' and iou[i, j] >= SAME
        ]
        if free:
            found.before_marks[i] = 'class'
            found.after_marks[max(free, key=lambda j: iou[i, j])] = 'class'


def choose(before: Mapping[Any, Prediction],
           others: Sequence[Mapping[Any, Prediction]], num_most: int,
           num_least: int) -> Tuple[List[Any], List[Any]]:
    """The images on which models differ most, and least, from the first one.

    Args:
        before: predictions of the first model by id of the image.
        others: of the others; the one that differs most counts.
        num_most: number of images that differ most.
        num_least: number of those that differ least, among those on which
            something is detected.

    Returns:
        Ids of images, those that differ most first, and those that differ
        least first.
    """
    scores: Dict[Any, float] = {}
    empty = set()
    for image, first in before.items():
        found = [
            compare(first.objects, after[image].objects) for after in others
            if image in after
        ]
        if found:
            scores[image] = max(one.score for one in found)
            if not any(len(one.before) + len(one.after) for one in found):
                empty.add(image)
    # Ties are broken by the order of the images.
    order = sorted(scores, key=lambda image: -scores[image])
    most = [image for image in order[:num_most] if scores[image] > 0]
    rest = [
        image for image in reversed(order)
        if image not in most and image not in empty
    ]
    return most, rest[:num_least]


def right_ones(objects: Objects,
               truth: Optional[Objects]) -> Optional[List[bool]]:
    """Which detections are an annotated object; None without truth."""
    if truth is None:
        return None
    right = {i for i, _ in match(objects, truth)}
    return [place in right for place in range(len(objects))]
