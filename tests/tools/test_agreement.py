"""Classes, heads, images and annotations that do not belong together."""
import json
import logging

import pytest
import torch

from isvit_det.commands.quantize_det import main
from isvit_det.datasets.drawing import CLASSES


@pytest.fixture
def refuse(tiny, tmp_path, capfd, monkeypatch):
    """Run a changed config that must be refused; what its one line says."""
    # MMEngine's logger keeps the stream that pytest gave an earlier test.
    monkeypatch.setattr(logging, 'raiseExceptions', False)

    def run(change, checkpoint=tiny.checkpoint):
        changed = tiny.variant(tmp_path / 'changed.py', change)
        argv = ['--work-dir', str(tmp_path / 'work'), '--method', 'minmax']
        assert main([changed, str(checkpoint), *argv]) == 2
        captured = capfd.readouterr()
        assert 'Traceback (most recent call last)' not in captured.err
        line, = (
            line for line in captured.err.splitlines()
            if line.startswith('error: '))
        # Refused before anything expensive was done.
        assert 'evaluating the' not in captured.out
        return line

    return run


def set_evaluator(evaluator):

    def change(cfg):
        cfg.test_evaluator = evaluator

    return change


def name_classes(*names):

    def change(cfg):
        cfg.test_dataloader.dataset.metainfo = dict(classes=names)

    return change


@pytest.fixture
def truth(tiny, tmp_path):
    """The evaluator counts against a changed annotation file."""

    def point(change, everywhere=False):
        source = tiny.data / 'annotations/instances_val.json'
        content = json.loads(source.read_text())
        change(content)
        path = tmp_path / 'truth.json'
        path.write_text(json.dumps(content))

        def use(cfg):
            cfg.test_evaluator.ann_file = str(path)
            if everywhere:
                cfg.test_dataloader.dataset.ann_file = str(path)

        return use

    return point


def test_a_class_that_is_misspelt(refuse):
    wrong = f'{CLASSES[-1]}s'
    line = refuse(name_classes(*CLASSES[:-1], wrong))
    assert repr(wrong) in line and f'is it {CLASSES[-1]!r}?' in line
    assert 'instances_val.json' in line


@pytest.mark.parametrize('names', [CLASSES[:3], CLASSES[::-1][1:]])
def test_classes_that_are_missing(refuse, names):
    line = refuse(name_classes(*names))
    assert f'{len(names)} classes' in line and 'num_classes=10' in line
    assert 'roi_head.bbox_head' in line


def test_a_class_that_is_given_twice(refuse):
    line = refuse(name_classes(*CLASSES[:-1], CLASSES[0]))
    assert 'twice' in line


def drop_category(content):
    del content['categories'][3]


def swap_categories(content):
    content['categories'].reverse()


def test_an_evaluator_with_other_categories(refuse, truth):
    line = refuse(truth(drop_category))
    assert 'truth.json' in line and repr(CLASSES[3]) in line
    line = refuse(truth(swap_categories))
    assert 'truth.json' in line and 'label 0' in line


def test_an_evaluator_with_other_images(refuse, truth):
    line = refuse(truth(lambda content: content['images'].pop()))
    assert 'truth.json has no image of id 4' in line and '1 of 4' in line

    def rename(content):
        content['images'][0]['file_name'] = 'other.png'

    line = refuse(truth(rename))
    assert 'truth.json' in line and 'other' in line and '000001.png' in line


@pytest.mark.parametrize('part, key', [
    ('annotations', 'area'),
    ('annotations', 'bbox'),
    ('annotations', 'iscrowd'),
    ('annotations', 'segmentation'),
    ('annotations', 'image_id'),
    ('images', 'id'),
    ('images', 'height'),
    ('categories', 'name'),
])
def test_entries_that_lack_what_is_counted(refuse, truth, part, key):

    def change(content):
        for entry in content[part][1:]:
            del entry[key]

    line = refuse(truth(change))
    assert 'truth.json' in line and f'no {key!r}' in line
    assert f'{part}[1]' in line


def test_annotations_that_are_no_coco(refuse, truth, tmp_path):
    line = refuse(truth(lambda content: content.pop('images')))
    assert "truth.json has no 'images'" in line
    use = truth(lambda content: None)
    (tmp_path / 'truth.json').write_text('{"images": [')
    assert 'truth.json: it is no JSON' in refuse(use)


def test_no_annotation_file(refuse):
    line = refuse(lambda cfg: cfg.test_evaluator.update(ann_file=None))
    assert 'test_evaluator.ann_file: CocoMetric has none' in line


def test_no_evaluator(refuse):
    for nothing in (None, [], {}):
        line = refuse(set_evaluator(nothing))
        assert 'test_evaluator' in line


def test_an_evaluator_that_measures_nothing(refuse, tmp_path):
    line = refuse(lambda cfg: cfg.test_evaluator.update(
        format_only=True, outfile_prefix=str(tmp_path / 'formatted')))
    assert 'CocoMetric measures nothing' in line
    assert not list(tmp_path.glob('formatted*'))


def test_an_unknown_figure(refuse):
    line = refuse(lambda cfg: cfg.test_evaluator.update(metric_items=['AP']))
    assert "test_evaluator.metric_items=['AP']: CocoMetric cannot" in line
    assert '"AP" is not supported' in line


def test_what_a_metric_needs_and_the_detector_does_not_give(refuse):
    line = refuse(set_evaluator(dict(type='SemSegMetric', prefix='seg')))
    assert "SemSegMetric cannot score" in line and 'pred_sem_seg' in line


def test_no_image_at_all(refuse):
    line = refuse(lambda cfg: cfg.test_dataloader.dataset.update(indices=0))
    assert 'no image is evaluated' in line


def test_masks_of_a_detector_without(refuse, tiny, tmp_path):
    content = torch.load(tiny.checkpoint, weights_only=True)
    content['state_dict'] = {
        key: value
        for key, value in content['state_dict'].items() if 'mask' not in key
    }
    torch.save(content, tmp_path / 'boxes.pth')

    def change(cfg):
        cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)

    line = refuse(change, tmp_path / 'boxes.pth')
    assert "'segm' needs masks" in line and "metric='bbox'" in line
