"""Progress of work: bars on a terminal, an occasional line elsewhere."""
import contextlib
import time
from typing import Callable, Iterator

from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn,
                           TimeRemainingColumn)

from isvit_det.screen.output import current

# Seconds between two lines at least, and at most.
MIN_PAUSE = 30.
MAX_PAUSE = 300.
PARTS = 10


class Pace:
    """Says when a line of progress is due.

    That is after every tenth of the work, but not more often than every 30 s,
    and after 5 min in any case.
    """

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._part = 0

    def is_due(self, share: float) -> bool:
        """Whether to say now that a share of the work is done."""
        pause = time.monotonic() - self._last
        is_more = int(share * PARTS) > self._part and pause >= MIN_PAUSE
        if share >= 1 or not (is_more or pause >= MAX_PAUSE):
            return False
        self.rest(share)
        return True

    def rest(self, share: float) -> None:
        """Count from now on: something else has been said."""
        self._last, self._part = time.monotonic(), int(share * PARTS)

    def left(self, share: float) -> str:
        """About how long the rest takes; '' if nothing is done yet."""
        if share <= 0:
            return ''
        passed = time.monotonic() - self._start
        return f', about {duration(passed * (1 - share) / share)} left'


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use.

    >>> duration(42.4), duration(150), duration(9000)
    ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 120:
        return f'{seconds:.0f} s'
    if seconds < 7200:
        return f'{seconds / 60:.2g} min' if seconds < 600 else \
            f'{seconds / 60:.0f} min'
    return f'{seconds / 3600:.1f} h'


def bars(unit: str, visible: bool = True) -> Progress:
    """Bars on the user's terminal; nothing where there is none.

    Args:
        unit: of what is counted.
        visible: whether to draw them there.
    """
    screen = current()
    console = Console() if screen is None else screen.console
    is_terminal = (
        console.is_terminal and not console.is_dumb_terminal
        if screen is None else screen.is_terminal)
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn(f'{unit}, left'),
        TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'),
        console=console,
        transient=screen is not None,
        redirect_stdout=screen is None,
        disable=not (visible and is_terminal))


@contextlib.contextmanager
def track(task: str,
          total: int,
          unit: str = 'images') -> Iterator[Callable[[int], None]]:
    """Show the progress of a loop, if a screen is open that has nothing else.

    Args:
        task: what is being done.
        total: how many there are.
        unit: of what is counted.

    Yields:
        a function that takes how many more are done.
    """
    screen = current()
    if screen is None or screen.verbose or screen.is_muted:
        # There the host's own lines tell of it.
        yield lambda more: None
        return
    done = 0
    pace = Pace()
    with bars(unit) as shown:
        bar = shown.add_task(task, total=total, note='')

        def advance(more: int) -> None:
            nonlocal done
            done = min(done + more, total)
            shown.update(bar, completed=done)
            share = done / total if total else 1.
            if not screen.is_terminal and pace.is_due(share):
                screen.say(f'  {done}/{total} {unit}{pace.left(share)}')

        yield advance
