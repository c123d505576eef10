"""Calibration images from the caller: files, arrays or Pillow images."""
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, List, Union

import numpy as np
import torch
from PIL import Image as pil
from PIL import ImageOps

from isvit_det.core.errors import QuantError

Image = Union[str, Path, np.ndarray]

EXPECTED = ('give a list of files, or of uint8 arrays (H, W, 3) in BGR order, '
            'as inference_detector takes them')
# Modes that Pillow converts to 8-bit RGB without scaling values.
PIL_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr')


def as_images(given: Any) -> List[Image]:
    """Convert images to files and arrays.

    Args:
        given: an image, or an ordered iterable of images. An image is a file,
            an array (H, W), (H, W, 1) or (H, W, 3) of uint8 or of floats in
            0..255 in BGR order, or an image of Pillow. An array (N, H, W, C)
            is N images.

    Returns:
        Paths, and arrays (H, W, 3) of uint8 or float32.

    Raises:
        QuantError: naming the first object that is no image, or ambiguous.
    """
    if _is_one(given):
        given = [given]
    elif isinstance(given, np.ndarray):
        # A stack of images, or an array of paths.
        is_many = given.ndim == 4 or given.dtype.kind in 'OU'
        given = list(np.atleast_1d(given)) if is_many else [given]
    elif isinstance(given, (Mapping, Set)) or not isinstance(given, Iterable):
        raise QuantError(f'calib_images: a {type(given).__name__} is no list; '
                         f'{EXPECTED}.')
    elif isinstance(given, torch.Tensor):
        given = [given]
    images = [_as_image(image, f'calib_images[{place}]')
              for place, image in enumerate(given)]  # yapf: disable
    if not images:
        raise QuantError(f'calib_images: there are none; {EXPECTED}, at least '
                         '1.')
    return images


def _is_one(given: Any) -> bool:
    return isinstance(given, (str, bytes, os.PathLike, pil.Image))


def _as_image(image: Any, name: str) -> Image:
    if isinstance(image, (str, os.PathLike)):
        return _as_file(Path(image), name)
    if isinstance(image, pil.Image):
        return _from_pillow(image, name)
    if isinstance(image, np.ndarray):
        return _as_array(image, name)
    advice = ''
    if isinstance(image, torch.Tensor):
        # The order of its axes and channels and its scale are unknown.
        advice = ' with tensor.permute(1, 2, 0).numpy() if it is (3, H, W)'
    raise QuantError(f'{name}: a {type(image).__name__} is no file and no '
                     f'array; {EXPECTED}{advice}.')


def _as_file(path: Path, name: str) -> Path:
    if path.is_dir():
        raise QuantError(f'{name}: {path} is a folder; give the files in it.')
    if not path.exists():
        raise QuantError(f'{name}: there is no file {path}; give files of '
                         'this machine.')
    return path


def _from_pillow(image: pil.Image, name: str) -> np.ndarray:
    if image.mode not in PIL_MODES:
        raise QuantError(f'{name}: an image of Pillow in mode {image.mode!r} '
                         'has no 8-bit colours; scale it to 0..255 and give '
                         "it in mode 'RGB'.")
    try:
        # Readers of files apply the orientation, too.
        upright = ImageOps.exif_transpose(image)
        array = np.asarray(upright.convert('RGB'))
    except OSError as error:
        raise QuantError(f'{name}: Pillow cannot read the image '
                         f'({error}); get it again.') from error
    return _as_array(array[..., ::-1], name)


def _as_array(array: np.ndarray, name: str) -> np.ndarray:
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or not array.size:
        advice = ''
        if len(shape) == 3 and shape[0] in (1, 3):
            advice = '; array.transpose(1, 2, 0) turns (3, H, W) into it'
        elif len(shape) == 3 and shape[2] == 4:
            advice = '; array[..., :3] leaves out transparency'
        raise QuantError(f'{name}: an array of shape {shape} is no image; '
                         f'expected (H, W, 3) in BGR order, or (H, W) in '
                         f'gray{advice}.')
    array = np.broadcast_to(array, (*array.shape[:2], 3))
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != 'f':
        raise QuantError(f'{name}: an array of {array.dtype}: its values may '
                         'mean anything; scale it to 0..255 and give uint8.')
    low, high = float(array.min()), float(array.max())
    # This is also true for NaN, which is in no range.
    if not (low >= 0 and 1 < high <= 255):
        raise QuantError(f'{name}: an array of {array.dtype} with values from '
                         f'{low:g} to {high:g}; scale it to 0..255, without '
                         'infinite and missing values, and give uint8.')
    return np.ascontiguousarray(array, dtype=np.float32)
