"""Hooks that exchange weights: what is meant is what MMDetection tests."""
import copy
import json
import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from isvit_det.commands.quantize_det import main
from isvit_det.core.errors import QuantError
from isvit_det.engine.hook import SOSCalibrationHook
from tests.engine.tiny import same_file_state
from tests.marks import slow

SHORT = ['--method', 'minmax', '--calib-images', '2']
AVERAGES = {
    'parameters': dict(momentum=.3),
    # As MMDetection's RTMDet.
    'buffers':
    dict(ema_type='ExpMomentumEMA', momentum=.2, update_buffers=True),
}


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


@pytest.fixture(scope='module', params=['parameters', slow('buffers')])
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
    expected = test_by_mmdetection(config, checkpoint, tmp_path / 'float')
    assert result['float']['metrics'] == expected
    assert result['quantized']['metrics'] != expected
    assert result['hooks_left_out'] == ['EMAHook']

    # The same without any hook, from the averaged weights alone.
    plain = tmp_path / 'averaged.pth'
    torch.save(dict(state_dict=averaged, meta=content['meta']), plain)
    alone = quantize(tiny.config, plain, tmp_path / 'alone')
    assert alone['hooks_left_out'] == []
    assert alone['float']['metrics'] == expected
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
    slow('PruningHook'),
    slow('ReplacingHook'),
    slow('LoadingHook'),
    slow('SwappingModelHook'), 'both'
])
def test_a_hook_of_the_users_is_left_out_once_it_has_run(
        kind, tiny, plain, tmp_path):
    kinds = ['PruningHook', 'ReplacingHook'] if kind == 'both' else [kind]
    config = with_hooks(tiny, tmp_path / 'tiny.py',
                        *(dict(type=name) for name in kinds))
    result = quantize(config, tiny.checkpoint, tmp_path / 'run')
    assert result['hooks_left_out'] == kinds
    expected = test_by_mmdetection(config, tiny.checkpoint, tmp_path / 'float')
    assert result['float']['metrics'] == expected != plain
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


@HOOKS.register_module()
class LateWriterHook(Hook):
    """Writes once, after the first image was predicted."""
    priority = 'LOWEST'

    def after_test_iter(self, runner, batch_idx, data_batch, outputs):
        if batch_idx == 1:
            for value in runner.model.backbone.parameters():
                value.data.mul_(.9)


def refused(capsys, *words):
    """The one line with which a run ends."""
    with pytest.MonkeyPatch.context() as patch:
        # MMEngine's logger keeps the stream that pytest gave another test.
        patch.setattr(logging, 'raiseExceptions', False)
        assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert 'Traceback' not in captured.err
    error, = (
        line for line in captured.err.splitlines()
        if line.startswith('error: '))
    return error


def test_weights_that_change_after_the_first_image_are_refused(
        tiny, tmp_path, capsys):
    config = with_hooks(tiny, tmp_path / 'tiny.py',
                        dict(type='LateWriterHook'))
    error = refused(capsys, config, tiny.checkpoint, *SHORT, '--work-dir',
                    tmp_path / 'run')
    assert 'LateWriterHook' in error and 'take it out' in error
    assert not (tmp_path / 'run/packed.pth').exists()


@HOOKS.register_module()
class ChildHook(SOSCalibrationHook):
    """A calibration of one's own."""


def test_a_child_of_the_calibration_hook_is_one(tiny, tmp_path):
    config = with_hooks(tiny, tmp_path / 'tiny.py', dict(type='ChildHook'))
    result = quantize(config, tiny.checkpoint, tmp_path / 'run')
    alone = quantize(tiny.config, tiny.checkpoint, tmp_path / 'alone')
    for name in ('float', 'quantized'):
        assert result[name]['metrics'] == alone[name]['metrics']
    hooks = Config.fromfile(tmp_path / 'run/tiny.py').custom_hooks
    assert [hook['type'] for hook in hooks] == ['ChildHook']


@pytest.mark.parametrize('other',
                         ['ChildHook', 'isvit_det.SOSCalibrationHook'])
def test_only_one_hook_calibrates(other, tiny, tmp_path, capsys):
    kinds = ['isvit_det.SOSCalibrationHook', other]
    config = with_hooks(tiny, tmp_path / 'tiny.py',
                        *(dict(type=kind) for kind in kinds))
    error = refused(capsys, config, tiny.checkpoint, *SHORT, '--work-dir',
                    tmp_path / 'run')
    assert '2 hooks calibrate' in error and 'keep one' in error

    # MMDetection's own test comes to the hooks another way.
    quantize(tiny.config, tiny.checkpoint, tmp_path / 'alone')
    both = Config.fromfile(tmp_path / 'alone/tiny.py')
    both.custom_hooks = [dict(type=kind) for kind in kinds]
    both.dump(tmp_path / 'both.py')
    with pytest.raises(QuantError, match='2 hooks calibrate'):
        test_by_mmdetection(tmp_path / 'both.py', tiny.checkpoint,
                            tmp_path / 'both')


STAGES = ('before_run', slow('after_load_checkpoint'), slow('before_test'),
          'before_test_epoch', slow('before_test_iter'), 'after_test_iter',
          slow('after_test_epoch'), slow('after_test'), 'after_run')


@HOOKS.register_module()
class RaisingHook(Hook):
    """Raises in one of its methods."""

    def __init__(self, stage):
        setattr(self, stage, self.fail)

    def fail(self, *args, **kwargs):
        raise RuntimeError('a mistake\nand more')


@pytest.mark.parametrize('stage', STAGES)
def test_a_hook_that_raises_is_named(stage, tiny, tmp_path, capsys):
    config = with_hooks(tiny, tmp_path / 'tiny.py',
                        dict(type='RaisingHook', stage=stage))
    error = refused(capsys, config, tiny.checkpoint, *SHORT, '--work-dir',
                    tmp_path / 'run')
    assert 'RaisingHook.fail raised RuntimeError: a mistake (test_' in error
    # Nothing is lost to what comes last.
    assert (tmp_path / 'run/result.json').exists() == (stage == 'after_run')


def test_another_loop_is_refused(tiny, tmp_path, capsys):
    config = tiny.variant(tmp_path / 'tiny.py',
                          lambda cfg: cfg.test_cfg.update(type='ValLoop'))
    error = refused(capsys, config, tiny.checkpoint, *SHORT, '--work-dir',
                    tmp_path / 'run')
    assert 'test_cfg.type' in error and 'ValLoop' in error
