"""Size and bit operations by bits, against packed files and by hand."""
import math

import pytest
import torch
from mmdet.apis import init_detector
from torch import nn

from isvit_det.apis import quantize_detector, save_detector
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import (QuantConv2d, QuantLinear, QuantMatMul,
                                   simulation)
from isvit_det.core.mixed import named_parts
from isvit_det.core.settings import QuantConfig
from isvit_det.costs.operations import (bops, counting, factor_bits,
                                        multiplied_bits)
from isvit_det.costs.size import file_bytes, mean_bits, part_bytes
from isvit_det.engine.speed_by_bits import layer_seconds, ranged

MIXED = [
    dict(match='backbone.stages.1', weight_bits=8, act_bits=8),
    dict(match='roi_head.*', weight_bits=3, act_bits=6)
]


@pytest.fixture(scope='module')
def models(tiny):
    """Calibrated ones: of one width, and mixed."""
    model = init_detector(tiny.config, tiny.checkpoint, device='cpu')
    images = sorted((tiny.data / 'train').iterdir())[:2]
    return [
        quantize_detector(
            model,
            images,
            scope='detector',
            iters=0,
            quant=dict(overrides=overrides)) for overrides in ([], MIXED)
    ]


def test_a_file_is_counted_to_the_byte(models, tmp_path):
    for index, model in enumerate(models):
        _, packed = save_detector(model, tmp_path / str(index))
        actual = len(open(packed, 'rb').read())
        assert file_bytes(model, model.provenance,
                          model.dataset_meta) == actual


def test_differences_by_layer_add_up_to_that_of_the_files(models):
    sizes = [file_bytes(model, {}, {}) for model in models]
    parts = [{
        name: part_bytes(part, model.quant_config.at(name))
        for name, part in named_parts(model)
    } for model in models]
    expected = sum(parts[1].values()) - sum(parts[0].values())
    tensors = len(models[0].state_dict())
    # Files are aligned, and the header has the overrides in text.
    assert abs(sizes[1] - sizes[0] - expected) < 64 * tensors / 4
    name = 'roi_head.bbox_head.shared_fcs.0'
    weight = models[0].get_submodule(name).weight
    before, after = (one[name] for one in parts)
    codes = weight.numel() // 2 - math.ceil(weight.numel() * 3 / 8)
    # Its table has 64 entries instead of 16.
    assert before - after == codes - (64 - 16)


def test_mean_bits_is_of_all_weights(models):
    assert mean_bits(models[0]) == 4
    widths = [(part.weight.numel(), part.weight_quantizer.bits)
              for _, part in named_parts(models[1])
              if not isinstance(part, QuantMatMul)]
    assert {bits for _, bits in widths} == {3, 4, 8}
    expected = sum(n * b for n, b in widths) / sum(n for n, _ in widths)
    assert mean_bits(models[1]) == pytest.approx(expected)


def test_multiplications_are_those_counted_by_hand():
    quant = QuantConfig(activation_tables=())
    model = nn.Sequential(
        QuantConv2d(nn.Conv2d(3, 8, 3, 2, 1, groups=1), quant), nn.Flatten(2),
        QuantLinear(nn.Linear(16, 5), quant), nn.Linear(5, 7)).eval()
    with counting(model) as found:
        model(torch.randn(2, 3, 8, 8))
    assert {
        name: one.macs
        for name, one in found.items()
    } == {
        '0': 2 * 8 * 16 * 27,
        '2': 2 * 8 * 16 * 5,
        '3': 2 * 8 * 5 * 7
    }
    assert [one.quantized for one in found.values()] == [True, True, False]
    expected = 16 * (found['0'].macs + found['2'].macs)
    assert bops(model, found) == expected + 32 * 32 * found['3'].macs


def test_a_product_and_a_transposed_convolution_are_counted():
    quant = QuantConfig()
    model = nn.Module()
    model.product = QuantMatMul.of_query_key(quant)
    model.up = nn.ConvTranspose2d(4, 6, 2, 2)
    with counting(model) as found:
        model.product(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 7))
        model.up(torch.randn(1, 4, 3, 3))
    assert found['product'].macs == 2 * 3 * 5 * 4 * 7
    assert found['up'].macs == 9 * 4 * 6 * 4


@pytest.mark.parametrize('settings, expected', [
    (dict(exponent='table'), 32 * 4),
    (dict(exponent='integer'), 4 * 4),
    (dict(softmax='log2'), 4 * 4),
    (dict(softmax='uniform'), 4 * 4),
])
def test_attention_counts_what_is_multiplied(settings, expected):
    quant = QuantConfig.from_dict(settings)
    assert factor_bits(QuantMatMul.of_attention_value(quant)) == expected
    assert factor_bits(QuantMatMul.of_query_key(quant)) == 16


def test_a_table_counts_its_entries():
    quant = QuantConfig(weight_bits=3)
    layer = QuantLinear(nn.Linear(4, 4), quant, 'fc2')
    assert factor_bits(layer) == 3 * 7
    quantizer = layer.input_quantizer
    quantizer.mark_fitted_()
    # A calibrated one whose entries are its codes multiplies these.
    assert multiplied_bits(quantizer) == 4
    quantizer.entries.copy_(torch.arange(16) * 8)
    assert multiplied_bits(quantizer) == 7


def test_bits_of_one_model_are_operations_of_another(models, tiny):
    from mmdet.utils import get_test_pipeline_cfg

    from isvit_det.apis import GivenImages, without_annotations
    uniform, mixed = models
    image = sorted((tiny.data / 'val').iterdir())[0]
    pipeline = without_annotations(get_test_pipeline_cfg(uniform.cfg.copy()))
    batch = GivenImages([str(image)], pipeline).read(0)
    with simulation(uniform), counting(uniform) as found:
        uniform.test_step(batch)
    names = [name for name, one in found.items() if one.quantized]
    assert set(names) == {name for name, _ in named_parts(uniform)}
    stage = sum(one.macs for name, one in found.items()
                if name.startswith('backbone.stages.1'))
    assert 0 < stage < sum(one.macs for one in found.values())
    assert bops(uniform, found) != bops(mixed, found)
    pairs = [(3, 3), (8, 8)]
    seconds = layer_seconds(uniform, batch, uniform.quant_config, pairs, 1)
    assert set(seconds) == {
        name
        for name, part in named_parts(uniform)
        if not isinstance(part, QuantMatMul)
    }
    assert all(
        set(own) <= set(pairs) and min(own.values()) > 0
        for own in seconds.values())


def test_kernels_are_not_timed_elsewhere():
    model = nn.Linear(2, 2, device='meta')
    with pytest.raises(QuantError, match="'meta'; give --device cpu"):
        layer_seconds(model, {}, QuantConfig(), [(4, 4)])


@pytest.mark.parametrize('bits', [(2, 2), (4, 4), (8, 8)])
def test_a_layer_to_be_timed_computes_what_it_should(bits):
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(16, 8), QuantConfig(), 'fc2')
    x = torch.randn(40, 16)
    twin = ranged(layer, x, QuantConfig(), bits)
    assert twin.weight is layer.weight
    assert not layer.input_quantizer.is_fitted
    error = (twin(x) - nn.functional.linear(x, layer.weight, layer.bias))
    assert error.norm() / x.norm() < .9 / 2**(min(bits) - 2)
