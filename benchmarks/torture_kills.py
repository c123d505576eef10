"""Kills at random moments: a run started again ends with the same codes."""
import random
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import torch

from benchmarks.torture_children import fork, kill, places, wait
from benchmarks.torture_models import Task
from isvit_det.core.digests import checksum
from isvit_det.core.errors import QuantError

# Seconds that the processes of a run have to end when one of them is gone.
PATIENCE = .3


class Kills(NamedTuple):
    """Kills of one task.

    Attributes:
        task: what is run.
        processes: that share it.
        folder: for its work directories.
    """
    task: Task
    processes: int
    folder: Path

    @property
    def name(self) -> str:
        """For people, and for the notes."""
        number = 'one process' if self.processes == 1 else 'two processes'
        return f'{self.task.name}, {number}'

    def start(self, work_dir: Path) -> List[int]:
        """Start the processes of a run; their ids."""
        return [
            fork(lambda: self.task.run(work_dir),
                 work_dir.with_suffix(f'.{rank}.log'), place)
            for rank, place in enumerate(places(self.processes))
        ]

    def undisturbed(self) -> float:
        """Run once to the end; seconds.

        Raises:
            QuantError: if it fails.
        """
        work_dir = self.folder / 'undisturbed'
        shutil.rmtree(work_dir, ignore_errors=True)
        start = time.monotonic()
        statuses = wait(self.start(work_dir))
        if any(statuses.values()):
            raise QuantError(f'{self.name}: the undisturbed run failed, see '
                             f'{work_dir.with_suffix(".0.log")}.')
        return time.monotonic() - start

    def codes(self, name: str) -> str:
        """Checksum of the state that a run packed."""
        path = self.folder / name / 'packed.pth'
        return checksum(torch.load(path, weights_only=True)['state_dict'])

    def one_run(self, seconds: float, draw: random.Random,
                limit: int) -> Dict[str, int]:
        """Kill and start again until a run ends, or was killed enough.

        Args:
            seconds: that an undisturbed run takes.
            draw: draws the moments.
            limit: kills after which the run may end.

        Returns:
            Kills, and whether the end was as the undisturbed one's.
        """
        work_dir = self.folder / 'killed'
        for old in self.folder.glob('killed*'):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        kills = 0
        while True:
            children = self.start(work_dir)
            delay = draw.uniform(0, seconds) if kills < limit else None
            first = draw.choice([children, *([child] for child in children)])
            first = list(first)
            statuses = wait(children, delay)
            if statuses and children:
                # One has ended: the others are about to.
                statuses.update(wait(children))
            if not children:
                break
            kills += 1
            kill([child for child in first if child in children])
            # As a launcher does, the others go after the first.
            children = [child for child in children if child not in first]
            wait(children, PATIENCE)
            kill(children)
        good = set(statuses.values()) == {0}
        same = good and self.codes('killed') == self.codes('undisturbed')
        return dict(kills=kills, runs=1, same=int(same), failed=int(not good))


def kill_until(case: Kills, number: int, notes: Dict[str, Any],
               save: Callable[[], None], deadline: float) -> None:
    """Kill a task's runs until there were so many kills, or time is up.

    Args:
        case: what is killed.
        number: of kills to reach, with those noted.
        notes: counts so far; is changed.
        save: keeps the notes.
        deadline: of ``time.monotonic``.
    """
    notes.setdefault('kills', 0)
    if notes['kills'] >= number or time.monotonic() > deadline:
        return
    seconds = case.undisturbed()
    while notes['kills'] < number and time.monotonic() < deadline:
        draw = random.Random(f'{case.name} {notes.get("runs", 0)}')
        counts = case.one_run(seconds, draw, min(4, number - notes['kills']))
        for key, value in counts.items():
            notes[key] = notes.get(key, 0) + value
        if counts['same'] == 0:
            kept = case.folder / f'bad_{notes["runs"]}'
            shutil.copytree(
                case.folder, kept, ignore=shutil.ignore_patterns('bad_*'))
        save()


def kill_rows(notes: Dict[str, Any]) -> List[Dict[str, str]]:
    """Rows of the table of kills."""
    return [{
        'killed': name,
        'kills': str(counts['kills']),
        'runs ended': str(counts.get('runs', 0)),
        'with the same codes': str(counts.get('same', 0))
    } for name, counts in notes.items()]
