"""Layers exchanged for quantized ones and back: the same parameters."""
import pytest
import torch
from torch import nn

from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.core.settings import QuantConfig
from isvit_det.core.swap import (float_version, make_float_, quantized_version,
                                 replace_)


@pytest.mark.parametrize('layer, shape', [
    (nn.Linear(4, 6), (2, 4)),
    (nn.Linear(4, 6, bias=False), (2, 4)),
    (nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), bias=False), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, 1, 2, 2, 4, padding_mode='reflect'), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding='same'), (2, 4, 9, 8)),
])
def test_a_layer_comes_back_as_it_was(layer, shape):
    layer.eval()
    quantized = quantized_version(layer, QuantConfig())
    assert isinstance(quantized, (QuantLinear, QuantConv2d))
    back = float_version(quantized)
    assert type(back) is type(layer) and not back.training
    assert back.weight is layer.weight and back.bias is layer.bias
    assert back.extra_repr() == layer.extra_repr()
    assert back.state_dict().keys() == layer.state_dict().keys()
    x = torch.randn(shape)
    assert torch.equal(back(x), layer(x)) and torch.equal(
        quantized(x), layer(x))


def test_a_layer_is_turned_back_at_all_its_places():
    shared, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleDict(
        dict(levels=nn.ModuleList([shared, shared]), other=other))
    keys = list(model.state_dict())
    replace_(
        model, {
            layer: quantized_version(layer, QuantConfig())
            for layer in (shared, other)
        })
    assert model['levels'][0] is model['levels'][1]
    make_float_(model, ['levels.1', 'levels', 'nowhere'])
    assert type(model['levels'][0]) is nn.Linear
    assert model['levels'][0] is model['levels'][1]
    assert isinstance(model['other'], QuantLinear)
    make_float_(model, ['levels.0', 'other'])
    assert list(model.state_dict()) == keys
    assert model['levels'][0].weight is shared.weight
