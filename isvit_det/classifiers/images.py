"""Images in a folder, flat or with a folder for each class."""
import contextlib
import os
import re
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from isvit_det.core.errors import QuantError, describe_error
from isvit_det.inputs.data_errors import last_line

EXTENSIONS = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.webp',
              '.tif', '.tiff', '.ppm', '.pgm')
# Other image formats, which Pillow does not read by itself.
FURTHER = ('.heic', '.heif', '.jxl', '.svg', '.raw', '.dng', '.cr2', '.cr3',
           '.nef', '.arw', '.exr', '.hdr')
# Folders that systems create, besides hidden ones: archives of macOS, network
# disks, recycle bins and notebooks.
SYSTEM_FOLDERS = ('__MACOSX', '@eaDir', '#recycle', '#snapshot',
                  '$RECYCLE.BIN', 'System Volume Information', 'lost+found',
                  '__pycache__')


def find_images(folder: Path, option: str) -> List[Path]:
    """Paths of all images in a folder and its subfolders, sorted.

    Images are regular files and links to these. Hidden files and folders, and
    ``SYSTEM_FOLDERS``, are ignored.

    Args:
        folder: to search.
        option: the command line option that named it, for messages.

    Raises:
        QuantError: if there are no images, the folder does not exist, or an
            image is a broken link.
    """
    if not folder.is_dir():
        what = 'is a file' if folder.exists() else 'is not there'
        raise QuantError(f'{option}: {folder} {what}; give a folder of images'
                         ', flat or with a folder for each class.')
    paths = []
    for entry in _walk(folder, ()):
        if _is_image(entry):
            paths.append(Path(entry.path))
        elif _has_ending(entry, EXTENSIONS) and not os.path.exists(entry):
            raise QuantError(f'{option}: {entry.path} is a link to what is '
                             'not there; mend or remove it.')
    paths.sort()
    if not paths:
        raise QuantError(f'{option}: {folder} holds no images; give a folder '
                         f'of {", ".join(EXTENSIONS)} files, flat or with a '
                         'folder for each class.')
    return paths


def other_pictures(folder: Path) -> List[Path]:
    """Files in a folder that look like images but are not read as such.

    Args:
        folder: to search.

    Returns:
        Sorted paths of files with the extension of an image format that is
        not read, and of entries with that of one that is read which are no
        regular files.
    """
    endings = (*Image.registered_extensions(), *FURTHER)
    return sorted(
        Path(entry.path) for entry in _walk(folder, ())
        if _has_ending(entry, endings) and not _is_image(entry))


def _has_ending(entry: os.DirEntry, endings: Tuple[str, ...]) -> bool:
    return entry.name.lower().endswith(endings)


def _is_image(entry: os.DirEntry) -> bool:
    return _has_ending(entry, EXTENSIONS) and entry.is_file()


