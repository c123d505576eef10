"""Unpickling without running code that a pickle names.

A pickle may name any function and have it called. Here, tensors and plain
containers are made by functions of this module. Objects of classes that are
common in training checkpoints are replaced by empty placeholders. All other
names are refused.
"""
import pickle
import re
from collections import OrderedDict
from typing import (Any, Callable, Dict, List, Mapping, NamedTuple, Optional,
                    Sequence, Tuple)

import torch
from torch import Tensor

from isvit_det.core.opcodes import check_memo

# Modules of Python 2, which older protocols name.
RENAMED = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}
# Classes of training logs, arguments and states, none of which is needed.
INERT = {
    'argparse.Namespace',
    'builtins.getattr',
    'builtins.object',
    'builtins.type',
    'builtins.list',
    'builtins.dict',
    'builtins.tuple',
    'builtins.int',
    'builtins.float',
    'builtins.str',
    'builtins.bool',
    'builtins.slice',
    'builtins.range',
    'collections.deque',
    'copyreg._reconstructor',
    'decimal.Decimal',
    'fractions.Fraction',
    'uuid.UUID',
    'numpy.ndarray',
    'torch.Tensor',
    'torch.device',
    'torch.nn.parameter.Parameter',
    'torch.serialization._get_layout',
    'torch.torch_version.TorchVersion',
    'addict.addict.Dict',
    'easydict.EasyDict',
    'fvcore.common.config.CfgNode',
    'detectron2.config.config.CfgNode',
    'mmcv.utils.config.Config',
    'mmcv.utils.config.ConfigDict',
    'mmengine.config.config.Config',
    'mmengine.config.config.ConfigDict',
    'mmengine.logging.history_buffer.HistoryBuffer',
    'lightning.fabric.utilities.data.AttributeDict',
    'pytorch_lightning.utilities.parsing.AttributeDict',
}
# Modules that have only such classes.
INERT_MODULES = ('datetime', 'numpy.dtypes', 'omegaconf', 'pathlib', 'typing',
                 'yacs.config')
STORAGES = dict(
    DoubleStorage=torch.float64,
    FloatStorage=torch.float32,
    HalfStorage=torch.float16,
    BFloat16Storage=torch.bfloat16,
    LongStorage=torch.int64,
    IntStorage=torch.int32,
    ShortStorage=torch.int16,
    CharStorage=torch.int8,
    ByteStorage=torch.uint8,
    BoolStorage=torch.bool,
    ComplexFloatStorage=torch.complex64,
    ComplexDoubleStorage=torch.complex128,
    UntypedStorage=torch.uint8)
# numpy's type codes of little endian numbers.
ARRAYS = dict(
    f2=torch.float16,
    f4=torch.float32,
    f8=torch.float64,
    i1=torch.int8,
    i2=torch.int16,
    i4=torch.int32,
    i8=torch.int64,
    u1=torch.uint8,
    b1=torch.bool)


