"""Native layers against the simulation in float64."""
import pytest
import torch

from isvit_det.plans.layer import Unsupported, plan_layer
from isvit_det.runtime.layers import NativeConv, NativeLinear
from tests.runtime.calibrated import (draw_conv, draw_linear,
                                      outputs_in_double, use_table_)
from tests.runtime.products import ISAS

every_isa = pytest.mark.parametrize('isa', ISAS, ids=lambda isa: isa.name)


def assert_close(native, layer, x):
    """Native outputs are within float32 rounding of their sums."""
    found = native(x)
    expected = outputs_in_double(layer, x)
    assert found.shape == expected.shape
    size = expected.abs().max()
    assert (found - expected).abs().max() <= 5e-7 * size


@every_isa
@pytest.mark.parametrize(
    'bits', ['w2a2', 'w3a5', 'w4a4', 'w4a8', 'w8a4', 'w6a8', 'w8a8'])
@pytest.mark.parametrize('bias', [True, False])
def test_linear(isa, bits, bias):
    layer, x = draw_linear(bits=bits, bias=bias)
    if not bias:
        layer.offset.copy_(torch.randn(24))
    assert_close(NativeLinear(layer, isa), layer, x)


@every_isa
@pytest.mark.parametrize('shift', [-40, 40, 3000])
def test_linear_with_a_zero_point_outside_of_the_codes(isa, shift):
    layer, x = draw_linear(shift=shift)
    x = x - shift * layer.input_quantizer.scale
    native = NativeLinear(layer, isa)
    codes = layer.input_quantizer.encode(x)
    assert codes.min() == 0 and codes.max() == 15
    assert_close(native, layer, x)


@every_isa
@pytest.mark.parametrize(
    'kernel, kwargs', [
        (1, {}),
        (3, dict(padding=1)),
        (3, dict(padding=1, stride=2)),
        (3, dict(padding=(0, 2), stride=(1, 3), bias=False)),
        (3, dict(padding=2, dilation=2)),
        ((1, 5), dict(padding=(0, 2))),
        (4, dict(stride=4)),
        (7, dict(stride=2, padding=3)),
    ],
    ids=str)
@pytest.mark.parametrize('channels', [3, 20])
@pytest.mark.parametrize(
    'memory', [torch.contiguous_format, torch.channels_last],
    ids=['planes', 'channels_last'])
def test_convolution(isa, kernel, kwargs, channels, memory):
    layer, x = draw_conv(channels, 18, kernel, **kwargs)
    x = x.contiguous(memory_format=memory)
    native = NativeConv(layer, isa)
    assert_close(native, layer, x)
    if memory is torch.channels_last:
        assert native(x).is_contiguous(memory_format=memory)
    else:
        assert native(x).is_contiguous()


@every_isa
@pytest.mark.parametrize('bits', ['w2a2', 'w4a8', 'w8a8'])
def test_convolution_at_other_widths(isa, bits):
    layer, x = draw_conv(16, 16, 3, padding=1, bits=bits)
    assert_close(NativeConv(layer, isa), layer, x)


@every_isa
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (6, 1), (2, 60)])
def test_convolution_of_small_and_of_long_maps(isa, size):
    layer, x = draw_conv(8, 5, 3, padding=1, size=size)
    assert_close(NativeConv(layer, isa), layer, x)


@every_isa
@pytest.mark.parametrize('bits', [2, 3, 4, 6])
def test_tables(isa, bits):
    linear, x = draw_linear(bits='w4a4')
    x = torch.nn.functional.gelu(x)
    use_table_(linear, x, bits)
    native = NativeLinear(linear, isa)
    assert native.plan.input.entries == tuple(
        linear.input_quantizer.entries.tolist())
    # Also beyond the values that the table was fitted to.
    assert_close(native, linear, 2 * x)
    # Padded with zeros, which is an entry of its own behind a ReLU alone.
    for act in (torch.relu, torch.nn.functional.gelu):
        conv, x = draw_conv(20, 18, 3, padding=1)
        use_table_(conv, act(x), bits)
        native = NativeConv(conv, isa)
        assert native.plan.padding_code == int(conv.input_quantizer.zero_point)
        assert_close(native, conv, act(x))


def test_padding_with_a_code_above_the_largest():
    layer, x = draw_conv(8, 8, 3, padding=1, shift=20)
    assert int(layer.input_quantizer.zero_point) > 15
    plan = plan_layer(layer)
    assert plan.top == plan.padding_code
    for isa in ISAS:
        assert_close(NativeConv(layer, isa), layer, x - 2.5)


def test_weights_far_beyond_eight_bits():
    layer, x = draw_conv(8, 8, 3, padding=1)
    layer.weight_quantizer.zero_point.fill_(5000)
    for isa in ISAS:
        assert_close(NativeConv(layer, isa), layer, x)


def test_nothing_comes_of_nothing():
    linear, _ = draw_linear()
    conv, _ = draw_conv(8, 8, 3, padding=1)
    for isa in ISAS:
        assert NativeLinear(linear, isa)(torch.zeros(0, 40)).shape == (0, 24)
        empty = torch.zeros(0, 8, 5, 5)
        assert NativeConv(conv, isa)(empty).shape == (0, 8, 5, 5)


@pytest.mark.parametrize('change, reason', [
    (lambda conv: conv.input_quantizer.zero_point.fill_(-3), 'no code'),
    (lambda conv: conv.input_quantizer.zero_point.fill_(2**30), 'larger than'),
    (lambda conv: setattr(conv, 'padding_mode', 'reflect'), 'reflect'),
    (lambda conv: setattr(conv, 'padding', 'same'), 'same'),
    (lambda conv: setattr(conv, 'groups', 2), '2 groups'),
    (lambda conv: setattr(conv.input_quantizer, 'enabled', False),
     'input is not quantized'),
    (lambda conv: setattr(conv.weight_quantizer, 'enabled', False),
     'weight is not quantized'),
    (lambda conv: conv.weight_quantizer.zero_point.fill_(2**26), '30 bits'),
    (lambda conv: conv.weight_quantizer.zero_point.fill_(2**16), '16 bits'),
])
def test_what_is_not_supported_is_named(change, reason):
    layer, _ = draw_conv(8, 8, 3, padding=1)
    change(layer)
    with pytest.raises(Unsupported, match=reason):
        NativeConv(layer, ISAS[-1])


def test_a_scale_per_input_channel_is_not_supported():
    layer, _ = draw_linear()
    layer.input_quantizer.num_channels = 40
    with pytest.raises(Unsupported, match='scale per channel'):
        plan_layer(layer)
