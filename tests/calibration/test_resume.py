"""Resume states: what was saved comes back, or the unit is told damaged."""
import random

import pytest
import torch
from torch import nn

from isvit_det.calibration.resume import ProgressFiles
from isvit_det.core.units import Unit

RECORD = dict(name='a', errors=dict(after_stage_3=.5), seconds=1.)


class Layer(Unit):
    """A unit that is only a name and a state."""

    def __init__(self, name='a'):
        self.name = name
        self.module = nn.Linear(3, 2)

    def forward(self, state):
        raise NotImplementedError


def value(unit):
    return unit.module.weight.detach().clone()


@pytest.fixture
def files(tmp_path):
    return ProgressFiles(tmp_path / 'units', 'run')


def test_what_was_saved_comes_back(files):
    unit, other = Layer(), Layer()
    files.save(0, unit, RECORD)
    assert files.load(0, other) == RECORD
    assert torch.equal(value(unit), value(other))
    assert files.load(1, other) is None and not files.damaged


@pytest.mark.parametrize('change', [
    lambda content: b'',
    lambda content: content[:20],
    lambda content: content[:-1],
    lambda content: content + b'x',
    lambda content: content[32:],
    lambda content: content[:32] + b'\x80\x02K\x01.',
])
def test_a_damaged_file_is_told_and_not_used(files, change):
    unit, other = Layer(), Layer()
    files.save(0, unit, RECORD)
    path, = files.directory.glob('*.pth')
    path.write_bytes(change(path.read_bytes()))
    before = value(other)
    assert files.load(0, other) is None and files.damaged
    assert torch.equal(value(other), before)
    assert files.load(1, other) is None and not files.damaged


def test_any_bit_counts(files):
    unit, other = Layer(), Layer()
    files.save(0, unit, RECORD)
    path, = files.directory.glob('*.pth')
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        assert files.load(0, other) is None and files.damaged


def test_a_state_of_another_unit_or_run_is_not_taken(files, tmp_path):
    units = Layer('a'), Layer('b')
    other = ProgressFiles(tmp_path / 'other', 'other run')
    for index, unit in enumerate(units):
        files.save(index, unit, RECORD)
        other.save(index, unit, RECORD)
    first, second = sorted(files.directory.glob('*.pth'))
    swapped = second.read_bytes(), first.read_bytes()
    first.write_bytes(swapped[0])
    second.write_bytes(swapped[1])
    foreign = sorted(other.directory.glob('*.pth'))[0]
    for index in (0, 1):
        assert files.load(index, units[index]) is None and files.damaged
    first.write_bytes(foreign.read_bytes())
    assert files.load(0, units[0]) is None and files.damaged


def test_a_damaged_note_starts_anew(files):
    unit = Layer()
    files.save(0, unit, RECORD)
    (files.directory / 'fingerprint').write_bytes(b'\xff\xfe')
    again = ProgressFiles(files.directory, 'run')
    assert again.discarded
    assert again.load(0, unit) is None and not again.damaged
