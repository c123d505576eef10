"""Files: packed checkpoints, and the float checkpoints they are made from."""
import hashlib
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Mapping

import torch

from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.opcodes import check_memo
from isvit_det.packed_header import HEADER, check_others
from isvit_det.packed_state import CODES, pack_state

FORMAT = 'isvit_det.packed'


def save_packed(model: Any, path: Path, provenance: Mapping[str, Any],
                dataset_meta: Mapping[str, Any]) -> None:
    """Write a packed checkpoint, whole or not at all.

    Args:
        model: built by ``quantized_detector`` and calibrated.
        path: of the file.
        provenance: what the calibration used; plain values.
        dataset_meta: the data set's metainfo, for MMDetection's inferencers.

    Raises:
        QuantError: if the file cannot be written; an older one stays.
    """
    others = dict(
        format=FORMAT,
        quant=plain(model.quant_config.to_dict()),
        provenance=plain(provenance),
        meta=dict(dataset_meta=plain_metainfo(dataset_meta)))
    content = dict(
        others, state_dict=pack_state(model, model.quant_config, others))
    write_atomically(path, lambda file: torch.save(content, file))


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Read a float or packed checkpoint without running code it may hold.

    Returns:
        Its content; a packed one has been verified.

    Raises:
        QuantError: if there is no such file, or it is damaged, or holds
            more than tensors and plain values.
    """
    if not path.is_file():
        raise QuantError(f'checkpoint: there is no file {path}; give the '
                         'path of a float or packed checkpoint.')
    try:
        with warnings.catch_warnings():
            # Of a damaged file, which gets its one line.
            warnings.simplefilter('ignore')
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        content = _read_mmengine(path, error)
    # Damaged files raise anything.
    except Exception as error:
        raise QuantError(
            f'checkpoint: {path} cannot be read, it is truncated or no '
            'checkpoint; download or make it again.') from error
    if not isinstance(content, dict):
        raise QuantError(f'checkpoint: {path} holds a '
                         f'{type(content).__name__}, expected a dict with '
                         "'state_dict'.")
    if is_packed(content):
        check_others(content)
    elif content.get('format') == FORMAT or _has_codes(content):
        raise QuantError(f'checkpoint: {path} says it is packed and has no '
                         'header; it was changed, make it again.')
    return content


class _Ignored:
    """Stands for what MMEngine's training log holds; nothing is run."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Of MMEngine's training log.
IGNORED = {
    'builtins.getattr', '__builtin__.getattr', '_codecs.encode', 'numpy.dtype',
    'numpy.ndarray', 'mmengine.logging.history_buffer.HistoryBuffer',
    *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core')
      for name in ('_reconstruct', 'scalar'))
}
# What torch writes for tensors.
TENSOR_PARTS = {
    'collections.OrderedDict', 'torch.Size', 'torch._utils._rebuild_parameter',
    'torch._utils._rebuild_tensor_v2',
    *(f'torch.{name}' for name in dir(torch) if name.endswith('Storage'))
}


class _Unpickler(pickle.Unpickler):
    """Makes tensors and plain values, and runs nothing else."""

    def __init__(self, file: Any, **kwargs: Any) -> None:
        check_memo(file)
        super().__init__(file, **kwargs)

    def find_class(self, module: str, name: str) -> Any:
        full = f'{module}.{name}'
        if full in IGNORED:
            return _Ignored
        if full in TENSOR_PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{full} is not read')


def _read_mmengine(path: Path, error: Exception) -> Any:
    """Read a file of MMEngine's training, whose log holds its own classes."""
    with open(path, 'rb') as file:
        # A zip archive, or a pickle as torch wrote them before 1.6.
        if file.read(2) not in (b'PK', b'\x80\x02'):
            raise QuantError(f'checkpoint: {path} is no checkpoint; download '
                             'or make it again.') from error
    reader = SimpleNamespace(
        __name__='pickle',
        Unpickler=_Unpickler,
        load=lambda file, **kwargs: _Unpickler(file, **kwargs).load())
    try:
        # Older torch cannot be told of classes that weights_only=True reads.
        return torch.load(
            path, map_location='cpu', pickle_module=reader, weights_only=False)
    # Damaged files raise anything.
    except Exception:
        raise QuantError(
            f'checkpoint: {path} holds more than weights and is not read for '
            "safety; if you trust it, keep its 'state_dict' and 'meta' only "
            '(MMDetection: tools/model_converters/publish_model.py).'
        ) from error


def is_packed(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's content is a packed one's."""
    state = content.get('state_dict')
    return isinstance(state, Mapping) and HEADER in state


def _has_codes(content: Mapping[str, Any]) -> bool:
    """Whether a content holds codes, as only packed ones do."""
    return any(
        str(key).endswith(f'.{CODES}') for part in (content, *content.values())
        if isinstance(part, Mapping) for key in part)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(2**20), b''):
            digest.update(block)
    return digest.hexdigest()


def plain_metainfo(metainfo: Mapping[str, Any]) -> Dict[str, Any]:
    """A data set's metainfo in plain values, as its visualizer reads it.

    >>> plain_metainfo({'classes': ('a', ), 'palette': ((1, 2, 3), )})
    {'classes': ['a'], 'palette': [(1, 2, 3)]}
    """
    kept = plain(metainfo)
    if isinstance(kept.get('palette'), list):
        # A list is several colours, a tuple is one.
        kept['palette'] = [tuple(color) for color in kept['palette']]
    return kept


def plain(value: Any) -> Any:
    """A copy with dicts, lists, strings and numbers only.

    >>> plain({'classes': ('a', 'b'), 1: None})
    {'classes': ['a', 'b'], '1': None}
    >>> type(plain(torch.__version__))
    <class 'str'>
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            # Not a subclass, which weights_only=True would refuse.
            return kind(value)
    if hasattr(value, 'tolist'):
        return plain(value.tolist())
    return str(value)
