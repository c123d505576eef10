"""The header of a packed state: settings, and checksums of the whole file.

MMEngine gives a model only the state of a file, so one checksum covers the
header and the state. For the other entries of the file, the header holds
digests, which are compared when the whole file is read.
"""
import hashlib
import json
from typing import Any, Dict, Mapping, Optional

import torch
from torch import Tensor

from isvit_det.core.digests import checksum, digest_of
from isvit_det.core.errors import QuantError

# Version 1 has no digests of the other entries.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
HEADER = 'isvit_det_header'
# Entries that an error message names.
SHOWN = 5


def describe_others(others: Mapping[str, Any]) -> Dict[str, Any]:
    """Entries of a header for the other entries of its file.

    Args:
        others: the entries of the file by name, without the state; plain
            values.
    """
    return dict(
        others={
            name: digest_of(value)
            for name, value in others.items()
        },
        classes=digest_of_classes(others.get('meta', {})))


def digest_of_classes(meta: Mapping[str, Any]) -> Optional[str]:
    """Digest of the class names in a file's ``meta``, None if it has none."""
    classes = (meta.get('dataset_meta') or {}).get('classes')
    return None if classes is None else digest_of(
        [str(name) for name in classes])


def write_header(header: Dict[str, Any], state: Mapping[str,
                                                        Tensor]) -> Tensor:
    """A header as a tensor of bytes, with the checksum of header and state."""
    header = dict(header, checksum=_checksum_of(header, state))
    text = json.dumps(header, sort_keys=True).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def read_header(state: Mapping[str, Tensor], prefix: str = '') -> dict:
    """Read the header of a packed state and verify its checksum.

    Args:
        state: packed.
        prefix: of the keys of the state.

    Raises:
        QuantError: if the version is newer than this package, or the state
            is not what was packed.
    """
    key = prefix + HEADER
    try:
        rest = {
            name[len(prefix):]: value
            for name, value in state.items()
            if name.startswith(prefix) and name != key
        }
        header = json.loads(bytes(state[key].tolist()).decode())
        version, expected = header['version'], header.pop('checksum')
    except (ValueError, KeyError, TypeError, AttributeError,
            RecursionError) as error:
        raise QuantError('packed file: its header cannot be read; it was '
                         'changed or damaged, pack it again.') from error
    if version not in READABLE_VERSIONS:
        raise QuantError(
            f'packed file: format version {version} is not supported, '
            f'expected {FORMAT_VERSION}; use the isvit_det that wrote it.')
    try:
        actual = _checksum_of(header, rest)
    except QuantError:
        actual = ''
    if actual != expected:
        raise QuantError('packed file: its checksum does not match its '
                         'contents; it was changed or damaged, pack it '
                         'again.')
    return header


def check_others(content: Mapping[str, Any]) -> None:
    """Raise unless the entries of a packed file are those that were written.

    Args:
        content: of the file: the packed state as ``'state_dict'``, and the
            other entries.

    Raises:
        QuantError: naming what was changed, taken away or added.
    """
    header = read_header(content['state_dict'])
    if header['version'] == 1:
        return
    changed = set(header['others']) - set(content)
    for name, value in content.items():
        if name != 'state_dict':
            try:
                digest = digest_of(value)
            except (QuantError, RecursionError, ValueError):
                digest = ''
            if header['others'].get(name) != digest:
                changed.add(name)
    if changed:
        names = ', '.join(sorted(map(repr, changed))[:SHOWN])
        raise QuantError(f'packed file: {names} is not what the calibration '
                         'wrote; it was changed or damaged, pack it again.')


def _checksum_of(header: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """SHA-256 over a header without its checksum, and a state."""
    text = json.dumps(header, sort_keys=True) + checksum(state)
    return hashlib.sha256(text.encode()).hexdigest()
