"""Hooks that exchange weights: what is meant is what MMDetection tests."""
import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from isvit_det.engine.command import main
from tests.engine.tiny import make_tiny, same_file_state

SHORT = ['--method', 'minmax', '--calib-images', '2']
AVERAGES = {
    'parameters': dict(momentum=.3),
    # As MMDetection's RTMDet.
    'buffers':
    dict(ema_type='ExpMomentumEMA', momentum=.2, update_buffers=True),
}


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp('tiny'))


def with_hooks(tiny, path, *hooks):
    """The float config with hooks of the user; its path."""
    return tiny.variant(path, lambda cfg: cfg.update(custom_hooks=list(hooks)))


def quantize(config, checkpoint, work_dir, *argv):
    """The report of a run."""
    words = [config, checkpoint, '--work-dir', work_dir, *SHORT, *argv]
    assert main([str(word) for word in words]) == 0
    return json.loads((work_dir / 'result.json').read_text())


def test_by_mmdetection(config, checkpoint, work_dir):
    """Metrics of MMDetection's own test."""
    cfg = Config.fromfile(str(config))
    cfg.merge_from_dict(
        dict(load_from=str(checkpoint), work_dir=str(work_dir)))
    return Runner.from_cfg(cfg).test()


# Not a test of pytest's.
test_by_mmdetection.__test__ = False  # type: ignore


@pytest.fixture(scope='module', params=AVERAGES)
def trained(request, tiny, tmp_path_factory):
    """A config with an average, and a checkpoint trained with it."""
    folder = tmp_path_factory.mktemp(request.param)
    hook = dict(type='EMAHook', **AVERAGES[request.param])
    config = with_hooks(tiny, folder / 'tiny.py', hook)
    cfg = Config.fromfile(config)
    cfg.load_from, cfg.work_dir = tiny.checkpoint, str(folder / 'train')
    cfg.train_cfg = dict(
        type='EpochBasedTrainLoop', max_epochs=1, val_interval=9)
    cfg.param_scheduler = []
    cfg.optim_wrapper.optimizer.lr = 1e-4
    cfg.train_dataloader.batch_size = 1
    Runner.from_cfg(cfg).train()
    return config, folder / 'train/epoch_1.pth'


def test_an_average_is_evaluated_calibrated_and_kept(trained, tiny, tmp_path):
    config, checkpoint = trained
    content = torch.load(checkpoint, weights_only=False)
    averaged, raw = content['state_dict'], content['ema_state_dict']
    assert any(not torch.equal(value, raw[f'module.{key}'])
               for key, value in averaged.items())
    result = quantize(config, checkpoint, tmp_path / 'run')
    wanted = test_by_mmdetection(config, checkpoint, tmp_path / 'float')
    assert result['float']['metrics'] == wanted
    assert result['quantized']['metrics'] != wanted
    assert result['hooks_left_out'] == ['EMAHook']

    # The same without any hook, from the averaged weights alone.
    plain = tmp_path / 'averaged.pth'
    torch.save(dict(state_dict=averaged, meta=content['meta']), plain)
    alone = quantize(tiny.config, plain, tmp_path / 'alone')
    assert alone['hooks_left_out'] == []
    assert alone['float']['metrics'] == wanted
    assert alone['quantized'] == result['quantized']
    packed = tmp_path / 'run/packed.pth'
    assert same_file_state(packed, tmp_path / 'alone/packed.pth')

    # MMDetection's test of the packed file, whose config has the hook.
    kept = tmp_path / 'run/tiny.py'
    again = test_by_mmdetection(kept, packed, tmp_path / 'packed')
    assert again == result['quantized']['metrics']

    # MMDetection's test of the training checkpoint calibrates in it.
    again = test_by_mmdetection(kept, checkpoint, tmp_path / 'hook')
    assert again == result['quantized']['metrics']
    assert same_file_state(packed, tmp_path / 'hook/packed.pth')


@HOOKS.register_module()
class PruningHook(Hook):
    """In place, before each test, with what it had before a training."""

    def before_run(self, runner):
        self.parameters = list(runner.model.backbone.parameters())

    def before_test_epoch(self, runner):
        for value in self.parameters:
            value.data[value.abs() < .01] = 0