class RefusedName(pickle.UnpicklingError):
    """A pickle names an object that is refused.

    Args:
        name: of the object, with its module.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f'{name} is not read')
        self.name = name
        # Otherwise the file is damaged, and the name may contain control
        # characters.
        self.is_name = re.fullmatch(r'[\w.]+', name) is not None


class Inert:
    """An empty placeholder for an object of another class."""
    __slots__ = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> 'Inert':
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class PlainDict(dict):
    """A dict whose only attribute is the metadata of torch's state dicts."""
    # As torch calls it.
    __slots__ = ('_metadata', )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._metadata: Mapping[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        metadata = state.get('_metadata') if isinstance(state, dict) else None
        if isinstance(metadata, dict):
            self._metadata = metadata


class Storage(NamedTuple):
    """Bytes that tensors share.

    Attributes:
        data: shape (bytes,), uint8.
        dtype: of the tensors.
    """
    data: Tensor
    dtype: torch.dtype


class DType:
    """A dtype of numpy: its type code and its byte order."""
    __slots__ = ('code', 'order')

    def __init__(self, code: Any = '', *args: Any) -> None:
        self.code = code
        self.order = '|'

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = state[1]

    def tensor(self, shape: Sequence[int], raw: Any) -> Optional[Tensor]:
        """Bytes as a tensor; None if the type is not supported."""
        dtype = ARRAYS.get(self.code if isinstance(self.code, str) else '')
        if dtype is None or self.order == '>':
            return None
        # Python 2 wrote bytes as text.
        raw = raw.encode('latin1') if isinstance(raw, str) else bytes(raw)
        if not raw:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(bytearray(raw), dtype=dtype)
        return flat.view(tuple(shape))


class Array:
    """An array of numpy, which a pickle creates before it sets its state."""
    __slots__ = ('value', )

    def __init__(self, *args: Any) -> None:
        self.value: Any = None

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, by_column, raw = state
        value = None
        if isinstance(dtype, DType) and not isinstance(raw, list):
            value = dtype.tensor(shape[::-1] if by_column else shape, raw)
        if value is not None and by_column:
            value = value.permute(*reversed(range(value.ndim))).contiguous()
        self.value = Inert() if value is None else value


class Call:
    """A function that a pickle may call, but not modify."""
    __slots__ = ('_function', )

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('a function has no state')


def _tensor(storage: Storage, offset: int, size: Sequence[int],
            stride: Sequence[int], *args: Any) -> Tensor:
    """A tensor on a storage; further arguments concern its gradient."""
    dtype = args[2] if len(args) > 2 and isinstance(args[2],
                                                    torch.dtype) else None
    dtype = dtype or storage.dtype
    itemsize = torch.empty(0, dtype=dtype).element_size()
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    numbers = [offset, *size, *stride]
    if not all(isinstance(n, int) and n >= 0
               for n in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError('a tensor of impossible shape')
    if 0 not in size and (last + 1) * itemsize > len(storage.data):
        raise pickle.UnpicklingError('a tensor beyond its storage')
    return torch.empty(
        0, dtype=dtype).set_(storage.data.untyped_storage(), offset,
                             tuple(size), tuple(stride))


def _of_subclass(function: Any, kind: Any, args: Sequence[Any],
                 state: Any) -> Any:
    if not isinstance(function, Call):
        raise pickle.UnpicklingError('a tensor of an unknown kind')
    return function(*args)


def _encode(text: str, encoding: str = 'latin1') -> bytes:
    """Bytes, as pickles of protocol 2 encode them."""
    if encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError('bytes in another encoding')
    return text.encode('latin1')


def _bytearray(raw: Any = b'', *encoding: str) -> bytearray:
    return bytearray(_encode(raw) if isinstance(raw, str) else bytes(raw))


def _scalar(dtype: Any, raw: Any = b'') -> Any:
    value = dtype.tensor((), raw) if isinstance(dtype, DType) else None
    return Inert() if value is None else value.item()


def _of_buffer(raw: Any, dtype: Any, shape: Sequence[int],
               order: Any) -> Array:
    array = Array()
    by_column = order == 'F'
    array.__setstate__((1, shape, dtype, by_column, raw))
    return array


NUMPY: Dict[str, Callable[..., Any]] = dict(
    _reconstruct=Array,
    scalar=_scalar,
    _frombuffer=_of_buffer,
    dtype=DType,
)
# Functions that a pickle may call, by module and name.
CALLED: Dict[str, Dict[str, Callable[..., Any]]] = {
    'collections':
    dict(
        OrderedDict=PlainDict,
        Counter=PlainDict,
        defaultdict=lambda *args: PlainDict()),
    'builtins':
    dict(
        set=set,
        frozenset=frozenset,
        complex=complex,
        bytes=lambda *args: bytes(_bytearray(*args)),
        bytearray=_bytearray),
    '_codecs':
    dict(encode=_encode),
    'torch':
    dict(Size=lambda *args: tuple(*args)),
    'torch._utils':
    dict(
        _rebuild_tensor=_tensor,
        _rebuild_tensor_v2=_tensor,
        _rebuild_tensor_v3=_tensor,
        _rebuild_parameter=lambda data, *args: data,
        _rebuild_parameter_with_state=lambda data, *args: data),
    'torch._tensor':
    dict(_rebuild_from_type_v2=_of_subclass),
    'numpy':
    NUMPY,
    'numpy.core.multiarray':
    NUMPY,
    'numpy._core.multiarray':
    NUMPY,
    'numpy.core.numeric':
    NUMPY,
    'numpy._core.numeric':
    NUMPY,
}


class SafeUnpickler(pickle.Unpickler):
    """An unpickler that makes tensors and plain values only.

    Args:
        file: to read from.
        storage: makes a storage from its description in the pickle.
    """

    def __init__(self,
                 file: Any,
                 storage: Optional[Callable[..., Storage]] = None) -> None:
        check_memo(file)
        super().__init__(file, encoding='latin1')
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        module = RENAMED.get(module, module)
        full = f'{module}.{name}'
        if name in CALLED.get(module, {}):
            return Call(CALLED[module][name])
        if full in INERT or any(module == kept or module.startswith(f'{kept}.')
                                for kept in INERT_MODULES):
            # A new class each time, because a pickle may modify it.
            return type(name, (Inert, ), dict(__slots__=()))
        if module in ('torch', 'torch.cuda', 'torch.storage'):
            if name in STORAGES:
                return STORAGES[name]
            value = vars(torch).get(name)
            if isinstance(value, torch.dtype):
                return value
        raise RefusedName(full)

    def persistent_load(self, pid: Any) -> Storage:
        if self._storage is None or pid[0] != 'storage' or not isinstance(
                pid[1], torch.dtype):
            raise pickle.UnpicklingError('a part that is kept elsewhere')
        return self._storage(*pid[1:])


def arrays_as_tensors(content: Any) -> Any:
    """The content of a file, with tensors in place of numpy arrays."""
    seen = set()
    waiting: List[Any] = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not isinstance(value, (dict, list)):
            continue
        seen.add(id(value))
        pairs: List[Tuple[Any, Any]] = list(
            value.items() if isinstance(value, dict) else enumerate(value))
        for key, item in pairs:
            value[key] = item = _without_array(item)
            waiting.append(item)
    return _without_array(content)


def _without_array(item: Any) -> Any:
    if isinstance(item, Array):
        return item.value
    if isinstance(item, tuple):
        return tuple(map(_without_array, item))
    return item


def ordered(state: Mapping[str, Tensor],
            rename: Callable[[str], Optional[str]]) -> 'OrderedDict[str, Any]':
    """A state dict with other names, its metadata included.

    Args:
        state: of a file.
        rename: returns the new name for an old one, or None to drop it.
    """
    renamed: 'OrderedDict[str, Any]' = OrderedDict()
    for key, value in state.items():
        name = rename(key)
        if name is not None:
            renamed[name] = value
    metadata: 'OrderedDict[str, Any]' = OrderedDict()
    for key, value in getattr(state, '_metadata', {}).items():
        name = rename(f'{key}.' if key else '')
        if name is not None and isinstance(value, dict):
            metadata[name.rstrip('.')] = dict(value)
    renamed._metadata = metadata  # type: ignore[attr-defined]
    return renamed
