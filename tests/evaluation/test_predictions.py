"""Predictions come back as they were, or are not taken over at all."""
import zipfile

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks

from isvit_det.evaluation.predictions import PredictionFile, decode, encode

MASKS = torch.zeros(3, 40, 50, dtype=torch.bool)
MASKS[1, 5:20, 7:30] = True
SAMPLE = dict(
    img_id=7,
    img_path='a.png',
    ori_shape=(40, 50),
    scale_factor=(np.float64(1.5), .5),
    text=None,
    pred_instances=dict(
        bboxes=torch.rand(3, 4),
        scores=torch.rand(6)[::2],
        labels=torch.tensor([0, 1, 1]),
        masks=MASKS),
    pred_sem_seg=dict(sem_seg=torch.randint(0, 9, (1, 40, 50))),
    instances=[dict(bbox=[1., 2., 3., 4.], mask=dict(counts=b'ab\xff'))],
    array=np.arange(6, dtype=np.uint16).reshape(2, 3),
    empty=torch.zeros(0, 40, 50, dtype=torch.bool),
    gt_instances=dict(
        bboxes=HorizontalBoxes(torch.rand(2, 4)),
        polygons=PolygonMasks([[np.array([0., 0., 4., 0., 4., 4.])]], 40, 50),
        bitmaps=BitmapMasks(np.ones((1, 40, 50), np.uint8), 40, 50)))


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, HorizontalBoxes):
        return torch.equal(one.tensor, other.tensor)
    if isinstance(one, (PolygonMasks, BitmapMasks)):
        return np.array_equal(one.to_ndarray(), other.to_ndarray())
    return one == other


def write(folder, samples=(SAMPLE, ), key='key', num_batches=1):
    file = PredictionFile(folder, 'float', key)
    file.start()
    for _ in range(num_batches):
        file.add(samples)
    file.finish(dict(seconds=3))
    return file


def test_everything_comes_back_as_it_was():
    assert same(decode(encode(SAMPLE)), SAMPLE)


def test_a_file_holds_all_batches_until_it_is_evaluated(tmp_path):
    file = write(tmp_path, num_batches=12)
    again = PredictionFile(tmp_path, 'float', 'key')
    assert again.find() == dict(seconds=3)
    batches = list(again.read())
    assert len(batches) == 12 and same(batches[11][0], SAMPLE)
    file.settle()
    assert again.find() is None
    assert [path.name for path in tmp_path.iterdir()] == ['float.zip']


def test_masks_are_kept_small(tmp_path):
    masks = torch.zeros(100, 400, 500, dtype=torch.bool)
    masks[:, 100:300, 100:300] = True
    file = write(tmp_path, [dict(masks=masks)])
    assert file.waiting.stat().st_size < 30e3


def test_predictions_of_something_else_are_not_taken_over(tmp_path):
    write(tmp_path)
    assert PredictionFile(tmp_path, 'float', 'other').find() is None
    assert PredictionFile(tmp_path, 'quantized', 'key').find() is None


@pytest.mark.parametrize('part', [.1, .5, .99])
def test_a_damaged_file_is_not_taken_over(tmp_path, part):
    file = write(tmp_path)
    whole = file.waiting.read_bytes()
    file.waiting.write_bytes(whole[:int(part * len(whole))])
    assert file.find() is None
    for place in range(int(100 * part), len(whole), 97):
        changed = bytearray(whole)
        changed[place] ^= 255
        file.waiting.write_bytes(changed)
        # Some bytes are dates.
        assert file.find() is None or same(next(file.read())[0], SAMPLE)


def test_a_file_that_runs_code_is_not_read(tmp_path):
    file = write(tmp_path)
    about = zipfile.ZipFile(file.waiting).read('about.json')

    class Evil:

        def __reduce__(self):
            return exec, ('raise SystemExit', )

    with zipfile.ZipFile(file.waiting, 'w') as changed:
        with changed.open('0', 'w') as inner:
            torch.save([Evil()], inner)
        changed.writestr('about.json', about)
    with pytest.raises(Exception, match='Weights only load failed'):
        list(file.read())


def test_what_cannot_be_kept_stops_nothing(tmp_path):
    file = write(tmp_path, [dict(SAMPLE, strange=object())])
    assert file.find() is None and not list(tmp_path.iterdir())
    (tmp_path / 'file').write_text('')
    file = write(tmp_path / 'file')
    assert file.find() is None
