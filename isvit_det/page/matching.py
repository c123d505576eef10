"""Which objects of two sets are the same: by class and by IoU of boxes."""
from typing import List, Tuple

import numpy as np
from pycocotools import mask as coco_mask

from isvit_det.page.detections import Objects

# Least IoU of the boxes of the same object.
SAME = .5


def box_iou(one: Objects, other: Objects) -> np.ndarray:
    """IoU of boxes, shape (N, M); over the detection's area for crowds.

    Args:
        one: N detections.
        other: M objects, some of which may be crowds.
    """
    if not len(one) or not len(other):
        return np.zeros((len(one), len(other)))
    crowd = other.crowd if other.crowd is not None else np.zeros(len(other))
    return np.asarray(
        coco_mask.iou(
            _corner_size(one), _corner_size(other),
            crowd.astype(np.uint8).tolist()))


def _corner_size(objects: Objects) -> np.ndarray:
    corners = objects.boxes
    return np.ascontiguousarray(
        np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1))


def mask_iou(one: Objects, other: Objects,
             pairs: List[Tuple[int, int]]) -> List[float]:
    """IoU of the masks of pairs; 1 if there are no masks."""
    if one.masks is None or other.masks is None:
        return [1.] * len(pairs)
    return [
        float(coco_mask.iou([one.masks[i]], [other.masks[j]], [0])[0, 0])
        for i, j in pairs
    ]


def match(one: Objects, other: Objects) -> List[Tuple[int, int]]:
    """Pairs of objects of the same class, each object in one pair at most.

    Pairs of larger IoU come first; below .5 nothing is a pair.
    """
    iou = box_iou(one, other)
    iou[one.labels[:, None] != other.labels[None]] = 0
    pairs: List[Tuple[int, int]] = []
    taken: Tuple[set, set] = set(), set()
    for flat in np.argsort(-iou, axis=None, kind='stable'):
        i, j = (int(place) for place in np.unravel_index(flat, iou.shape))
        if iou[i, j] < SAME:
            break
        if i not in taken[0] and j not in taken[1]:
            pairs.append((i, j))
            taken[0].add(i)
            taken[1].add(j)
    return pairs
