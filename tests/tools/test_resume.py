"""A run that is killed anywhere ends, started again, with the same codes."""
import json
import os
import signal

import pytest
import torch

from isvit_det.commands.quantize_det import main
from isvit_det.engine import calibrate, run
from tests.engine.tiny import FLOAT_DEIT, make_tiny, same_file_state
from tests.marks import slow
from tests.processes import in_process


class Killed(BaseException):
    """Stands in for the signal where the moment can be patched in."""


def command(tiny, work_dir):
    return [
        tiny.config, tiny.checkpoint, '--scope', 'detector', '--iters', '4',
        '--calib-images', '3', '--work-dir',
        str(work_dir)
    ]


@pytest.fixture(scope='module')
def undisturbed(tiny, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('undisturbed')
    assert main(command(tiny, work_dir)) == 0
    return work_dir


def run_until(stage, unit, argv):
    """Run, and be killed at the second step of a stage of a unit."""
    show = calibrate.CalibrationProgress.__call__

    def watch(self, event):
        show(self, event)
        reached = (event.stage, event.index) == (stage, unit)
        if reached and event.step >= min(2, event.num_steps):
            os.kill(os.getpid(), signal.SIGKILL)

    calibrate.CalibrationProgress.__call__ = watch
    return main(argv)


def kill_in_stage(argv, stage, unit=3):
    # Ends with the same codes in the same number of threads only.
    threads = torch.get_num_threads()
    status, printed = in_process(run_until, stage, unit, argv, threads=threads)
    assert status == -signal.SIGKILL, printed


def kill_before(argv, module, function):

    def die(*args, **kwargs):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, die)
        with pytest.raises(Killed):
            main(argv)


def report(work_dir):
    return json.loads((work_dir / 'result.json').read_text())


def check_end(argv, work_dir, undisturbed, num_finished):
    """The same command ends as if nothing had been, and repeats nothing."""
    assert not (work_dir / 'result.json').exists()
    before = json.loads((work_dir / 'float_metrics.json').read_text())
    assert main(argv) == 0
    assert same_file_state(work_dir / 'packed.pth', undisturbed / 'packed.pth')
    found, expected = report(work_dir), report(undisturbed)
    assert [unit['resumed'] for unit in found['units']
            ] == [i < num_finished for i in range(len(expected['units']))]
    assert found['float'] == before['found']
    for name in ('float', 'quantized'):
        assert found[name]['metrics'] == expected[name]['metrics']
    assert found['backbone_error'] == expected['backbone_error']


@pytest.mark.parametrize('stage', [slow(1), slow(2), 3])
def test_a_run_killed_in_a_stage_ends_with_the_same_codes(
        tiny, undisturbed, tmp_path, stage):
    argv = command(tiny, tmp_path)
    kill_in_stage(argv, stage)
    assert not (tmp_path / 'packed.pth').exists()
    check_end(argv, tmp_path, undisturbed, 3)


@pytest.mark.slow
def test_a_deit_killed_in_a_global_block_ends_with_the_same_codes(tmp_path):
    tiny = make_tiny(tmp_path / 'tiny', float_config=FLOAT_DEIT)
    assert main(command(tiny, tmp_path / 'undisturbed')) == 0
    argv = command(tiny, tmp_path / 'killed')
    kill_in_stage(argv, 3, unit=2)
    check_end(argv, tmp_path / 'killed', tmp_path / 'undisturbed', 2)


def test_a_run_killed_before_the_heads_resumes(tiny, undisturbed, tmp_path):
    argv = command(tiny, tmp_path)
    kill_before(argv, calibrate, 'calibrate_heads_')
    assert not (tmp_path / 'packed.pth').exists()
    check_end(argv, tmp_path, undisturbed, 8)


@pytest.mark.slow
def test_the_packed_file_is_there_before_the_evaluation(
        tiny, undisturbed, tmp_path):
    argv = command(tiny, tmp_path)
    kill_before(argv, run, 'count_calls')
    assert same_file_state(tmp_path / 'packed.pth', undisturbed / 'packed.pth')
    check_end(argv, tmp_path, undisturbed, 8)


@pytest.mark.slow
def test_another_command_does_not_take_the_state_over(tiny, undisturbed,
                                                      tmp_path):
    kill_before(command(tiny, tmp_path), calibrate, 'calibrate_heads_')
    other = command(tiny, tmp_path) + ['--bits', 'w3a3']
    assert main(other) == 0
    assert not any(unit['resumed'] for unit in report(tmp_path)['units'])
    logs = sorted(tmp_path.glob('*/*.log'))
    assert any('starting anew' in log.read_text() for log in logs)


@pytest.mark.slow
def test_images_of_another_size_do_not_take_the_state_over(
        tiny, undisturbed, tmp_path):
    argv = command(tiny, tmp_path)
    kill_before(argv, calibrate, 'calibrate_heads_')
    other = tiny.variant(
        tmp_path.with_suffix('.py'),
        lambda cfg: cfg.test_dataloader.dataset.pipeline[1].update(
            scale=(80, 64)))
    assert main([other, *argv[1:]]) == 0
    assert not any(unit['resumed'] for unit in report(tmp_path)['units'])


@pytest.mark.slow
def test_the_same_weights_in_another_file_take_the_state_over(
        tiny, undisturbed, tmp_path):
    argv = command(tiny, tmp_path)
    kill_before(argv, calibrate, 'calibrate_heads_')
    content = torch.load(tiny.checkpoint, weights_only=True)
    other = tmp_path / 'renamed.pth'
    torch.save(dict(content, epoch=12), other)
    assert main([argv[0], str(other), *argv[2:]]) == 0
    assert all(unit['resumed'] for unit in report(tmp_path)['units'])
    assert same_file_state(tmp_path / 'packed.pth', undisturbed / 'packed.pth')
    origin = torch.load(tmp_path / 'packed.pth')['provenance']
    assert origin['float_checkpoint'] == 'renamed.pth'


def logged(work_dir, words):
    logs = [path.read_text() for path in work_dir.glob('*/*.log')]
    return any(words in log for log in logs)


def test_a_damaged_file_of_a_unit_is_made_again(tiny, undisturbed, tmp_path):
    argv = command(tiny, tmp_path)
    kill_before(argv, calibrate, 'calibrate_heads_')
    path, = tmp_path.glob('calibration/units/0007.pth')
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    check_end(argv, tmp_path, undisturbed, 7)
    assert logged(tmp_path, 'state saved of unit stages.3.blocks.0 is damaged')


@pytest.mark.slow
def test_a_state_of_another_unit_is_not_taken(tiny, undisturbed, tmp_path):
    argv = command(tiny, tmp_path)
    kill_before(argv, calibrate, 'calibrate_heads_')
    one, two = (tmp_path / f'calibration/units/000{i}.pth' for i in (6, 7))
    two.write_bytes(one.read_bytes())
    check_end(argv, tmp_path, undisturbed, 7)


@pytest.mark.slow
def test_other_float_weights_are_evaluated_anew(tiny, tmp_path):
    argv = command(tiny, tmp_path) + ['--method', 'minmax']
    assert main(argv) == 0
    content = torch.load(tiny.checkpoint, weights_only=True)
    for value in content['state_dict'].values():
        if value.is_floating_point():
            value += .1 * torch.rand_like(value)
    changed = tmp_path / 'changed.pth'
    torch.save(content, changed)
    first = report(tmp_path)
    assert main([argv[0], str(changed), *argv[2:]]) == 0
    assert first['float']['metrics'] != report(tmp_path)['float']['metrics']
