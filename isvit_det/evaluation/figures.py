"""Figures: the values that metrics return, their units, and their display."""
import math
import re
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from mmdet.evaluation import CocoMetric, OpenImagesMetric, VOCMetric

from isvit_det.core.plain import plain
from isvit_det.evaluation.tasks import Task

# Metrics that return fractions of 1, and the names of these. Others return
# percent (CocoPanopticMetric, SemSegMetric), or values of unknown unit.
FRACTIONAL = (CocoMetric, VOCMetric, OpenImagesMetric)
FRACTION = re.compile(r'((bbox|segm|proposal)_)?(m?AP|AR|recall)[\w@.]*|'
                      r'.*_precision')
# Methods of a metric that compute its figures.
MEASURES = ('compute_metrics', 'evaluate')
PRECISIONS = ('bbox_mAP', 'segm_mAP', 'bbox_AP', 'segm_AP')
# Most columns of a table for figures other than box and mask AP.
NUM_COLUMNS = 6


def fractions(metrics: Mapping[str, Any], tasks: Sequence[Task]) -> List[str]:
    """Names of the figures that are fractions of 1.

    This depends on the classes of the metrics and not on the values, so that
    the figures of the float and of the quantized model have the same unit.

    Args:
        metrics: of an evaluator.
        tasks: its metrics.
    """
    return [
        name for name, value in metrics.items()
        if is_number(value) and _is_precision(name, tasks, _is_fractional)
    ]


def _is_precision(name: str, tasks: Sequence[Task],
                  fits: Callable[[Any], bool]) -> bool:
    """Whether the name is one of a fraction, and ``fits`` all its metrics."""
    owners = [task for task in tasks if task.owns(name)]
    return bool(owners) and all(
        fits(task.metric) and FRACTION.fullmatch(name[len(task.prefix):])
        for task in owners)


def _is_fractional(metric: Any) -> bool:
    """Whether MMDetection's own code computes the fractions of a metric.

    A subclass of one of its metrics may compute percent or other values.
    """
    places = [getattr(type(metric), name).__module__ for name in MEASURES]
    return isinstance(metric, FRACTIONAL) and all(
        place.split('.')[0] in ('mmdet', 'mmengine') for place in places)