def _walk(folder: Path, above: Tuple[str, ...]) -> Iterator[os.DirEntry]:
    # Class folders are often links, and a link may lead back to a parent.
    real = os.path.realpath(folder)
    if real in above or not os.path.isdir(real):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), (*above, real))
            else:
                yield entry


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or created by a system.

    >>> [is_hidden(name) for name in ('.cache', '@eaDir', '._a.jpg', 'a.jpg')]
    [True, True, True, False]
    """
    return name.startswith('.') or name in SYSTEM_FOLDERS


def class_labels(
        folder: Path,
        paths: Sequence[Path]) -> Tuple[List[str], List[Optional[int]]]:
    """The class folders in a folder, and the label of each image.

    A folder without images is a class too; otherwise the labels after it
    would be wrong.

    Args:
        folder: may have a folder for each class.
        paths: of ``find_images`` in it.

    Returns:
        Names of the class folders in the order of the labels, with numbers in
        names sorted by value; and the labels of the images, None for an image
        outside of all class folders.

    Raises:
        QuantError: naming a broken link, which may be a class.
    """
    entries = [entry for entry in folder.iterdir()
               if not is_hidden(entry.name)]  # yapf: disable
    broken = [entry for entry in entries if not entry.exists()]
    if broken:
        raise QuantError(f'image folder: {min(broken)} is a link to what is '
                         'not there, perhaps a class; mend or remove it.')
    classes = sorted((entry.name for entry in entries if entry.is_dir()),
                     key=_natural)
    index = {name: i for i, name in enumerate(classes)}
    # An image directly in the folder is its own first part, and no class.
    owners = [path.relative_to(folder).parts[0] for path in paths]
    return classes, [index.get(name) for name in owners]


def _natural(name: str) -> List[Tuple[int, str]]:
    """A key that sorts numbers in a name by value.

    >>> sorted(['n10', 'n9', 'n01'], key=_natural)
    ['n01', 'n9', 'n10']
    """
    return [(int(part), '') if part.isdigit() else (-1, part)
            for part in re.split(r'(\d+)', name)]


class ImageList(Dataset):
    """A data set of images by path, each with its index.

    Args:
        paths: of the images.
        transform: PIL image to tensor (3, H, W).
    """

    def __init__(self, paths: Sequence[Path],
                 transform: Callable[[Any], Tensor]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Tensor, int]:
        with _opened(self.paths[index]) as image:
            pixels = image.convert('RGB')
        return self.transform(pixels), index

    def check(self) -> None:
        """Open every image, without decoding it.

        Raises:
            QuantError: naming an image that cannot be opened.
        """
        for path in self.paths:
            with _opened(path):
                pass

    def batches(self,
                size: int,
                workers: int = 0) -> Iterator[Tuple[Tensor, Tensor]]:
        """Batches (B, 3, H, W) in order, with the indices of the images (B,).

        Raises:
            QuantError: naming an image that cannot be read, or if a process
                that reads them was ended.
        """
        loader = DataLoader(self, size, num_workers=workers)
        try:
            yield from loader
        except QuantError as error:
            raise QuantError(last_line(error)) from error
        except RuntimeError as error:
            if 'DataLoader worker' not in str(error):
                raise
            raise QuantError(
                'image: a process that reads images was ended '
                f'({describe_error(error)}), often for want of memory; give '
                'fewer --workers, or none.') from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an image; errors in this context become QuantErrors."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(('I', 'F')):
                raise QuantError(
                    f'image: {path} has more than 8 bits (mode {image.mode} '
                    'of Pillow), which are cut off when it is read as RGB; '
                    'convert it to 8 bits.')
            if 0 in image.size:
                raise ValueError('it has no pixels')
            yield image
    except (QuantError, MemoryError):
        raise
    # With a damaged file, Pillow can raise any exception.
    except Exception as error:
        raise QuantError(f'image: {path} cannot be read '
                         f'({describe_error(error)}); it is damaged, get it '
                         'again.') from error


class FolderSample:
    """A random sample of the images in a folder, without replacement.

    Args:
        folder: of the images.
        transform: PIL image to tensor (3, H, W).
        num_images: number of images to draw; if there are fewer, all.
        seed: of the sample.

    Attributes:
        asked: ``num_images``.
        rest: paths of the other images, in random order. The first of them do
            not depend on ``num_images``.
    """

    def __init__(self, folder: Path, transform: Callable[[Any], Tensor],
                 num_images: int, seed: int) -> None:
        every = find_images(folder, '--calib')
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(every), generator=generator).tolist()
        self.folder = folder
        self.asked = num_images
        drawn = [every[i] for i in order[:num_images]]
        self.images = ImageList(drawn, transform)
        self.rest = [every[i] for i in reversed(order[num_images:])]

    def __len__(self) -> int:
        return len(self.images)

    def paths(self) -> List[Path]:
        """Path of every image drawn."""
        return list(self.images.paths)

    def ids(self) -> List[Optional[int]]:
        """Files of a folder have no ids."""
        return [None] * len(self)

    def names(self) -> List[str]:
        """Path of every image drawn within the folder."""
        return [str(path.relative_to(self.folder)) for path in self.paths()]

    def tensors(self, mirrored: bool) -> Iterator[Tensor]:
        """Images (1, 3, H, W), and then their mirror images if asked for."""
        for image, _ in self.images.batches(1):
            yield image
        if mirrored:
            for image, _ in self.images.batches(1):
                yield image.flip(-1)
