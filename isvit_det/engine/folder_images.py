"""Images of a folder, flat or with a folder for each class."""
import os
import re
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from isvit_det.core.errors import QuantError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


def find_images(folder: Path, option: str) -> List[Path]:
    """Paths of all images in a folder and those below it, sorted.

    Args:
        folder: to look in.
        option: the argument that named it.

    Raises:
        QuantError: if there are none.
    """
    # Class folders are often links, which Path.rglob passes by.
    found = sorted(
        Path(place) / name
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names if name.lower().endswith(EXTENSIONS))
    if not found:
        raise QuantError(f'{option}: {folder} holds no images; give a folder '
                         f'of {", ".join(EXTENSIONS)} files, flat or with a '
                         'folder for each class.')
    return found


def class_labels(folder: Path,
                 paths: Sequence[Path]) -> Tuple[List[str], List[int]]:
    """Classes of a folder, and one of each image.

    They come in the order of their names, numbers in them by value.

    Returns:
        Names of the folders, none if an image lies in no folder, and labels.
    """
    names = [path.relative_to(folder).parts[:-1] for path in paths]
    if not all(names):
        return [], []
    classes = sorted({name[0] for name in names}, key=_natural)
    index = {name: i for i, name in enumerate(classes)}
    return classes, [index[name[0]] for name in names]


def _natural(name: str) -> List[Tuple[int, str]]:
    """A key that sorts numbers in a name by value.

    >>> sorted(['n10', 'n9', 'n01'], key=_natural)
    ['n01', 'n9', 'n10']
    """
    return [(int(part), '') if part.isdigit() else (-1, part)
            for part in re.split(r'(\d+)', name)]


class ImageList(Dataset):
    """Images by path, each with its position.

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
        try:
            with Image.open(self.paths[index]) as image:
                return self.transform(image.convert('RGB')), index
        except (OSError, Image.DecompressionBombError) as error:
            raise QuantError(
                f'image: {self.paths[index]} cannot be read '
                f'({error}); it is damaged, get it again.') from error

    def batches(self,
                size: int,
                workers: int = 0) -> Iterator[Tuple[Tensor, Tensor]]:
        """Batches (B, 3, H, W) in order, with positions (B,).

        Raises:
            QuantError: naming an image that cannot be read.
        """
        loader = DataLoader(self, size, num_workers=workers)
        try:
            yield from loader
        except QuantError as error:
            # A worker puts its traceback before the message.
            line = str(error).strip().splitlines()[-1]
            raise QuantError(line.split('QuantError: ')[-1]) from error


class FolderSample:
    """Images drawn from a folder by seed without replacement.

    Args:
        folder: to draw from.
        transform: PIL image to tensor (3, H, W).
        num_images: to draw; all are taken if there are fewer.
        seed: of the draw.

    Attributes:
        asked: ``num_images``.
        rest: paths of the images not drawn, in random order. It starts with
            the same ones, however many are drawn.
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
