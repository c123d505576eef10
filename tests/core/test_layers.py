"""Quantized layers, modes and observation."""
import pytest
import torch
from torch import nn

from isvit_det.core.layers import (QuantConv2d, QuantLinear, QuantMatMul,
                                   fit_weights_, list_sites, observe,
                                   precision, quantizers)
from isvit_det.core.settings import QuantConfig

CONFIG = QuantConfig(weight_bits=4, act_bits=5)


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv = QuantConv2d(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), CONFIG, input_bits=8)
        self.qk = QuantMatMul.of_query_key(CONFIG)
        self.av = QuantMatMul.of_attention_value(CONFIG)
        self.fc = QuantLinear(nn.Linear(8, 4, bias=False), CONFIG)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        attention = self.qk(x, x.transpose(1, 2)).softmax(-1)
        return self.fc(self.av(attention, x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))


def calibrate_(net, images):
    with observe(net):
        net(images)
    fit_weights_(net)
    return net


def float_output(net, images):
    conv, fc = net.conv, net.fc
    x = nn.functional.conv2d(images, conv.weight, conv.bias, 2, 1)
    x = x.flatten(2).transpose(1, 2)
    attention = (x @ x.transpose(1, 2)).softmax(-1)
    return nn.functional.linear(attention @ x, fc.weight)


def test_uncalibrated_layers_compute_what_float_layers_compute(net, images):
    assert torch.equal(net(images), float_output(net, images))


def test_calibration_leaves_the_mode_alone_and_precision_turns_it_on(
        net, images):
    expected = float_output(net, images)
    calibrate_(net, images)
    assert torch.equal(net(images), expected)
    with precision(net, weights=True, acts=True):
        quantized = net(images)
    assert not torch.equal(quantized, expected)
    assert (quantized - expected).norm() < .5 * expected.norm()
    assert torch.equal(net(images), expected)


def test_weights_and_activations_are_turned_on_apart(net, images):
    calibrate_(net, images)
    outputs = []
    for weights in (False, True):
        for acts in (False, True):
            with precision(net, weights=weights, acts=acts):
                roles = {(q.role, q.enabled) for q in quantizers(net).values()}
                assert roles == {('weight', weights), ('act', acts)}
                outputs.append(net(images))
    for i, one in enumerate(outputs):
        assert not any(torch.equal(one, other) for other in outputs[:i])


def test_the_mode_is_given_back_on_an_error_and_when_mixed(net, images):
    calibrate_(net, images)
    net.fc.input_quantizer.enabled = True
    before = {n: q.enabled for n, q in quantizers(net).items()}
    with pytest.raises(ZeroDivisionError):
        with precision(net, weights=True, acts=False):
            raise ZeroDivisionError
    assert {n: q.enabled for n, q in quantizers(net).items()} == before


def test_observation_ends_on_an_error_and_fits_nothing(net, images):
    with pytest.raises(ZeroDivisionError):
        with observe(net):
            net(images)
            raise ZeroDivisionError
    assert not any(q.is_fitted for q in quantizers(net).values())
    assert all(q.observer is None for q in quantizers(net).values())
    assert not net.av._forward_pre_hooks


def test_attention_is_observed_with_the_values_that_it_weighs():
    """Values that grow with the key make small attention matter."""
    generator = torch.Generator().manual_seed(2)
    x = (4 * torch.randn(16, 2, 49, 49, generator=generator)).softmax(-1)
    x = x.sort(-1, descending=True).values
    values = torch.logspace(-2, 3, 49)[:, None].expand(16, 2, 49, 8)
    errors = {}
    for by in ('attention', 'output'):
        product = QuantMatMul.of_attention_value(
            QuantConfig(shift_error=by, act_bits=3))
        with observe(product):
            product(x, values)
        product.left_quantizer.enabled = True
        errors[by] = (product(x, values) - x @ values).square().sum().item()
    assert errors['output'] < errors['attention']


def test_every_site_is_listed_with_bits_and_granularity(net, images):
    calibrate_(net, images)
    with precision(net, weights=True, acts=True):
        net(images)
    found = {
        s.name: (s.bits, s.granularity, s.num_calls)
        for s in list_sites(net)
    }
    assert found == {
        'conv.input_quantizer': (8, 'tensor', 1),
        'conv.weight_quantizer': (4, 'channel', 1),
        'qk.left_quantizer': (5, 'tensor', 1),
        'qk.right_quantizer': (5, 'tensor', 1),
        'av.left_quantizer': (5, 'tensor', 1),
        'av.right_quantizer': (5, 'tensor', 1),
        'fc.input_quantizer': (5, 'tensor', 1),
        'fc.weight_quantizer': (4, 'channel', 1),
    }


def test_what_reaches_the_arithmetic_has_so_many_values(net, images):
    calibrate_(net, images)
    with precision(net, weights=True, acts=True):
        weight = net.fc.weight_quantizer(net.fc.weight)
        assert all(len(row.unique()) <= 2**4 for row in weight)
        seen = []
        net.fc.input_quantizer.register_forward_hook(
            lambda module, args, out: seen.append(out))
        net(images)
    assert len(seen[0].unique()) <= 2**5


def test_layers_share_their_parameters_with_what_they_replace():
    source = nn.Linear(3, 5)
    layer = QuantLinear(source, CONFIG)
    assert layer.weight is source.weight and layer.bias is source.bias
    assert layer.offset is None
    conv = nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2, dilation=2)
    quantized = QuantConv2d(conv, CONFIG)
    x = torch.randn(1, 4, 9, 9)
    assert quantized.weight is conv.weight and torch.equal(
        quantized(x), conv(x))


def test_a_layer_without_bias_owns_an_offset_that_it_adds():
    layer = QuantLinear(nn.Linear(3, 2, bias=False), CONFIG)
    x = torch.randn(4, 3)
    before = layer(x)
    layer.offset.copy_(torch.tensor([1., -2.]))
    assert torch.allclose(layer(x), before + layer.offset)
    assert 'offset' in layer.state_dict()


def test_a_convolution_of_patches_of_its_size_is_one_product():
    layer = QuantConv2d(nn.Conv2d(3, 8, 4, stride=4), CONFIG)
    patches = torch.randn(6, 3, 4, 4)
    for quantized in (False, True):
        if quantized:
            with observe(layer):
                layer(patches)
            fit_weights_(layer)
        with precision(layer, quantized, quantized), torch.no_grad():
            expected = layer(patches).flatten(1)
            found = layer.run_patches(patches)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected, layer(patches).flatten(1))


def test_gradients_reach_weights_through_the_rounding(net, images):
    calibrate_(net, images)
    with precision(net, weights=True, acts=True):
        net(images).square().sum().backward()
    for layer in (net.conv, net.fc):
        assert layer.weight.grad.abs().sum() > 0
