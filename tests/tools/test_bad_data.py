"""Data at fault: one line before the float evaluation, in each split."""
import copy
import json
import logging
import shutil

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from isvit_det.commands.quantize_det import main
from tests.inputs.test_data_errors import Failing


@pytest.fixture
def refuse(tiny, tmp_path, capsys, monkeypatch):
    """Run on changed data that must be refused; what the one line says."""
    monkeypatch.setattr(logging, 'raiseExceptions', False)

    def run(split,
            change=None,
            picture=None,
            early=True,
            argv=(),
            place=1,
            **options):
        data = tmp_path / 'data'
        shutil.copytree(tiny.data, data)
        path = data / f'annotations/instances_{split}.json'
        content = json.loads(path.read_text())
        if change is not None:
            change(content)
            path.write_text(json.dumps(content))
        if picture is not None:
            picture(data / split / content['images'][place]['file_name'])

        def move(cfg):
            for name in ('train', 'test'):
                cfg[f'{name}_dataloader'].dataset.data_root = f'{data}/'
            cfg.test_evaluator.ann_file = str(data /
                                              'annotations/instances_val.json')
            for key, value in options.items():
                cfg.merge_from_dict({key.replace('__', '.'): value})

        config = tiny.variant(tmp_path / 'bad.py', move)
        status = main([
            config, tiny.checkpoint, '--method', 'minmax', '--work-dir',
            str(tmp_path / 'work'), *argv
        ])
        out, err = capsys.readouterr()
        assert status == 2 and 'Traceback' not in err
        line, = (
            line for line in err.splitlines() if line.startswith('error: '))
        # Every picture is still to be predicted.
        assert not early or 'Epoch(test)' not in out
        assert not early or 'iterations per unit' not in out
        # The evaluators' trial is no result.
        assert 'copypaste' not in (out if early else '')
        assert str(data) in line, line
        return line

    return run


def drop(section, key):

    def change(content):
        assert content[section]
        for entry in content[section]:
            entry.pop(key, None)

    return change


@pytest.mark.parametrize('split, section, key', [
    ('train', 'images', 'width'),
    ('train', 'annotations', 'area'),
    ('train', 'annotations', 'segmentation'),
    ('val', 'images', 'file_name'),
    ('val', 'annotations', 'image_id'),
    ('val', 'annotations', 'iscrowd'),
    ('val', 'annotations', 'segmentation'),
])
def test_annotations_that_lack_something(refuse, split, section, key):
    line = refuse(split, drop(section, key))
    assert f"'{key}'" in line and f'{section}[' in line
    assert f'instances_{split}.json' in line


def test_a_train_set_without_crowds_is_fine(tiny, tmp_path):
    path = tiny.data / 'annotations/instances_train.json'
    content = copy.deepcopy(json.loads(path.read_text()))
    drop('annotations', 'iscrowd')(content)
    (tmp_path / 'train.json').write_text(json.dumps(content))
    assert main([
        tiny.config, tiny.checkpoint, '--method', 'minmax', '--no-float-eval',
        '--work-dir', str(tmp_path / 'work'), '--cfg-options',
        f'train_dataloader.dataset.ann_file={tmp_path / "train.json"}'
    ]) == 0  # yapf: disable


def resize(content):
    content['images'][1].update(height=11, width=12)


def test_masks_of_another_size_than_the_image(refuse):
    line = refuse('val', resize)
    assert '000002.png' in line and '11 and 12' in line


def turn_mask(content):
    for entry in content['annotations']:
        height, width = 7, 9
        entry['segmentation'] = dict(
            size=[height, width], counts=[height * width])


def test_masks_that_no_transform_can_read(refuse):
    line = refuse('train', turn_mask)
    assert 'LoadAnnotations' in line and '.png' in line


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    'picture', [
        lambda path: path.write_bytes(b''),
        lambda path: cv2.imwrite(str(path), np.zeros((2000, 1, 3), np.uint8)),
    ],
    ids=['empty', 'needle'])
def test_pictures_that_are_none(refuse, split, picture):
    assert f'{split}/000002.png' in refuse(split, None, picture)


def test_a_needle_is_tried_before_all_others(refuse):

    def narrow(content):
        content['images'][1].update(height=2000, width=1)

    line = refuse(
        'val', narrow,
        lambda path: cv2.imwrite(str(path), np.zeros((2000, 1, 3), np.uint8)))
    assert '1 x 2000' in line and 'Resize' in line


@pytest.mark.parametrize('workers', [0, 2])
def test_a_transform_of_ones_own_fails_in_the_middle(refuse, tiny, workers):
    pipeline = Config.fromfile(tiny.config).test_dataloader.dataset.pipeline
    # Neither the first picture nor the longest one.
    step = dict(type=Failing.NAME, kind='IndexError', at='val/000003.png')
    pipeline.insert(1, step)
    line = refuse(
        'val',
        early=False,
        test_dataloader__dataset__pipeline=pipeline,
        test_dataloader__num_workers=workers)
    assert 'val/000003.png' in line and 'Failing' in line
    assert 'IndexError: custom' in line


def test_every_picture_is_opened_before_calibration(refuse):
    """A damaged one in the middle, without a float evaluation."""
    line = refuse(
        'val',
        picture=lambda path: path.write_bytes(b'<html>404</html>'),
        argv=['--no-float-eval'],
        place=2)
    assert 'val/000003.png' in line and 'LoadImageFromFile' in line


def test_a_mask_far_outside_of_the_last_image(refuse):

    def far(content):
        content['annotations'][-1]['segmentation'] = [[0, 0, 1e9, 0, 1e9, 1e9]]

    line = refuse('val', far)
    assert "'segmentation' [[0, 0, 1" in line and 'image_id 4' in line
