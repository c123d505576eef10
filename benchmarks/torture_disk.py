"""Full disks: one line, nothing lost, and on from there when there is room.

A command runs on a small file system that is full at one moment or another,
then again with room. Where none can be mounted, a limit on the size of files
does instead.
"""
import contextlib
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

from benchmarks.torture_children import fork, wait
from benchmarks.torture_kills import Kills
from benchmarks.torture_models import (classifier_task, detector_task,
                                       make_classifier)
from isvit_det.engine.cells import Cell

REPO = Path(__file__).parents[1]
ROOM = 256 << 20
PAGE = 4096
# Sizes of the disk tried for each command, between nothing and enough.
NUM_SIZES = 10
# What a line says that ends a command on a full disk.
LINE = re.compile(r'^error: .*(No space left|File too large|written)', re.I)


class Command(NamedTuple):
    """Something that writes.

    Attributes:
        name: for people.
        run: does it in a folder; gives the exit status.
        files: what must be the same as on a disk with room, by name.
    """
    name: str
    run: Callable[[Path], int]
    files: List[str]


def tool(name: str, *argv: Any) -> int:
    """Run a tool's script in this process; its exit status."""
    sys.path.insert(0, str(REPO / 'tools'))
    module = __import__(name)
    return module.main([str(word) for word in argv])


def commands(folder: Path) -> List[Command]:
    """All that write."""
    detector = detector_task(folder / 'detector', 'detector')
    classifier = classifier_task(folder / 'classifier')
    weights = make_classifier(folder / 'classifier')[2]
    config, checkpoint = detector.argv[:2]
    spill = ['--store-gb', '0']

    def cell(disk: Path) -> int:
        from isvit_det.core.errors import QuantError
        script = disk.parent / 'tool.py'
        script.write_text(CELL)
        try:
            Cell(script, [], disk / 'cell', Path(weights)).run()
        except QuantError as error:
            print(f'error: {error}', file=sys.stderr)
            return 2
        return 0

    return [
        Command('quantize_det', lambda disk: detector.run(disk / 'w', *spill),
                ['w/packed.pth']),
        Command('quantize_cls',
                lambda disk: classifier.run(disk / 'w', *spill),
                ['w/packed.pth']),
        Command(
            'publish_float', lambda disk: tool('publish_float', checkpoint,
                                               disk / 'float.pth'),
            ['float.pth']),
        Command('a cell of a benchmark', cell, []),
    ]


CELL = '''
import argparse, hashlib, json, sys
from pathlib import Path
from isvit_det.engine.console import run_command
from isvit_det.engine.report import write_result
'''


@contextlib.contextmanager
def mounted(disk: Path, size: int) -> Iterator[bool]:
    """A file system of a size in bytes; whether it could be mounted."""
    disk.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs',
         str(disk)],
        capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(['umount', str(disk)], check=True)
        else:
            shutil.rmtree(disk)
