"""One form of config: types by name, and tuples where classes want them.

MMEngine's pure Python configs have classes as ``type``, and JSON and YAML
have no tuples. Both become what a text config holds.
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

# Keys whose values are built by MMEngine's registries.
TYPE_KEYS = ('type', 'base')
# Kinds of values that a JSON file writes as a list.
LISTS = (list, collections.abc.Sequence, collections.abc.Iterable,
         collections.abc.Collection)
# What a value is if a hint says one of these.
SCALARS: Mapping[Any, Any] = {
    int: int,
    float: (int, float),
    str: str,
    bool: bool,
    dict: dict,
    type(None): type(None)
}


def name_types_(node: Any) -> None:
    """Write the types of a config as names that registries know, in place.

    Classes, functions, MMEngine's lazy objects and import paths (which its
    dumps of pure Python configs hold) become registered names where there is
    one, and import paths where there is none.

    Raises:
        ImportError: if something is not to be imported.
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
    # It raises what the modules on the path raise.
    try:
        return get_object_from_string(path)
    except Exception:
        return None


def _registries() -> Iterator[Registry]:
    """Every registry of every package that has been imported."""
    left = [
        value for value in vars(mmengine_registry).values()
        if isinstance(value, Registry)
    ]
    while left:
        registry = left.pop(0)
        yield registry
        left += registry.children.values()


def restore_tuples_(node: Any) -> None:
    """Turn lists into tuples where classes say so, in place.

    A class says so by the annotation or the default of an argument; lists
    that it takes as they are stay lists.
    """
    if isinstance(node, dict):
        kind = class_of(node.get('type'))
        for key, value in list(node.items()):
            if kind is not None and isinstance(value, list):
                value = node[key] = _restored(kind, key, value)
            elif key == 'palette' and isinstance(value, list):
                # Colours; a tuple of them would be a single one.
                node[key] = _as_default(value, [()])
            restore_tuples_(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            restore_tuples_(value)


def has_lists(value: Any) -> bool:
    """Whether a value of ``--cfg-options`` holds a list."""
    if isinstance(value, Mapping):
        return any(map(has_lists, value.values()))
    return isinstance(value, list)


def class_of(name: Any) -> Any:
    """The class or function that a config's type names, None if none is."""
    if not isinstance(name, str):
        return name if inspect.isclass(name) else None
    registries = (
        getattr(mmdet_registry, key)
        for key in ('TRANSFORMS', 'DATASETS', 'MODELS', 'TASK_UTILS',
                    'METRICS', 'DATA_SAMPLERS', 'HOOKS'))
    for registry in registries:
        # What is in no registry is told when it is built.
        with contextlib.suppress(RuntimeError, ImportError, KeyError):
            found = registry.get(name)
            if found is not None:
                return found
    return None


def _restored(kind: Any, key: str, value: List[Any]) -> Any:
    """The argument of a class as its signature wants it."""
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
    # Annotations are anybody's code.
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
    """Whether a value is what a hint says once lists are tuples, and it."""
    origin = typing.get_origin(hint) or hint
    args = typing.get_args(hint)
    # Python 3.10's X | Y has an origin of its own.
    if origin is typing.Union or type(hint).__name__ == 'UnionType':
        for arg in args:
            fits, found = _fit(value, arg)
            if fits:
                return True, found
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
    found = [_fit(item, hint) for item, hint in zip(value, hints)]
    if not all(fits for fits, _ in found):
        return False, value
    return True, kind(item for _, item in found)


class WholeConfig(Config):
    """A config whose Python file is written whole or not at all."""

    def dump(self, file: Any = None) -> Any:
        """Write a file, or give the text, as ``Config`` does.

        Raises:
            QuantError: if a Python file cannot be written.
        """
        if file is None or Path(file).suffix != '.py':
            return super().dump(file)
        text = self.pretty_text.encode()
        write_atomically(Path(file), lambda out: out.write(text))
        return None


def as_python(cfg: Config) -> Config:
    """A config that MMEngine writes as Python, which keeps tuples.

    What a killed run leaves of it is never half of a file.
    """
    path = Path(cfg.filename or 'config.py')
    if path.suffix != '.py':
        cfg = Config(
            cfg._cfg_dict,
            cfg_text=cfg.text or '\n',
            filename=str(path.with_suffix('.py')))
    # Config would take the attribute for one of its keys.
    object.__setattr__(cfg, '__class__', WholeConfig)
    return cfg
