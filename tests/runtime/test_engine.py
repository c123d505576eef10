"""When a layer runs natively, when it is simulated, and what is told."""
import copy
import pickle

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn

from isvit_det.core.errors import QuantError
from isvit_det.core.layers import quantizers, simulation
from isvit_det.runtime import engine
from isvit_det.runtime.build import NoLibrary
from isvit_det.runtime.engine import (VARIABLE, attach_runtime_,
                                      describe_engine, engine_line)
from tests.runtime.calibrated import draw_conv, draw_linear


class Net(nn.Module):
    """A convolution and a linear layer, calibrated."""

    def __init__(self):
        super().__init__()
        self.conv, self.x = draw_conv(8, 8, 3, padding=1)
        self.fc, _ = draw_linear(8)

    def forward(self, x):
        return self.fc(self.conv(x).amax((2, 3)))


@pytest.fixture
def net(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    made = Net().eval()
    attach_runtime_(made, 'native')
    return made


@pytest.fixture
def calls(monkeypatch):
    """Names of the native layers that ran."""
    ran = []
    for kind in (engine.NativeConv, engine.NativeLinear):

        def run(self, x, kind=kind, call=kind.__call__):
            ran.append(kind.__name__)
            return call(self, x)

        monkeypatch.setattr(kind, '__call__', run)
    return ran


def predict(net, x=None):
    with torch.no_grad():
        return net(net.x if x is None else x)


def test_layers_run_natively_and_agree(net, calls):
    found = predict(net)
    assert calls == ['NativeConv', 'NativeLinear']
    with simulation(net):
        expected = predict(net)
    assert len(calls) == 2
    assert (found - expected).abs().max() < 1e-5
    predict(net)
    assert len(calls) == 4


def test_simulation_gives_back_on_error(net, calls):
    with pytest.raises(RuntimeError), simulation(net):
        raise RuntimeError
    predict(net)
    assert len(calls) == 2


def use(what, do):
    return pytest.param(do, id=what)


def observe(net):
    net.fc.input_quantizer.observer = net.fc.input_quantizer.new_observer()
    net.conv.input_quantizer.observer = net.conv.input_quantizer.new_observer()


def hook_all(net):
    for quantizer in quantizers(net).values():
        quantizer.register_forward_hook(lambda *args: None)


def hook_before_all(net):
    for quantizer in quantizers(net).values():
        quantizer.register_forward_pre_hook(lambda *args: None)


@pytest.mark.parametrize('change', [
    use('training', lambda net: net.train()),
    use('observers', observe),
    use('hooks', hook_all),
    use('pre_hooks', hook_before_all),
    use('float64', lambda net: net.double()),
    use('simulation',
        lambda net: setattr(net.runtime, 'engine', 'simulation')),
])
def test_what_is_simulated(net, calls, change):
    change(net)
    predict(net, net.x.to(net.fc.weight.dtype))
    assert calls == []


def test_with_gradients_layers_are_simulated(net, calls):
    out = net(net.x)
    assert calls == [] and out.requires_grad
    with torch.inference_mode():
        net(net.x)
    assert len(calls) == 2


def test_under_autocast_layers_are_simulated(net, calls):
    with torch.autocast('cpu', torch.bfloat16):
        predict(net)
        assert describe_engine(net)['reason'] == 'autocast is on'
    assert calls == []


def test_hooks_of_all_modules_are_simulated(net, calls):
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        predict(net)
    finally:
        handle.remove()
    assert calls == []


def test_hooks_of_a_layer_itself_see_native_outputs(net, calls):
    seen = []
    net.fc.register_forward_hook(lambda module, args, out: seen.append(out))
    found = predict(net)
    assert len(calls) == 2 and torch.equal(seen[0], found)


def test_a_layer_that_is_off_is_float(net, calls):
    net.fc.input_quantizer.enabled = net.fc.weight_quantizer.enabled = False
    predict(net)
    assert calls == ['NativeConv']


def test_the_environment_stands_above_the_model(net, calls, monkeypatch):
    monkeypatch.setenv(VARIABLE, 'simulation')
    predict(net)
    assert calls == []
    net.runtime.engine = 'simulation'
    monkeypatch.setenv(VARIABLE, 'native')
    predict(net)
    assert len(calls) == 2
    monkeypatch.setenv(VARIABLE, 'fast')
    with pytest.raises(QuantError, match=f"{VARIABLE}: 'fast'"):
        predict(net)


def test_sites_that_run_natively_are_counted(net):
    predict(net)
    assert {q.num_calls for q in quantizers(net).values()} == {1}
    predict(net, net.x[:0])
    assert {q.num_calls for q in quantizers(net.conv).values()} == {1}


@pytest.mark.parametrize('change', [
    use('weight', lambda fc: fc.weight.neg_()),
    use('bias', lambda fc: fc.bias.add_(1)),
    use('scale', lambda fc: fc.input_quantizer.scale.mul_(2)),
    use('zero_point', lambda fc: fc.input_quantizer.zero_point.add_(14)),
    use('weight_scale', lambda fc: fc.weight_quantizer.scale.mul_(2)),
    use('other_weight',
        lambda fc: setattr(fc, 'weight', nn.Parameter(-fc.weight))),
    use('other_data', lambda fc: setattr(fc.weight, 'data', -fc.weight.data)),
])
def test_what_changes_a_layer_is_seen(net, change):
    before = predict(net)
    with torch.no_grad():
        change(net.fc)
    after = predict(net)
    assert not torch.allclose(before, after, atol=1e-3)
    with simulation(net):
        assert (predict(net) - after).abs().max() < 1e-5


@pytest.mark.parametrize(
    'remake', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=['copy', 'pickle'])
def test_copies_run_natively_on_their_own(net, calls, remake):
    expected = predict(net)
    other = remake(net)
    assert other.fc.native._kept._made is None
    with torch.no_grad():
        net.fc.weight.zero_()
    assert torch.equal(predict(other), expected)
    assert len(calls) == 4
    other.runtime.engine = 'simulation'
    predict(other)
    assert len(calls) == 4
    predict(net)
    assert len(calls) == 6


def test_layers_that_cannot_run_are_named(net):
    net.conv.padding_mode = 'reflect'
    net.conv.native._key = None
    found = describe_engine(net)
    assert found['engine'] == 'native' and found['native_layers'] == 1
    assert list(found['simulated']) == ['conv']
    assert "conv (its padding mode is 'reflect'" in engine_line(found)
    assert '1 of 2 quantized layers run in integers' in engine_line(found)


def test_a_model_on_another_device_is_said_to_be_simulated(net):
    found = describe_engine(net.to('meta'))
    assert found['engine'] == 'simulation' and found['native_layers'] == 0
    assert "on a device of type 'meta'" in engine_line(found)


def test_without_a_library_all_is_simulated(net, calls, monkeypatch):

    def fail():
        raise NoLibrary('c++ failed: out of luck')

    monkeypatch.setattr(engine, 'supported_isas', fail)
    predict(net)
    assert calls == []
    found = describe_engine(net)
    assert found['engine'] == 'simulation' and found['kernels'] is None
    assert engine_line(found).endswith(
        'since there is no native library: c++ failed: out of luck')


def test_auto_leaves_portable_kernels_alone(net, monkeypatch):
    monkeypatch.setattr(engine, 'supported_isas',
                        lambda: [engine.Isa.PORTABLE])
    assert net.runtime.choose().isa is engine.Isa.PORTABLE
    net.runtime.engine = 'auto'
    assert net.runtime.choose().isa is None


def test_one_line_is_logged_and_another_when_the_engine_changes(
        net, monkeypatch):
    lines = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', lines.append)
    predict(net)
    predict(net)
    assert len(lines) == 1 and 'run in integers' in lines[0]
    monkeypatch.setenv(VARIABLE, 'simulation')
    predict(net)
    predict(net)
    assert len(lines) == 2 and 'are simulated' in lines[1]


def test_a_model_that_is_not_calibrated_says_nothing(net, monkeypatch):
    lines = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', lines.append)
    net.fc.input_quantizer.enabled = False
    predict(net)
    assert lines == []


def test_there_are_three_engines():
    with pytest.raises(QuantError, match="model.engine: 'gpu'"):
        attach_runtime_(Net(), 'gpu')
