"""Progress of work: bars on a terminal, occasional lines elsewhere."""
import contextlib
import time
from typing import Callable, Iterator

from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn,
                           TimeRemainingColumn)

from isvit_det.screen.output import current

# The least and the most seconds between two lines.
MIN_PAUSE = 30.
MAX_PAUSE = 300.
PARTS = 10


class Pace:
    """Decides when a line of progress is due.

    A line is due after every tenth of the work, but not within 30 s of the
    last one, and after 5 min in any case.
    """

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._part = 0

    def is_due(self, share: float) -> bool:
        """Whether to report now that a share of the work is done."""
        pause = time.monotonic() - self._last
        is_more = int(share * PARTS) > self._part and pause >= MIN_PAUSE
        if share >= 1 or not (is_more or pause >= MAX_PAUSE):
            return False
        self.rest(share)
        return True

    def rest(self, share: float) -> None:
        """Start the pause anew, because something else was reported."""
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
    """Progress bars on the user's terminal; nothing without a terminal.

    Args:
        unit: what is counted, such as ``'images'``.
        visible: whether to draw them on a terminal.
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
    """Show the progress of a loop, if the open screen does not show its log.

    Args:
        task: what is being done.
        total: number of units of work.
        unit: what is counted.

    Yields:
        a function that takes how many more are done.
    """
    screen = current()
    if screen is None or screen.verbose or screen.is_muted:
        # MMEngine's own lines report the progress there.
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
