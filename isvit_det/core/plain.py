"""Values as plain data, which any reader of a file can load."""
from typing import Any, Dict, Mapping


def plain(value: Any) -> Any:
    """A copy with dicts, lists, strings and numbers only.

    >>> plain({'classes': ('a', 'b'), 1: None})
    {'classes': ['a', 'b'], '1': None}
    >>> import torch
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
