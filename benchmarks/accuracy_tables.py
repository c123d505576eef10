"""The tables of benchmarks/accuracy.py: means and spreads over seeds."""
import dataclasses
import statistics
from typing import (Any, Callable, Dict, Iterable, List, Mapping, Optional,
                    Sequence, Tuple)

from benchmarks.accuracy_runs import Key, Subject
from isvit_det.report.tables import format_table

# Titles of the figures, their units and digits.
DETECTOR_FIGURES = dict(
    box_ap=('box AP', .01, 1),
    mask_ap=('mask AP', .01, 1),
    backbone_error=('backbone error', 1., 4))
CLASSIFIER_FIGURES = dict(agreement=('agreement %', .01, 1), kl=('KL', 1., 3))

Find = Callable[[Key], Optional[Mapping[str, float]]]


def measures(result: Mapping[str, Any]) -> Dict[str, float]:
    """The figures of the result of a run."""
    if 'scores' in result:
        return {key: result['scores'][key] for key in ('agreement', 'kl')}
    figures = {key: result['quantized'][key] for key in ('box_ap', 'mask_ap')}
    if 'backbone_error' in result:
        figures['backbone_error'] = result['backbone_error']
    return figures


def rows(cells: Iterable[Tuple[Key, Optional[Mapping[str, float]]]],
         names: Sequence[str],
         figures: Mapping[str, Tuple[str, float, int]],
         sign: str = '') -> List[Dict[str, str]]:
    """One row for all seeds of a cell: mean and standard deviation.

    Args:
        cells: keys of one model with their figures, None if they were not
            run.
        names: attributes of a key that a row has in common and shows.
        figures: titles, units and digits of what is shown.
        sign: '+' for changes.
    """
    groups: Dict[Tuple[Any, ...], List[Optional[Mapping[str, float]]]] = {}
    for key, cell in cells:
        group = tuple(getattr(key, name) for name in names)
        groups.setdefault(group, []).append(cell)
    table = []
    for group, every in groups.items():
        there = [cell for cell in every if cell is not None]
        row = dict(zip(names, map(str, group)))
        row['seeds'] = f'{len(there)} of {len(every)}'
        for name, (title, unit, digits) in figures.items():
            values = [cell[name] / unit for cell in there if name in cell]
            row[title] = spread(values, digits, sign)
        table.append(row)
    return table


def spread(values: List[float], digits: int, sign: str = '') -> str:
    """Mean and sample standard deviation, or '-' of nothing.

    >>> spread([1., 2.], 1), spread([3.], 2, '+'), spread([], 1)
    ('1.5 ± 0.7', '+3.00', '-')
    """
    if not values:
        return '-'
    text = f'{statistics.mean(values):{sign}.{digits}f}'
    if len(values) > 1:
        text += f' ± {statistics.stdev(values):.{digits}f}'
    return text


def print_tables(name: str, subject: Subject, keys: List[Key],
                 usual: Tuple[int, int], find: Find, change: Find) -> None:
    """Print the tables of a model.

    Args:
        name: of the model.
        subject: the model.
        keys: its cells.
        usual: number of images and of iterations of most cells.
        find: returns the figures of a cell, None if it was not run.
        change: returns the change by an ablation, None if it is not known.
    """
    figures, title = CLASSIFIER_FIGURES, name
    if subject.scopes:
        figures, title = DETECTOR_FIGURES, f'{name}, scope detector'
    # Cells are ordered by seed; a row has all seeds.
    keys = sorted(keys, key=lambda key: (key.bits, key.scope))
    cells = [key for key in keys if key.extent == usual]
    methods = [key for key in cells if not key.option]
    single = [key for key in cells if key.option]
    extent = [key for key in keys if key.extent != usual]
    table = rows(((key, find(key)) for key in methods),
                 ('bits', 'scope', 'variant'), figures)
    print(f'\n{name}\n\n{format_table(table)}')
    if single:
        table = rows(((key, change(key)) for key in single),
                     ('bits', 'option'), figures, '+')
        print(f'\n{title}, what a single option changes\n\n'
              f'{format_table(table)}')
    if extent:
        compared = {
            dataclasses.replace(key, images=usual[0], iters=usual[1])
            for key in extent
        }
        extent += [key for key in cells if key in compared]
        extent.sort(key=lambda key: (key.bits, key.variant, *key.extent))
        table = rows(((key, find(key)) for key in extent),
                     ('bits', 'variant', 'images', 'iters'), figures)
        print(f'\n{title}, images and iterations\n\n{format_table(table)}')
