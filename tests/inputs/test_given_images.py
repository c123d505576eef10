"""What is given as images: taken if it is obvious, refused in one line."""
import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.registry import init_default_scope
from PIL import Image

from isvit_det.apis import GivenImages
from isvit_det.core.errors import QuantError
from isvit_det.inputs.given_images import as_images

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GRAY = COLOR[..., 0]
THREE = np.repeat(GRAY[..., None], 3, -1)


@pytest.fixture
def files(tmp_path):
    paths = []
    for place in range(2):
        paths.append(tmp_path / f'{place}.png')
        cv2.imwrite(str(paths[-1]), COLOR)
    return paths


@pytest.mark.parametrize('make, expected', [
    (lambda: COLOR, [COLOR]),
    (lambda: [COLOR, GRAY], [COLOR, THREE]),
    (lambda: (COLOR, ), [COLOR]),
    (lambda: (image for image in (COLOR, COLOR)), [COLOR, COLOR]),
    (lambda: iter([COLOR]), [COLOR]),
    (lambda: {
        'a': COLOR
    }.values(), [COLOR]),
    (lambda: np.stack([COLOR, COLOR]), [COLOR, COLOR]),
    (lambda: np.stack([THREE[..., :1]] * 2), [THREE, THREE]),
    (lambda: GRAY, [THREE]),
    (lambda: GRAY[..., None], [THREE]),
    (lambda: COLOR.astype(np.float64), [COLOR.astype(np.float32)]),
    (lambda: Image.fromarray(COLOR[..., ::-1]), [COLOR]),
    (lambda: [Image.fromarray(GRAY)], [THREE]),
    (lambda: [Image.fromarray(COLOR[..., ::-1]).convert('RGBA')], [COLOR]),
    (lambda: COLOR[:, ::-1][:, ::-1], [COLOR]),
])
def test_what_is_obvious_is_taken(make, expected):
    found = as_images(make())
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype and np.array_equal(one, other)
        assert one.flags.c_contiguous


def test_files_are_taken_one_or_many_in_any_order_of_things(files):
    for given in (files[0], str(files[0])):
        assert as_images(given) == files[:1]
    texts = [str(path) for path in files]
    for given in (files, texts, tuple(texts), iter(texts), np.array(texts)):
        assert as_images(given) == files


@pytest.mark.parametrize('given, words', [
    ([], ['none', 'at least 1']),
    (iter(()), ['none']),
    (None, ['NoneType']),
    (3, ['int']),
    ({
        'a': COLOR
    }, ['dict']),
    ({'a.png'}, ['set']),
    ([COLOR, None], ['[1]', 'NoneType']),
    ([[COLOR]], ['[0]', 'list']),
    (b'\x89PNG', ['[0]', 'bytes']),
    (COLOR.astype(np.uint16), ['[0]', 'uint16', '0..255']),
    (COLOR.astype(np.int64), ['int64']),
    (COLOR > 7, ['bool']),
    (COLOR / 255, ['float64', 'from 0 to', '0..255']),
    (COLOR * 257., ['float64']),
    (COLOR - 99., ['float64']),
    (np.where(COLOR > 7, np.nan, 3.), ['nan', 'missing']),
    (np.where(COLOR > 7, np.inf, 3.), ['inf']),
    (np.zeros((0, 5, 3), np.uint8), ['(0, 5, 3)']),
    (COLOR.transpose(2, 0, 1), ['(3, 6, 5)', 'transpose(1, 2, 0)']),
    (np.zeros((6, 5, 4), np.uint8), ['(6, 5, 4)', '[..., :3]']),
    (np.zeros((6, 5, 2), np.uint8), ['(6, 5, 2)']),
    (np.zeros(5, np.uint8), ['(5,)']),
    (torch.zeros(3, 6, 5), ['Tensor', 'permute(1, 2, 0)']),
    ([torch.zeros(3, 6, 5)], ['[0]', 'Tensor']),
    (Image.new('I', (5, 6)), ["'I'", 'RGB']),
    (Image.new('F', (5, 6)), ["'F'"]),
    ('/', ['/', 'folder']),
    (['/nowhere/a.png'], ['[0]', '/nowhere/a.png']),
    ('http://a.b/c.png', ['c.png', 'this machine']),
])
def test_what_is_not_is_one_line(given, words):
    with pytest.raises(QuantError) as caught:
        as_images(given)
    line = str(caught.value)
    assert line.startswith('calib_images') and '\n' not in line
    for word in words:
        assert word in line


PIPELINE = [
    dict(type='LoadImageFromFile', to_float32=True),
    dict(type='mmdet.Resize', scale=(64, 64), keep_ratio=True),
    dict(type='mmdet.PackDetInputs')
]


class OwnReader(LoadImageFromFile):
    """A subclass of what reads images."""


class Note(BaseTransform):
    """Stands before what reads images."""

    def transform(self, results):
        return dict(results, noted=True)


@pytest.mark.parametrize('pipeline', [
    PIPELINE,
    [dict(type=OwnReader), *PIPELINE[1:]],
    [dict(type=Note), *PIPELINE],
], ids=['plain', 'own', 'second'])  # yapf: disable
def test_arrays_and_files_are_prepared_alike(pipeline, files):
    init_default_scope('mmdet')
    images = GivenImages([files[0], COLOR], pipeline)
    one, other = (images.read(index)['inputs'][0] for index in range(2))
    assert torch.equal(one, other) and one.dtype == other.dtype


def test_the_hash_knows_type_and_shape():
    zeros = np.zeros((4, 6, 3), np.uint8)
    same = [zeros, zeros.copy()]
    others = [np.zeros((6, 4, 3), np.uint8), np.zeros((2, 12, 3), np.uint8)]
    others.append(np.ascontiguousarray(zeros[:1]))
    init_default_scope('mmdet')
    hashes = GivenImages([*same, *others], PIPELINE).hashes()
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_a_transform_that_fails_names_the_place(files):
    init_default_scope('mmdet')
    needle = np.zeros((2000, 1, 3), np.uint8)
    damaged = files[0].with_name('damaged.png')
    damaged.write_text('no picture')
    images = GivenImages([files[0], needle, damaged], PIPELINE)
    images.read(0)
    with pytest.raises(QuantError, match=r'calib_images\[1\].*1 x 2000.*Res'):
        images.read(1)
    with pytest.raises(QuantError, match=r'calib_images\[2\].*damaged.png'):
        images.read(2)
