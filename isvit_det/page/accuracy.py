"""The accuracy part of the report: AP in parts, and kinds of errors."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional

import numpy as np
from markupsafe import Markup

from isvit_det.page import plots
from isvit_det.page.breakdown import Breakdown, break_down
from isvit_det.page.detections import Prediction
from isvit_det.page.error_kinds import KINDS, ErrorKinds, find_error_kinds
from isvit_det.page.table import Cell, Table, change, name, number, points
from isvit_det.page.truth import Truth

Predictions = Mapping[Any, Prediction]
TITLES = {'bbox': 'Boxes', 'segm': 'Masks'}
# Rows of a table that are not folded.
LIMIT = 20
# Most images on which errors are sorted, evenly spread.
MAX_IMAGES = 1000


@dataclass
class Kind:
    """AP of boxes or of masks.

    Attributes:
        title: of the section.
        by_size: a table.
        by_class: a table.
        plots: by IoU, and precision by recall.
    """
    title: str
    by_size: Table
    by_class: Table
    plots: List[Markup] = field(default_factory=list)


@dataclass
class Accuracy:
    """What the report says of accuracy.

    Attributes:
        kinds: of boxes, and of masks if there are any.
        errors: table of the kinds of errors; None without ground truth.
        num_images: on which these are counted.
        missing: why there is nothing, or ''.
    """
    kinds: List[Kind] = field(default_factory=list)
    errors: Optional[Table] = None
    num_images: int = 0
    missing: str = ''


def describe_accuracy(models: Mapping[str, Predictions],
                      truth: Optional[Truth]) -> Accuracy:
    """AP in parts of several models on the same images.

    Args:
        models: predictions by title; changes are against the first.
        truth: of the images, if there is one.
    """
    if not models or truth is None:
        return Accuracy(missing='There are no predictions with ground truth.')
    if not truth.coco.anns:
        return Accuracy(
            missing='No object of these classes is annotated on the images: '
            'there is no AP.')
    found = Accuracy()
    if not truth.is_coco:
        found.missing = ('AP in parts is COCO\'s, and this run was measured '
                         'by another metric.')
    for kind in TITLES:
        parts = {
            title: break_down(truth, predictions, kind)
            for title, predictions in models.items()
        }
        known = {key: one for key, one in parts.items() if one is not None}
        if known:
            found.kinds.append(_kind(TITLES[kind], known, truth))
    images = sorted(truth.images)
    chosen = set(images[::max(1, -(-len(images) // MAX_IMAGES))])
    found.errors = _errors({
        title:
        find_error_kinds(
            truth, {
                image: prediction
                for image, prediction in predictions.items() if image in chosen
            })
        for title, predictions in models.items()
    })
    found.num_images = len(chosen)
    return found


def _kind(title: str, parts: Dict[str, Breakdown], truth: Truth) -> Kind:
    curves = {
        key: (one.thresholds, one.by_threshold)
        for key, one in parts.items()
    }
    precision = {
        key: {
            iou: values
            for iou, values in one.precision.items() if iou != '0.90'
        }
        for key, one in parts.items()
    }
    return Kind(
        title, _by_size(parts), _by_class(parts, truth),
        [plots.by_threshold(curves),
         plots.precision_recall(precision)])


def _changes(values: List[float], worst: float = 0.) -> List[Cell]:
    """Cells of a value of each model, and of each change."""
    first, *others = values
    return [points(first)] + [
        cell for value in others
        for cell in (points(value), change(first, value, worst=worst))
    ]


def _columns(parts: Mapping[str, Any]) -> List[str]:
    first, *others = parts
    return [first] + [text for one in others for text in (one, 'change')]


def _by_size(parts: Dict[str, Breakdown]) -> Table:
    first = next(iter(parts.values()))
    rows = [[
        name('all' if size == 'all' else f'{size} objects'),
        *_changes([one.by_size[size] for one in parts.values()])
    ] for size in first.by_size]
    rows += [[
        name(f'all, IoU {value:.2f}'),
        *_changes([one.by_threshold[place] for one in parts.values()])
    ] for place, value in enumerate(first.thresholds)]
    return Table(['AP', *_columns(parts)], rows)


def _by_class(parts: Dict[str, Breakdown], truth: Truth) -> Table:
    """Classes, those that lose most first."""
    every = list(parts.values())
    loss = every[-1].by_class - every[0].by_class
    order = np.argsort(np.where(np.isnan(loss), np.inf, loss), kind='stable')
    known = np.abs(loss[~np.isnan(loss)])
    worst = float(known.max()) if len(known) else 0.
    counts = [0] * len(truth.classes)
    for objects in truth.images.values():
        for label in objects.labels:
            counts[label] += 1
    rows = []
    for label in order:
        rows.append([
            name(truth.classes[label]),
            number(counts[label], 'd'),
            *_changes([one.by_class[label] for one in every], worst),
            *[points(one.recall[label]) for one in every]
        ])
    return Table([
        'class', 'objects', *_columns(parts),
        *[f'recall, {title}' for title in parts]
    ],
                 rows,
                 limit=LIMIT)


def _errors(kinds: Dict[str, ErrorKinds]) -> Table:
    first, *others = kinds.values()
    rows = []
    for kind, meaning in KINDS.items():
        cells = [name(f'{kind}: {meaning}')]
        cells += [number(first.counts[kind], 'd'), points(first.costs[kind])]
        for one in others:
            cells += [
                number(one.counts[kind], 'd'),
                points(one.costs[kind]),
                change(first.costs[kind], one.costs[kind], is_loss=False)
            ]
        rows.append(cells)
    titles = list(kinds)
    columns = ['kind of error']
    columns += [f'{titles[0]}: number', 'costs']
    for title in titles[1:]:
        columns += [f'{title}: number', 'costs', 'change']
    return Table(columns, rows)
