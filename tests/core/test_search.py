"""Range search: what is chosen from what observers have seen."""
import pytest
import torch

from isvit_det.core.functional import (range_to_affine, uniform_decode,
                                       uniform_encode)
from isvit_det.core.observers import AttentionObserver, Samples
from isvit_det.core.quantizers import (ShiftUniformLog2Quantizer,
                                       UniformQuantizer)
from isvit_det.core.search import quantiles
from isvit_det.core.settings import QuantConfig
from tests.core.test_observers import observed


def test_a_stream_gives_the_quantiles_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator).exp()
    shares = (.001, .05, .5, .95, .999)
    exact = torch.quantile(x.double(), torch.tensor(shares).double())
    found = quantiles(observed(*x.split(999)).samples(), shares)[:, 0]
    span = (x.max() - x.min()).item()
    # A histogram that has doubled keeps at least half of its 2048 bins.
    assert (found - exact).abs().max() <= span / 1024


def test_quantiles_of_sorted_values_are_those_of_torch():
    x = torch.randn(3, 101).sort(1).values
    shares = (0., .1, .37, 1.)
    exact = torch.quantile(x, torch.tensor(shares), dim=1)
    assert torch.allclose(
        quantiles(Samples(x, torch.ones_like(x)), shares), exact, atol=1e-6)


def brute_force(x, percentiles, bits):
    """Least error and its scale, the slow way."""
    found = []
    for share in percentiles:
        low, high = torch.quantile(x, 1 - share), torch.quantile(x, share)
        scale, zero = range_to_affine(low, high, bits)
        codes = uniform_encode(x, scale, zero, bits)
        error = (uniform_decode(codes, scale, zero) - x).square().sum()
        found.append((error.item(), scale.item()))
    return min(found)


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_the_search_finds_what_brute_force_finds(bits):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(5000, generator=generator).pow(3)
    percentiles = (.9, .99, .999, 1.)
    error, scale = brute_force(x, percentiles, bits)
    exact = UniformQuantizer(bits, 'weight', percentiles)
    exact.fit_tensor_(x)
    assert exact.scale.item() == pytest.approx(scale, rel=1e-4)
    quantizer = UniformQuantizer(bits, 'act', percentiles)
    quantizer.fit_(observed(*x.split(100)))
    quantizer.enabled = True
    found = (quantizer(x) - x).square().sum().item()
    assert found <= error * 1.05


def test_weights_are_searched_per_channel():
    weight = torch.randn(4, 50) * torch.tensor([[.1], [1.], [5.], [20.]])
    quantizer = UniformQuantizer(4, 'weight', (.99, 1.), 4, 0)
    quantizer.fit_tensor_(weight)
    for index in range(4):
        alone = UniformQuantizer(4, 'weight', (.99, 1.))
        alone.fit_tensor_(weight[index])
        assert torch.equal(alone.scale, quantizer.scale[index])


def attention_seen(x, values=None, keep=False):
    observer = AttentionObserver(keep)
    for start in range(0, len(x), 4):
        observer.update(x[start:start + 4])
        if values is not None:
            observer.keep_(x[start:start + 4], values[start:start + 4])
    return observer


def error_by_shift(x, exponent):
    """Squared error of each shift alone."""
    out = {}
    for shift in QuantConfig().shifts:
        config = QuantConfig(shifts=(shift, ), exponent=exponent, act_bits=4)
        quantizer = ShiftUniformLog2Quantizer(4, config)
        quantizer.fit_(attention_seen(x))
        quantizer.enabled = True
        out[quantizer.shift.item()] = (quantizer(x) - x).square().sum().item()
    return out


@pytest.mark.parametrize('exponent', ['table', 'integer'])
def test_the_shift_has_the_least_error_of_the_grid(exponent):
    generator = torch.Generator().manual_seed(1)
    x = (4 * torch.randn(16, 2, 49, 49, generator=generator)).softmax(-1)
    quantizer = ShiftUniformLog2Quantizer(
        4, QuantConfig(exponent=exponent, act_bits=4))
    quantizer.fit_(attention_seen(x))
    errors = error_by_shift(x, exponent)
    # The histogram's bins and true values may disagree on a near tie.
    assert errors[quantizer.shift.item()] <= 1.02 * min(errors.values())
    assert max(errors.values()) > 1.5 * min(errors.values())


def test_the_shift_may_be_chosen_by_attention_times_value():
    """Values that grow with the key make small attention matter."""
    generator = torch.Generator().manual_seed(2)
    x = (4 * torch.randn(16, 2, 49, 49, generator=generator)).softmax(-1)
    x = x.sort(-1, descending=True).values
    values = torch.logspace(-2, 3, 49)[:, None].expand(16, 2, 49, 8)
    config = QuantConfig(shift_error='output', act_bits=3)
    by_output = ShiftUniformLog2Quantizer(3, config)
    by_output.fit_(attention_seen(x, values, keep=True))
    config = QuantConfig(shift_error='attention', act_bits=3)
    by_attention = ShiftUniformLog2Quantizer(3, config)
    by_attention.fit_(attention_seen(x))
    errors = []
    for quantizer in (by_output, by_attention):
        quantizer.enabled = True
        errors.append(((quantizer(x) - x) @ values).square().sum().item())
    assert by_output.shift != by_attention.shift
    assert errors[0] < errors[1]


def test_small_attention_of_long_rows_counts_by_what_it_adds_up_to():
    """A few large values and a thousand small ones that sum to as much."""
    generator = torch.Generator().manual_seed(3)
    x = (3 * torch.randn(2, 3, 1000, 1000, generator=generator)).softmax(-1)
    values = 1 + torch.randn(2, 3, 1000, 8, generator=generator)
    errors = {}
    for by in ('attention', 'output'):
        quantizer = ShiftUniformLog2Quantizer(
            4, QuantConfig(shift_error=by, act_bits=4))
        observer = quantizer.new_observer()
        for image in range(2):
            observer.update(x[image])
            observer.keep_(x[image], values[image])
        quantizer.fit_(observer)
        quantizer.enabled = True
        error = (quantizer(x) - x) @ values
        errors[by] = (error.square().sum() /
                      (x @ values).square().sum()).item()
    assert errors['output'] < .5 * errors['attention']
