"""Measures of what low bits change, and how sure their figures are."""
import math
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import torch
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from scipy.stats import spearmanr
from torch import Tensor

from isvit_det.core.errors import QuantError
from isvit_det.evaluation.predictions import decode, encode
from isvit_det.report.tables import relative_errors

# From the cheapest to the most costly.
MEASURES = ('features', 'detections', 'ap')
# Parts of the images, of whose APs the spread is taken.
FOLDS = 5
# Half the width of a 95 % interval in standard errors.
WIDTH = 1.96


class Figure(NamedTuple):
    """A mean with its standard error.

    Attributes:
        value: the mean over images, or AP on all of them.
        error: its standard error; None where one image says nothing of it.
    """
    value: float
    error: Any = None

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Figure':
        """The mean of independent values.

        >>> Figure.of([1., 3.])
        Figure(value=2.0, error=1.0)
        """
        num = len(values)
        mean = math.fsum(values) / num
        if num == 1:
            return cls(mean)
        spread = math.fsum((x - mean)**2 for x in values) / (num - 1)
        return cls(mean, math.sqrt(spread / num))


def feature_error(expected: Sequence[Tensor],
                  found: Sequence[Tensor]) -> float:
    """Squared error relative to the squared norm, mean over maps."""
    errors = [
        relative_errors(other[:1], one[:1])[0]
        for one, other in zip(expected, found)
    ]
    return float(torch.stack(errors).mean())


class SubsetAP:
    """Box and mask AP on images of a data set in COCO's format.

    Args:
        picks: data set and index of each image, of ``CalibrationImages``.
        masks: whether there are masks.

    Raises:
        QuantError: if the images are not of one annotation file.
    """

    def __init__(self, picks: Sequence[Tuple[Any, int]], masks: bool) -> None:
        sets = {id(dataset): dataset for dataset, _ in picks}
        files = {
            getattr(dataset, 'ann_file', None)
            for dataset in sets.values()
        }
        first = next(iter(sets.values()))
        if len(files) > 1 or not isinstance(first, CocoDataset):
            raise QuantError(
                "ap: the training images are not of one CocoDataset, whose "
                "annotations AP needs; take --measure detections.")
        self.metric = CocoMetric(
            ann_file=first.ann_file,
            metric=['bbox', 'segm'] if masks else ['bbox'])
        self.metric.dataset_meta = first.metainfo
        self.masks = masks

    def results(self, samples: Sequence[Any]) -> List[Any]:
        """What the metric keeps of samples in the form of ``kept``."""
        self.metric.results.clear()
        self.metric.process({}, [decode(sample) for sample in samples])
        found = list(self.metric.results)
        self.metric.results.clear()
        return found

    def measure(self, results: Sequence[Any]) -> Dict[str, float]:
        """AP in points, by kind, on the images of some results."""
        if not results:
            return {}
        self.metric.img_ids = [truth['img_id'] for truth, _ in results]
        found = self.metric.compute_metrics(list(results))
        kinds = ('bbox', 'segm') if self.masks else ('bbox', )
        # -1 where there is nothing to find.
        return {
            kind: 100 * max(0., float(found.get(f'{kind}_mAP', 0.)))
            for kind in kinds
        }

    def loss(self, before: Sequence[Any], after: Sequence[Any]) -> Figure:
        """Points of box AP lost, with the spread over parts of the images.

        Args:
            before: of ``results``.
            after: likewise, of the same images.
        """

        def change(part: slice) -> float:
            one, other = (self.measure(all[part]) for all in (before, after))
            return one['bbox'] - other['bbox']

        whole = change(slice(None))
        if len(before) < 2 * FOLDS:
            return Figure(whole)
        folds = [change(slice(fold, None, FOLDS)) for fold in range(FOLDS)]
        return Figure(whole, Figure.of(folds).error)


def kept(sample: Any) -> Any:
    """A prediction in plain values, for a file and for ``SubsetAP``."""
    whole = sample.to_dict()
    return encode(
        {key: whole[key]
         for key in ('img_id', 'ori_shape', 'pred_instances')})


def rank_correlation(one: Sequence[float],
                     other: Sequence[float]) -> Dict[str, Any]:
    """Spearman's rank correlation, with a 95 % interval by Fisher's z.

    Args:
        one: values of one measure, by part.
        other: values of another one, of the same parts.

    Returns:
        ``value``, ``low`` and ``high``; None where there are too few parts.
    """
    num = len(one)
    if num < 4 or len(set(one)) < 2 or len(set(other)) < 2:
        return dict(value=None, low=None, high=None, parts=num)
    value = float(spearmanr(one, other).statistic)
    # Fieller's variance of Fisher's z for ranks.
    width = WIDTH * math.sqrt(1.06 / (num - 3))
    z = math.atanh(max(-.999999, min(.999999, value)))
    return dict(
        value=value,
        low=math.tanh(z - width),
        high=math.tanh(z + width),
        parts=num)


def means(rows: Sequence[Mapping[str, float]]) -> Dict[str, Figure]:
    """The figure of each measure that all rows have."""
    names: List[str] = [
        name for name in MEASURES if all(name in row for row in rows)
    ]
    return {name: Figure.of([row[name] for row in rows]) for name in names}
