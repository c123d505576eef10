"""Pictures for the report: an image, and what to draw over it."""
import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from isvit_det.page.detections import Objects, Prediction
from isvit_det.page.disagreement import compare, right_ones, shown
from isvit_det.page.truth import Truth

# Longest side of a picture in pixels.
MAX_SIDE = 720
QUALITY = 82
# Outlines of masks are simplified by this many pixels of the picture.
TOLERANCE = .7


@dataclass
class Shape:
    """An object to draw, in pixels of the picture.

    Attributes:
        mark: how it is drawn: ``'truth'``, ``'same'``, ``'lost'``, ...
        box: left, top, width, height.
        outline: of the mask, as the commands of an SVG path; may be ''.
        label: name of the class.
        score: None for an annotated object.
        is_right: whether there is such an object; None if that is unknown.
    """
    mark: str
    box: List[float]
    outline: str
    label: str
    score: Optional[float] = None
    is_right: Optional[bool] = None


@dataclass
class Panel:
    """What one model, or the ground truth, has on a picture."""
    title: str
    kind: str
    shapes: List[Shape]


@dataclass
class Picture:
    """An image with its panels.

    Attributes:
        name: of the file.
        width: in pixels.
        height: in pixels.
        source: the image as an address with its data, or '' if it cannot be
            read.
        caption: what differs.
        score: of the disagreement.
        panels: ground truth first, if there is one.
    """
    name: str
    width: int
    height: int
    source: str
    caption: str
    score: Optional[float]
    panels: List[Panel] = field(default_factory=list)


def make_picture(prediction: Prediction, truth: Optional[Truth], image: Any,
                 models: Dict[str,
                              Objects], classes: Sequence[str]) -> Picture:
    """The picture of an image with what models detect on it.

    Args:
        prediction: of any of the models, for the file and its size.
        truth: ground truth, if there is one.
        image: id of the image.
        models: detections by the title of the model. The first is compared
            with each of the others.
        classes: names by label.
    """
    height, width = (int(side) for side in prediction.size)
    scale = min(1., MAX_SIDE / max(height, width, 1))
    there = None if truth is None else truth.images.get(image)
    (title, first), *others = models.items()
    panels: List[Panel] = []
    score: Optional[float] = None
    captions: List[str] = []

    def panel(name: str, kind: str, objects: Objects,
              marks: Sequence[str]) -> Panel:
        return Panel(name, kind, _shapes(objects, marks, scale, classes,
                                         there))

    if there is not None:
        panels.append(
            panel('ground truth', 'truth', there, ['truth'] * len(there)))
    if not others:
        kept = shown(first)
        panels.append(panel(title, 'alone', kept, ['same'] * len(kept)))
    for place, (name, objects) in enumerate(others):
        found = compare(first, objects)
        if place == 0:
            # With several others, the first model has no marks of its own.
            marks = (
                found.before_marks if len(others) == 1 else ['same'] *
                len(found.before))
            panels.append(panel(title, 'before', found.before, marks))
        score = max(score or 0., found.score)
        of_whom = f'{name}: ' if len(others) > 1 else ''
        captions.append(of_whom + found.describe())
        panels.append(panel(name, 'after', found.after, found.after_marks))
    width, height = round(width * scale), round(height * scale)
    return Picture(
        Path(prediction.path).name or str(image), width, height,
        _encode(prediction.path, width, height), '; '.join(captions), score,
        panels)


def _shapes(objects: Objects, marks: Sequence[str], scale: float,
            classes: Sequence[str], there: Optional[Objects]) -> List[Shape]:
    right = None
    if marks and marks[0] != 'truth':
        right = right_ones(objects, there)
    shapes = []
    for place, mark in enumerate(marks):
        left, top, far, low = (objects.boxes[place] * scale).round(1).tolist()
        label = int(objects.labels[place])
        name = classes[label] if label < len(classes) else f'class {label}'
        outline = ''
        if objects.masks is not None:
            outline = trace(objects.masks[place], scale)
        is_annotated = mark == 'truth'
        shapes.append(
            Shape(mark, [left, top,
                         max(far - left, 0.),
                         max(low - top, 0.)], outline, str(name),
                  None if is_annotated else float(objects.scores[place]),
                  None if right is None else right[place]))
    return shapes


def trace(mask: Dict[str, Any], scale: float) -> str:
    """The outline of a mask as the commands of an SVG path.

    >>> square = np.zeros((4, 4), np.uint8, order='F')
    >>> square[1:3, 1:3] = 1
    >>> trace(coco_mask.encode(square), 1.)
    'M1.5 1.5L1.5 2.5L2.5 2.5L2.5 1.5Z'
    """
    pixels = coco_mask.decode(mask)
    contours, _ = cv2.findContours(pixels, cv2.RETR_CCOMP,
                                   cv2.CHAIN_APPROX_SIMPLE)
    commands = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, TOLERANCE / scale, True)[:, 0]
        if len(points) > 2:
            # Contours go through the centres of pixels.
            commands.append('M' + 'L'.join(f'{x:g} {y:g}' for x, y in (
                (points + .5) * scale).round(1)) + 'Z')
    return ''.join(commands)


def _encode(path: str, width: int, height: int) -> str:
    """An image as an address with its data; '' if it cannot be read."""
    try:
        content = np.fromfile(path, np.uint8)
        pixels: Any = cv2.imdecode(content, cv2.IMREAD_COLOR)
        pixels = cv2.resize(
            pixels, (max(width, 1), max(height, 1)),
            interpolation=cv2.INTER_AREA)
        done, encoded = cv2.imencode('.jpg', pixels,
                                     [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    except (OSError, ValueError, cv2.error):
        return ''
    if not done:
        return ''
    data = base64.b64encode(encoded.tobytes()).decode()
    return f'data:image/jpeg;base64,{data}'
