"""Checks of single settings, with errors that name key and value."""
import dataclasses
import re
from typing import Any, Mapping, Tuple, Type, TypeVar

from isvit_det.core.errors import QuantError

MIN_BITS, MAX_BITS = 2, 8

T = TypeVar('T')


def parse_bits(text: str) -> Tuple[int, int]:
    """Split ``'w4a8'`` into the bits of weights and of activations.

    Raises:
        QuantError: if the text has another form or bits outside 2..8.

    >>> parse_bits('w4a8')
    (4, 8)
    """
    match = re.fullmatch(r'w(\d+)a(\d+)', str(text))
    if match is None or any(not MIN_BITS <= int(bits) <= MAX_BITS
                            for bits in match.groups()):
        raise QuantError(f'bits: {text!r} is not allowed; give wNaM with N '
                         f'and M in {MIN_BITS}..{MAX_BITS}, such as w4a4.')
    return int(match.group(1)), int(match.group(2))


def check_choice(key: str, value: Any, allowed: Tuple[Any, ...]) -> None:
    """Raise a QuantError unless a value is one of those allowed."""
    if value not in allowed:
        raise QuantError(f'{key}: {value!r} is not allowed; expected one of '
                         f'{list(allowed)}.')


def check_number(key: str, value: Any, low: float, high: float,
                 kind: Tuple[Type, ...]) -> None:
    """Raise a QuantError unless a value is a number in a range."""
    if (isinstance(value, bool) or not isinstance(value, kind)
            or not low <= value <= high):
        name = 'an integer' if kind == (int, ) else 'a number'
        raise QuantError(f'{key}: {value!r} is not allowed; expected {name} '
                         f'between {low:.10g} and {high:.10g}.')


def from_dict(cls: Type[T], name: str, values: Mapping[str, Any]) -> T:
    """A dataclass from plain values; lists become tuples.

    Raises:
        QuantError: naming keys that are no fields.
    """
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise QuantError(f'{name}: unknown keys {unknown}; expected a subset '
                         f'of {known}.')
    return cls(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
        })
