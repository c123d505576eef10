"""The portable kernels on another CPU give what they give on this one."""
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from isvit_det.plans.swin import plan_merging
from isvit_det.runtime import build, native
from isvit_det.runtime.blocks import NativeMerging
from isvit_det.runtime.layers import NativeConv, NativeLinear
from isvit_det.runtime.native import Isa
from tests.runtime.blocks import (TWO_STAGES, WINDOWED, draw_backbone,
                                  draw_vit, native_block)
from tests.runtime.calibrated import draw_conv, draw_linear
from tests.runtime.tape import Recorder

REPLAY = Path(__file__).with_name('replay.cpp')
ARM_COMPILER, ARM_RUNNER = 'aarch64-linux-gnu-g++', 'qemu-aarch64'
ARM_PACKAGES = 'g++-aarch64-linux-gnu and qemu-user'


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder(build.load_library())
    monkeypatch.setattr(native, 'load_library', lambda: found)
    return found


def run_layers():
    """Layers of every kind on the portable kernels."""
    for bits in ('w4a4', 'w8a8', 'w3a6'):
        layer, x = draw_linear(bits=bits)
        NativeLinear(layer, Isa.PORTABLE)(x)
    for kwargs in (dict(padding=1), dict(padding=2, dilation=2, stride=2)):
        layer, x = draw_conv(20, 18, 3, **kwargs)
        for memory in (torch.contiguous_format, torch.channels_last):
            NativeConv(layer, Isa.PORTABLE)(x.contiguous(memory_format=memory))


def run_blocks():
    """Blocks of Swin and ViT and a merging on the portable kernels."""
    for bits in ('w4a4', 'w6a6', 'w8a8'):
        model = draw_backbone(dict(bits=bits), **TWO_STAGES)
        x = torch.randn(2, 9 * 10, 32)
        for block in model.stages[0].blocks:
            native_block(block, Isa.PORTABLE)(x, (9, 10), trace={})
        merging = model.stages[0].downsample
        NativeMerging(plan_merging(merging), Isa.PORTABLE)(x, (9, 10))
    for block in draw_vit(**WINDOWED).blocks:
        native_block(block, Isa.PORTABLE)(x, (9, 10), trace={})


def build_replay(compiler, folder):
    program = folder / 'replay'
    subprocess.run([
        *compiler, '-O1', '-std=c++17',
        str(REPLAY), '-ldl', '-o',
        str(program)
    ],
                   check=True)
    return program


def replay(command, library, tape, folder):
    """Exit status and lines of the program."""
    path = folder / 'tape'
    path.write_bytes(tape)
    done = subprocess.run(
        [*command, str(library), str(path)], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_a_tape_is_repeated_and_a_wrong_one_is_found(recorder, tmp_path):
    run_layers()
    command = [build_replay(build.find_compiler(), tmp_path)]
    library = build.library_path()
    status, lines = replay(command, library, recorder.encode(), tmp_path)
    assert status == 0 and len(lines) == len(recorder.calls) > 10
    assert all(line.endswith(': 0 bytes differ') for line in lines)
    call = recorder.calls[-1]
    pairs = zip(call._before, call._after)
    wrong = [one != other for one, other in pairs].index(True)
    after = bytearray(call._after)
    after[wrong] ^= 1
    call._after = bytes(after)
    status, lines = replay(command, library, recorder.encode(), tmp_path)
    assert status == 1 and lines[-1] == f'{call.name}: 1 bytes differ'


@pytest.mark.slow
def test_arm(recorder, tmp_path):
    """Compiled for ARM with NEON, to the bit, floats included."""
    if platform.machine() == 'aarch64':
        pytest.skip('this is an ARM: its kernels are tested by all tests')
    for program in (ARM_COMPILER, ARM_RUNNER):
        if not shutil.which(program):
            pytest.skip(f'there is no {program}: install {ARM_PACKAGES}')
    library = tmp_path / 'libisvit.so'
    build.compile_library(library, [ARM_COMPILER])
    run_layers()
    run_blocks()
    command = [
        ARM_RUNNER, '-L', '/usr/aarch64-linux-gnu',
        build_replay([ARM_COMPILER], tmp_path)
    ]
    status, lines = replay(command, library, recorder.encode(), tmp_path)
    assert (status, len(lines)) == (0, len(recorder.calls)), lines
    assert any('isvit_run_block' in line for line in lines)
    print('\n'.join(lines))
