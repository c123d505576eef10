"""Files of predictions, which are written during an evaluation."""
import contextlib
import io
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

import numpy as np
import torch
from mmdet.structures.bbox import BaseBoxes, get_box_type
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.logging import MMLogger
from pycocotools import mask as coco_mask
from torch import Tensor

from isvit_det.core.distributed import all_gather, rank, world_size

# Key of a dict that encodes another object.
KIND = '#kind'
ABOUT = 'about.json'
# Exceptions when a damaged file is read.
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError,
              zlib.error, zipfile.BadZipFile)


class PredictionFile:
    """The predictions of one model: a zip file for each process.

    Until ``settle`` is called, the name of the file says that the predictions
    are waiting to be measured, and the next run with the same key uses them.

    Args:
        directory: of the file.
        name: of the model.
        key: digest of everything that the predictions depend on.
    """

    def __init__(self, directory: Path, name: str, key: str) -> None:
        several = f'_{rank()}of{world_size()}' * (world_size() > 1)
        self.kept = directory / f'{name}{several}.zip'
        self.waiting = directory / f'{name}{several}.waiting.zip'
        self.partial = directory / f'{name}{several}.partial.zip'
        self.key = key
        self._file: Optional[zipfile.ZipFile] = None
        self._count = 0

    def start(self) -> None:
        """Remove all predictions, and open a new file."""
        self.discard()
        with self._writing():
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = zipfile.ZipFile(
                self.partial, 'w', zipfile.ZIP_DEFLATED, compresslevel=1)

    def add(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append the predictions of a batch."""
        if self._file is None:
            return
        with self._writing():
            memory = io.BytesIO()
            torch.save([encode(sample) for sample in samples], memory)
            self._file.writestr(str(self._count), memory.getvalue())
            self._count += 1

    def finish(self, about: Mapping[str, Any]) -> None:
        """Close the file; its predictions are waiting to be measured.

        Args:
            about: plain values that ``find`` returns.
        """
        if self._file is None:
            return
        with self._writing():
            content = dict(key=self.key, count=self._count, about=about)
            self._file.writestr(ABOUT, json.dumps(content))
            self._file.close()
            self.partial.replace(self.waiting)
        self._file = None

    def find(self) -> Optional[Dict[str, Any]]:
        """The values given to ``finish``, if predictions are waiting.

        None unless all processes have predictions with this key.
        """
        about = self._read_about()
        return about if None not in all_gather(about) else None

    def read(self) -> Iterator[List[Dict[str, Any]]]:
        """The predictions, batch by batch, on the CPU."""
        with zipfile.ZipFile(self.waiting) as file:
            for index in range(len(file.namelist()) - 1):
                memory = io.BytesIO(file.read(str(index)))
                batch = torch.load(memory, weights_only=True)
                yield [decode(sample) for sample in batch]

    def settle(self) -> None:
        """Rename the file, whose predictions have been measured."""
        if self.waiting.exists():
            self.waiting.replace(self.kept)

    def discard(self) -> None:
        """Remove all predictions."""
        self._close()
        for path in (self.kept, self.waiting, self.partial):
            with contextlib.suppress(OSError):
                path.unlink()

    def abandon(self) -> None:
        """Remove an unfinished file."""
        self._close()
        with contextlib.suppress(OSError):
            self.partial.unlink()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            # Closing writes to the disk, which may be full.
            with contextlib.suppress(OSError):
                file.close()

    def _read_about(self) -> Optional[Dict[str, Any]]:
        try:
            with zipfile.ZipFile(self.waiting) as file:
                content = json.loads(file.read(ABOUT))
                whole = (
                    content['key'] == self.key
                    and content['count'] == len(file.namelist()) - 1
                    and file.testzip() is None)
                return content['about'] if whole else None
        except UNREADABLE:
            return None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Continue without a file if it cannot be written."""
        try:
            yield
        except (OSError, RuntimeError, TypeError) as error:
            self.abandon()
            MMLogger.get_current_instance().warning(
                f'the predictions are not kept in {self.kept}: {error}')


def read_kept(directory: Path, name: str,
              key: str) -> Iterator[Dict[str, Any]]:
    """The kept predictions of a model, image by image, as ``encode`` has them.

    Args:
        directory: of the files.
        name: of the model.
        key: that the predictions must have.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the files are damaged, incomplete or of another key.
    """
    pattern = re.compile(rf'{re.escape(name)}(_\d+of(?P<num>\d+))?\.zip')
    paths: Dict[int, List[Path]] = {}
    for path in sorted(directory.glob('*.zip')):
        match = pattern.fullmatch(path.name)
        if match is not None:
            paths.setdefault(int(match['num'] or 1), []).append(path)
    if not paths:
        raise FileNotFoundError(f'{directory / name}.zip is not there')
    reason = f'{directory / name}.zip is of another run'
    for num, parts in paths.items():
        try:
            if len(parts) < num:
                raise ValueError(f'{num - len(parts)} of {num} files are '
                                 'not there')
            if all(_key_of(path) == key for path in parts):
                for path in parts:
                    yield from _encoded(path)
                return
        except UNREADABLE as error:
            reason = f'{parts[0]} is damaged ({error})'
    raise ValueError(reason)


def _key_of(path: Path) -> str:
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read(ABOUT))['key']


