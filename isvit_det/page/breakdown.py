"""COCO's AP in parts: by class, by size, by IoU, and precision by recall."""
import contextlib
import io
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from isvit_det.page.detections import Prediction
from isvit_det.page.truth import Truth

# COCO's limit on the detections of an image.
MAX_DETECTIONS = 100
SIZES = ('all', 'small', 'medium', 'large')


@dataclass
class Breakdown:
    """AP of one model, all in fractions; NaN where nothing is to be measured.

    Attributes:
        kind: ``'bbox'`` or ``'segm'``.
        by_class: AP at IoU .50:.95, shape (K,).
        recall: largest recall by class, mean over the IoU, shape (K,).
        by_size: AP by the size of objects, by name.
        thresholds: of IoU, shape (T,).
        by_threshold: AP at each of them, shape (T,).
        precision: at 101 values of recall from 0 to 1, mean over classes, by
            IoU; each of shape (101,).
    """
    kind: str
    by_class: np.ndarray
    recall: np.ndarray
    by_size: Dict[str, float]
    thresholds: np.ndarray
    by_threshold: np.ndarray
    precision: Dict[str, np.ndarray]

    @property
    def ap(self) -> float:
        """AP at IoU .50:.95 of all classes."""
        return self.by_size['all']


def break_down(truth: Truth, predictions: Mapping[Any, Prediction],
               kind: str) -> Optional[Breakdown]:
    """AP of detections in parts, by pycocotools.

    Args:
        truth: of the images.
        predictions: by id of the image.
        kind: ``'bbox'`` or ``'segm'``.

    Returns:
        None if there is nothing to measure: no object, no masks.
    """
    if not truth.is_coco or not truth.coco.anns or (kind == 'segm'
                                                    and not truth.has_masks):
        return None
    entries = _entries(truth, predictions, kind)
    if entries is None:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO()
        found.dataset = dict(truth.coco.dataset, annotations=[])
        found.createIndex()
        if entries:
            found = truth.coco.loadRes(entries)
        measured = COCOeval(truth.coco, found, kind)
        measured.params.imgIds = sorted(image for image in predictions
                                        if image in truth.images)
        measured.params.catIds = truth.cat_ids
        measured.params.maxDets = [1, 10, MAX_DETECTIONS]
        # They are taken as they are: the order is that of the labels.
        measured.evaluate()
        measured.accumulate()
    # (T, R, K, A, M) and (T, K, A, M), with -1 for nothing to measure.
    precision, recall = (
        np.where(measured.eval[key] < 0, np.nan, measured.eval[key])[..., -1]
        for key in ('precision', 'recall'))
    order = [list(measured.params.catIds).index(i) for i in truth.cat_ids]
    precision, recall = precision[:, :, order], recall[:, order]
    every = precision[..., 0]
    thresholds = measured.params.iouThrs
    return Breakdown(
        kind,
        by_class=mean(every, (0, 1)),
        recall=mean(recall[..., 0], 0),
        by_size={
            name: float(mean(precision[..., place], (0, 1, 2)))
            for place, name in enumerate(SIZES)
        },
        thresholds=thresholds,
        by_threshold=mean(every, (1, 2)),
        precision={
            f'{value:.2f}': mean(every[place], 1)
            for place, value in enumerate(thresholds)
            if round(100 * value) in (50, 75, 90)
        })


def mean(values: np.ndarray, axes: Any) -> np.ndarray:
    """Mean over some axes of what is not NaN, NaN if all is.

    >>> mean(np.array([[1., np.nan], [np.nan, np.nan]]), 1).tolist()
    [1.0, nan]
    """
    known = ~np.isnan(values)
    total = np.where(known, values, 0.).sum(axes)
    count = known.sum(axes)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _entries(truth: Truth, predictions: Mapping[Any, Prediction],
             kind: str) -> Optional[List[Dict[str, Any]]]:
    """Detections as COCO's results; None if masks are missing."""
    entries = []
    for image, prediction in predictions.items():
        found = prediction.objects
        if image not in truth.images or not len(found):
            continue
        if kind == 'segm' and found.masks is None:
            return None
        corners = found.boxes
        boxes = np.concatenate(
            [corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        for place in range(len(found)):
            # A detector that reads text may name more than is annotated.
            if found.labels[place] >= len(truth.cat_ids):
                continue
            entry = dict(
                image_id=image,
                category_id=truth.cat_ids[found.labels[place]],
                score=float(found.scores[place]))
            if kind == 'segm':
                assert found.masks is not None
                entry['segmentation'] = dict(found.masks[place])
            else:
                entry['bbox'] = boxes[place].tolist()
            entries.append(entry)
    return entries
