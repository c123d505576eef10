"""Observers: histograms that lose nothing, and what is kept of attention."""
import itertools

import pytest
import torch

from isvit_det.core.errors import QuantError
from isvit_det.core.functional import log_table
from isvit_det.core.observers import (BATCH_SAMPLES, NUM_SAMPLES,
                                      AttentionObserver, RangeObserver)
from isvit_det.core.quantizers import UniformQuantizer


def observed(*batches, channels=1):
    observer = RangeObserver(channels)
    for batch in batches:
        observer.update(batch)
    return observer


def test_the_extremes_are_exact_whatever_the_order():
    x = torch.randn(1000) * torch.logspace(-3, 3, 1000)
    for order in (x, x.flip(0), x[torch.randperm(1000)]):
        observer = observed(*order.split(7))
        assert observer.low.item() == x.min().item()
        assert observer.high.item() == x.max().item()
        assert observer.counts.sum() == 1000


def test_neither_order_nor_batches_change_a_histogram():
    x = torch.randn(1000, 3).pow(5) + torch.tensor([0., 9., -1000.])
    whole = observed(x, channels=3)
    for order in (x.flip(0), x[x[:, 0].argsort()], x[torch.randperm(1000)]):
        parts = observed(*order.split(13), channels=3)
        assert torch.equal(parts.counts, whole.counts)
        assert torch.equal(*(o.samples().values for o in (parts, whole)))


def test_single_values_in_any_order_are_those_of_one_batch():
    x = torch.tensor([-.3992, -.0076, .0115, 0., .0388, .1649])
    whole = observed(x)
    for order in itertools.permutations(x):
        parts = observed(*(value[None] for value in order))
        assert torch.equal(parts.counts, whole.counts)


@pytest.mark.parametrize('x', [
    torch.full((9, ), 1e30),
    torch.full((9, ), -3e-38),
    torch.tensor([1e6, 1e6 + .0625]),
    torch.tensor([0., 0.]),
    torch.tensor([-65504., 65504.]).half(),
    torch.tensor([-1., 2047., 2048.])
])
def test_every_value_finds_its_bin(x):
    observer = observed(x)
    assert observer.counts.sum() == len(x)
    values, weights = observer.samples()
    values = values.repeat_interleave(weights.long()[0], 1)[0]
    span = (x.max() - x.min()).item()
    assert (values - x.sort().values).abs().max() <= span / 1024


def test_channels_are_observed_apart():
    x = torch.randn(64, 3) * torch.tensor([1., 10., .1])
    together = observed(x, channels=3)
    for index in range(3):
        alone = observed(x[:, index])
        assert together.low[index] == alone.low[0]
        assert torch.equal(together.counts[index], alone.counts[0])


def test_a_tensor_beyond_two_to_the_24_elements_is_counted_whole():
    """torch.quantile refuses these; a float32 counter would stop."""
    x = torch.zeros(2**24 + 5)
    x[-3:] = 1.
    observer = observed(x)
    assert observer.counts.sum().item() == 2**24 + 5
    assert observer.counts[0, 0].item() == 2**24 + 2
    quantizer = UniformQuantizer(2, 'act', (.99, 1.))
    quantizer.fit_(observer)
    assert quantizer.is_fitted


@pytest.mark.parametrize('value', [float('inf'), float('-inf'), float('nan')])
@pytest.mark.parametrize('kind', [RangeObserver, AttentionObserver])
def test_values_that_are_no_numbers_are_refused(kind, value):
    observer = kind()
    observer.update(torch.rand(9))
    with pytest.raises(QuantError, match='infinite values or NaN'):
        observer.update(torch.tensor([.5, value]))


def test_of_large_attention_some_rows_are_kept_with_their_values():
    observer = AttentionObserver(keep_values=True)
    # One matrix holds more than all that is kept.
    x = torch.rand(3, 1200, 1200).softmax(-1)
    values = torch.randn(3, 1200, 9)
    for _ in range(120):
        observer.keep_(x, values)
    assert 0 < sum(rows.numel() for rows, *_ in observer.pairs) <= NUM_SAMPLES
    heads, positions = set(), set()
    for number, (rows, kept, _) in enumerate(observer.pairs):
        assert rows.numel() <= BATCH_SAMPLES and rows.shape[1] == 13
        head = number % 3
        assert torch.equal(kept[0], values[head])
        for row in rows[0]:
            position, = (x[head] == row).all(1).nonzero().flatten().tolist()
            heads.add(head)
            positions.add(position)
    # Every batch adds another head and other rows.
    assert heads == {0, 1, 2} and len(positions) > 500


def test_rows_of_padding_do_not_change_the_error_of_attention():
    torch.manual_seed(0)
    x = torch.rand(6, 2, 5, 5).softmax(-1)
    values = torch.randn(6, 2, 5, 3)
    inside = torch.rand(6, 5) > .4
    padded = torch.where(inside[:, None, :, None], x, torch.rand_like(x))
    step = torch.tensor(.5)
    table = log_table(step, step, 3)
    errors = []
    for attention in (x, padded):
        observer = AttentionObserver(keep_values=True)
        observer.update(attention)
        observer.keep_(attention, values, inside)
        errors.append(
            observer.output_error(torch.zeros(()), step, step, table, 3))
    assert errors[0] == errors[1] > 0
    every = AttentionObserver(keep_values=True)
    every.update(x)
    every.keep_(x, values)
    assert every.output_error(torch.zeros(()), step, step, table,
                              3) > errors[0]
