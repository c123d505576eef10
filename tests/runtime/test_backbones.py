"""A Swin backbone whose blocks run natively."""
import copy
import pickle

import pytest
import torch

from isvit_det.core.layers import quantized_layers, quantizers, simulation
from isvit_det.plans.layer import Unsupported
from isvit_det.runtime import blocks, engine, swin_backbone
from isvit_det.runtime.engine import (VARIABLE, attach_runtime_,
                                      describe_engine, engine_line)
from tests.runtime.blocks import TWO_STAGES, draw_backbone


@pytest.fixture(scope='module')
def calibrated():
    return draw_backbone(**TWO_STAGES)


@pytest.fixture
def model(calibrated, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    model = copy.deepcopy(calibrated)
    attach_runtime_(model, 'native')
    return model


@pytest.fixture
def ran(monkeypatch):
    """Names of the blocks and mergings that ran natively."""
    names = []
    for kind in (swin_backbone.NativeBlock, swin_backbone.NativeMerging):

        def run(self, *args, kind=kind, call=kind.__call__):
            names.append(kind.__name__)
            return call(self, *args)

        monkeypatch.setattr(kind, '__call__', run)
    return names


ALL = ['NativeBlock'] * 2 + ['NativeMerging'] + ['NativeBlock'] * 2


def predict(model, images=2, size=(70, 90)):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(images, 3, *size))


def simulate(model):
    """What the simulation predicts in float64."""
    twin = copy.deepcopy(model).double()
    torch.manual_seed(1)
    with torch.no_grad():
        return twin(torch.randn(2, 3, 70, 90).double())


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def test_outputs_are_those_of_the_simulation(model, ran):
    found = predict(model)
    assert ran == ALL
    expected = simulate(model)
    assert ran == ALL
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        assert relative_error(one, other) < 1e-5


def test_what_is_simulated_has_no_native_parts(model, ran):
    with simulation(model):
        predict(model)
    assert ran == []


def test_the_image_is_left_as_it_was(model):
    x = torch.randn(1, 3, 64, 64)
    before = x.clone()
    with torch.no_grad():
        model(x)
    assert torch.equal(x, before)


def test_every_site_counts(model):
    before = {name: q.num_calls for name, q in quantizers(model).items()}
    predict(model)
    for name, quantizer in quantizers(model).items():
        assert quantizer.num_calls == before[name] + 1, name


def hook_block(model):
    model.stages[0].blocks[0].register_forward_hook(lambda *args: None)


def hook_within_block(model):
    attention = model.stages[0].blocks[0].attn.w_msa
    attention.softmax.register_forward_hook(lambda *args: None)


def observe_within_block(model):
    quantizer = model.stages[0].blocks[0].ffn.layers[1].input_quantizer
    quantizer.observer = quantizer.new_observer()


def train_dropout(model):
    model.stages[0].blocks[0].attn.drop.train()


def refuse_block(model):
    model.stages[0].blocks[0].ffn.layers[0][1] = torch.nn.Tanh()


@pytest.mark.parametrize('change', [
    hook_block, hook_within_block, observe_within_block, train_dropout,
    refuse_block
])
def test_one_block_alone_runs_by_its_modules(model, ran, change):
    change(model)
    found = predict(model)
    assert ran == ALL[1:]
    assert relative_error(found[1], simulate(model)[1]) < 1e-5


def test_a_hook_on_a_stage_sees_its_forward(model, ran):
    seen = []
    model.stages[1].register_forward_hook(lambda *args: seen.append(args))
    predict(model)
    assert len(seen) == 1 and ran == []


def test_gradients_training_and_other_dtypes_are_simulated(model, ran):
    x = torch.randn(1, 3, 64, 64)
    model(x)
    with torch.no_grad():
        model.train()
        model(x)
        model.eval()
        model.double()(x.double())
    assert ran == []


def test_the_setting_is_read_at_every_forward(model, ran, monkeypatch):
    monkeypatch.setenv(VARIABLE, 'simulation')
    predict(model)
    assert ran == []
    monkeypatch.setenv(VARIABLE, 'native')
    predict(model)
    assert ran == ALL


def test_a_changed_block_is_packed_anew(model):
    before = predict(model)
    block = model.stages[0].blocks[1]
    with torch.no_grad():
        block.norm2.bias.add_(1)
    after = predict(model)
    assert relative_error(after[0], before[0]) > 1e-2
    assert relative_error(after[0], simulate(model)[0]) < 1e-5


def test_copies_and_pickles_run_too(model, ran):
    expected = predict(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del ran[:]
        for one, other in zip(predict(twin), expected):
            assert torch.equal(one, other)
        assert ran == ALL


def test_all_images_of_a_batch_are_as_alone(model):
    batch = predict(model, images=3)
    torch.manual_seed(1)
    x = torch.randn(3, 3, 70, 90)
    with torch.no_grad():
        for i in range(3):
            for one, all_of_them in zip(model(x[i:i + 1]), batch):
                assert torch.equal(one[0], all_of_them[i])


def test_what_is_described_is_packed_once_and_is_what_runs(
        model, ran, monkeypatch):
    packed = []
    for module in (engine, blocks):
        for name in ('NativeLinear', 'NativeConv', 'NativeBlock',
                     'NativeMerging', 'pack_layer'):
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, noting(packed, name, getattr(module, name)))
    found = describe_engine(model)
    layers = len(quantized_layers(model))
    assert found['native_layers'] == layers
    assert found['simulated'] == found['unfused'] == {}
    inside = sum(
        len(quantized_layers(part)) for stage in model.stages
        for part in (*stage.blocks, stage.downsample) if part is not None)
    # Query, key and value are packed one by one.
    assert 'NativeLinear' not in packed
    assert packed.count('NativeConv') == layers - inside
    packed.clear()
    predict(model)
    assert ran == ALL and packed == []


def noting(calls, name, make):

    def call(*args, **kwargs):
        calls.append(name)
        return make(*args, **kwargs)

    return call


@pytest.mark.parametrize('change, reason', [
    (lambda block: block.ffn.register_forward_hook(lambda *args: None),
     'ffn has forward hooks'),
    (lambda block: block.attn.w_msa.train(), 'attn.w_msa is in training mode'),
    (lambda block: setattr(block.attn.w_msa.proj, 'native', None),
     'attn.w_msa.proj is simulated'),
])
def test_a_block_that_runs_layer_by_layer_is_named(model, change, reason):
    change(model.stages[0].blocks[1])
    found = describe_engine(model)
    assert found['unfused'] == {'stages.0.blocks.1': reason}
    assert found['engine'] == 'native'
    assert f'layer by layer: stages.0.blocks.1 ({reason})' in \
        engine_line(found)


def test_what_the_kernels_cannot_run_as_a_whole_is_named(model, monkeypatch):

    def refuse(*args):
        raise Unsupported('it is too long')

    monkeypatch.setattr(swin_backbone, 'NativeMerging', refuse)
    found = describe_engine(model)
    assert found['unfused'] == {'stages.0.downsample': 'it is too long'}
    assert found['native_layers'] == len(quantized_layers(model))
