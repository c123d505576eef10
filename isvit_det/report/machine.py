"""What a measurement was taken on, and the memory that a process needed."""
import os
import platform
from pathlib import Path
from typing import Any, Dict, List

import torch

# Instructions that decide which kernels an engine has, as Linux names them.
INSTRUCTIONS = ('avx2', 'fma', 'avx_vnni', 'avx512f', 'avx512bw',
                'avx512_vnni', 'avx512_bf16', 'amx_int8', 'amx_bf16', 'asimd',
                'asimddp', 'i8mm', 'bf16')
STATUS = Path('/proc/self/status')
CPUINFO = Path('/proc/cpuinfo')


def describe_machine() -> Dict[str, Any]:
    """The CPU's name, its instructions for neural networks, and its cores."""
    facts = _cpu_facts()
    flags = set(facts.get('flags', facts.get('Features', '')).split())
    found: List[str] = [name for name in INSTRUCTIONS if name in flags]
    return dict(
        cpu=facts.get('model name', platform.machine()),
        instructions=found,
        cores=len(os.sched_getaffinity(0)),
        torch=torch.__version__)


def machine_line(machine: Dict[str, Any]) -> str:
    """What ``describe_machine`` found, as one line.

    >>> machine_line(dict(cpu='CPU', instructions=['avx2'], cores=2, torch=2))
    'CPU (avx2), 2 cores; torch 2'
    """
    instructions = ', '.join(machine['instructions']) or 'no vector ones known'
    return (f'{machine["cpu"]} ({instructions}), {machine["cores"]} cores; '
            f'torch {machine["torch"]}')


def _cpu_facts() -> Dict[str, str]:
    """Facts of the first core."""
    facts: Dict[str, str] = {}
    try:
        for line in CPUINFO.read_text().splitlines():
            key, _, value = line.partition(':')
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return facts


def peak_bytes() -> int:
    """Most memory that this program has needed so far, in bytes.

    ``getrusage`` would count what the process that started it needed before
    the program was loaded; Linux's status of the process does not.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith('VmHWM:'):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f'{STATUS} has no VmHWM')
