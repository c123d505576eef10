"""How far a detector's detections are from those of another one."""
from typing import Any, Dict, Mapping

import torch
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

# Detections with less in common are not the same object.
MIN_IOU = .5


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Share of the detections that are not found again, from 0 to 1.

    It is ``1 - 2 * sum(min(s, t) * q) / (sum(s) + sum(t))`` over pairs of
    detections with scores s and t, one of each detector, of the same class,
    whose boxes overlap by an IoU of at least .5; q is that IoU, and with masks
    the mean of it and that of the masks. Detections take their partners in
    the order of their scores, each the one that overlaps most. Equal
    detections have a difference of 0, and disjoint ones of 1. A detection
    counts by its score, so it matters little which score is the least that is
    reported.

    Args:
        expected: ``bboxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and
            perhaps ``masks`` (N, H, W).
        found: likewise, of the other detector.

    >>> one = dict(bboxes=torch.tensor([[0., 0, 10, 10]]),
    ...            scores=torch.tensor([.8]), labels=torch.tensor([1]))
    >>> difference(one, one)
    0.0
    >>> round(difference(one, dict(one, scores=torch.tensor([.4]))), 3)
    0.333
    >>> difference(one, dict(one, labels=torch.tensor([2])))
    1.0
    """
    scores, others = (x['scores'].double().cpu() for x in (expected, found))
    total = float(scores.sum() + others.sum())
    if total == 0:
        return 0.
    common = 0.
    if len(scores) and len(others):
        overlaps = box_ious(expected['bboxes'], found['bboxes'])
        same = (expected['labels'].cpu()[:, None] == found['labels'].cpu())
        overlaps = torch.where(same & (overlaps >= MIN_IOU), overlaps, -1.)
        for row in scores.argsort(descending=True, stable=True).tolist():
            quality, column = overlaps[row].max(0)
            if quality < 0:
                continue
            q = float(quality)
            if 'masks' in expected and 'masks' in found:
                q = (q + mask_iou(expected['masks'][row],
                                  found['masks'][int(column)])) / 2
            common += q * float(min(scores[row], others[column]))
            overlaps[:, column] = -1.
    return 1. - 2 * common / total


def box_ious(one: Tensor, other: Tensor) -> Tensor:
    """IoU of all pairs of boxes (N, 4) and (M, 4), float64, (N, M)."""
    return bbox_overlaps(*(getattr(x, 'tensor', x).double().cpu()
                           for x in (one, other)))


def mask_iou(one: Any, other: Any) -> float:
    """IoU of two masks (H, W); that of two empty ones is 1."""
    one, other = (torch.as_tensor(x).bool() for x in (one, other))
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.


def detections(sample: Any) -> Dict[str, Any]:
    """What ``difference`` takes, of a data sample of MMDetection."""
    instances = sample.pred_instances
    names = [
        name for name in ('bboxes', 'scores', 'labels', 'masks')
        if name in instances
    ]
    return {name: instances[name] for name in names}
