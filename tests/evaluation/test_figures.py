"""Figures are shown in the units that their metrics have."""
import json

import pytest
from mmdet.evaluation import CocoMetric, SemSegMetric, VOCMetric
from mmengine.evaluator import BaseMetric

from isvit_det.evaluation.figures import (Figures, average_precision,
                                          explain_gaps, fractions, gaps, raw)
from isvit_det.evaluation.tasks import Task


class Own(BaseMetric):
    """A metric that MMDetection does not have."""
    default_prefix = 'own'

    def process(self, data_batch, data_samples):
        pass

    def compute_metrics(self, results):
        return {}


TASKS = [
    Task(CocoMetric(), {}, 'coco/', None),
    Task(VOCMetric(), {}, 'pascal_voc/', None),
    Task(SemSegMetric(prefix='seg'), {}, 'seg/', None),
    Task(Own(), {}, 'own/', None),
]
METRICS = {
    'coco/bbox_mAP': .5,
    'coco/bbox_mAP_50': .75,
    'coco/bbox_mAP_s': -1.,
    'coco/a/b_precision': float('nan'),
    'coco/AR@100': .25,
    'pascal_voc/AP50': .8,
    'seg/mIoU': .9,
    'own/mAP': .4,
    'own/depth': -1.,
    'own/rate': float('inf'),
    'own/word': 'good'
}


def found(metrics, **more):
    shown = raw(metrics)
    return dict(
        dict(
            metrics=shown,
            fractions=fractions(shown, TASKS),
            gaps=gaps(shown, TASKS, []),
            part=None,
            detections=3,
            split=False), **more)


def test_fractions_are_those_of_metrics_that_give_fractions():
    assert fractions(METRICS, TASKS) == [
        'coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/bbox_mAP_s',
        'coco/a/b_precision', 'coco/AR@100', 'pascal_voc/AP50'
    ]


def test_minus_one_and_nan_are_no_figures_and_the_rest_is_raw():
    shown = raw(METRICS)
    gone = {'coco/bbox_mAP_s', 'coco/a/b_precision', 'own/rate'}
    assert set(gaps(shown, TASKS, [])) == gone
    # As MMDetection has it, where JSON can say it.
    assert shown['coco/bbox_mAP_s'] == -1
    assert all(shown[name] == METRICS[name] for name in METRICS.keys() - gone)
    json.dumps(shown, allow_nan=False)


def test_a_metric_with_nothing_to_measure_has_no_figures():
    found = gaps(raw(METRICS), TASKS, [TASKS[1]])
    assert 'pascal_voc/AP50' in found and 'coco/bbox_mAP' not in found


@pytest.mark.parametrize('name, cell', [
    ('coco/bbox_mAP', '50.0'),
    ('coco/bbox_mAP_s', None),
    ('pascal_voc/AP50', '80.0'),
    ('seg/mIoU', '0.9'),
    ('own/mAP', '0.4'),
    ('own/depth', '-1'),
    ('own/word', 'good'),
    ('missing', None),
])
def test_only_fractions_are_shown_in_points(name, cell):
    each = found(METRICS)
    assert Figures(each).cell(each, name) == cell


def test_box_and_mask_ap_come_first_and_the_rest_is_listed():
    unquantized = found({
        'own/a': 1.,
        'coco/segm_mAP': .4,
        'coco/bbox_mAP': .5,
        'coco/bbox_mAP_50': .6
    })
    quantized = found({'own/a': 2., 'coco/bbox_mAP': .3})
    figures = Figures(unquantized, quantized)
    assert list(figures.columns) == ['box AP', 'mask AP', 'own/a']
    assert figures.list_rest() == [
        '                  float  quantized',
        'coco/bbox_mAP_50   60.0          -'
    ]


def test_what_has_no_ap_beside_it_has_columns_of_its_own():
    figures = Figures({}, found({'coco/bbox_mAP_50': .5, 'own/a': 1}))
    assert list(figures.columns) == ['coco/bbox_mAP_50', 'own/a']


def test_ap_of_several_data_sets_is_not_one_number():
    each = found({'a/coco/bbox_mAP': .5, 'b/coco/bbox_mAP': .4}, split=True)
    assert list(
        Figures(each).columns) == ['a/coco/bbox_mAP', 'b/coco/bbox_mAP']


def test_figures_of_the_images_predicted_are_shown():
    each = found({'coco/bbox_mAP': .1}, part={'coco/bbox_mAP': .6})
    assert Figures(each).cell(each, 'coco/bbox_mAP') == '60.0'


def test_ap_is_none_where_there_was_nothing_to_measure():
    assert average_precision({'coco/bbox_mAP': -1.}, 'bbox') is None
    assert average_precision({'coco/bbox_mAP': None}, 'bbox') is None
    assert average_precision({'lvis/segm_AP': .5}, 'segm') == .5
    assert average_precision({}, 'segm') is None


def test_gaps_are_explained_once():
    each = found({'coco/bbox_mAP_s': -1.}, detections=0)
    notes = explain_gaps(dict(float=each, quantized=each), [])
    assert notes[0] == 'float: nothing was detected'
    assert sum('coco/bbox_mAP_s' in note for note in notes) == 1
    assert len(explain_gaps(dict(float=found({})), TASKS)) == 0


class Percent(CocoMetric):
    """A class made from CocoMetric, with another unit."""

    def compute_metrics(self, results):
        return {}


class Renamed(CocoMetric):
    """A class made from CocoMetric that measures as it does."""

    def process(self, data_batch, data_samples):
        pass


def test_the_class_alone_decides_what_is_a_fraction():
    """Percent below 1 are not taken for a fraction."""

    def shown(kind, value):
        task = Task(kind(), {}, 'coco/', None)
        values = {'coco/bbox_mAP': value, 'coco/bbox_mAP_l': -1.}
        each = dict(
            metrics=values,
            fractions=fractions(values, [task]),
            gaps=gaps(values, [task], []))
        figures = Figures(each)
        column, = figures.columns
        assert each['gaps'] == ['coco/bbox_mAP_l']
        return column, figures.cell(each, 'coco/bbox_mAP')

    assert shown(Percent, 86.8) == ('coco/bbox_mAP', '86.8')
    assert shown(Percent, .6) == ('coco/bbox_mAP', '0.6')
    assert shown(CocoMetric, .6) == ('box AP', '60.0')
    assert shown(Renamed, .6) == ('box AP', '60.0')
