"""Processes of one run share the images, and end as a single one does."""
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from isvit_det.commands.launch import joined
from isvit_det.commands.quantize_det import main
from isvit_det.core.bit_packing import unpack
from isvit_det.core.errors import QuantError
from tests.engine.tiny import NUM_PICTURES, REPO, make_tiny, same_file_state
from tests.processes import in_process

TOOL = str(REPO / 'tools/quantize_det.py')


def free_port():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return str(free.getsockname()[1])


def start(command, **environment):
    return subprocess.Popen([sys.executable, *command],
                            cwd=REPO,
                            env={
                                **os.environ, 'OMP_NUM_THREADS': '1',
                                **environment
                            },
                            stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            text=True)


def ended(process):
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def report(folder):
    return json.loads((folder / 'result.json').read_text())


def packed_state(folder):
    return torch.load(folder / 'packed.pth', weights_only=True)['state_dict']


def run_as(rank, port, argv):
    """The run of one of two processes, as a launcher starts it."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        MASTER_ADDR='localhost',
        MASTER_PORT=port)
    return main([*argv, '--launcher', 'pytorch'])


def by_forks(argv):
    """Run in two processes, which have imported all; what they print."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        ends = list(
            pool.map(lambda rank: in_process(run_as, rank, port, argv),
                     (0, 1)))
    assert [status for status, _ in ends] == [0, 0], ends
    return ends[0][1] + ends[1][1]


def by_torchrun(argv):
    """The same as a user starts it."""
    torchrun = [
        '-m', 'torch.distributed.run', '--nproc_per_node', '2',
        '--master_port',
        free_port()
    ]
    return ended(start([*torchrun, TOOL, *argv, '--launcher', 'pytorch']))


def run_both(folder, iters, *options, start_two=by_torchrun):
    """Folder of a run of one process, and of one of two."""
    tiny = make_tiny(folder)
    folders = [folder / 'one', folder / 'two']
    alone, together = ([
        tiny.config, tiny.checkpoint, '--calib-images', '5', '--iters', iters,
        '--work-dir',
        str(work_dir), *options
    ] for work_dir in folders)
    status, printed = in_process(main, alone)
    assert status == 0, printed
    # One process shows what is done, and the table.
    printed = start_two(together)
    for words in ('log: ', 'evaluating the quantized model on 4', 'unit 1/8',
                  '| quantized'):
        assert printed.count(words) == 1, printed
    return folders


@pytest.mark.slow
def test_without_iterations_the_files_are_equal(tmp_path):
    """Ranges, and the correction of neck and heads."""
    folders = run_both(
        tmp_path, '0', '--scope', 'detector', start_two=by_forks)
    assert same_file_state(*(folder / 'packed.pth' for folder in folders))
    alone, together = map(report, folders)
    for name in ('float', 'quantized'):
        assert alone[name]['metrics'] == together[name]['metrics']
    assert together['backbone_error'] == pytest.approx(alone['backbone_error'])
    # Each process counts its own, and one that counts none is an error.
    calls = {
        site['name']: site['num_calls']
        for site in together['sites'] if site['name'].startswith('backbone.')
    }
    assert set(calls.values()) == {NUM_PICTURES['val']}
    for folder in folders:
        assert not (folder / 'calibration').exists()


@pytest.mark.slow
def test_with_iterations_few_codes_move_by_one_step(tmp_path):
    """Adam's first steps follow the sign of a gradient, however small."""
    folders = run_both(tmp_path, '3', '--no-float-eval', '--method',
                       'isvit_paper')
    one, two = map(packed_state, folders)
    assert one.keys() == two.keys()
    moved = total = 0
    for key in one:
        if key.endswith('.weight_codes'):
            codes, others = (
                unpack(state[key], 4, (2 * len(state[key]), )).int()
                for state in (one, two))
            distance = (codes - others).abs()
            assert distance.max() <= 1
            moved += (distance > 0).sum().item()
            total += codes.numel()
        elif one[key].is_floating_point():
            assert torch.allclose(one[key], two[key], rtol=1e-2, atol=1e-2)
    print(f'{moved} of {total} codes differ')
    assert moved <= 1e-3 * total


