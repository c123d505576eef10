"""Budgets, and the choice of bits under them by integer programming."""
import re
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from isvit_det.core.checks import MAX_BITS, MIN_BITS, parse_bits
from isvit_det.core.errors import QuantError

Bits = Tuple[int, int]
# By part and bits.
Costs = Mapping[str, Mapping[Bits, float]]
FORMS = ('4.5bits (mean over the quantized weights), 20MB (the packed file), '
         '12GBOPs (a prediction), 0.8s (a prediction on this machine) or '
         'ap-0.5 (points of box AP that may be lost)')
# Harms that differ by less than this share of the largest count as equal.
EQUAL = 1e-5
# Names of the units in messages, and what one of them is.
UNITS = {'bits': 1., 'MB': 1e6, 'GBOPs': 1e9, 's': 1.}


class Budget(NamedTuple):
    """A limit on what a quantized detector may cost.

    Attributes:
        kind: ``'bits'``, ``'MB'``, ``'GBOPs'``, ``'s'`` or ``'ap'``.
        amount: in this unit; points of box AP for ``'ap'``.
    """
    kind: str
    amount: float

    @property
    def limit(self) -> float:
        """The amount in bits, bytes, bit operations or seconds."""
        return self.amount * UNITS[self.kind]

    def shown(self, value: float) -> str:
        """A cost in the unit of the budget.

        >>> Budget('MB', 20).shown(1.5e6)
        '1.5MB'
        """
        return f'{value / UNITS[self.kind]:.4g}{self.kind}'


def parse_budget(text: str) -> Budget:
    """Read a budget as the command line has it.

    Raises:
        QuantError: if it has another form, or is not positive.

    >>> parse_budget('20MB'), parse_budget('ap-0.5')
    (Budget(kind='MB', amount=20.0), Budget(kind='ap', amount=0.5))
    """
    number = r'(\d+(?:\.\d*)?|\.\d+)'
    found = re.fullmatch(rf'ap-{number}', text)
    if found is not None:
        return Budget('ap', float(found.group(1)))
    found = re.fullmatch(rf'{number}(bits|MB|GBOPs|s)', text)
    if found is None or float(found.group(1)) == 0:
        raise QuantError(f'--budget: {text!r} cannot be read; give one such '
                         f'as {FORMS}.')
    return Budget(found.group(2), float(found.group(1)))


def parse_choices(text: str) -> List[Bits]:
    """Read what bits may be chosen from.

    Raises:
        QuantError: naming one that cannot be read.

    >>> parse_choices('3,4,w4a8')
    [(3, 3), (4, 4), (4, 8)]
    """
    pairs = []
    for word in text.split(','):
        digits = re.fullmatch(r'\d+', word)
        if digits and not MIN_BITS <= int(word) <= MAX_BITS:
            raise QuantError(f'--bits-from: {word!r} is not allowed; give '
                             f'bits from {MIN_BITS} to {MAX_BITS}, such as '
                             '3,4,6,8, or wNaM.')
        pairs.append(parse_bits(f'w{word}a{word}' if digits else word))
    if len(set(pairs)) < len(pairs):
        raise QuantError(f'--bits-from: {text!r} names bits twice; leave one '
                         'out.')
    return pairs


class Limit(NamedTuple):
    """A budget, and what each part costs of it.

    Attributes:
        budget: not of AP.
        costs: of each part at each of its bits.
        fixed: what everything else costs.
    """
    budget: Budget
    costs: Costs
    fixed: float = 0.

    def of(self, chosen: Mapping[str, Bits]) -> float:
        """The cost of a choice."""
        return self.fixed + sum(self.costs[part][bits]
                                for part, bits in chosen.items())

    def extremes(self) -> Tuple[float, float]:
        """The least and the most that can be chosen."""
        return tuple(  # type: ignore
            self.fixed + sum(one(own.values()) for own in self.costs.values())
            for one in (min, max))


def choose(harm: Costs, limits: Sequence[Limit]) -> Dict[str, Bits]:
    """Bits of each part that do the least harm within limits.

    Harms add up, which is what makes the problem linear; it is solved
    exactly, as an integer program.

    Args:
        harm: of each part at each of its bits.
        limits: all of them are kept.

    Raises:
        QuantError: if a limit, or all of them together, cannot be kept;
            it says what can.

    >>> harm = {'a': {(4, 4): 1., (8, 8): 0.}, 'b': {(4, 4): 3., (8, 8): 0.}}
    >>> costs = {part: {(4, 4): 4., (8, 8): 8.} for part in harm}
    >>> choose(harm, [Limit(Budget('s', 12.), costs)])
    {'a': (4, 4), 'b': (8, 8)}
    """
    for limit in limits:
        least, most = limit.extremes()
        if limit.budget.limit < least:
            show = limit.budget.shown
            raise QuantError(
                f'--budget: {show(limit.budget.limit)} cannot be kept: with '
                f'--bits-from as given, the least is {show(least)} and the '
                f'most {show(most)}; give more, or fewer bits to choose from.')
    keys = [(part, bits) for part, own in harm.items() for bits in own]
    weights = np.array([harm[part][bits] for part, bits in keys])
    weights = weights / max(weights.max(), 1e-30)
    # Of equal harm, the cheaper ones.
    for limit in limits:
        own = np.array([limit.costs[part][bits] for part, bits in keys])
        weights = weights + EQUAL * own / max(own.max(), 1e-30)
    one_each = np.array([[part == name for part, _ in keys] for name in harm],
                        dtype=float)
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit in limits:
        row = np.array([[limit.costs[part][bits] for part, bits in keys]])
        room = limit.budget.limit - limit.fixed
        scale = max(abs(room), 1e-30)
        constraints.append(
            LinearConstraint(row / scale, -np.inf, room / scale))
    found = milp(
        weights,
        constraints=constraints,
        integrality=np.ones(len(keys)),
        bounds=Bounds(0, 1),
        options=dict(mip_rel_gap=0.))
    if found.x is None:
        asked = ' and '.join(
            limit.budget.shown(limit.budget.limit) for limit in limits)
        raise QuantError(f'--budget: {asked} cannot be kept together with '
                         '--bits-from as given; give more of one.')
    return {
        part: bits
        for (part, bits), taken in zip(keys, found.x.round()) if taken
    }


def fall(harm: Mapping[Bits, float]) -> Dict[Bits, float]:
    """Harms of one part that never rise with more bits.

    A measured harm is a mean over few images. Where fewer bits seem to do
    less harm, they are taken to do as much as more of them.

    >>> fall({(3, 3): .2, (4, 4): .3, (8, 8): 0.})
    {(3, 3): 0.3, (4, 4): 0.3, (8, 8): 0.0}
    """
    return {
        bits:
        max(value for other, value in harm.items()
            if other[0] >= bits[0] and other[1] >= bits[1])
        for bits in harm
    }
