"""Reading files of torch, safetensors and numpy without running code."""
import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from isvit_det.core.errors import QuantError
from isvit_det.core.unpickling import (RefusedName, SafeUnpickler, Storage,
                                       arrays_as_tensors)

# The first two values in a file that torch before 1.6 wrote.
MAGIC, PROTOCOL = 0x1950a86a20f9469cfc6c, 1001
PICKLES = (b'\x80\x02', b'\x80\x03', b'\x80\x04', b'\x80\x05')
SAFETENSORS = dict(
    F64=torch.float64,
    F32=torch.float32,
    F16=torch.float16,
    BF16=torch.bfloat16,
    I64=torch.int64,
    I32=torch.int32,
    I16=torch.int16,
    I8=torch.int8,
    U8=torch.uint8,
    BOOL=torch.bool)


class _Wrong(Exception):
    """An error in a file; the message follows the file's path."""


def read_file(path: Path) -> Any:
    """Read a file, without running code that it may hold.

    Args:
        path: of a file written by ``torch.save`` or by safetensors, or of a
            pickle of numpy arrays, which become tensors.

    Returns:
        Its content, with tensors on the CPU.

    Raises:
        QuantError: if the file does not exist, is damaged, has another
            format, or holds objects that cannot be read safely.
    """
    if not path.is_file():
        fault = (f'{path} is a folder'
                 if path.is_dir() else f'there is no file {path}')
        raise QuantError(f'checkpoint: {fault}; give the path of a float or '
                         'packed checkpoint.')
    try:
        return _reader(path)(path)
    except _Wrong as error:
        raise QuantError(f'checkpoint: {path} {error}') from error
    # A damaged file can raise any exception.
    except Exception as error:
        if isinstance(error, RefusedName) and error.is_name:
            raise QuantError(
                f'checkpoint: {path} holds {error.name}, which is no part of '
                'weights, and is not read for safety; if you trust the file, '
                'load it where it was made and save its weights alone, the '
                'state_dict().') from error
        raise QuantError(
            f'checkpoint: {path} cannot be read, it is truncated, damaged or '
            'no checkpoint; download or make it again.') from error


def _reader(path: Path) -> Callable[[Path], Any]:
    if path.suffix == '.safetensors':
        return _read_safetensors
    with open(path, 'rb') as file:
        start = file.read(4)
    if path.suffix == '.pkl' and start[:2] != b'PK':
        return _read_pickle
    if start[:2] in PICKLES:
        return _read_legacy
    if start == b'PK\x03\x04':
        return _read_archive
    what = 'is no checkpoint' if start else 'is empty'
    raise _Wrong(f'cannot be read: {path.name} {what}; download or make it '
                 'again.')


def _read_pickle(path: Path) -> Any:
    """A pickle of numpy arrays, the format of Detectron2's model zoo."""
    with open(path, 'rb') as file:
        return arrays_as_tensors(SafeUnpickler(file).load())


def _read_archive(path: Path) -> Any:
    """A zip archive, the format of torch since 1.6."""
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        roots = [name[:-len('data.pkl')] for name in sizes
                 if name.endswith('data.pkl')]  # yapf: disable
        if len(roots) != 1:
            raise _Wrong('is an archive and no checkpoint; give a file of '
                         'torch.save.')
        root = roots[0]
        if f'{root}constants.pkl' in sizes:
            raise _Wrong('is a program of TorchScript and not its weights; '
                         'save the state_dict() of the model.')
        order = f'{root}byteorder'
        if order in sizes and archive.read(order) != b'little':
            raise _Wrong('was written on a machine of other byte order; save '
                         'it on one of this kind.')
        storages: Dict[str, Storage] = {}

        def read_storage(dtype: torch.dtype, key: str, location: str, *args:
                         Any) -> Storage:
            if key not in storages:
                name = f'{root}data/{key}'
                data = bytearray(sizes[name])
                with archive.open(name) as part:
                    _fill(data, part)
                storages[key] = Storage(_as_tensor(data), dtype)
            return Storage(storages[key].data, dtype)

        pickled = io.BytesIO(archive.read(f'{root}data.pkl'))
        content = SafeUnpickler(pickled, read_storage).load()
    return arrays_as_tensors(content)


def _read_legacy(path: Path) -> Any:
    """Several pickles and the storages after them, the format before 1.6."""
    size = path.stat().st_size
    storages: Dict[str, Tuple[bytearray, Storage, int]] = {}

    def make_storage(dtype: torch.dtype,
                     key: str,
                     location: str,
                     length: int,
                     view: Optional[Tuple[str, int, int]] = None) -> Storage:
        itemsize = torch.empty(0, dtype=dtype).element_size()
        if key not in storages:
            if not 0 <= length * itemsize <= size:
                raise pickle.UnpicklingError('a storage beyond the file')
            data = bytearray(length * itemsize)
            # Filled when the storages are read, after the pickles.
            storages[key] = data, Storage(_as_tensor(data), dtype), itemsize
        data, whole, itemsize = storages[key]
        if view is None:
            return whole
        _, start, length = view
        part = memoryview(data)[start * itemsize:(start + length) * itemsize]
        return Storage(torch.frombuffer(part, dtype=torch.uint8), dtype)

    with open(path, 'rb') as file:
        if (SafeUnpickler(file).load() != MAGIC
                or SafeUnpickler(file).load() != PROTOCOL):
            raise _Wrong('is a pickle and no checkpoint; give a file of '
                         'torch.save.')
        if not SafeUnpickler(file).load().get('little_endian', True):
            raise _Wrong('was written on a machine of other byte order; save '
                         'it on one of this kind.')
        content = SafeUnpickler(file, make_storage).load()
        keys: List[str] = SafeUnpickler(file).load()
        for key in keys:
            data, _, itemsize = storages[key]
            length = int.from_bytes(_read(file, 8), 'little')
            if length * itemsize != len(data):
                raise EOFError
            _fill(data, file)
    return arrays_as_tensors(content)


def _read_safetensors(path: Path) -> Dict[str, Tensor]:
    """A header in JSON, followed by the bytes of the tensors."""
    size = path.stat().st_size
    with open(path, 'rb') as file:
        length = int.from_bytes(_read(file, 8), 'little')
        if length > size:
            raise EOFError
        header = json.loads(_read(file, length))
        start = 8 + length
        tensors = {}
        for name, entry in header.items():
            if name == '__metadata__':
                continue
            if entry['dtype'] not in SAFETENSORS:
                raise _Wrong(f'holds {name!r} as {entry["dtype"]!r}, which is '
                             f'not read; convert it to one of '
                             f'{list(SAFETENSORS)}.')
            dtype = SAFETENSORS[entry['dtype']]
            first, end = entry['data_offsets']
            shape = tuple(entry['shape'])
            itemsize = torch.empty(0, dtype=dtype).element_size()
            if (min((0, *shape)) < 0 or not 0 <= first <= end <= size - start
                    or math.prod(shape) * itemsize != end - first):
                raise EOFError
            file.seek(start + first)
            data = bytearray(end - first)
            _fill(data, file)
            tensors[name] = _as_tensor(data).view(dtype).view(shape)
    return tensors


def _as_tensor(data: bytearray) -> Tensor:
    """A tensor of bytes that shares their memory."""
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8)


def _read(file: BinaryIO, length: int) -> bytes:
    content = file.read(length)
    if len(content) != length:
        raise EOFError
    return content


def _fill(data: bytearray, file: Any) -> None:
    """Fill a buffer from a file."""
    rest = memoryview(data)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
