"""Codes made of native outputs, held against the simulation in float64.

Every engine is given the same input, so that what differs is its own. What
counts as equal: at most twice the codes by which the simulation in float32
differs, and one of 100,000.
"""
import pytest
import torch
from torch import nn

from isvit_det.core.quantizers import UniformQuantizer
from isvit_det.runtime.layers import NativeConv, NativeLinear
from tests.runtime.calibrated import calibrate, outputs_in_double
from tests.runtime.products import ISAS

every_isa = pytest.mark.parametrize('isa', ISAS, ids=lambda isa: isa.name)


def assert_equal_codes(native, layer, x, bits):
    """Compare the codes that the next layer would make of the outputs."""
    exact = outputs_in_double(layer, x)
    with torch.no_grad():
        simulated = layer(x)
    quantizer = UniformQuantizer(bits, 'act')
    low, high = exact.quantile(.001), exact.quantile(.999)
    quantizer.scale.copy_((high - low) / (2**bits - 1))
    quantizer.zero_point.copy_(torch.round(-low / quantizer.scale))
    expected = quantizer.double().encode(exact)
    quantizer.float()
    found, reference = ((quantizer.encode(y) != expected).sum().item()
                        for y in (native(x), simulated))
    assert found <= 2 * reference + 1e-5 * expected.numel()
    # The codes are many different ones.
    assert len(expected.unique()) == 2**bits


@every_isa
@pytest.mark.parametrize(
    'bits', ['w2a2', 'w3a3', 'w4a4', 'w4a8', 'w8a4', 'w6a6', 'w6a8', 'w8a8'])
@pytest.mark.parametrize('inputs', [96, 768])
def test_codes_of_a_linear_layer(isa, bits, inputs):
    torch.manual_seed(0)
    x = torch.randn(400, inputs)
    layer = calibrate(nn.Linear(inputs, 200), x, bits)
    assert_equal_codes(NativeLinear(layer, isa), layer, x, 8)


@every_isa
@pytest.mark.parametrize('bits', ['w3a3', 'w4a4', 'w8a8'])
def test_codes_of_a_convolution(isa, bits):
    torch.manual_seed(0)
    x = torch.randn(1, 64, 24, 30).relu()
    layer = calibrate(nn.Conv2d(64, 64, 3, padding=1), x, bits)
    assert_equal_codes(NativeConv(layer, isa), layer, x, 8)
