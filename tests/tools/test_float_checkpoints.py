"""Which weights of a float checkpoint quantize_det and the tools take."""
import argparse
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from isvit_det.checkpoint import read_checkpoint
from isvit_det.commands.quantize_det import configure, main, parse_args
from isvit_det.engine.run import QuantizationRun
from isvit_det.report.tables import weight_bytes
from tests.engine.tiny import REPO

LOADED = []


@HOOKS.register_module()
class NoteLoadedHook(Hook):
    """Notes what it is told of a checkpoint."""

    def after_load_checkpoint(self, runner, checkpoint):
        LOADED.append(dict(checkpoint))


@pytest.fixture(scope='module')
def state(tiny):
    return torch.load(tiny.checkpoint, weights_only=True)['state_dict']


def other(state):
    return {
        key: value + 1 if value.is_floating_point() else value
        for key, value in state.items()
    }


def forms(state):
    """Files with the same weights, as trainings leave them."""
    raw = {f'module.{key}': value for key, value in other(state).items()}
    history = HistoryBuffer()
    history.update(np.float64(1.))
    copies = {f'ema_{k.replace(".", "_")}': v for k, v in other(state).items()}
    return {
        'weights alone': state,
        'MMEngine, averaged': dict(
            state_dict=state, ema_state_dict=dict(raw, steps=torch.tensor(1)),
            message_hub=dict(log_scalars={'loss': history}),
            meta=dict(epoch=1, seed=np.int64(3))),
        'MMDetection 2, averaged': dict(
            state_dict={**state, **copies}, meta=dict(CLASSES=('a', ))),
        'several processes': dict(state_dict={
            f'module.{key}': value for key, value in state.items()}),
        'compiled': dict(state_dict={
            f'module._orig_mod.{key}': value for key, value in state.items()}),
        'arguments': dict(model=state, args=argparse.Namespace(lr=.1)),
    }  # yapf: disable


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(forms({})))
def test_the_weights_are_those_of_the_plain_file(name, tiny, state, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(forms(state)[name], path)
    config = tiny.variant(
        tmp_path / 'noted.py',
        lambda cfg: cfg.update(custom_hooks=[dict(type='NoteLoadedHook')]))
    args = parse_args([
        config,
        str(path), '--method', 'minmax', '--work-dir',
        str(tmp_path / 'work')
    ])
    LOADED.clear()
    run = QuantizationRun(configure(args), 'cpu')
    found = run.model.state_dict()
    for key, value in state.items():
        assert torch.equal(found[key], value), key
    # Hooks are told of them, as by MMEngine.
    told, = LOADED
    assert told['state_dict'].keys() == state.keys()
    assert run.given_bytes == weight_bytes(state)


def test_the_weights_of_an_averaged_training_are_those_that_mmengine_tests(
        tiny, tmp_path):
    """A checkpoint that MMEngine writes and reads with its own hook."""
    cfg = Config.fromfile(tiny.config)
    cfg.work_dir = str(tmp_path)
    cfg.custom_hooks = [dict(type='EMAHook')]
    runner = Runner.from_cfg(cfg)
    runner.call_hook('before_run')
    hook, = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    for value in hook.ema_model.module.parameters():
        value.data += .5
    runner.save_checkpoint(
        str(tmp_path),
        'epoch_1.pth',
        save_optimizer=False,
        save_param_scheduler=False)
    runner.load_checkpoint(str(tmp_path / 'epoch_1.pth'))
    expected = runner.model.state_dict()
    content = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert "entry 'state_dict', not 'ema_state_dict'" in content['taken']
    name = 'neck.lateral_convs.0.conv.weight'
    raw = content['ema_state_dict'][f'module.{name}']
    assert torch.allclose(expected[name], raw + .5)
    for key, value in content['state_dict'].items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize('key, words', [
    ('backbone.layers.0.blocks.0.attn.qkv.weight', 'tools/convert_swin_od.py'),
    ('backbone.net.blocks.0.attn.qkv.weight', 'tools/convert_vitdet.py'),
    ('backbone.simfp_2.0.weight', 'tools/convert_vitdet.py'),
    ('blocks.0.attn.qkv.weight', 'tools/quantize_cls.py'),
    ('layers.0.blocks.1.attn.qkv.weight', 'model.backbone.init_cfg'),
])
@pytest.mark.parametrize('entry', ['state_dict', 'model', None])
def test_what_to_run_is_named_for_known_layouts(key, words, entry, tiny,
                                                tmp_path, capsys):
    weights = {key: torch.ones(1)}
    path = tmp_path / 'x.pth'
    torch.save({entry: weights} if entry else weights, path)
    assert main([tiny.config, str(path), '--work-dir', str(tmp_path / 'w')
                 ]) == 2  # yapf: disable
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith('error: checkpoint: ') and words in line
    assert 'x.pth' in line and not (tmp_path / 'w').exists()


@pytest.mark.parametrize('name', sorted(forms({})))
def test_what_is_published_is_the_plain_file(name, state, tmp_path,
                                             monkeypatch, capsys):
    torch.save(forms(state)[name], tmp_path / 'x.pth')
    tool = Path(REPO / 'tools/publish_float.py')
    monkeypatch.setattr(
        sys, 'argv',
        [str(tool),
         str(tmp_path / 'x.pth'),
         str(tmp_path / 'out.pth')])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(tool), run_name='__main__')
    assert not done.value.code
    found = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert 'weights of x.pth: ' in capsys.readouterr().out
