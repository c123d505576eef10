"""Detections of images, as the kept predictions have them."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import numpy as np

from isvit_det.evaluation.predictions import KIND, read_kept

# Masks as pycocotools compresses them: size (H, W), and counts.
Rle = Dict[str, Any]


@dataclass
class Objects:
    """Objects of one image, detected or annotated.

    Attributes:
        boxes: left, top, right, bottom in pixels, shape (N, 4).
        labels: shape (N,).
        scores: shape (N,); 1 for those annotated.
        masks: run-length encoded; None if there are none.
        crowd: which are crowds, shape (N,).
    """
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: Optional[List[Rle]] = None
    crowd: Optional[np.ndarray] = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Any) -> 'Objects':
        """Some of them.

        Args:
            index: integers, shape (n,), or booleans, shape (N,).
        """
        chosen = np.arange(len(self))[index]
        return Objects(
            self.boxes[chosen], self.labels[chosen], self.scores[chosen],
            None if self.masks is None else [self.masks[i] for i in chosen],
            None if self.crowd is None else self.crowd[chosen])


@dataclass
class Prediction:
    """What a model predicts on an image.

    Attributes:
        path: of the image.
        size: height and width of the image.
        objects: detected.
    """
    path: str
    size: tuple
    objects: Objects


class NotShown(Exception):
    """Predictions of a kind that reports do not show."""


def read_predictions(folder: Path, name: str,
                     key: str) -> Dict[Any, Prediction]:
    """Detections by the id of the image, each image once.

    Args:
        folder: of the kept predictions.
        name: of the model.
        key: of the predictions.

    Raises:
        FileNotFoundError, ValueError: as ``read_kept``.
        NotShown: if they are no detections of upright boxes.
    """
    found: Dict[Any, Prediction] = {}
    for sample in read_kept(folder, name, key):
        instances = sample.get('pred_instances')
        if instances is None or 'bboxes' not in instances:
            raise NotShown('they are no boxes, which alone are shown here')
        path, size = sample.get('img_path') or '', sample['ori_shape'][:2]
        found.setdefault(
            sample.get('img_id'),
            Prediction(str(path), tuple(size), _objects(instances)))
    return found


def _objects(instances: Mapping[str, Any]) -> Objects:
    boxes = instances['bboxes']
    if isinstance(boxes, Mapping):
        boxes = boxes['tensor']
    boxes = boxes.double().numpy().reshape(-1, boxes.shape[-1])
    labels = instances['labels'].numpy()
    if boxes.shape[1] != 4:
        raise NotShown('their boxes are not upright rectangles')
    scores = instances['scores'].double().numpy()
    masks = None
    kept = instances.get('masks')
    if isinstance(kept, Mapping) and kept.get(KIND) == 'masks':
        size = list(kept['shape'][1:])
        masks = [dict(size=size, counts=text) for text in kept['counts']]
    order = np.argsort(-scores, kind='stable')
    return Objects(boxes, labels, scores, masks).take(order)
