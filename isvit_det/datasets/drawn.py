"""The drawn data set, in COCO format, which is generated on first use."""
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import cv2
import numpy as np
from mmdet.datasets import CocoDataset
from pycocotools import mask as coco_mask

from isvit_det.core.errors import QuantError
from isvit_det.datasets.drawing import CLASSES, draw_picture
from isvit_det.registry import DATASETS
from isvit_det.screen.output import say

SEED = 2311
# Must change when the same seed gives other images.
VERSION = '1'
NUM_PICTURES = dict(train=3000, val=320)


def write_split(root: Path, split: str, num: int) -> None:
    """Draw a split into ``root/split`` and ``root/annotations``."""
    (root / split).mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    images: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    for index in range(num):
        picture = draw_picture((SEED, list(NUM_PICTURES).index(split), index))
        name = f'{index + 1:06d}.png'
        height, width = picture.pixels.shape[:2]
        if not cv2.imwrite(str(root / split / name), picture.pixels):
            raise OSError(f'could not write {root / split / name}')
        images.append(
            dict(id=index + 1, file_name=name, height=height, width=width))
        for mask, label in zip(picture.masks, picture.labels):
            annotations.append(
                _annotation(len(annotations) + 1, index + 1, mask, label))
    categories = [
        dict(id=label + 1, name=name) for label, name in enumerate(CLASSES)
    ]
    path = root / 'annotations' / f'instances_{split}.json'
    path.write_text(
        json.dumps(
            dict(
                images=images, annotations=annotations,
                categories=categories)))


def _annotation(annotation_id: int, image_id: int, mask: np.ndarray,
                label: int) -> Dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(
        id=annotation_id,
        image_id=image_id,
        category_id=label + 1,
        bbox=coco_mask.toBbox(rle).tolist(),
        area=int(mask.sum()),
        iscrowd=0,
        segmentation=dict(
            size=list(rle['size']), counts=rle['counts'].decode()))


def generate(root: Path, sizes: Dict[str, int]) -> None:
    """Generate the data set in ``root`` unless it exists.

    It is drawn in a temporary folder, which is renamed at the end. If two
    processes do so at once, the result of one of them is removed.

    Args:
        root: folder of the data set.
        sizes: number of images of each split.

    Raises:
        QuantError: if another version has drawn the existing data set.
    """
    note = root / 'version'
    if root.exists():
        if not note.is_file() or note.read_text() != VERSION:
            raise QuantError(f'data set: {root} was not drawn by this version '
                             'of isvit_det; remove it, or name another '
                             'folder as data_root.')
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    say(f'drawing {sum(sizes.values())} pictures into {root} (once)')
    draft = Path(tempfile.mkdtemp(prefix='.draft_', dir=root.parent))
    try:
        for split, num in sizes.items():
            write_split(draft, split, num)
        (draft / note.name).write_text(VERSION)
        draft.chmod(0o755)
        os.rename(draft, root)
    except OSError:
        if not root.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@DATASETS.register_module()
class DrawnDataset(CocoDataset):
    """Synthetic images of ten shapes, in COCO format.

    The arguments are those of ``CocoDataset``. ``data_root`` is generated on
    first use.
    """
    METAINFO: Dict[str, Any] = dict(
        classes=CLASSES,
        palette=[(37 * i % 256, 91 * i % 256, 173 * i % 256)
                 for i in range(1,
                                len(CLASSES) + 1)])

    def __init__(self,
                 *args: Any,
                 data_root: str,
                 lazy_init: bool = False,
                 **kwargs: Any) -> None:
        # The class names do not need the images.
        if not lazy_init:
            generate(Path(data_root), NUM_PICTURES)
        super().__init__(
            *args, data_root=data_root, lazy_init=lazy_init, **kwargs)
