"""Joining the processes of a run, with or without GPUs."""
import contextlib
import os
import socket
import subprocess
from typing import Iterator

import torch
from mmengine.device import get_device
from mmengine.dist import is_distributed, is_main_process
from torch import distributed as dist

from isvit_det.core.errors import QuantError, describe_error

# Where launchers put a process's number, how many there are, its number on
# its machine, and how many are there.
VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'),
    'slurm':
    ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NTASKS_PER_NODE'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE',
            'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_LOCAL_SIZE')
}
COMMANDS = dict(pytorch='torchrun', slurm='srun', mpi='mpirun')
MAX_PORT = 2**16 - 1
# More than any machine or network has.
MAX_PROCESSES = 2**20


@contextlib.contextmanager
def joined(launcher: str) -> Iterator[bool]:
    """Be one of a run's processes.

    On GPUs MMEngine joins them, by nccl; on CPUs this does, by gloo.

    Args:
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Raises:
        QuantError: if the command was not started by that launcher, what the
            launcher says cannot be, the processes do not find each other, or
            there are fewer GPUs than processes.

    Yields:
        whether this process is the main one, which MMEngine itself knows
        later only.
    """
    if launcher != 'none' and not is_distributed():
        _translate(launcher)
        if get_device() == 'cpu':
            _join_on_cpus()
        elif int(os.environ['LOCAL_RANK']) >= torch.cuda.device_count():
            raise QuantError(
                f'--launcher: {torch.cuda.device_count()} GPUs are too few '
                'for the processes started here; start one for each, or set '
                'CUDA_VISIBLE_DEVICES= to use CPUs.')
    try:
        is_first = launcher == 'none' or os.environ.get('RANK', '0') == '0'
        yield is_first and is_main_process()
    finally:
        if launcher != 'none' and is_distributed():
            dist.destroy_process_group()


def _translate(launcher: str) -> None:
    """Set the variables that torch reads from those of a launcher."""
    missing = [
        name for name in VARIABLES[launcher][:3] if name not in os.environ
    ]
    if missing:
        raise QuantError(f'--launcher: {launcher!r} needs {missing[0]} in the '
                         'environment; start the command by '
                         f'{COMMANDS[launcher]}, or leave --launcher out.')
    for name, source in zip(VARIABLES['pytorch'], VARIABLES[launcher]):
        if source in os.environ:
            os.environ[name] = os.environ[source]
    os.environ.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_machine(launcher)
    rank, size, local_rank, local_size = VARIABLES[launcher]
    processes = _number(size, 1, MAX_PROCESSES)
    _number(rank, 0, processes - 1)
    _number(local_rank, 0, processes - 1)
    if local_size in os.environ:
        # Slurm's may be of a larger job than this one.
        _number(local_size, 1, MAX_PROCESSES)
    _check_address(_number('MASTER_PORT', 1, MAX_PORT))


def _number(name: str, low: int, high: int) -> int:
    """The number that a variable of the environment holds.

    Raises:
        QuantError: if it is no integer or out of bounds.
    """
    text = os.environ[name]
    number = int(text) if text.isdecimal() else -1
    if not low <= number <= high:
        raise QuantError(f'--launcher: {name}={text!r} is not allowed; '
                         f'expected an integer between {low} and {high}, as '
                         'the launcher sets it.')
    return number


def _check_address(port: int) -> None:
    """Raise unless the name of process 0's machine is known; no wait."""
    address = os.environ['MASTER_ADDR']
    try:
        socket.getaddrinfo(address, port)
    # Of a name that is none: no letters that names have.
    except (OSError, UnicodeError) as error:
        raise QuantError(f'--launcher: MASTER_ADDR={address!r} is no machine '
                         f'that is known here ({error}); set it to the name '
                         'of the machine of process 0.') from error


def _join_on_cpus() -> None:
    try:
        dist.init_process_group('gloo')
    except RuntimeError as error:
        raise QuantError(f'--launcher: the processes did not find each other '
                         f'({describe_error(error)}); check MASTER_ADDR and '
                         'MASTER_PORT.') from error


def _first_machine(launcher: str) -> str:
    if launcher == 'slurm':
        nodes = os.environ.get('SLURM_NODELIST', '')
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            hosts = subprocess.run(['scontrol', 'show', 'hostnames', nodes],
                                   check=True,
                                   stdout=subprocess.PIPE,
                                   text=True).stdout.split()
            if hosts:
                return hosts[0]
    raise QuantError('--launcher: MASTER_ADDR is not set; set it to the name '
                     'of the machine of process 0.')
