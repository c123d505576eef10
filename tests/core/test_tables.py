"""Tables: the best one, and codes of the nearest entry."""
import itertools

import pytest
import torch
from torch.nn import functional as F

from isvit_det.core.observers import Samples
from isvit_det.core.tables import (best_entries, cell_codes, look_up,
                                   search_table, table_position, table_values)
from tests.core.test_observers import observed

WIDE = (.95, .99, .999, .9999, 1.)


def draw(seed, count=30):
    """Some positions, ascending, in and beyond 0 .. 7, with weights."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(count, generator=generator, dtype=torch.double)
    positions = (12 * positions - 2).sort().values
    # Also in the middle between entries, and on them.
    positions[::3] = (2 * positions[::3]).round() / 2
    weights = torch.randint(0, 5, (count, ), generator=generator).double()
    return positions.sort().values, weights


def distances(positions, weights, entries):
    """Weighted squared distances to the nearest of some integers."""
    away = positions[:, None] - torch.tensor(entries).double()
    return (weights * away.abs().min(1).values.square()).sum().item()


@pytest.mark.parametrize('num_codes', [2, 3, 4])
@pytest.mark.parametrize('seed', range(20))
def test_no_other_entries_are_nearer(seed, num_codes):
    positions, weights = draw(seed)
    for kept in (None, 0, seed % 8, 7):
        entries, error = best_entries(positions, weights, num_codes, 8, kept)
        assert kept is None or kept in entries
        assert error.item() == pytest.approx(
            distances(positions, weights, entries.tolist()), abs=1e-9)
        least = min(
            distances(positions, weights, choice)
            for choice in itertools.combinations(range(8), num_codes)
            if kept is None or kept in choice)
        assert error.item() == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize('positions', [[3.2], [-9., 40.], [1., 1., 2.]])
def test_entries_are_as_many_as_asked_for_whatever_the_data(positions):
    positions = torch.tensor(positions).double()
    weights = torch.ones(len(positions)).double()
    for num_codes in (4, 8, 16):
        entries, _ = best_entries(positions, weights, num_codes, 16)
        assert len(entries) == num_codes and (entries.diff() > 0).all()
        assert 0 <= entries.min() and entries.max() <= 15


def test_a_code_is_that_of_the_nearest_entry():
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(5000, generator=generator).double()
    scale, zero_point = torch.tensor(.07).double(), torch.tensor(40)
    for bits in range(2, 7):
        entries = torch.randperm(128, generator=generator)[:2**bits]
        entries = entries.sort().values
        codes = look_up(x, cell_codes(entries, 256), scale, zero_point)
        away = table_position(x, scale, zero_point)[:, None] - entries
        assert torch.equal(codes.long(), away.abs().argmin(1))


def test_the_middle_belongs_to_the_greater_entry():
    of_cells = cell_codes(torch.tensor([1, 2, 6]), 16)
    assert of_cells.tolist() == [0] * 3 + [1] * 5 + [2] * 8
    x = torch.tensor([-9., 1.49, 1.5, 3.99, 4., 99.])
    codes = look_up(x, of_cells, torch.tensor(1.), torch.tensor(0))
    assert codes.tolist() == [0, 0, 1, 1, 2, 2]


def gelu_samples(count=100_000):
    generator = torch.Generator().manual_seed(3)
    x = F.gelu(1.5 * torch.randn(count, generator=generator))
    observer = observed(x)
    return observer.samples(), observer.low[0], observer.high[0]


def error_of(samples, values):
    """Weighted squared error with the nearest of some values."""
    away = samples.values[0].double()[:, None] - values.double()
    return (samples.weights[0].double() *
            away.abs().min(1).values.square()).sum().item()


@pytest.mark.parametrize('bits', [2, 3, 4, 6])
def test_the_error_of_a_table_is_what_its_values_have(bits):
    samples, low, high = gelu_samples()
    table = search_table(samples, low, high, WIDE, bits, 7, False)
    values = table_values(table.entries, table.scale, table.zero_point)
    assert table.error.item() == pytest.approx(
        error_of(samples, values), rel=1e-5)


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_no_logarithmic_table_on_the_same_grid_is_better(bits):
    """SULQ's form with any shift, up to 100, where its values are even."""
    samples, low, high = gelu_samples()
    table = search_table(samples, low, high, WIDE, bits, 7, False)
    errors = []
    for shift in (.1705, .18, .2, .225, .3, .5, 1., 3., 100.):
        for share in (.5, .7, .9, 1.):
            ends = torch.stack([high * share, low])
            first, last = (ends + shift).log2()
            exponents = torch.linspace(float(first), float(last), 2**bits)
            entries = (torch.exp2(exponents) - shift) / table.scale
            entries = entries.add(table.zero_point).round()
            entries = entries.clamp(0, 127).unique()
            errors.append(
                error_of(samples,
                         table_values(entries, table.scale, table.zero_point)))
    assert table.error.item() <= min(errors) * (1 + 1e-6)
    # The best shift is no bad table: the comparison means something.
    assert min(errors) < 2 * table.error.item()


def test_zero_is_a_value_only_where_it_has_to_be():
    x = torch.linspace(.5, 2., 1000)[None]
    samples = Samples(x, torch.ones_like(x))
    for keeps_zero in (True, False):
        table = search_table(samples, x[0, 0], x[0, -1], (1., ), 3, 7,
                             keeps_zero)
        values = table_values(table.entries, table.scale, table.zero_point)
        assert bool((values == 0).any()) == keeps_zero


def test_nan_counts_as_the_first_cell():
    x = torch.tensor([float('nan'), 3.])
    found = look_up(x, torch.tensor([7., 8., 9.]), torch.tensor(1.),
                    torch.tensor(0))
    assert found.tolist() == [7., 9.]
