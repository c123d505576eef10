"""The drawn data set: deterministic, varied, whole, and in COCO format."""
import json
import multiprocessing
import os

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from isvit_det.core.errors import QuantError
from isvit_det.datasets import drawn
from isvit_det.datasets.drawing import CLASSES, draw_picture
from isvit_det.datasets.drawn import NUM_PICTURES, SEED, DrawnDataset, generate

SMALL = dict(train=3, val=2)


@pytest.fixture(scope='module')
def val():
    """The whole val split, undrawn to the disk."""
    return [draw_picture((SEED, 1, i)) for i in range(NUM_PICTURES['val'])]


def test_the_val_split_is_large_and_varied(val):
    assert len(val) >= 300 and len(CLASSES) >= 8
    areas = np.array([mask.sum() for picture in val for mask in picture.masks])
    assert len(areas) >= 2000
    # COCO's small, medium and large.
    sizes = np.histogram(areas, [0, 32**2, 96**2, np.inf])[0]
    assert (sizes >= 100).all()
    labels = np.bincount([label for p in val for label in p.labels])
    assert len(labels) == len(CLASSES) and labels.min() >= 100
    assert len({picture.pixels.shape for picture in val}) > 200


def test_objects_overlap_and_their_masks_do_not(val):
    touching = 0
    for picture in val[:50]:
        count = np.sum(picture.masks, axis=0)
        assert count.max() <= 1
        boxes = [np.argwhere(mask) for mask in picture.masks]
        boxes = [(b.min(0), b.max(0)) for b in boxes]
        touching += sum((lo <= other_hi).all() and (other_lo <= hi).all()
                        for i, (lo, hi) in enumerate(boxes)
                        for other_lo, other_hi in boxes[:i])
    assert touching > 50


def test_a_picture_depends_on_its_seed_alone():
    one, again = draw_picture((1, 2)), draw_picture((1, 2))
    other = draw_picture((1, 3))
    assert np.array_equal(one.pixels, again.pixels)
    assert one.labels == again.labels
    assert one.pixels.shape != other.pixels.shape or not np.array_equal(
        one.pixels, other.pixels)


def test_what_is_written_is_what_was_drawn(tmp_path):
    generate(tmp_path / 'drawn', SMALL)
    coco = COCO(str(tmp_path / 'drawn/annotations/instances_val.json'))
    assert len(coco.imgs) == 2
    for index, (image_id, info) in enumerate(coco.imgs.items()):
        picture = draw_picture((SEED, 1, index))
        pixels = cv2.imread(str(tmp_path / 'drawn/val' / info['file_name']))
        assert np.array_equal(pixels, picture.pixels)
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(picture.masks)
        for annotation, mask, label in zip(annotations, picture.masks,
                                           picture.labels):
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation['area'] == mask.sum()
            assert coco.cats[annotation['category_id']]['name'] == (
                CLASSES[label])
            left, top, width, height = annotation['bbox']
            rows, columns = np.nonzero(mask)
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1,
                                                    rows.max() + 1)


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob('*') if path.is_file()
    }


def test_two_processes_may_draw_it_at_once(tmp_path):
    context = multiprocessing.get_context('fork')
    workers = [
        context.Process(target=generate, args=(tmp_path / 'drawn', SMALL))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    generate(tmp_path / 'again', SMALL)
    assert contents(tmp_path / 'drawn') == contents(tmp_path / 'again')
    assert sorted(os.listdir(tmp_path)) == ['again', 'drawn']


def test_an_interrupted_drawing_leaves_nothing_under_its_name(
        tmp_path, monkeypatch):

    def fail(seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn, 'draw_picture', fail)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / 'drawn', SMALL)
    assert not os.listdir(tmp_path)


def test_the_dataset_draws_on_first_use_and_reads_as_coco(
        tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, 'NUM_PICTURES', SMALL)
    dataset = DrawnDataset(
        data_root=str(tmp_path / 'drawn'),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'))
    assert len(dataset) == 3
    assert dataset.metainfo['classes'] == CLASSES
    found = json.loads(
        (tmp_path / 'drawn/annotations/instances_train.json').read_text())
    assert sum(len(dataset.get_data_info(i)['instances'])
               for i in range(3)) == len(found['annotations'])


def test_pictures_of_another_version_are_not_taken_for_these(
        tmp_path, monkeypatch):
    generate(tmp_path / 'drawn', SMALL)
    monkeypatch.setattr(drawn, 'VERSION', 'another')
    with pytest.raises(QuantError, match='remove it'):
        generate(tmp_path / 'drawn', SMALL)
