#!/usr/bin/env python
"""Faults and load, as figures: kills, full disks, damaged files, memory.

The results are kept in the work directory, and the same command goes on from
there. Four tables are printed at the end, also of what is not complete.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping

import torch

from benchmarks.torture_children import fork, wait
from benchmarks.torture_disk import disk_rows, fill_disks
from benchmarks.torture_files import file_rows, mutate_files
from benchmarks.torture_kills import Kills, kill_rows, kill_until
from benchmarks.torture_memory import measure_memory, memory_rows
from benchmarks.torture_models import classifier_task, detector_task
from isvit_det.commands.console import run_command
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.report.tables import format_table

# Share of the minutes after which each kind stops, whatever is missing.
KINDS = {'files': .25, 'memory': .35, 'disk': .5, 'kills': 1.}
NUM_KILLS = {'quantize_det': 50, 'quantize_cls': 50}


class Notes:
    """The results so far, in a file.

    Args:
        path: of the file.

    Attributes:
        results: by kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: Dict[str, Dict[str, Any]] = {kind: {} for kind in KINDS}
        if path.exists():
            self.results.update(json.loads(path.read_text()))

    def save(self) -> None:
        """Write the file anew."""
        text = json.dumps(self.results, indent=1).encode()
        write_atomically(self.path, lambda file: file.write(text))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--minutes', type=float, default=110, help='to take at most')
    add('--kinds', nargs='+', choices=list(KINDS), default=list(KINDS))
    add('--scale',
        type=float,
        default=1.,
        help='of the numbers of kills and of damaged files')
    add('--work-dir', type=Path, default=Path('work_dirs/torture'))
    return parser.parse_args()


def in_child(work: Callable[[], Any], log: Path) -> None:
    """Prepare something in a child, which leaves no trace in this process.

    Raises:
        QuantError: if it fails.
    """

    def prepare() -> int:
        work()
        return 0

    if set(wait([fork(prepare, log)]).values()) != {0}:
        raise QuantError(f'torture: the models could not be made, see {log}.')


def all_kills(folder: Path) -> List[Kills]:
    """What is killed: both commands, scopes, and numbers of processes."""
    cases = [
        Kills(
            detector_task(folder / 'detector', scope, processes), processes,
            folder / 'kills' / f'{scope}_{processes}')
        for scope in ('backbone', 'detector') for processes in (1, 2)
    ]
    classifier = classifier_task(folder / 'classifier')
    return cases + [Kills(classifier, 1, folder / 'kills' / 'classifier')]


def kills(folder: Path, notes: Dict[str, Any], save: Callable[[], None],
          scale: float, deadline: float) -> None:
    """Kill the runs of all tasks.

    Args:
        folder: to work in.
        notes: counts so far by task; is changed.
        save: keeps the notes.
        scale: of the numbers of kills.
        deadline: of ``time.monotonic``.
    """
    cases = all_kills(folder)
    for case in cases:
        command = case.task.name.split(',')[0]
        same = [c for c in cases if c.task.name.split(',')[0] == command]
        # The first cases take the remainder.
        number, more = divmod(round(NUM_KILLS[command] * scale), len(same))
        number += same.index(case) < more
        kill_until(case, number, notes.setdefault(case.name, {}), save,
                   deadline)


def main() -> None:
    args = parse_args()
    # Children of a process with threads of its own would hang.
    torch.set_num_threads(1)
    os.environ['OMP_NUM_THREADS'] = '1'
    folder = args.work_dir.resolve()
    notes = Notes(folder / 'notes.json')
    start = time.monotonic()
    in_child(
        lambda: (classifier_task(folder / 'classifier'),
                 detector_task(folder / 'detector', 'backbone')),
        folder / 'models.log')
    work: Mapping[str, Callable[..., None]] = dict(
        kills=kills,
        disk=fill_disks,
        files=mutate_files,
        memory=measure_memory)
    for kind, share in KINDS.items():
        if kind in args.kinds:
            work[kind](folder, notes.results[kind], notes.save, args.scale,
                       start + share * 60 * args.minutes)
    tables = dict(
        kills=kill_rows, disk=disk_rows, files=file_rows, memory=memory_rows)
    for kind, rows in tables.items():
        if notes.results[kind]:
            print(f'\n{format_table(rows(notes.results[kind]))}')


if __name__ == '__main__':
    sys.exit(run_command(main))
