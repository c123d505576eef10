"""SHA-256 of contents: of state dicts, of plain values, and of files."""
import hashlib
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor

from isvit_det.core.errors import QuantError


def checksum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors.

    Raises:
        QuantError: if a value is no dense tensor with memory for each of its
            elements, which can occur in a damaged file.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if not _is_plain(value):
            raise QuantError(f'{name}: not a tensor of plain memory.')
        value = value.detach().cpu().contiguous()
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose bytes can be read.

    An expanded view, which repeats few bytes, could fill the memory.
    """
    return (isinstance(value, Tensor) and value.layout == torch.strided
            and not value.is_quantized and value.device.type != 'meta'
            and (value.is_contiguous() or value.numel() * value.element_size()
                 <= value.untyped_storage().nbytes()))


def digest_of(value: Any) -> str:
    """SHA-256 over a plain value: its types, its order and its content.

    Args:
        value: None, a bool, number or string, or lists, tuples and dicts
            with strings as keys of these. The order of a dict does not matter.

    Raises:
        QuantError: if it holds anything else.

    >>> digest_of({'a': 1, 'b': [2]}) == digest_of({'b': [2], 'a': 1})
    True
    >>> digest_of([1, 2]) == digest_of((1, 2))
    False
    """
    digest = hashlib.sha256()
    for word in _words(value):
        digest.update(f'{word}\n'.encode())
    return digest.hexdigest()


def _words(value: Any) -> Iterator[str]:
    kind = type(value)
    if kind in (type(None), bool, int, float, str):
        yield f'{kind.__name__} {value!r}'
    elif kind in (list, tuple):
        yield f'{kind.__name__} {len(value)}'
        for item in value:
            yield from _words(item)
    elif kind is dict and all(type(key) is str for key in value):
        yield f'dict {len(value)}'
        for key in sorted(value):
            yield from _words(key)
            yield from _words(value[key])
    else:
        raise QuantError(f'a {kind.__name__} is no plain value.')


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(2**20), b''):
            digest.update(block)
    return digest.hexdigest()
