"""Bits by layer: which override covers what, and what is refused."""
import json

import pytest
import torch
from torch import nn

from isvit_det.core.errors import QuantError
from isvit_det.core.layers import QuantConv2d, QuantLinear, QuantMatMul
from isvit_det.core.mixed import set_bits_
from isvit_det.core.overrides import parse_override
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.core.table_quantizer import TableQuantizer


def config(*overrides, **more):
    return QuantConfig.from_dict(
        dict(dict(bits='w4a4', overrides=list(overrides)), **more))


def build(quant):
    """A network with a layer at two places, a product and a convolution."""
    shared = QuantLinear(nn.Linear(4, 4), quant, 'fc2')
    return nn.ModuleDict({
        'stem':
        QuantConv2d(nn.Conv2d(3, 4, 1), quant, input_bits=8),
        'block':
        nn.ModuleDict({
            'fc': shared,
            'product': QuantMatMul.of_attention_value(quant)
        }),
        'tail':
        nn.ModuleDict({'fc': shared})
    })


def widths(model):
    stem, fc = model['stem'], model['block']['fc']
    product = model['block']['product']
    return dict(
        stem=(stem.weight_quantizer.bits, stem.input_quantizer.bits),
        fc=(fc.weight_quantizer.bits, fc.input_quantizer.bits),
        product=(product.left_quantizer.bits, product.right_quantizer.bits))


@pytest.mark.parametrize('match, changed', [
    ('block', ('fc', 'product')),
    ('block.fc', ('fc', )),
    ('tail.*', ('fc', )),
    ('*.pro?uct', ('product', )),
    ('*', ('stem', 'fc', 'product')),
])
def test_a_pattern_covers_names_and_what_is_inside(match, changed):
    quant = config(dict(match=match, weight_bits=3, act_bits=6))
    model = build(quant)
    set_bits_(model, quant)
    # The input of the first layer has a setting of its own.
    expected = dict(stem=(3, 8), fc=(3, 6), product=(6, 6))
    before = dict(stem=(4, 8), fc=(4, 4), product=(4, 4))
    assert widths(model) == {
        name: (expected if name in changed else before)[name]
        for name in before
    }


def test_the_last_one_decides_for_weights_and_activations_by_themselves():
    quant = config(
        dict(match='*', weight_bits=8, act_bits=8),
        dict(match='*.fc', weight_bits=3), dict(match='tail', act_bits=5))
    model = build(quant)
    set_bits_(model, quant)
    # A layer that occurs twice is covered by any of its names.
    assert widths(model)['fc'] in [(3, 8), (3, 5)]
    assert widths(model)['product'] == (8, 8)


def test_tables_come_and_go_with_the_bits():
    quant = config(dict(match='block.fc', act_bits=8))
    model = build(quant)
    assert isinstance(model['block']['fc'].input_quantizer, TableQuantizer)
    set_bits_(model, quant)
    assert not isinstance(model['block']['fc'].input_quantizer, TableQuantizer)
    quant = config(dict(match='block.fc', act_bits=4), bits='w8a8')
    model = build(quant)
    set_bits_(model, quant)
    assert isinstance(model['block']['fc'].input_quantizer, TableQuantizer)


@pytest.mark.parametrize('overrides, words', [
    ([dict(match='blok', act_bits=8)], ["'blok' matches no", 'is it block']),
    ([dict(match='product', act_bits=8)], ['is it block.product?']),
    ([dict(match='*.product', weight_bits=8)], ['no weights', 'act_bits']),
    ([dict(match='block')], ["'block' changes nothing"]),
    ([dict(match='block', act_bits=9)], ['9', 'between 2 and 8']),
    ([dict(match='block', act_bits=True)], ['True', 'between 2 and 8']),
    ([dict(match='', act_bits=4)], ["match=''"]),
    ([dict(act_bits=4)], ['has no match']),
    ([dict(match='block', bits=4)], ['unknown keys', "'bits'"]),
    (['block'], ["('block',)", 'expected a list such as']),
    ('block', ["'block'", 'expected a list such as']),
])
def test_what_is_wrong_is_one_line(overrides, words):
    with pytest.raises(QuantError) as error:
        quant = QuantConfig.from_dict(dict(overrides=overrides))
        set_bits_(build(quant), quant)
    text = str(error.value)
    assert '\n' not in text and all(word in text for word in words)


@pytest.mark.parametrize('text', ['neck', 'neck=', 'neck=8', '=w4', 'neck=4w'])
def test_the_command_line_reads_patterns_with_bits(text):
    with pytest.raises(QuantError, match='cannot be read'):
        parse_override(text)


def test_settings_survive_plain_values():
    quant = config(dict(match='a=b', weight_bits=8))
    again = QuantConfig.from_dict(json.loads(json.dumps(quant.to_dict())))
    assert again == quant and hash(again) == hash(quant)
    assert quant.label == 'w4a4 mixed' and quant.bits == 'w4a4'
    # Files of one width say nothing of overrides.
    assert 'overrides' not in config().to_dict()
    assert config().label == 'w4a4'


def test_few_bits_anywhere_are_optimised_as_the_paper_does():
    assert SOSConfig.from_dict({}, config(bits='w8a8')).iters == 200
    low = config(dict(match='*', act_bits=3), bits='w8a8')
    assert SOSConfig.from_dict({}, low).iters == 1000


def test_new_quantizers_are_not_fitted():
    quant = config(dict(match='block', act_bits=5))
    model = build(quant)
    fc = model['block']['fc']
    fc.weight_quantizer.fit_tensor_(torch.randn(4, 4))
    set_bits_(model, quant)
    assert not fc.weight_quantizer.is_fitted