def _encoded(path: Path) -> Iterator[Dict[str, Any]]:
    with zipfile.ZipFile(path) as file:
        for index in range(len(file.namelist()) - 1):
            memory = io.BytesIO(file.read(str(index)))
            yield from torch.load(memory, weights_only=True)


def encode(value: Any) -> Any:
    """Predictions as tensors and plain values, with run-length encoded masks.

    Raises:
        TypeError: naming a type that is not supported.
    """
    if isinstance(value, BaseBoxes):
        name, _ = get_box_type(type(value))
        return {KIND: 'boxes', 'name': name, 'tensor': encode(value.tensor)}
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bool and value.ndim == 3:
            return {
                KIND: 'masks',
                'shape': list(value.shape),
                'counts': [_counts(mask) for mask in value.numpy()]
            }
        # torch.save would write the whole storage of a view.
        return value.clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return {
            KIND: 'array',
            'dtype': value.dtype.str,
            'shape': list(value.shape),
            'bytes': _bytes_tensor(np.ascontiguousarray(value).tobytes())
        }
    if isinstance(value, np.generic):
        return {
            KIND: 'number',
            'dtype': value.dtype.str,
            'value': value.item()
        }
    if isinstance(value, (BitmapMasks, PolygonMasks)):
        return {
            KIND: type(value).__name__,
            'masks': encode(value.masks),
            'size': [value.height, value.width]
        }
    if isinstance(value, bytes):
        return {KIND: 'bytes', 'bytes': _bytes_tensor(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(encode, value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f'they hold a {type(value).__name__}')


def decode(value: Any) -> Any:
    """Undo ``encode``."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(decode, value))
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind is None:
        return {key: decode(item) for key, item in value.items()}
    if kind == 'boxes':
        return get_box_type(value['name'])[1](value['tensor'], clone=False)
    if kind == 'masks':
        masks = np.zeros(value['shape'], bool)
        for mask, counts in zip(masks, value['counts']):
            mask[:] = coco_mask.decode(
                dict(size=value['shape'][1:], counts=counts))
        return torch.from_numpy(masks)
    if kind == 'array':
        raw = value['bytes'].numpy().tobytes()
        array = np.frombuffer(raw, np.dtype(value['dtype']))
        return array.reshape(value['shape']).copy()
    if kind == 'number':
        return np.dtype(value['dtype']).type(value['value'])
    if kind == 'bytes':
        return value['bytes'].numpy().tobytes()
    classes = {'BitmapMasks': BitmapMasks, 'PolygonMasks': PolygonMasks}
    return classes[kind](decode(value['masks']), *value['size'])


def _counts(mask: np.ndarray) -> str:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return encoded['counts'].decode()


def _bytes_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) \
        if raw else torch.empty(0, dtype=torch.uint8)
