"""Damaged files: read as what was written, or refused in one line."""
import io
import random
import time
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List

import timm
import torch

from benchmarks.torture_children import fork, wait
from benchmarks.torture_models import CLASSIFIER
from isvit_det.calibration.resume import ProgressFiles
from isvit_det.checkpoint import read_checkpoint, save_packed
from isvit_det.classifiers.vit import quantize_vit
from isvit_det.core.digests import checksum, digest_of
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import fit_weights_, quantizers
from isvit_det.core.settings import QuantConfig

# Damaged files of each kind that a child reads.
BATCH = 250
NUM_FILES = {'packed file': 10000, 'resume state': 1000}
CLASSES = [f'class {number}' for number in range(20)]
OUTCOMES = ('refused', 'as written', 'other', 'crashed')


def mutate(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """A copy with bits flipped, bytes cut, inserted or exchanged.

    Args:
        content: what is damaged.
        other: another file's, blocks of which may take places.
        draw: decides.
    """
    if draw.random() < .2:
        return _zip_anew(content, draw)
    changed = bytearray(content)
    kind = draw.choice([_flip, _flip, _cut, _insert, _exchange, _truncate])
    for _ in range(draw.choice([1, 1, 2, 5])):
        kind(changed, other, draw)
    return bytes(changed)


def _flip(content: bytearray, other: bytes, draw: random.Random) -> None:
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def _cut(content: bytearray, other: bytes, draw: random.Random) -> None:
    start = draw.randrange(len(content) + 1)
    del content[start:start + draw.randrange(1, 300)]


def _insert(content: bytearray, other: bytes, draw: random.Random) -> None:
    start = draw.randrange(len(content) + 1)
    content[start:start] = draw.randbytes(draw.randrange(1, 100))


def _exchange(content: bytearray, other: bytes, draw: random.Random) -> None:
    """Exchange a block with one of this file, or take the other file's."""
    size = draw.randrange(1, 2000)
    start = draw.randrange(len(content) + 1)
    if draw.random() < .5:
        block = other[start:start + size]
    else:
        place = draw.randrange(len(content) + 1)
        block = bytes(content[place:place + size])
        content[place:place + size] = content[start:start + size]
    content[start:start + size] = block


def _truncate(content: bytearray, other: bytes, draw: random.Random) -> None:
    del content[draw.randrange(len(content) + 1):]


def _zip_anew(content: bytes, draw: random.Random) -> bytes:
    """A whole archive again, with other bytes in one of its files."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        changed = bytearray(content)
        _flip(changed, content, draw)
        return bytes(changed)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        names = old.namelist()
        pickled = [name for name in names if name.endswith('data.pkl')]
        place = draw.choice([draw.choice(names), *pickled])
        with zipfile.ZipFile(file, 'w') as new:
            for name in names:
                value = bytearray(old.read(name))
                if name == place:
                    for _ in range(draw.choice([1, 1, 3])):
                        draw.choice([_flip, _cut, _insert])(value, b'', draw)
                new.writestr(name, bytes(value))
    return file.getvalue()


class Packed:
    """Packed files of a small model; how damaged ones are read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / 'damaged.pth'
        folder.mkdir(parents=True, exist_ok=True)
        self.contents = []
        for seed in (0, 1):
            path = folder / f'packed_{seed}.pth'
            save_packed(
                small_model(seed), path,
                dict(seed=seed, image_ids=list(range(seed, 40))),
                dict(classes=CLASSES[seed:], palette=[(1, 2, seed)] * 20))
            self.contents.append(path.read_bytes())
        self.expected = self._describe(folder / 'packed_0.pth')

    def _describe(self, path: Path) -> List[str]:
        content = read_checkpoint(path)
        others = {
            key: value
            for key, value in content.items()
            if key not in ('state_dict', 'taken')
        }
        return [checksum(content['state_dict']), digest_of(others)]

    def outcome(self, damaged: bytes) -> str:
        """What becomes of a damaged file; one of ``OUTCOMES``."""
        self.path.write_bytes(damaged)
        try:
            actual = self._describe(self.path)
        except QuantError as error:
            return 'crashed' if '\n' in str(error) else 'refused'
        return 'as written' if actual == self.expected else 'other'


class Resume:
    """Resume states of two small units; how damaged ones are read."""

    def __init__(self, folder: Path) -> None:
        self.files = ProgressFiles(folder / 'units', 'torture')
        self.unit, other = small_model(0).units()[1:3]
        self.record = dict(name=self.unit.name, errors=dict(a=.5))
        self.files.save(0, self.unit, self.record)
        self.files.save(1, other, self.record)
        self.path, second = sorted(self.files.directory.glob('*.pth'))
        self.contents = [self.path.read_bytes(), second.read_bytes()]
        self.expected = checksum(self.unit.module.state_dict())

    def outcome(self, damaged: bytes) -> str:
        """What becomes of a damaged file; one of ``OUTCOMES``."""
        self.path.write_bytes(damaged)
        record = self.files.load(0, self.unit)
        if checksum(self.unit.module.state_dict()) != self.expected:
            return 'other'
        if record is None:
            return 'refused' if self.files.damaged else 'other'
        return 'as written' if record == self.record else 'other'


def small_model(seed: int) -> Any:
    """A calibrated classifier of two blocks."""
    torch.manual_seed(seed)
    source = timm.create_model(CLASSIFIER, num_classes=4).eval()
    model = quantize_vit(source, QuantConfig.from_dict({})).eval()
    for quantizer in quantizers(model).values():
        if quantizer.role == 'act':
            observer = quantizer.new_observer()
            observer.update(torch.rand(64))
            quantizer.fit_(observer)
    fit_weights_(model)
    return model


KINDS: Dict[str, Callable[[Path], Any]] = {
    'packed file': Packed,
    'resume state': Resume
}


def read_damaged(kind: str, folder: Path, start: int, end: int) -> List[str]:
    """Outcomes of the damaged files of these numbers, read in children.

    A child that dies takes its file with it as 'crashed', and another one
    goes on behind it.
    """
    results = folder / f'{kind.split()[0]}.outcomes'
    results.unlink(missing_ok=True)
    outcomes: List[str] = []

    def work() -> int:
        reader = KINDS[kind](folder / kind.split()[0])
        with open(results, 'a', buffering=1) as out:
            for number in range(start + len(outcomes), end):
                draw = random.Random(number)
                content, other = reader.contents
                damaged = mutate(content, other, draw)
                try:
                    outcome = reader.outcome(damaged)
                except BaseException as error:
                    print(f'{kind} {number}: {error!r}')
                    outcome = 'crashed'
                out.write(f'{outcome}\n')
        return 0

    while len(outcomes) < end - start:
        statuses = wait([fork(work, folder / f'{kind.split()[0]}.log')])
        outcomes = results.read_text().splitlines()
        if set(statuses.values()) != {0}:
            print(f'{kind} {start + len(outcomes)}: a child ended with '
                  f'{list(statuses.values())}')
            with open(results, 'a') as out:
                out.write('crashed\n')
            outcomes.append('crashed')
    return outcomes


def mutate_files(folder: Path, notes: Dict[str, Any], save: Callable[[], None],
                 scale: float, deadline: float) -> None:
    """Read damaged files until there were enough of each kind.

    Args:
        folder: to work in.
        notes: counts so far by kind; is changed.
        save: keeps the notes.
        scale: of the numbers.
        deadline: of ``time.monotonic``.
    """
    for kind, number in NUM_FILES.items():
        counts = notes.setdefault(kind, dict.fromkeys(OUTCOMES, 0))
        total = round(number * scale)
        while sum(counts.values()) < total and time.monotonic() < deadline:
            start = sum(counts.values())
            end = min(start + BATCH, total)
            for outcome in read_damaged(kind, folder / 'files', start, end):
                counts[outcome] += 1
            save()


def file_rows(notes: Dict[str, Any]) -> List[Dict[str, str]]:
    """Rows of the table of damaged files."""
    return [{
        'damaged': kind,
        'files': str(sum(counts.values())),
        **{
            name: str(counts[name])
            for name in OUTCOMES
        }
    } for kind, counts in notes.items()]
