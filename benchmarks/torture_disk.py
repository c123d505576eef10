"""Full disks: one line, nothing lost, and on from there when there is room.

A command runs on a small file system, which is full at some size or from a
random moment on, and then again with room. Where none can be mounted, files
may not grow beyond a size instead.
"""
import contextlib
import importlib
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch

from benchmarks.torture_children import fork, wait
from benchmarks.torture_models import (classifier_task, detector_task,
                                       make_classifier)
from isvit_det.core.digests import checksum
from isvit_det.engine.cells import Cell
from isvit_det.engine.console import run_command

TOOLS = Path(__file__).parents[1] / 'tools'
# Bytes of the disk with room.
ROOM = 64 << 20
# Sizes of the disk, and random moments, that each command is tried with.
NUM_SIZES = 6
NUM_MOMENTS = 6
KEYS = ('trials', 'one line', 'same after', 'not filled')
# A tool that writes a report as the commands do, for a cell.
TOOL = '''
import sys
from pathlib import Path
from isvit_det.checkpoint import file_hash
from isvit_det.engine.console import run_command
from isvit_det.engine.report import write_result
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
        sys.path.insert(0, str(TOOLS))
        main = importlib.import_module('publish_float').main
        return main([checkpoint, str(disk / 'float.pth')])

    def cell(disk: Path) -> int:
        script = disk.parent / 'tool.py'
        script.write_text(TOOL)
        run = Cell(script, [weights], disk / 'cell', Path(weights)).run
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
        """Leave no room."""
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


def try_full(command: Command, folder: Path, size: int,
             moment: Optional[float], wanted: Optional[str]) -> Dict[str, int]:
    """Run a command on a full disk, and again with room.

    Args:
        command: what runs.
        folder: for the disk and what is printed.
        size: of the disk, in bytes.
        moment: seconds after which another fills the disk; None: nobody.
        wanted: checksum of the weights that a run with room ends with.

    Returns:
        A count of each of ``KEYS``.
    """
    log = folder / 'printed.log'
    log.unlink(missing_ok=True)
    counts = dict.fromkeys(KEYS, 0)
    counts['trials'] = 1
    with Disk(folder / 'disk', size) as disk:

        def run() -> int:
            with disk.limited():
                return command.run(disk.place)

        children = [fork(run, log)]
        statuses = {} if moment is None else wait(children, moment)
        if moment is not None:
            disk.fill()
        statuses.update(wait(children))
        text = log.read_text()
        if set(statuses.values()) == {0}:
            counts['not filled'] = 1
        else:
            counts['one line'] = int(
                set(statuses.values()) == {2} and 'Traceback' not in text
                and len(re.findall('^error: ', text, re.M)) == 1)
        disk.give_room()
        again = wait([fork(lambda: command.run(disk.place), log)])
        found = weights_of(disk.place, command)
        counts['same after'] = int(
            set(again.values()) == {0} and found == wanted)
    if not counts['same after'] or not (counts['one line']
                                        or counts['not filled']):
        name = command.name.split()[-1]
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
    """Try all commands on disks of several sizes, full at random moments.

    Args:
        folder: to work in.
        notes: counts so far by command; is changed.
        save: keeps the notes.
        scale: of the numbers of sizes and of moments.
        deadline: of ``time.monotonic``.
    """
    place = folder / 'full'
    place.mkdir(parents=True, exist_ok=True)
    num_sizes, num_moments = (
        max(1, round(scale * number)) for number in (NUM_SIZES, NUM_MOMENTS))
    for command in commands(folder):
        counts = notes.setdefault(command.name, dict.fromkeys(KEYS, 0))
        if counts['trials'] >= num_sizes + num_moments:
            continue
        with Disk(place / 'disk', ROOM) as disk:
            start = time.monotonic()
            log = place / 'undisturbed.log'
            wait([fork(lambda: command.run(disk.place), log)])
            seconds = time.monotonic() - start
            needed = sum(path.stat().st_size for path in disk.place.rglob('*')
                         if path.is_file())
            wanted = weights_of(disk.place, command)
        while (counts['trials'] < num_sizes + num_moments
               and time.monotonic() < deadline):
            number = counts['trials']
            draw = random.Random(f'{command.name} {number}')
            size, moment = ROOM, None
            if number < num_sizes:
                size = int(needed * number / num_sizes) + 4096
            else:
                moment = draw.uniform(0, seconds)
            found = try_full(command, place, size, moment, wanted)
            for key in KEYS:
                counts[key] += found[key]
            save()


def disk_rows(notes: Dict[str, Any]) -> List[Dict[str, str]]:
    """Rows of the table of full disks."""
    return [{
        'on a full disk': name,
        'trials': str(counts['trials']),
        'ended before it was full': str(counts['not filled']),
        'ended in one line': str(counts['one line']),
        'then the same with room': str(counts['same after'])
    } for name, counts in notes.items()]