@HOOKS.register_module()
class ReplacingHook(Hook):
    """Other tensors, last of all hooks, and the former ones afterwards."""
    priority = 'LOWEST'

    def before_test(self, runner):
        self.former = {}
        for name, value in runner.model.named_parameters():
            self.former[name] = value.data
            value.data = value.data * .9

    def after_test(self, runner):
        for name, value in runner.model.named_parameters():
            value.data = self.former[name]


@HOOKS.register_module()
class LoadingHook(Hook):
    """A whole state, kept from before the run."""

    def after_load_checkpoint(self, runner, checkpoint):
        self.state = {
            key: value * 1.1 if value.is_floating_point() else value
            for key, value in checkpoint['state_dict'].items()
        }

    def before_test_epoch(self, runner):
        runner.model.load_state_dict(self.state)


@HOOKS.register_module()
class SwappingModelHook(Hook):
    """Another model in the runner, as a whole."""

    def before_test_epoch(self, runner):
        model = copy.deepcopy(runner.model)
        for value in model.backbone.parameters():
            value.data *= .9
        runner.model = model


@pytest.fixture(scope='module')
def plain(tiny, tmp_path_factory):
    return test_by_mmdetection(tiny.config, tiny.checkpoint,
                               tmp_path_factory.mktemp('plain'))


@pytest.mark.parametrize('kind', [
    'PruningHook', 'ReplacingHook', 'LoadingHook', 'SwappingModelHook', 'both'
])
def test_a_hook_of_the_users_is_left_out_once_it_has_run(
        kind, tiny, plain, tmp_path):
    kinds = ['PruningHook', 'ReplacingHook'] if kind == 'both' else [kind]
    config = with_hooks(tiny, tmp_path / 'tiny.py',
                        *(dict(type=name) for name in kinds))
    result = quantize(config, tiny.checkpoint, tmp_path / 'run')
    assert result['hooks_left_out'] == kinds
    wanted = test_by_mmdetection(config, tiny.checkpoint, tmp_path / 'float')
    assert result['float']['metrics'] == wanted != plain
    # What was calibrated is what was evaluated, by either way to the hook.
    again = test_by_mmdetection(tmp_path / 'run/tiny.py', tiny.checkpoint,
                                tmp_path / 'hook')
    assert again == result['quantized']['metrics']
    assert same_file_state(tmp_path / 'run/packed.pth',
                           tmp_path / 'hook/packed.pth')


@HOOKS.register_module()
class CountingHook(Hook):
    """Changes nothing and stays in the run."""
    images = 0

    def after_test_iter(self, runner, batch_idx, data_batch, outputs):
        CountingHook.images += len(outputs)


def test_a_hook_that_changes_nothing_stays(tiny, tmp_path):
    config = with_hooks(tiny, tmp_path / 'tiny.py', dict(type='CountingHook'))
    CountingHook.images = 0
    result = quantize(config, tiny.checkpoint, tmp_path / 'run')
    assert result['hooks_left_out'] == []
    assert CountingHook.images == 2 * 4


@HOOKS.register_module()
class DuringTestHook(Hook):
    """Exchanges weights for the time of each image, where nobody looks."""

    def before_test_iter(self, runner, batch_idx, data_batch=None):
        self.scale(runner, .5)

    def after_test_iter(self, runner, batch_idx, data_batch, outputs):
        self.scale(runner, 2.)

    def scale(self, runner, factor):
        for value in runner.model.backbone.parameters():
            value.data.mul_(factor)


@HOOKS.register_module()
class LateDuringTestHook(DuringTestHook):
    priority = 'LOWEST'


@pytest.mark.parametrize('kind', ['DuringTestHook', 'LateDuringTestHook'])
@pytest.mark.parametrize('argv', [[], ['--no-float-eval']])
def test_weights_that_change_during_a_test_are_refused(kind, argv, tiny,
                                                       tmp_path, capsys):
    config = with_hooks(tiny, tmp_path / 'tiny.py', dict(type=kind))
    words = [config, tiny.checkpoint, *SHORT, *argv]
    words += ['--work-dir', str(tmp_path / 'run')]
    assert main(words) == 2
    error, = (
        line for line in capsys.readouterr().err.splitlines()
        if line.startswith('error: '))
    assert kind in error and 'take it out' in error
    # Before the calibration where the float model is evaluated.
    assert (tmp_path / 'run/packed.pth').exists() == bool(argv)
