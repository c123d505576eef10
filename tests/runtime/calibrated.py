"""Calibrated layers for the tests of the runtime."""
import torch
from torch import nn

from isvit_det.core.layers import (QuantConv2d, QuantLinear, fit_weights_,
                                   set_precision_)
from isvit_det.core.settings import QuantConfig
from isvit_det.core.table_quantizer import activation_quantizer


def calibrate(source, x, bits='w4a4', shift=0.):
    """A quantized layer whose ranges are those of ``x``, turned on."""
    config = QuantConfig.from_dict(dict(bits=bits))
    twin = QuantLinear if isinstance(source, nn.Linear) else QuantConv2d
    layer = twin(source, config).eval()
    fit_weights_(layer)
    quantizer = layer.input_quantizer
    low, high = x.min(), x.max()
    quantizer.scale.copy_((high - low) / (2**quantizer.bits - 1))
    quantizer.zero_point.copy_(torch.round(-low / quantizer.scale + shift))
    quantizer.mark_fitted_()
    set_precision_(layer, True, True)
    return layer


def use_table_(layer, x, bits):
    """Give a calibrated layer's input a table that is fitted to ``x``."""
    config = QuantConfig(act_bits=bits, activation_tables=('fc2', ))
    quantizer = activation_quantizer(config, 'fc2')
    observer = quantizer.new_observer()
    observer.update(x)
    quantizer.fit_(observer)
    quantizer.enabled = True
    layer.input_quantizer = quantizer.eval()


def draw_linear(inputs=40, outputs=24, bits='w4a4', bias=True, shift=0.):
    """A calibrated linear layer and inputs (2, 9, inputs) for it."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, inputs)
    return calibrate(nn.Linear(inputs, outputs, bias), x, bits, shift), x


def draw_conv(*args, bits='w4a4', size=(9, 11), shift=0., **kwargs):
    """A calibrated convolution and two maps for it; other args as torch's."""
    torch.manual_seed(0)
    x = torch.randn(2, args[0], *size)
    return calibrate(nn.Conv2d(*args, **kwargs), x, bits, shift), x


def outputs_in_double(layer, x):
    """What the simulation gives in float64."""
    with torch.no_grad():
        out = layer.double()(x.double())
    layer.float()
    return out
