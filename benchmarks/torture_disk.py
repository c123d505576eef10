"""Full disks: one line, nothing lost, and on from there when there is room.

A command runs on a small file system, which is full at some size or from the
moment on at which a file is opened to be written, and then again with room.
Where none can be mounted, files may not grow beyond a size instead.
"""
import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import (Any, Callable, Counter, Dict, Iterator, List, NamedTuple,
                    Optional, Tuple)

import torch

from benchmarks.torture_children import fork, wait
from benchmarks.torture_models import (classifier_task, detector_task,
                                       make_classifier)
from isvit_det.commands import publish_float
from isvit_det.commands.cells import Cell
from isvit_det.commands.console import run_command
from isvit_det.core.digests import checksum

# Bytes of the disk with room.
ROOM = 64 << 20
# Sizes of the disk that each command is tried with.
NUM_SIZES = 6
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KEYS = ('trials', 'one line', 'same after', 'not filled')
# A tool that writes a report as the commands do, for a cell.
TOOL = '''
import sys
from pathlib import Path
from isvit_det.core.digests import file_hash
from isvit_det.commands.console import run_command
from isvit_det.report.tables import write_result
origin = dict(float_checkpoint_sha256=file_hash(Path(sys.argv[1])))
report = dict(provenance=origin, filling=list(range(9999)))
sys.exit(run_command(lambda: write_result(
    Path(sys.argv[3]) / 'result.json', report)))
'''


class Command(NamedTuple):
    """Something that writes to a disk.

    Attributes:
        name: for people.
        run: does it in a folder; the exit status.
        out: file of weights that it ends with, if any.
    """
    name: str
    run: Callable[[Path], int]
    out: Optional[str] = None


def commands(folder: Path) -> List[Command]:
    """All that are tried; models and data lie in a folder."""
    detector = detector_task(folder / 'detector', 'detector')
    classifier = classifier_task(folder / 'classifier')
    weights = make_classifier(folder / 'classifier')[2]
    checkpoint = detector.argv[1]
    # All activations go to the disk.
    spill = ['--store-gb', '0']

    def publish(disk: Path) -> int:
        return publish_float.main([checkpoint, str(disk / 'float.pth')])

    def cell(disk: Path) -> int:
        script = disk.parent / 'tool.py'
        script.write_text(TOOL)
        run = Cell([str(script)], [weights], disk / 'cell', Path(weights)).run
        return run_command(lambda: print(len(run())))

    return [
        Command('quantize_det', lambda disk: detector.run(disk / 'w', *spill),
                'w/packed.pth'),
        Command('quantize_cls',
                lambda disk: classifier.run(disk / 'w', *spill),
                'w/packed.pth'),
        Command('publish_float', publish, 'float.pth'),
        Command('a cell of a benchmark', cell)
    ]


