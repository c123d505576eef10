"""Finding the weights in a checkpoint: those that its trainer evaluates."""
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from isvit_det.core.errors import QuantError
from isvit_det.core.reading import read_file
from isvit_det.core.unpickling import Inert, ordered

# Entries that hold weights, in order of preference. timm evaluates the
# averaged weights and chooses its best checkpoint by them. DeiT evaluates
# 'model'. In files of MMEngine, 'state_dict' has the averaged weights, and
# 'ema_state_dict' those from which training continues.
ENTRIES = ('state_dict_ema', 'state_dict', 'model', 'model_state_dict')
# Entries that are used if the file has none of those.
ONLY = ('model_ema', 'ema_state_dict', 'ema', 'teacher')
# Prefixes that wrappers add to every name: DistributedDataParallel,
# torch.compile, Lightning. No supported model has a single child of such a
# name.
PREFIXES = ('module.', '_orig_mod.', 'model.')
# Counters that averaged models have beside their 'module.'.
COUNTERS = ('n_averaged', 'steps')
# Types of weights that are accepted.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Weights(NamedTuple):
    """Weights of a file.

    Attributes:
        state_dict: tensors by name, as ``load_state_dict`` takes them.
        rest: the other entries of the file.
        summary: a line that says which entry was used.
    """
    state_dict: Dict[str, Tensor]
    rest: Dict[str, Any]
    summary: str


def read_weights(path: Path) -> Weights:
    """Read the weights of a file, those that its trainer would evaluate.

    Raises:
        QuantError: if it cannot be read or holds no weights.
    """
    return weights_of(read_file(path), path)


def check_values(state: Mapping[str, Tensor], model: Mapping[str,
                                                             Tensor]) -> None:
    """Check that the floating tensors of a state are finite.

    Integers of the model, such as counters and indices, are not checked, nor
    are tensors that the state or the model lacks.

    Args:
        state: tensors of a file by name.
        model: tensors of the model that is to load them, by the same names.

    Raises:
        QuantError: naming the first tensor that has no floating type, or that
            has NaN or infinite values in the model's type where the model has
            none.
    """
    for key, own in model.items():
        value = state.get(key)
        if value is None or not own.is_floating_point():
            continue
        if value.dtype not in FLOATS:
            raise QuantError(f'weights: {key!r} is of {value.dtype}, expected '
                             f'one of {list(map(str, FLOATS))}; give float '
                             'weights.')
        # A tensor on the meta device has no values.
        if not own.is_meta and own.isfinite().all():
            check_finite(key, value.to(own.dtype))


def check_finite(name: str, value: Tensor) -> None:
    """Raise QuantError if a tensor holds NaN or infinite values."""
    if not value.isfinite().all():
        raise QuantError(f'weights: {name!r} holds NaN or infinite values in '
                         f'{value.dtype}; its training diverged or the file '
                         'is damaged, give other weights.')


def weights_of(content: Any, path: Path) -> Weights:
    """Find the weights in the content of a file.

    Prefixes that wrappers add to the names are removed.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        QuantError: if there are no weights, or not all of them are tensors.
    """
    entries, state = _find_entry(content, path)
    rest = {}
    if entries:
        rest = {k: v for k, v in content.items() if k != entries[0]}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise QuantError(f'checkpoint: {key!r} of {path} is no tensor; '
                             'give a file of weights alone, or one that has '
                             f'them under one of {list(ENTRIES)}.')
    notes = [f'{path.name}: all of it']
    if entries:
        notes = [f"{path.name}: entry {' of '.join(map(repr, entries[::-1]))}"]
    left = [key for key in (*ENTRIES, *ONLY) if _has_tensors(rest.get(key))]
    if left:
        notes.append(f'not {" or ".join(map(repr, left))}')
    state, stripped = _without_prefixes(state)
    if stripped:
        notes.append(f'without the prefix {stripped!r}')
    copies = set(_averaging_copies(state))
    if copies:
        notes.append(f"without {len(copies)} copies 'ema_*' that MMDetection "
                     '2 goes on from')
        state = ordered(state, lambda key: None if key in copies else key)
    return Weights(state, rest, f'weights of {", ".join(notes)}')


def _find_entry(content: Any,
                path: Path) -> Tuple[List[str], Mapping[Any, Any]]:
    """The weights, and the names of the nested entries that lead to them."""
    entries: List[str] = []
    while True:
        if not isinstance(content, dict):
            kind = type(content).__name__
            what = ('an object of a class that is not read' if isinstance(
                content, Inert) else 'a ' + kind)
            where = f' under {entries[-1]!r}' if entries else ''
            raise QuantError(
                f'checkpoint: {path} holds {what}{where}, expected a dict of '
                'weights or one that has them under one of '
                f'{[*ENTRIES, *ONLY]}.')
        entry = _choose(content)
        if entry is None:
            break
        entries.append(entry)
        content = content[entry]
    if not content:
        where = f' under {entries[-1]!r}' if entries else ''
        raise QuantError(f'checkpoint: {path} holds an empty dict{where} and '
                         'no weights; give a file of weights.')
    return entries, content


def _choose(content: Mapping[Any, Any]) -> Optional[str]:
    order = [*ENTRIES, *ONLY]
    if 'meta' in content:
        # Files of MMEngine and MMCV, which use this entry alone.
        order.insert(0, 'state_dict')
    for key in order:
        value = content.get(key)
        # timm writes None for an entry that it does not have.
        if key in content and value is not None and not isinstance(
                value, Tensor):
            return key
    return None


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(item, Tensor) for item in value.values())


def _without_prefixes(
        state: Mapping[str, Tensor]) -> Tuple[Dict[str, Tensor], str]:
    """A state without the prefixes of wrappers, and these prefixes."""
    stripped = ''
    renamed: Dict[str, Tensor] = ordered(state, lambda key: key)
    while True:
        kept = [key for key in renamed if key not in COUNTERS]
        prefix = next(
            (prefix for prefix in PREFIXES
             if kept and all(key.startswith(prefix) for key in kept)), '')
        if not prefix:
            break
        stripped += prefix
        renamed = _strip(renamed, prefix)
    if any('._orig_mod.' in key for key in renamed):
        stripped += '(...)_orig_mod.'
        renamed = ordered(renamed, lambda key: key.replace('._orig_mod.', '.'))
    return renamed, stripped


def _strip(state: Mapping[str, Tensor], prefix: str) -> Dict[str, Tensor]:
    return ordered(
        state, lambda key: key[len(prefix):]
        if key.startswith(prefix) else None)


def _averaging_copies(state: Mapping[str, Tensor]) -> List[str]:
    """Names of the copies of weights in files of MMDetection 2's EMA hook.

    The copies are the weights from which training continues. Their names are
    those of the averaged weights with underscores instead of dots.
    """
    known = {key.replace('.', '_') for key in state}
    copies = [key for key in state if re.match(r'ema_\w+$', key)]
    if all(key[len('ema_'):] in known for key in copies):
        return copies
    return []