def is_number(value: Any) -> bool:
    """Whether a figure is a number.

    >>> is_number(.5), is_number('a'), is_number(True)
    (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def raw(metrics: Mapping[str, Any]) -> Dict[str, Any]:
    """The figures of an evaluator as plain values.

    NaN and infinite values, which JSON does not have, become None.

    >>> raw({'coco/bbox_mAP_s': -1., 'seg/mIoU': float('nan')})
    {'coco/bbox_mAP_s': -1.0, 'seg/mIoU': None}
    """
    return {
        name: None if is_number(value) and not math.isfinite(value) else value
        for name, value in plain(metrics).items()
    }


def gaps(metrics: Mapping[str, Any], tasks: Sequence[Task],
         nothing: Sequence[Task]) -> List[str]:
    """Names of the figures for which there was nothing to measure.

    COCO's evaluation returns -1 for them, others return NaN.

    Args:
        metrics: of ``raw``.
        tasks: the metrics of the evaluator.
        nothing: those that are known to have nothing to measure.
    """
    names = []
    for name, value in metrics.items():
        owners = [task for task in tasks if task.owns(name)]
        known = owners and all(task in nothing for task in owners)
        # A subclass of CocoMetric may return this value unchanged.
        if value is None or known or (value == -1 and _is_precision(
                name, tasks, lambda metric: isinstance(metric, FRACTIONAL))):
            names.append(name)
    return names


def explain_gaps(results: Mapping[str, Mapping[str, Any]],
                 nothing: Sequence[Task]) -> List[str]:
    """Sentences on figures that are missing.

    Args:
        results: of the models that were evaluated, by name.
        nothing: metrics for which the reason is known.
    """
    notes = []
    for model in ('float', 'quantized'):
        each = results.get(model)
        if each is None:
            continue
        if each['detections'] == 0:
            notes.append(f'{model}: nothing was detected')
        names = [
            name for name in each['gaps']
            if not any(task.owns(name) for task in nothing)
        ]
        if names:
            more = f' and {len(names) - 6} more' if len(names) > 6 else ''
            notes.append(
                f'nothing to measure for {", ".join(names[:6])}{more}: no '
                'annotation that counts is of that kind')
    return list(dict.fromkeys(notes))


def average_precision(metrics: Optional[Mapping[str, Any]],
                      kind: str) -> Optional[float]:
    """AP of ``'bbox'`` or ``'segm'`` as a fraction, None if it is missing.

    MMDetection returns no AP if nothing was detected.
    """
    name = precision_name(metrics or {}, kind)
    value = None if name is None else (metrics or {})[name]
    return None if value is None or value < 0 else float(value)


def precision_name(metrics: Mapping[str, Any], kind: str) -> Optional[str]:
    """Name of the first figure that is COCO's or LVIS's AP.

    >>> precision_name({'coco/bbox_mAP': .5}, 'bbox')
    'coco/bbox_mAP'
    """
    for name in metrics:
        if name.split('/')[-1] in (f'{kind}_mAP', f'{kind}_AP'):
            return name
    return None


def in_points(fraction: Optional[float]) -> str:
    """AP in points, as text.

    >>> in_points(.4567), in_points(None), in_points(-1.)
    ('45.7', '-', '-')
    """
    # COCO's evaluation returns -1 if there was nothing to measure.
    if fraction is None or fraction < 0:
        return '-'
    return f'{100 * fraction:.1f}'


class Figures:
    """The figures of the float and of the quantized model.

    Args:
        results: result of each model, empty if it was not evaluated.

    Attributes:
        names: of all figures.
        columns: titles of the figures that a table shows, and their names.
            Box and mask AP come first.
        rest: names of the figures that have no column.
    """

    def __init__(self, *results: Mapping[str, Any]) -> None:
        self.results = results
        self.names: List[str] = []
        for each in results:
            self.names += [n for n in _shown(each) if n not in self.names]
        # AP in another unit is shown under its own name.
        every = dict.fromkeys(
            name for name in self.names if any(
                name in each.get('fractions', ()) for each in results))
        split = any(each.get('split') for each in results)
        self.columns: Dict[str, str] = {}
        for kind, title in (('bbox', 'box AP'), ('segm', 'mask AP')):
            name = None if split else precision_name(every, kind)
            if name is not None:
                self.columns[title] = name
        others = [name for name in self.names if not self._is_detail(name)]
        for name in others[:NUM_COLUMNS]:
            self.columns[name] = name
        if not self.columns:
            self.columns['box AP'] = ''
        self.rest = [
            name for name in self.names if name not in self.columns.values()
        ]

    def _is_detail(self, name: str) -> bool:
        """Whether a figure has a column, or is a detail of an AP."""
        if name in self.columns.values() or name.endswith('_precision'):
            return True
        whole = [one for one in self.names if one.endswith(PRECISIONS)]
        return any(name != one and name.startswith(one[:one.rindex('_')])
                   for one in whole)

    def cell(self, result: Mapping[str, Any], name: str) -> Optional[str]:
        """A figure of one of the models; fractions are shown in points."""
        value = _shown(result).get(name)
        if isinstance(value, str):
            return value
        if not is_number(value):
            return None
        if name in result.get('fractions', ()):
            return in_points(value)
        return f'{value:.4g}'

    def list_rest(self) -> List[str]:
        """Lines that show the figures without a column, float first."""
        cells = [['', 'float', 'quantized']]
        cells += [[
            name, *(self.cell(each, name) or '-' for each in self.results)
        ] for name in self.rest]
        widths = [max(map(len, column)) for column in zip(*cells)]
        return [
            '  '.join([
                row[0].ljust(widths[0]),
                *(cell.rjust(width)
                  for cell, width in zip(row[1:], widths[1:]))
            ]) for row in cells
        ]


def _shown(result: Mapping[str, Any]) -> Dict[str, Any]:
    """Figures of the images that were predicted."""
    every = {**(result.get('metrics') or {}), **(result.get('part') or {})}
    return {**every, **dict.fromkeys(result.get('gaps', ()))}
