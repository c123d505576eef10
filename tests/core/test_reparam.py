"""Stage 2 moves no code: float64 exactly, float32 almost never."""
import pytest
import torch
from torch import nn

from isvit_det.core.layers import QuantLinear, observe, precision
from isvit_det.core.reparam import (NormLinear, fold_channel_scales_,
                                    use_channel_scales_,
                                    widen_narrow_channels_)
from isvit_det.core.settings import QuantConfig

CHANNELS = 24


class Padding(nn.Module):

    def __init__(self, dtype):
        super().__init__()
        self.register_buffer('padding_value',
                             torch.zeros(CHANNELS, dtype=dtype))


def make_pair(dtype, bias, seed=0, constant=None, bits=4):
    torch.manual_seed(seed)
    norm = nn.LayerNorm(CHANNELS)
    norm.weight.data = torch.rand(CHANNELS) * 4 + .05
    norm.bias.data = 3 * torch.randn(CHANNELS)
    # Zero, or next to it.
    if constant is not None:
        norm.weight.data[constant] = 0.
    linear = QuantLinear(
        nn.Linear(CHANNELS, 10, bias=bias), QuantConfig(act_bits=bits))
    pair = NormLinear(norm.to(dtype), linear.to(dtype), Padding(dtype))
    return pair, torch.randn(3000, CHANNELS, dtype=dtype)


def fit_(pair, x):
    use_channel_scales_(pair)
    with observe(pair.linear):
        pair.linear(pair.norm(x))
    widen_narrow_channels_(pair.linear.input_quantizer)


def run(pair, x):
    """Codes and outputs, of tokens and of a padded position."""
    rows = torch.cat([pair.norm(x), pair.padding.padding_value[None]])
    with precision(pair.linear, weights=False, acts=True):
        return (pair.linear.input_quantizer.encode(rows).detach(),
                pair.linear(rows).detach())


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.double, torch.float])
@pytest.mark.parametrize('bits, constant', [(4, None), (8, None), (8, 5)])
def test_folding_moves_no_code_and_no_output(dtype, bias, bits, constant):
    moved = 0
    for seed in range(24):
        pair, x = make_pair(dtype, bias, seed, constant, bits)
        fit_(pair, x)
        assert pair.linear.input_quantizer.granularity == 'channel'
        codes, out = run(pair, x)
        fold_channel_scales_(pair)
        assert pair.linear.input_quantizer.granularity == 'tensor'
        new_codes, new_out = run(pair, x)
        distance = (codes - new_codes).abs()
        moved += int((distance > 0).sum())
        assert distance.max() <= (0 if dtype == torch.double else 1)
        # Where a code moved, the output moves by its step.
        same = (distance == 0).all(1)
        assert (new_out - out)[same].norm() <= 1e-5 * out.norm()
    total = 24 * codes.numel()
    assert moved == 0 if dtype == torch.double else moved <= 1e-5 * total


def test_folding_is_no_identity():
    """The test above would pass on a pair that nothing happens to."""
    pair, x = make_pair(torch.double, True)
    fit_(pair, x)
    before = pair.linear.weight.clone(), pair.norm.bias.clone()
    fold_channel_scales_(pair)
    assert not torch.allclose(before[0], pair.linear.weight)
    assert not torch.allclose(before[1], pair.norm.bias)
    assert pair.padding.padding_value.abs().max() > .1


def test_the_zero_point_stays_an_integer():
    pair, x = make_pair(torch.float, True)
    fit_(pair, x)
    fold_channel_scales_(pair)
    assert pair.linear.input_quantizer.zero_point.dtype == torch.int32
    assert pair.linear.input_quantizer.zero_point.shape == ()


def test_the_scale_that_stage_2_leads_to_changes_nothing(monkeypatch):
    """Weights have scales per output channel, which take a factor up."""
    mean = torch.Tensor.mean
    results = []
    for factor in (1, .5, 4):
        pair, x = make_pair(torch.double, True)
        fit_(pair, x)
        monkeypatch.setattr(torch.Tensor, 'mean', lambda t: factor * mean(t))
        fold_channel_scales_(pair)
        monkeypatch.undo()
        weight = pair.linear.weight_quantizer
        weight.fit_tensor_(pair.linear.weight)
        with precision(pair.linear, weights=True, acts=True), torch.no_grad():
            results.append(
                (pair.linear.input_quantizer.scale.item(),
                 weight.encode(pair.linear.weight), pair.linear(pair.norm(x))))
    for factor, (scale, codes, out) in zip((1, .5, 4), results):
        assert scale == factor * results[0][0]
        assert torch.equal(codes, results[0][1])
        assert (out - results[0][2]).abs().max() < 1e-9


def test_a_constant_channel_ruins_neither_mean_nor_codes():
    pair, x = make_pair(torch.double, True, constant=5)
    fit_(pair, x)
    channel = pair.linear.input_quantizer
    others = channel.zero_point.double()[torch.arange(CHANNELS) != 5]
    assert abs(channel.zero_point[5].item()) < 1e5
    codes, out = run(pair, x)
    fold_channel_scales_(pair)
    new_codes, new_out = run(pair, x)
    assert torch.equal(codes, new_codes)
    assert torch.allclose(out, new_out, rtol=1e-9, atol=1e-9)
    assert others.abs().max() < 1e3


def test_a_narrow_channel_keeps_its_centre():
    pair, x = make_pair(torch.double, True, constant=3)
    value = pair.norm.bias[3].item()
    fit_(pair, x)
    quantizer = pair.linear.input_quantizer
    assert quantizer(pair.norm(x))[0, 3].item() == value
    quantizer.enabled = True
    found = quantizer(pair.norm(x))[0, 3].item()
    assert abs(found - value) <= quantizer.scale[3].item()