class Disk:
    """A file system that can be full; a context manager.

    Args:
        place: of its files.
        size: in bytes.
    """

    def __init__(self, place: Path, size: int) -> None:
        self.place = place
        self.size = size
        self.mounted = False

    def __enter__(self) -> 'Disk':
        self.place.mkdir(parents=True, exist_ok=True)
        self.mounted = self._mount(f'size={self.size}')
        return self

    def __exit__(self, *error: Any) -> None:
        if self.mounted:
            subprocess.run(['umount', '--lazy', str(self.place)], check=True)
        shutil.rmtree(self.place, ignore_errors=True)

    def _mount(self, options: str) -> bool:
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs']
        with contextlib.suppress(FileNotFoundError):
            return subprocess.run(
                command + [str(self.place)],
                stderr=subprocess.DEVNULL).returncode == 0
        return False

    def fill(self) -> None:
        """Leave no room; to this process, where nothing could be mounted."""
        if not self.mounted:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
            return
        with contextlib.suppress(OSError):
            with open(self.place / 'filling', 'wb', buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    def give_room(self) -> None:
        """Let whatever is written fit."""
        if self.mounted:
            (self.place / 'filling').unlink(missing_ok=True)
            self._mount(f'remount,size={ROOM}')

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Limit the size of files, where nothing could be mounted."""
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)


def kind_of(path: str) -> str:
    """Kind of a file: its name without numbers and a temporary one's ending.

    Example:
        >>> kind_of('/w/units/.unit_03.pth.4127.x8_b3q')
        'unit_#.pth'
    """
    name = re.sub(r'^\.(.+)\.\d+\.\w+$', r'\1', os.path.basename(path))
    return re.sub(r'\d+', '#', name)


def watch_openings(place: Path, on_opening: Callable[[str], None]) -> None:
    """Tell of each file in a folder that this process opens to write.

    There is no way back: this is for a child process.

    Args:
        place: the folder.
        on_opening: is told the kind of file before it is opened.
    """
    busy = False

    def hook(event: str, args: Tuple[Any, ...]) -> None:
        nonlocal busy
        if event != 'open' or busy or not args[2] & WRITES:
            return
        if isinstance(args[0], str) and args[0].startswith(str(place)):
            busy = True
            on_opening(kind_of(args[0]))
            busy = False

    sys.addaudithook(hook)


def opened(command: Command, place: Path, log: Path) -> Counter[str]:
    """Run a command to its end; how often it opens which kinds of file."""
    record = log.with_suffix('.opened')
    record.unlink(missing_ok=True)

    def run() -> int:
        with open(record, 'w', buffering=1) as file:
            watch_openings(place, lambda kind: print(kind, file=file))
            return command.run(place)

    wait([fork(run, log)])
    return Counter(record.read_text().splitlines())


def try_full(command: Command, folder: Path, size: int,
             opening: Optional[Tuple[str, int]],
             expected: Optional[str]) -> Dict[str, int]:
    """Run a command on a full disk, and again with room.

    Args:
        command: what runs.
        folder: for the disk and what is printed.
        size: of the disk, in bytes.
        opening: kind and number of the file at whose opening the disk is
            filled by another; None: never.
        expected: checksum of the weights that a run with room ends with.

    Returns:
        A count of each of ``KEYS``.
    """
    log = folder / 'printed.log'
    log.unlink(missing_ok=True)
    counts = dict.fromkeys(KEYS, 0)
    counts['trials'] = 1
    with Disk(folder / 'disk', size) as disk:
        seen: Counter[str] = Counter()

        def fill_at(kind: str) -> None:
            if (kind, seen[kind]) == opening:
                disk.fill()
            seen[kind] += 1

        def run() -> int:
            watch_openings(disk.place, fill_at)
            with disk.limited():
                return command.run(disk.place)

        statuses = wait([fork(run, log)])
        text = log.read_text()
        if set(statuses.values()) == {0}:
            counts['not filled'] = 1
        else:
            counts['one line'] = int(
                set(statuses.values()) == {2} and 'Traceback' not in text
                and len(re.findall('^error: ', text, re.M)) == 1)
        disk.give_room()
        again = wait([fork(lambda: command.run(disk.place), log)])
        actual = weights_of(disk.place, command)
        counts['same after'] = int(
            set(again.values()) == {0} and actual == expected)
    if not counts['same after'] or not counts['one line']:
        name = command.name.split()[-1]
        print(f'on a full disk, {command.name}: {size} bytes, full at '
              f'{opening}: {counts}')
        shutil.copy(log, folder / f'bad_{name}_{time.time():.0f}.log')
    return counts


def weights_of(place: Path, command: Command) -> Optional[str]:
    """Checksum of the weights that a command wrote, None without such."""
    if command.out is None or not (place / command.out).exists():
        return None
    content = torch.load(place / command.out, weights_only=True)
    return checksum(content['state_dict'])


def fill_disks(folder: Path, notes: Dict[str, Any], save: Callable[[], None],
               scale: float, deadline: float) -> None:
    """Try all commands on disks of several sizes, full at all kinds of write.

    Args:
        folder: to work in.
        notes: counts so far by command; is changed.
        save: keeps the notes.
        scale: of the numbers of sizes and of kinds of write.
        deadline: of ``time.monotonic``.
    """
    place = folder / 'full'
    place.mkdir(parents=True, exist_ok=True)
    num_sizes = max(1, round(scale * NUM_SIZES))
    for command in commands(folder):
        counts = notes.setdefault(command.name, dict.fromkeys(KEYS, 0))
        if counts.get('planned') == counts['trials'] or (time.monotonic()
                                                         > deadline):
            continue
        with Disk(place / 'disk', ROOM) as disk:
            kinds = opened(command, disk.place, place / 'undisturbed.log')
            needed = sum(path.stat().st_size for path in disk.place.rglob('*')
                         if path.is_file())
            expected = weights_of(disk.place, command)
        trials: List[Tuple[int, Optional[Tuple[str, int]]]] = [
            (int(needed * number / num_sizes) + 4096, None)
            for number in range(num_sizes)
        ]
        draw = random.Random(command.name)
        trials += [(ROOM, (kind, draw.randrange(kinds[kind])))
                   for kind in sorted(kinds)
                   ][:max(1, round(scale * len(kinds)))]
        counts.update(kinds=len(trials) - num_sizes, planned=len(trials))
        for size, opening in trials[counts['trials']:]:
            if time.monotonic() > deadline:
                break
            result = try_full(command, place, size, opening, expected)
            for key in KEYS:
                counts[key] += result[key]
            save()


def disk_rows(notes: Dict[str, Any]) -> List[Dict[str, str]]:
    """Rows of the table of full disks."""
    return [{
        'on a full disk': name,
        'trials': str(counts['trials']),
        'kinds of write': str(counts.get('kinds', '-')),
        'ended before it was full': str(counts['not filled']),
        'ended in one line': str(counts['one line']),
        'then the same with room': str(counts['same after'])
    } for name, counts in notes.items()]
