"""Overrides: bits of single layers or units, beside those of all others."""
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from isvit_det.core.checks import MAX_BITS, MIN_BITS, check_number, from_dict
from isvit_det.core.errors import QuantError

EXAMPLE = "[dict(match='backbone.stages.0.*', weight_bits=8, act_bits=8)]"


@dataclass(frozen=True)
class Override:
    """Bits of the layers and products whose names match a pattern.

    Attributes:
        match: a name, or a pattern of one as in a shell: ``*`` stands for any
            text, dots included, ``?`` for one character, ``[ab]`` for one of
            these. It covers a layer or a product if it matches its name or
            that of a module around it, so ``backbone.stages.0.blocks.1``
            covers a whole block.
        weight_bits: of these layers, 2 to 8; None leaves them as they are.
        act_bits: of the inputs of these layers and of both factors of these
            products, 2 to 8; None leaves them as they are.
    """
    match: str
    weight_bits: Optional[int] = None
    act_bits: Optional[int] = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise QuantError(f'quant.overrides: match={self.match!r} is not '
                             'allowed; expected the name of a layer or unit, '
                             'or a pattern such as backbone.stages.0.*')
        where = f'quant.overrides: {self.match!r}'
        if self.weight_bits is None and self.act_bits is None:
            raise QuantError(f'{where} changes nothing; give weight_bits, '
                             'act_bits or both.')
        for key in ('weight_bits', 'act_bits'):
            if getattr(self, key) is not None:
                check_number(f'{where}: {key}', getattr(self, key), MIN_BITS,
                             MAX_BITS, (int, ))

    def covers(self, name: str) -> bool:
        """Whether a name, or the start of it before a dot, matches.

        >>> override = Override('backbone.stages.?', act_bits=8)
        >>> override.covers('backbone.stages.0.blocks.1.ffn')
        True
        >>> override.covers('backbone.stages')
        False
        """
        parts = name.split('.')
        return any(
            fnmatchcase('.'.join(parts[:num]), self.match)
            for num in range(1,
                             len(parts) + 1))

    def to_dict(self) -> Dict[str, Any]:
        """Plain values, without those that are None."""
        return {k: v for k, v in vars(self).items() if v is not None}


def make_overrides(value: Any) -> Tuple[Override, ...]:
    """Overrides from plain values, in order.

    Raises:
        QuantError: if the value is no list of overrides or of dicts of them.
    """
    if not isinstance(value, (list, tuple)) or not all(
            isinstance(one, (Override, Mapping)) for one in value):
        raise QuantError(f'quant.overrides: {value!r} is not allowed; '
                         f'expected a list such as {EXAMPLE}.')
    for one in value:
        if isinstance(one, Mapping) and 'match' not in one:
            raise QuantError(f'quant.overrides: {dict(one)!r} has no match; '
                             f'expected a list such as {EXAMPLE}.')
    return tuple(
        one if isinstance(one, Override
                          ) else from_dict(Override, 'quant.overrides', one)
        for one in value)


def parse_override(text: str) -> Override:
    """An override as the command line has it.

    Raises:
        QuantError: if the text has another form.

    >>> parse_override('neck.*=w8a6').to_dict()
    {'match': 'neck.*', 'weight_bits': 8, 'act_bits': 6}
    >>> parse_override('neck.*=a8').to_dict()
    {'match': 'neck.*', 'act_bits': 8}
    """
    found = re.fullmatch(r'(.+)=(?=[wa])(?:w(\d+))?(?:a(\d+))?', text)
    if found is None:
        raise QuantError(f'--layer-bits: {text!r} cannot be read; give '
                         "PATTERN=wNaM, wN or aM, such as 'neck.*=w8a8'.")
    match, *bits = found.groups()
    return Override(match,
                    *(None if one is None else int(one) for one in bits))


def bits_at(overrides: Sequence[Override], name: str,
            bits: Tuple[int, int]) -> Tuple[int, int]:
    """Bits of weights and activations of a layer or product.

    Args:
        overrides: of these, the last one that covers the name decides, for
            weights and activations by themselves.
        name: of the layer or product in the whole model.
        bits: those of all other layers.

    >>> overrides = make_overrides([dict(match='neck.*', weight_bits=8),
    ...                             dict(match='*.conv', weight_bits=6)])
    >>> bits_at(overrides, 'neck.0.conv', (4, 4))
    (6, 4)
    """
    weight, act = bits
    for one in overrides:
        if one.covers(name):
            weight = one.weight_bits or weight
            act = one.act_bits or act
    return weight, act
