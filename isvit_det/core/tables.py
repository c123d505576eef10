"""Tables of values for activations: their arithmetic, and the best table.

A table has one integer, its entry, for each of the 2**b codes, so that a code
stands for ``(entry - zero_point) * scale`` and an integer product can read
entries where it would read codes. Entries are unevenly spaced: where values
are frequent they are dense.
"""
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.functional import range_to_affine, table_decode
from isvit_det.core.observers import Samples
from isvit_det.core.search import quantiles


class Table(NamedTuple):
    """A table and its squared error on the values that it was found by.

    Attributes:
        entries: ascending integers, int64, shape (2**bits,).
        scale: of one step of the entries, scalar.
        zero_point: entry that would stand for 0, an integer, scalar.
        error: weighted sum of squared errors, float64, scalar.
    """
    entries: Tensor
    scale: Tensor
    zero_point: Tensor
    error: Tensor


def cell_codes(entries: Tensor, num_cells: int) -> Tensor:
    """The code of every cell, a cell being half a step of the entries.

    Cell c holds the positions ``x / scale + zero_point`` from c / 2 up to
    (c + 1) / 2. The middle between two integers lies on an edge of cells, so
    all positions of a cell are nearest to the same entry.

    Args:
        entries: ascending integers, shape (codes,).
        num_cells: at least twice the largest entry.

    Returns:
        int32, shape (num_cells,); ascending.

    >>> cell_codes(torch.tensor([0, 1, 4]), 8).tolist()
    [0, 1, 1, 1, 1, 2, 2, 2]
    """
    cells = torch.arange(num_cells, device=entries.device)
    edges = entries.long()[:-1] + entries.long()[1:]
    return torch.searchsorted(edges, cells, right=True).int()


def table_position(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Where reals lie among the entries: ``x / scale + zero_point``."""
    return torch.div(x, scale).add_(zero_point)


def look_up(x: Tensor, values: Tensor, scale: Tensor,
            zero_point: Tensor) -> Tensor:
    """For each real, the value of the cell in which it lies.

    Args:
        x: any shape.
        values: of every cell, see ``cell_codes``; shape (cells,). Reals
            beyond them count to the first or the last one, NaN to the first.
        scale: of the entries, positive, scalar.
        zero_point: an integer, scalar.
    """
    cells = torch.div(x, scale / 2).floor_()
    cells = cells.add_(2 * zero_point).clamp_(0, len(values) - 1)
    return table_decode(cells, values)


def table_values(entries: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Value of every code, ``(entry - zero_point) * scale``, (codes,)."""
    return (entries.to(scale.dtype) - zero_point) * scale


def search_table(samples: Samples, low: Tensor, high: Tensor,
                 percentiles: Sequence[float], bits: int, entry_bits: int,
                 keeps_zero: bool) -> Table:
    """The table of least squared error (Lloyd-Max, with integer entries).

    Each percentile p gives a grid of 2**entry_bits equal steps from the
    quantile 1 - p to the quantile p. Of every grid, ``best_entries`` finds
    the best entries, and the best of these tables is taken.

    Args:
        samples: one row of values, ascending.
        low: their exact minimum, scalar.
        high: their exact maximum, scalar.
        percentiles: K shares; 1 takes the whole range.
        bits: width of the codes.
        entry_bits: width of the entries, more than ``bits``.
        keeps_zero: whether 0 has to be one of the values.
    """
    lows = quantiles(samples, [1 - share for share in percentiles])[:, 0]
    highs = quantiles(samples, percentiles)[:, 0]
    weights = samples.weights[0].double()
    found = []
    for share, row_low, row_high in zip(percentiles, lows, highs):
        if share == 1:
            row_low, row_high = low, high
        if keeps_zero:
            row_low, row_high = row_low.clamp(max=0), row_high.clamp(min=0)
        scale, zero_point = range_to_affine(row_low, row_high, entry_bits)
        positions = table_position(samples.values[0].double(), scale.double(),
                                   zero_point)
        entries, error = best_entries(positions, weights, 2**bits,
                                      2**entry_bits,
                                      int(zero_point) if keeps_zero else None)
        found.append(
            Table(entries, scale, zero_point,
                  error * scale.double()**2))
    return min(found, key=lambda table: float(table.error))


def best_entries(positions: Tensor,
                 weights: Tensor,
                 num_codes: int,
                 num_entries: int,
                 kept: Optional[int] = None) -> Tuple[Tensor, Tensor]:
    """The ``num_codes`` integers that weighted positions are nearest to.

    This is the optimum, by dynamic programming over the entries from the
    lowest to the highest: what two adjacent entries cost, which share the
    positions between them at the middle, does not depend on the others.

    Args:
        positions: ascending, float64, shape (N,).
        weights: not negative, float64, shape (N,).
        num_codes: number of entries to choose.
        num_entries: entries are chosen from ``0 .. num_entries - 1``.
        kept: an entry that has to be chosen; None for none.

    Returns:
        The entries, ascending, int64, shape (num_codes,), and the weighted
        sum of squared distances, scalar.
    """
    steps = torch.arange(num_entries, device=positions.device)
    gaps, before, behind = _costs(positions, weights, steps)
    if kept is not None:
        below, above = steps < kept, steps > kept
        gaps[below[:, None] & above] = torch.inf
        before[above] = torch.inf
        behind[below] = torch.inf
    cost, chosen = before, []
    for _ in range(num_codes - 1):
        # Row by the lower entry, column by the upper one.
        cost, lower = (cost[:, None] + gaps).min(0)
        chosen.append(lower)
    cost = cost + behind
    entry = cost.argmin()
    error, entries = cost[entry], [entry]
    for lower in reversed(chosen):
        entries.append(lower[entries[-1]])
    return torch.stack(entries[::-1]), error


def _costs(positions: Tensor, weights: Tensor,
           steps: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Squared distances of the positions between two adjacent entries.

    Returns:
        For every lower and upper entry, shape (n, n), infinite unless upper
        is greater; for the positions below the lowest entry, and for those
        above the highest one, (n,) each.
    """
    number = len(steps)
    powers = torch.stack([positions**power for power in range(3)])
    sums = torch.nn.functional.pad((powers * weights).cumsum(1), (1, 0))
    # Sums of all positions below every multiple of a half.
    halves = torch.arange(2 * number - 1, device=steps.device) / 2
    sums = torch.cat(
        [sums[:, torch.searchsorted(positions, halves.double())],
         sums[:, -1:]], 1)  # yapf: disable

    def distances(start: Tensor, stop: Tensor, entry: Tensor) -> Tensor:
        zeroth, first, second = sums[:, stop] - sums[:, start]
        # Rounding must not make an empty stretch's cost negative.
        return (second - 2 * entry * first +
                entry * entry * zeroth).clamp(min=0)

    lower, upper = steps[:, None], steps[None]
    middle = (lower + upper).expand(number, number)
    gaps = distances(2 * lower, middle, lower) + distances(
        middle, 2 * upper, upper)
    gaps[lower >= upper] = torch.inf
    total, zeroth, first, second = len(sums[0]) - 1, *sums[:, 2 * steps]
    before = second - 2 * steps * first + steps * steps * zeroth
    behind = distances(2 * steps, torch.full_like(steps, total), steps)
    return gaps, before.clamp(min=0), behind
