"""Statistics of layers are those of their quantizers, and survive a file."""
import numpy as np
import pytest
import torch
from torch import nn

from isvit_det.core.layers import (QuantConv2d, QuantLinear, QuantMatMul,
                                   fit_weights_, observe, set_precision_)
from isvit_det.core.settings import QuantConfig
from isvit_det.costs.operations import bops, counting
from isvit_det.engine.layer_statistics import measure_layers, time_parts
from isvit_det.evaluation.predictions import UNREADABLE
from isvit_det.report.layer_file import NUM_BINS, LayerFile

CONFIG = QuantConfig.from_dict(dict(bits='w4a4'))
TOKENS, CHANNELS = 12, 8


class Attention(nn.Module):
    """A convolution, and attention of tokens to each other."""

    def __init__(self):
        super().__init__()
        self.patches = QuantConv2d(nn.Conv2d(3, CHANNELS, 2, 2), CONFIG)
        self.product = QuantMatMul.of_attention_value(CONFIG)
        self.head = nn.ModuleDict(
            dict(
                fc=QuantLinear(nn.Linear(CHANNELS, 5), CONFIG, 'fc2'),
                rest=nn.Linear(5, 2)))

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = self.product((x @ x.transpose(1, 2)).softmax(-1), x)
        return self.head['rest'](self.head['fc'](x))


@pytest.fixture(scope='module')
def made():
    """A calibrated model, and images of which some values are clipped."""
    torch.manual_seed(0)
    model = Attention().eval()
    with observe(model):
        model(torch.randn(1, 3, 6, 8))
    fit_weights_(model)
    set_precision_(model, weights=True, acts=True)
    return model, 2 * torch.randn(3, 1, 3, 6, 8)


@pytest.fixture(scope='module')
def measured(made):
    model, images = made
    return measure_layers(model, lambda place: model(images[place]), 3)


def layer(measured, name):
    return next(one for one in measured.layers if one.name == name)


def test_all_layers_are_there_those_in_float_too(measured):
    kinds = {one.name: one.kind for one in measured.layers}
    assert kinds == {
        'patches': 'conv',
        'product': 'matmul',
        'head.fc': 'linear',
        'head.rest': 'linear'
    }
    assert {one.part
            for one in measured.layers} == {'patches', 'product', 'head'}
    rest = layer(measured, 'head.rest')
    assert not rest.is_quantized and rest.error is None
    assert rest.bops == rest.macs * 1024


def test_bit_operations_are_those_of_the_whole_model(made, measured):
    model, images = made
    with counting(model) as found:
        model(images[0])
    assert sum(one.bops for one in measured.layers) == bops(model, found)


def test_multiplications_of_one_image(measured):
    macs = {one.name: one.macs for one in measured.layers}
    assert macs == {
        'patches': TOKENS * CHANNELS * 3 * 4,
        'product': TOKENS * TOKENS * CHANNELS,
        'head.fc': TOKENS * CHANNELS * 5,
        'head.rest': TOKENS * 5 * 2
    }


def test_errors_and_clipped_shares_are_those_of_the_first_layer(
        made, measured):
    model, images = made
    found = layer(measured, 'patches')
    own = model.patches
    values = torch.cat(list(images))
    with torch.no_grad():
        exact = nn.functional.conv2d(values, own.weight, own.bias, 2)
        error = (own(values) - exact).square().sum() / exact.square().sum()
        acts = nn.functional.conv2d(
            own.input_quantizer(values), own.weight, own.bias, 2) - exact
    assert found.error == pytest.approx(error.item(), rel=1e-4)
    assert found.error_of_acts == pytest.approx(
        (acts.square().sum() / exact.square().sum()).item(), rel=1e-4)
    site, = found.sites
    clipped = ~own.input_quantizer.inside(values)
    assert site.clipped == clipped.sum() > 0
    assert site.total == values.numel() == site.counts.sum()
    assert len(site.levels) == 16 and (np.diff(site.levels) > 0).all()


def test_weights_and_their_codes(made, measured):
    weight = made[0].patches.weight
    found = layer(measured, 'patches')
    assert found.code_counts.sum() == weight.numel() == found.num_weights
    assert found.weight_counts.sum() == weight.numel()
    codes = made[0].patches.weight_quantizer.encode(weight).long()
    assert found.code_counts.tolist() == torch.bincount(
        codes.flatten(), minlength=16).tolist()


def test_attention_is_counted_by_its_logarithm(measured):
    left, right = layer(measured, 'product').sites
    assert left.is_log and not right.is_log
    assert left.counts.sum() == left.total == 3 * TOKENS * TOKENS
    assert (left.levels >= 0).all() and (left.levels <= 1.01).all()


def test_a_model_is_left_as_it_was(made, measured):
    model = made[0]
    assert not any(module._forward_hooks for module in model.modules())
    assert model.patches.weight_quantizer.enabled


def test_seconds_of_the_parts(made):
    model, images = made
    found = time_parts(model, lambda place: model(images[place]), 3)
    # Its head is not called as a whole.
    assert found.keys() == {'patches', 'product', 'all'}
    assert all('forward' not in one.__dict__ for one in model.children())


def test_a_file_gives_back_what_was_measured(measured, tmp_path):
    measured.key, measured.seconds = 'a key', dict(all=.5)
    path = tmp_path / 'layers.npz'
    measured.save(path)
    again = LayerFile.load(path)
    assert again.key == 'a key' and again.seconds == dict(all=.5)
    for one, other in zip(again.layers, measured.layers):
        for site, kept in zip(one.sites, other.sites):
            assert site.counts.tolist() == kept.counts.tolist()
            assert site.levels == pytest.approx(kept.levels)
            assert len(site.counts) == NUM_BINS
        assert one.code_counts.tolist() == other.code_counts.tolist()
        assert (one.name, one.error, one.bops) == (other.name, other.error,
                                                   other.bops)


def test_two_files_of_the_same_are_the_same(measured, tmp_path):
    paths = tmp_path / 'a.npz', tmp_path / 'b.npz'
    for path in paths:
        measured.save(path)
    one, other = (LayerFile.load(path) for path in paths)
    assert str(one) == str(other)


@pytest.mark.parametrize('content', [b'', b'PK\3\4', b'{}'])
def test_a_damaged_file_is_refused(content, tmp_path):
    path = tmp_path / 'layers.npz'
    path.write_bytes(content)
    with pytest.raises(UNREADABLE):
        LayerFile.load(path)
