"""``--cfg-options``: reading KEY=VALUE, and fitting it into a config."""
import argparse
import dataclasses
import difflib
import inspect
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from mmengine.config import DictAction
from mmengine.runner import Runner

from isvit_det.core.errors import QuantError
from isvit_det.core.settings import QuantConfig, SOSConfig

FORMS = ('give KEY=VALUE, VALUE a number, True, False, None, a text without '
         'quotes and spaces, or a list [1,2] or tuple (1,2) of such; set '
         'what a dict holds key by key, such as model.backbone.depth=12, or '
         'write it into a config')
# First characters of values that MMEngine cannot parse.
UNREAD = ('dict(', '{')
# Keys of a config that MMEngine's Runner reads.
RUNNER_KEYS = (*(name for name in inspect.signature(Runner).parameters
                 if name != 'cfg'), 'model_wrapper_cfg', 'sync_bn',
               'find_unused_parameters', 'activation_checkpointing',
               'efficient_conv_bn_eval', 'compile')


class OverrideAction(DictAction):
    """Parses KEY=VALUE as MMEngine does, with errors in one line."""

    def __call__(self,
                 parser: argparse.ArgumentParser,
                 namespace: argparse.Namespace,
                 values: Union[str, Sequence[Any], None],
                 option_string: Optional[str] = None) -> None:
        for pair in values or ():
            try:
                super().__call__(parser, namespace, [pair], option_string)
                key, value = pair.split('=',
                                        1)[0], getattr(namespace, self.dest)
                check_key(key)
                is_read = not _is_unread(value[key])
            # For unbalanced brackets, commas in unknown brackets, and a
            # missing "=".
            except (AssertionError, RecursionError, ValueError):
                is_read = False
            if not is_read:
                parser.error(f'{self.option_strings[0]}: {pair!r} cannot be '
                             f'read; {FORMS}.')


def check_key(key: str) -> None:
    """Raise ValueError unless a key consists of names separated by dots."""
    if not all(part.strip() == part and part for part in key.split('.')):
        raise ValueError(key)


def check_pairs(parser: argparse.ArgumentParser, pairs: Sequence[str]) -> None:
    """Check options for another command; errors are those of ``parser``."""
    action = OverrideAction(['--cfg-options'], 'cfg_options')
    action(parser, argparse.Namespace(), pairs)


def _is_unread(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_unread, value))
    return isinstance(value, str) and value.startswith(UNREAD)


def check_overrides(cfg: Mapping[str, Any], overrides: Mapping[str,
                                                               Any]) -> None:
    """Check that overrides fit a config.

    Args:
        cfg: a whole config.
        overrides: values by dotted key.

    Raises:
        QuantError: naming a key that has a value without keys, or an element
            that a list does not have, on its path; that contains another key;
            or whose first name neither the config nor the Runner has.
    """
    for key, value in overrides.items():
        parts = key.split('.')
        if parts[0] not in cfg and parts[0] not in RUNNER_KEYS:
            raise QuantError(f'--cfg-options: {key}: neither the config nor '
                             f"MMEngine's Runner has {parts[0]!r}"
                             f'{_suggestion(key, cfg)}; give a key of the '
                             'config, quant.KEY or sos.KEY.')
        for other in overrides:
            if other.startswith(f'{key}.'):
                raise QuantError(f'--cfg-options: {key} and {other} are given '
                                 'both; give the one or the other.')
        _check_place(cfg, parts, value)


def _suggestion(key: str, cfg: Mapping[str, Any]) -> str:
    """A question with the most similar name, for an unknown key; or ''."""
    names: Dict[str, str] = {name: name for name in (*cfg, *RUNNER_KEYS)}
    settings = [('sos', one.name) for one in dataclasses.fields(SOSConfig)]
    settings += [('quant', one.name)
                 for one in dataclasses.fields(QuantConfig)]
    for owner, name in [*settings, ('quant', 'bits')]:
        names[name] = names[f'{owner}.{name}'] = f'{owner}.{name}'
    for text in (key, key.split('.')[0]):
        for near in difflib.get_close_matches(text, names, 1):
            return f', is it {names[near]!r}?'
    return ''


def _check_place(cfg: Mapping[str, Any], parts: List[str], value: Any) -> None:
    key, place, node = '.'.join(parts), 'the config', cfg
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise QuantError(
                    f'--cfg-options: {key}: {place} is a list of {len(node)}, '
                    f'whose elements are numbered from 0; {part!r} is none '
                    'of them.')
            if is_last and not isinstance(value, Mapping):
                raise QuantError(
                    f'--cfg-options: {key}: an element of a list is not '
                    f'replaced; give the whole list, {place}=[...].')
            node = node[int(part)]
        elif isinstance(node, Mapping):
            if part not in node:
                # A new key, below which dicts are created.
                numbers = [one for one in parts[depth:] if one.isdigit()]
                if numbers:
                    raise QuantError(f'--cfg-options: {key}: there is no list '
                                     f'that {numbers[0]!r} could number; give '
                                     'the list in a config.')
                return
            node = node[part]
        else:
            shown = repr(node)
            raise QuantError(
                f'--cfg-options: {key}: {place} is '
                f'{shown if len(shown) < 80 else type(node).__name__} and has '
                f'no {part!r}; give {place} as a whole.')
        place = '.'.join(parts[:depth + 1])
