"""Images of a folder, and the classes that its folders are."""
import os
import signal

import numpy as np
import pytest
from PIL import Image

from isvit_det.classifiers.images import (ImageList, class_labels, find_images,
                                          other_pictures)
from isvit_det.core.errors import QuantError


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


def test_an_image_whose_link_is_broken_is_named(tmp_path):
    make(tmp_path, 'a/1.jpg')
    os.symlink(tmp_path / 'gone', tmp_path / 'a/2.jpg')
    with pytest.raises(QuantError, match='2.jpg is a link to what is not'):
        find_images(tmp_path, '--val')


def test_what_seems_a_picture_and_is_none_here_is_told(tmp_path):
    make(tmp_path, 'a/1.TIF', 'a/2.jfif', 'b/3.gif', 'b/4.HEIC', 'b/5.avif',
         'b/notes.txt', 'b/.6.gif')
    os.mkfifo(tmp_path / 'a/7.png')
    assert found(tmp_path) == ['a/1.TIF', 'a/2.jfif']
    assert [path.name for path in other_pictures(tmp_path)
            ] == ['7.png', '3.gif', '4.HEIC', '5.avif']


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


def test_what_is_no_folder_is_said(tmp_path):
    make(tmp_path, '1.jpg')
    for name, words in (('1.jpg', 'is a file'), ('gone', 'is not there')):
        with pytest.raises(QuantError, match=f'--val: .*{name} {words}'):
            find_images(tmp_path / name, '--val')


def broken_png(path):
    """Of whose pixels a half is missing, and the rest is no chunk."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    content = bytearray(path.read_bytes())
    start = content.find(b'IDAT') - 4
    length = int.from_bytes(content[start:start + 4], 'big')
    content[start:start + 4] = (length // 2).to_bytes(4, 'big')
    path.write_bytes(content)


@pytest.mark.parametrize('workers', [0, 1])
def test_whatever_a_damaged_image_raises_is_one_line(tmp_path, workers):
    broken_png(tmp_path / 'x.png')
    images = ImageList([tmp_path / 'x.png'], np.asarray)
    with pytest.raises(QuantError) as error:
        list(images.batches(1, workers))
    assert len(str(error.value).splitlines()) == 1
    assert f'{tmp_path / "x.png"} cannot be read' in str(error.value)


def test_what_has_no_header_of_an_image_is_found_without_pixels(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / '1.png')
    images = ImageList([tmp_path / '1.png', tmp_path / '2.png'], None)
    for content in (b'', b'<html>Not found</html>'):
        (tmp_path / '2.png').write_bytes(content)
        with pytest.raises(QuantError, match='2.png cannot be read'):
            images.check()
    (tmp_path / '2.png').write_bytes((tmp_path / '1.png').read_bytes())
    images.check()


def test_a_reading_process_that_was_killed_is_one_line(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / '1.png')
    images = ImageList([tmp_path / '1.png'],
                       lambda image: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(QuantError, match='was ended .*--workers'):
        list(images.batches(1, 1))


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
