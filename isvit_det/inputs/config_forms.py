"""Normalising configs: types as names, and tuples where classes expect them.

MMEngine's pure Python configs have classes as ``type``, and JSON and YAML
have no tuples. Both are converted to the form of a text config.
"""
import collections.abc
import contextlib
import inspect
import itertools
import typing
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Tuple

from mmdet import registry as mmdet_registry
from mmengine import registry as mmengine_registry
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

from isvit_det.core.files import write_atomically

# Keys of the values that MMEngine's registries build.
TYPE_KEYS = ('type', 'base')
# Types that a JSON file writes as a list.
LISTS = (list, collections.abc.Sequence, collections.abc.Iterable,
         collections.abc.Collection)
# Type hints, and the types of values that satisfy them.
SCALARS: Mapping[Any, Any] = {
    int: int,
    float: (int, float),
    str: str,
    bool: bool,
    dict: dict,
    type(None): type(None)
}


def name_types_(node: Any) -> None:
    """Replace the types in a config by names of registries, in place.

    Types are classes, functions, MMEngine's lazy objects, or import paths,
    which MMEngine writes when it dumps pure Python configs. A type that is
    not registered is replaced by its import path.

    Raises:
        ImportError: if a lazy object cannot be imported.
    """
    if isinstance(node, Config):
        node = node._cfg_dict
    if isinstance(node, dict):
        # ConfigDict's own methods would build lazy objects.
        for key, value in list(dict.items(node)):
            if key in TYPE_KEYS:
                dict.__setitem__(node, key, _name(value))
            else:
                name_types_(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            name_types_(value)


def _name(value: Any) -> Any:
    if isinstance(value, (LazyObject, LazyAttr)):
        value = value.build()
    known = value
    if isinstance(value, str) and value.count('.') > 1:
        known = _imported(value)
    if not callable(known):
        name_types_(value)
        return value
    names = [
        key if registry.parent is None else f'{registry.scope}.{key}'
        for registry in _registries()
        for key, module in registry.module_dict.items() if module is known
    ]
    if names:
        return names[0]
    path = f'{known.__module__}.{getattr(known, "__qualname__", "")}'
    return path if _imported(path) is known else value


def _imported(path: str) -> Any:
    # Importing the modules of the path may raise any exception.
    try:
        return get_object_from_string(path)
    except Exception:
        return None


def _registries() -> Iterator[Registry]:
    """All registries of the packages that are imported."""
    left = [
        value for value in vars(mmengine_registry).values()
        if isinstance(value, Registry)
    ]
    while left:
        registry = left.pop(0)
        yield registry
        left += registry.children.values()


def restore_tuples_(node: Any) -> None:
    """Turn lists into tuples where classes expect tuples, in place.

    This is decided by the type hint or the default of the argument. Other
    lists stay lists.
    """
    if isinstance(node, dict):
        kind = class_of(node.get('type'))
        for key, value in list(node.items()):
            if kind is not None and isinstance(value, list):
                value = node[key] = _restored(kind, key, value)
            elif key == 'palette' and isinstance(value, list):
                # A list of colours, each of which is a tuple.
                node[key] = _as_default(value, [()])
            restore_tuples_(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            restore_tuples_(value)


def has_lists(value: Any) -> bool:
    """Whether a value of ``--cfg-options`` contains a list."""
    if isinstance(value, Mapping):
        return any(map(has_lists, value.values()))
    return isinstance(value, list)


def class_of(name: Any) -> Any:
    """The class or function of a config's ``type``, None if there is none."""
    if not isinstance(name, str):
        return name if inspect.isclass(name) else None
    registries = (
        getattr(mmdet_registry, key)
        for key in ('TRANSFORMS', 'DATASETS', 'MODELS', 'TASK_UTILS',
                    'METRICS', 'DATA_SAMPLERS', 'HOOKS'))
    for registry in registries:
        # A name in no registry becomes an error when it is built.
        with contextlib.suppress(RuntimeError, ImportError, KeyError):
            registered = registry.get(name)
            if registered is not None:
                return registered
    return None


def _restored(kind: Any, key: str, value: List[Any]) -> Any:
    """The argument of a class, with the tuples of its signature."""
    for base in inspect.getmro(kind) if inspect.isclass(kind) else [kind]:
        call = base.__init__ if inspect.isclass(base) else base
        parameter = _parameters(call).get(key)
        if parameter is None:
            continue
        hints = _hints(call)
        if key in hints:
            return _fit(value, hints[key])[1]
        return _as_default(value, parameter.default)
    return value


def _parameters(call: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(call).parameters
    except (TypeError, ValueError):
        return {}


def _hints(call: Callable) -> Mapping[str, Any]:
    # Evaluating annotations may raise any exception.
    try:
        return typing.get_type_hints(call)
    except Exception:
        return {}


def _as_default(value: Any, default: Any) -> Any:
    if not isinstance(value, list) or not isinstance(default, (list, tuple)):
        return value
    inner = default[0] if default else None
    kind = tuple if isinstance(default, tuple) else list
    return kind(_as_default(item, inner) for item in value)


def _fit(value: Any, hint: Any) -> Tuple[bool, Any]:
    """Whether a value fits a hint, with lists as tuples; and that value."""
    origin = typing.get_origin(hint) or hint
    args = typing.get_args(hint)
    # The origin of Python 3.10's X | Y is not typing.Union.
    if origin is typing.Union or type(hint).__name__ == 'UnionType':
        for arg in args:
            fits, fitted = _fit(value, arg)
            if fits:
                return True, fitted
        return False, value
    if origin is tuple or origin in LISTS:
        if not isinstance(value, (list, tuple)):
            return False, value
        return _fit_items(value, tuple if origin is tuple else type(value),
                          origin is tuple, args)
    if origin is typing.Any:
        return True, value
    if origin in SCALARS:
        return isinstance(value, SCALARS[origin]), value
    return not isinstance(value, list), value


def _fit_items(value: Any, kind: Any, is_tuple: bool,
               args: Tuple[Any, ...]) -> Tuple[bool, Any]:
    if not args:
        return True, kind(value)
    if is_tuple and args[-1] is not Ellipsis:
        if len(args) != len(value):
            return False, value
        hints: Any = args
    else:
        hints = itertools.repeat(args[0])
    fitted = [_fit(item, hint) for item, hint in zip(value, hints)]
    if not all(fits for fits, _ in fitted):
        return False, value
    return True, kind(item for _, item in fitted)


class WholeConfig(Config):
    """A config that writes Python files atomically."""

    def dump(self, file: Any = None) -> Any:
        """Write a file, or return the text, as ``Config`` does.

        Raises:
            QuantError: if a Python file cannot be written.
        """
        if file is None or Path(file).suffix != '.py':
            return super().dump(file)
        text = self.pretty_text.encode()
        write_atomically(Path(file), lambda out: out.write(text))
        return None


def as_python(cfg: Config) -> Config:
    """A config that MMEngine writes as Python, which preserves tuples.

    It is written atomically.
    """
    path = Path(cfg.filename or 'config.py')
    if path.suffix != '.py':
        cfg = Config(
            cfg._cfg_dict,
            cfg_text=cfg.text or '\n',
            filename=str(path.with_suffix('.py')))
    # Config's own __setattr__ would set a key.
    object.__setattr__(cfg, '__class__', WholeConfig)
    return cfg
