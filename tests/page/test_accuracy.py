"""AP in parts, kinds of errors, and disagreement, on made detections."""
import dataclasses

import numpy as np
import pytest

from isvit_det.page.breakdown import break_down
from isvit_det.page.detections import Objects, Prediction, read_predictions
from isvit_det.page.disagreement import choose, compare
from isvit_det.page.error_kinds import KINDS, find_error_kinds
from isvit_det.page.pictures import trace
from isvit_det.page.truth import read_truth
from tests.page.made import (HEIGHT, WIDTH, detections, encoded_square,
                             make_result, make_truth, write_predictions)

CLASSES = ('cat', 'dog')


def objects(*entries, masks=None):
    """Objects of (left, top, right, bottom, label, score)."""
    table = np.array(entries, float).reshape(-1, 6)
    return Objects(table[:, :4], table[:, 4].astype(int), table[:, 5], masks)


def predicted(found):
    return Prediction('', (HEIGHT, WIDTH), found)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Ground truth, and detections of several qualities as read from disk."""
    folder = tmp_path_factory.mktemp('truth')
    content = make_truth(folder, CLASSES)
    truth, reason = read_truth(
        make_result(folder, CLASSES)['truth'], {1, 2, 3, 4})
    assert reason == ''
    models = {}
    for name, change in (('right', {}), ('moved', dict(move=5)),
                         ('fewer', dict(drop=2)), ('none', dict(drop=9))):
        found = {
            image:
            detections([
                one
                for one in content['annotations'] if one['image_id'] == image
            ], **change)
            for image in (1, 2, 3, 4)
        }
        write_predictions(folder, name, folder, found)
        models[name] = read_predictions(folder / 'predictions', name, 'key')
    return truth, models


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_perfect_detections_have_an_ap_of_one(made, kind):
    truth, models = made
    found = break_down(truth, models['right'], kind)
    assert found.ap == pytest.approx(1)
    assert found.by_class == pytest.approx([1, 1])
    assert found.by_threshold == pytest.approx(np.ones(10))
    assert found.recall == pytest.approx([1, 1])
    assert np.isnan(found.by_size['large'])


def test_moved_boxes_are_found_up_to_their_iou(made):
    truth, models = made
    found = break_down(truth, models['moved'], 'bbox')
    # 18 pixels wide, moved by 5: IoU 13 / 23 = .565.
    assert found.by_threshold == pytest.approx([1, 1] + 8 * [0])
    assert found.ap == pytest.approx(.2)
    assert found.precision['0.50'].max() == 1
    assert found.precision['0.75'].max() == 0


def test_no_detection_has_an_ap_of_zero(made):
    truth, models = made
    found = break_down(truth, models['none'], 'bbox')
    assert found.ap == 0 and found.recall.tolist() == [0, 0]


def test_the_order_of_labels_is_kept(tmp_path):
    """Categories whose ids are not in the order of the labels."""
    content = make_truth(tmp_path, CLASSES)
    result = make_result(tmp_path, CLASSES)
    entry = dict(result['truth'][0], classes=['dog', 'cat'], cat_ids=[11, 10])
    truth, _ = read_truth([entry], {1})
    only = [one for one in content['annotations'] if one['image_id'] == 1]
    # Of label 0, which is dog: all objects of category 11.
    found = [
        dict(one, label=0) for one, there in zip(detections(only), only)
        if there['category_id'] == 11
    ]
    write_predictions(tmp_path, 'dogs', tmp_path, {1: found})
    parts = break_down(
        truth, read_predictions(tmp_path / 'predictions', 'dogs', 'key'),
        'bbox')
    assert parts.by_class == pytest.approx([1, 0])


def test_ap_at_half_is_that_of_pycocotools(made):
    truth, models = made
    for name in ('right', 'moved', 'fewer', 'none'):
        kinds = find_error_kinds(truth, models[name])
        parts = break_down(truth, models[name], 'bbox')
        assert kinds.ap == pytest.approx(parts.by_threshold[0], abs=1e-9)


# An object of class 0 at (0, 0, 20, 20), and one of class 1 far from it.
THERE = objects((0, 0, 20, 20, 0, 1), (50, 30, 70, 50, 1, 1))
FIRST = (0, 0, 20, 20, 0, .9)
SECOND = (50, 30, 70, 50, 1, .9)


def errors(truth, *found, crowd=(False, False)):
    """Kinds of errors of detections where ``THERE`` is annotated."""
    there = dataclasses.replace(THERE, crowd=np.array(crowd))
    truth = dataclasses.replace(truth, images={1: there})
    return find_error_kinds(truth, {1: predicted(objects(*found))})


@pytest.mark.parametrize('kind, found', [
    ('classification', [(0, 0, 20, 20, 1, .95), SECOND]),
    ('localisation', [(10, 0, 30, 20, 0, .95), SECOND]),
    ('both', [FIRST, SECOND, (10, 0, 30, 20, 1, .95)]),
    ('duplicate', [FIRST, SECOND, (0, 0, 19, 20, 0, .8)]),
    ('background', [FIRST, SECOND, (0, 40, 9, 50, 0, .95)]),
    ('missed', [FIRST]),
])
def test_each_kind_of_error_is_told_and_costs_something(made, kind, found):
    kinds = errors(made[0], *found)
    assert {key for key, num in kinds.counts.items() if num} == {kind}
    assert kinds.counts[kind] == 1
    # A duplicate below all that is right costs nothing.
    if kind != 'duplicate':
        assert kinds.ap + kinds.costs[kind] == pytest.approx(1)
        assert kinds.costs[kind] > 0
    assert all(kinds.costs[key] == 0 for key in KINDS if key != kind)


def test_detections_of_a_crowd_are_no_errors(made):
    kinds = errors(made[0], (2, 2, 8, 8, 0, .9), SECOND, crowd=(True, False))
    assert not any(kinds.counts.values()) and kinds.ap == 1


def test_a_model_does_not_disagree_with_itself():
    found = compare(objects(FIRST, SECOND), objects(FIRST, SECOND))
    assert found.score == 0
    assert found.before_marks == found.after_marks == ['same', 'same']


def test_what_disagreement_consists_of():
    one = objects(FIRST, SECOND)
    lost = compare(one, objects(FIRST))
    assert lost.score == pytest.approx(.9)
    assert lost.before_marks == ['same', 'lost'
                                 ] and lost.describe() == '1 lost'
    turned = compare(objects(FIRST), one)
    assert turned.score == lost.score
    assert turned.after_marks == ['same', 'found']
    named = compare(objects(FIRST), objects((0, 0, 20, 20, 1, .8)))
    assert named.before_marks == named.after_marks == ['class']
    assert named.score == pytest.approx(1.7)
    moved = compare(objects(FIRST), objects((5, 0, 25, 20, 0, .9)))
    assert moved.before_marks == ['moved']
    assert moved.score == pytest.approx(1 - 15 / 25)
    faint = compare(objects((0, 0, 20, 20, 0, .2)), objects())
    assert faint.score == 0


def test_masks_that_differ_count():
    masks = [encoded_square(0, 0, 20)], [encoded_square(0, 0, 10)]
    found = compare(*(objects(FIRST, masks=each) for each in masks))
    assert found.score == pytest.approx(.75)
    assert found.after_marks == ['moved']


def test_images_are_chosen_by_the_model_that_differs_most():
    none, one, two = objects(), objects(FIRST), objects(FIRST, SECOND)
    before = dict(a=one, b=one, c=two, d=none)
    after = dict(a=one, b=none, c=none, d=none)
    before, after = ({
        key: predicted(found)
        for key, found in each.items()
    } for each in (before, after))
    most, least = choose(before, [before, after], 1, 9)
    assert most == ['c']
    # Nothing was detected on d by any model.
    assert least == ['a', 'b']


def test_the_outline_of_a_mask_has_its_holes():
    pixels = encoded_square(10, 10, 20)
    assert trace(pixels, 1.).count('M') == 1
    assert trace(encoded_square(10, 10, 0), 1.) == ''


def test_annotations_without_masks_and_others_that_are_none(tmp_path):
    make_truth(tmp_path, CLASSES, masks=False)
    recorded = make_result(tmp_path, CLASSES)['truth']
    truth, _ = read_truth(recorded, {1})
    assert len(truth.images) == 1 and not truth.has_masks
    (tmp_path / 'truth.json').write_text('[]')
    truth, reason = read_truth(recorded, {1})
    assert truth is None and 'truth.json cannot be used' in reason
