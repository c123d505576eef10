"""Tables of the report: cells that are shown, and values that they sort by."""
import math
from dataclasses import dataclass, field
from typing import Any, List, Optional, Sequence

NOTHING = '–'


@dataclass
class Cell:
    """A cell.

    Attributes:
        text: shown.
        value: that it sorts by; None comes last, and sorts by ``text`` where
            the whole column has None.
        tone: ``'worse'``, ``'better'`` or ''.
        share: length of a bar behind the text, 0 to 1; None without.
        is_name: whether it is a name: aligned left.
    """
    text: str
    value: Optional[float] = None
    tone: str = ''
    share: Optional[float] = None
    is_name: bool = False


@dataclass
class Table:
    """A table that sorts by a click on a column.

    Attributes:
        columns: titles.
        rows: cells, as many as columns in each.
        caption: a sentence below the title, or ''.
        limit: rows beyond this number are folded; None shows all.
    """
    columns: Sequence[str]
    rows: List[List[Cell]] = field(default_factory=list)
    caption: str = ''
    limit: Optional[int] = None


def name(text: Any) -> Cell:
    """A cell with a name."""
    return Cell(str(text), is_name=True)


def number(value: Optional[float],
           digits: str = '.4g',
           unit: str = '',
           **more: Any) -> Cell:
    """A cell with a number; None and NaN are nothing.

    >>> number(.1234).text, number(float('nan')).text
    ('0.1234', '–')
    >>> number(2, 'd', ' s').text
    '2 s'
    """
    if value is None or math.isnan(value):
        return Cell(NOTHING)
    return Cell(f'{value:{digits}}{unit}', float(value), **more)


def points(fraction: Optional[float]) -> Cell:
    """A cell with a fraction in points.

    >>> points(.4567).text
    '45.7'
    """
    return number(None if fraction is None else 100 * fraction, '.1f')


def change(before: Optional[float],
           after: Optional[float],
           is_loss: bool = True,
           worst: float = 0.) -> Cell:
    """A cell with the change of a fraction in points.

    Args:
        before: None if there is nothing to compare with.
        after: the fraction now.
        is_loss: whether less is worse.
        worst: change, as a fraction, at which the cell's bar is full.

    >>> change(.5, .47).text, change(.5, .47).tone, change(.1, .1).text
    ('-3.0', 'worse', '0.0')
    """
    if before is None or after is None:
        return Cell(NOTHING)
    found = number(100 * (after - before), '+.1f')
    if found.value is None:
        return found
    if found.text in ('+0.0', '-0.0'):
        found.text = '0.0'
    else:
        is_worse = (found.value < 0) == is_loss
        found.tone = 'worse' if is_worse else 'better'
    if worst > 0:
        found.share = min(1., abs(found.value) / 100 / worst)
    return found
