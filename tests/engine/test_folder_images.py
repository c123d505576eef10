"""Images of a folder, and the classes that its folders are."""
import os

import numpy as np
import pytest
from PIL import Image

from isvit_det.core.errors import QuantError
from isvit_det.engine.folder_images import ImageList, class_labels, find_images


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder):
    return [
        path.relative_to(folder).as_posix()
        for path in find_images(folder, '--val')
    ]


@pytest.mark.parametrize('hidden', [
    '.ipynb_checkpoints/x.jpg', '.cache/a/x.jpg', '__MACOSX/a/x.jpg',
    '@eaDir/x.jpg', 'a/@eaDir/1.jpg/THUMB.jpg', 'a/._1.jpg', 'a/.1.jpg',
    'a/.thumbnails/1.jpg', '._a.jpg', '$RECYCLE.BIN/x.jpg', '#recycle/x.png',
    'lost+found/x.jpg', '.x.jpg/y.jpg'
])
def test_what_is_hidden_is_neither_class_nor_image(tmp_path, hidden):
    make(tmp_path, 'a/1.jpg', 'b/2.JPEG', hidden)
    assert found(tmp_path) == ['a/1.jpg', 'b/2.JPEG']
    paths = find_images(tmp_path, '--val')
    assert class_labels(tmp_path, paths) == (['a', 'b'], [0, 1])


def test_a_folder_below_a_hidden_one_is_a_folder(tmp_path):
    make(tmp_path, '.cache/data/a/1.jpg')
    folder = tmp_path / '.cache/data'
    assert found(folder) == ['a/1.jpg']
    assert class_labels(folder, find_images(folder, '--val'))[0] == ['a']


@pytest.mark.parametrize('empty', [
    'b/.keep', 'b/notes.txt', 'b/._1.jpg', 'b/.cache/1.jpg', 'b/sub/notes.md'
])
def test_a_class_without_images_keeps_its_label(tmp_path, empty):
    make(tmp_path, 'a/1.jpg', empty, 'c/2.jpg')
    paths = find_images(tmp_path, '--val')
    assert class_labels(tmp_path, paths) == (['a', 'b', 'c'], [0, 2])


def test_images_are_of_the_topmost_folder_and_strays_of_none(tmp_path):
    make(tmp_path, 'a/deep/er/1.jpg', 'b/1.jpg', 'b/x/2.jpg', 'list.txt',
         'stray.png')
    paths = find_images(tmp_path, '--val')
    assert found(tmp_path)[-1] == 'stray.png'
    assert class_labels(tmp_path, paths) == (['a', 'b'], [0, 1, 1, None])


def test_links_are_followed_once(tmp_path):
    make(tmp_path, 'data/1.jpg', 'val/a/2.jpg')
    val = tmp_path / 'val'
    (val / 'b').symlink_to(tmp_path / 'data')
    (val / 'c').symlink_to(tmp_path / 'data')
    # Back to what is above.
    (val / 'a/loop').symlink_to(val)
    (val / 'a/self').symlink_to(val / 'a')
    assert found(val) == ['a/2.jpg', 'b/1.jpg', 'c/1.jpg']
    assert class_labels(val, find_images(val, '--val')) == (['a', 'b',
                                                             'c'], [0, 1, 2])


def test_a_class_whose_link_is_broken_is_named(tmp_path):
    make(tmp_path, 'a/1.jpg')
    os.symlink(tmp_path / 'gone', tmp_path / 'b')
    with pytest.raises(QuantError, match='b is a link to what is not there'):
        class_labels(tmp_path, find_images(tmp_path, '--val'))


def test_numbers_in_names_are_ordered_by_value(tmp_path):
    make(tmp_path, 'n10/1.jpg', 'n9/1.jpg', 'n1/x.txt')
    paths = find_images(tmp_path, '--val')
    assert class_labels(tmp_path, paths) == (['n1', 'n9', 'n10'], [2, 1])


@pytest.mark.parametrize('names', [(), ('a/x.txt', ), ('.a/1.jpg', ),
                                   ('a/.1.jpg', )])
def test_a_folder_without_images_is_refused(tmp_path, names):
    make(tmp_path, *names)
    with pytest.raises(QuantError, match='--val: .* holds no images'):
        find_images(tmp_path, '--val')


@pytest.mark.parametrize('kind', ['uint16', 'int32', 'float32'])
def test_what_rgb_would_cut_off_is_refused(tmp_path, kind):
    path = tmp_path / ('x.png' if kind == 'uint16' else 'x.tiff')
    Image.fromarray(np.full((8, 8), 3000, kind)).save(path)
    images = ImageList([path], lambda image: image)
    with pytest.raises(QuantError, match='has more than 8 bits'):
        images[0]


def test_gray_and_transparent_images_of_8_bits_are_read(tmp_path):
    for mode in ('L', 'LA', 'RGBA', 'P', '1'):
        Image.new('RGB', (8, 8),
                  (200, 200, 200)).convert(mode).save(tmp_path / f'{mode}.png')
    images = ImageList(find_images(tmp_path, '--calib'), np.asarray)
    assert len(images) == 5
    for index in range(5):
        pixels, _ = images[index]
        assert pixels.shape == (8, 8, 3) and pixels.max() >= 200