@pytest.mark.slow
def test_a_rounding_in_closed_form_parts_but_is_as_good(tmp_path):
    """A code that moves changes all columns and units after it."""
    one, two = map(report, run_both(tmp_path, '3', '--no-float-eval'))
    assert [unit['name'] for unit in one['units']
            ] == [unit['name'] for unit in two['units']]
    for unit, other in zip(one['units'], two['units']):
        assert unit['errors'] == pytest.approx(other['errors'], rel=.05)
    assert two['backbone_error'] == pytest.approx(
        one['backbone_error'], rel=.05)


@pytest.fixture
def environment(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR',
                 'MASTER_PORT', 'LOCAL_WORLD_SIZE'):
        # Restored afterwards even if it was not there.
        monkeypatch.setenv(name, 'x')
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize('launcher, variables', [
    ('slurm', dict(SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_LOCALID='0')),
    ('mpi',
     dict(
         OMPI_COMM_WORLD_RANK='0',
         OMPI_COMM_WORLD_SIZE='1',
         OMPI_COMM_WORLD_LOCAL_RANK='0')),
])
def test_other_launchers_are_understood(environment, launcher, variables,
                                        tmp_path):
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setenv('MASTER_PORT', free_port())
    if launcher == 'slurm':
        scontrol = tmp_path / 'scontrol'
        scontrol.write_text('#!/bin/sh\necho localhost\necho elsewhere\n')
        scontrol.chmod(0o755)
        environment.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
        environment.setenv('SLURM_NODELIST', 'x[1-2]')
    else:
        environment.setenv('MASTER_ADDR', 'localhost')
    with joined(launcher):
        assert torch.distributed.get_world_size() == 1
        assert os.environ['MASTER_ADDR'] == 'localhost'
    assert not torch.distributed.is_initialized()


ONE_PROCESS = dict(
    RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='localhost')


@pytest.mark.parametrize('variables, words', [
    (dict(RANK='a'), "RANK='a' .*between 0 and 0"),
    (dict(RANK='3'), "RANK='3' .*between 0 and 0"),
    (dict(RANK='-1'), "RANK='-1'"),
    (dict(RANK='3', WORLD_SIZE='0'), "WORLD_SIZE='0'"),
    (dict(WORLD_SIZE='9' * 30), "WORLD_SIZE='999"),
    (dict(LOCAL_RANK='x'), "LOCAL_RANK='x'"),
    (dict(LOCAL_WORLD_SIZE='0'), "LOCAL_WORLD_SIZE='0' .*between 1 and"),
    (dict(MASTER_PORT='x'), "MASTER_PORT='x'"),
    (dict(MASTER_PORT='70000'), "MASTER_PORT='70000'"),
    (dict(MASTER_ADDR='no.such.host.invalid'), 'no machine that is known'),
    (dict(MASTER_ADDR='.' * 80), 'no machine that is known'),
])
def test_what_a_launcher_cannot_mean_is_one_line(environment, variables,
                                                 words):
    for name, value in {**ONE_PROCESS, **variables}.items():
        environment.setenv(name, value)
    with pytest.raises(QuantError, match=f'--launcher: .*{words}') as error:
        with joined('pytorch'):
            pass
    assert len(str(error.value).splitlines()) == 1
    assert not torch.distributed.is_initialized()


def test_a_port_that_is_taken_is_one_line(environment):
    with socket.socket() as taken:
        taken.bind(('localhost', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in dict(ONE_PROCESS, MASTER_PORT=port).items():
            environment.setenv(name, value)
        with pytest.raises(QuantError, match='did not find each other'):
            with joined('pytorch'):
                pass
