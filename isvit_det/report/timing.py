"""Timing runs that take turns, so that other work on a machine hits all."""
import resource
import statistics
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple


class Seconds(NamedTuple):
    """Medians over rounds.

    Attributes:
        wall: what a clock on the wall measures.
        processor: of all threads of this process together.
        user: of these, without what the system does, such as providing
            memory.
    """
    wall: float
    processor: float
    user: float


def _now() -> Seconds:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Seconds(time.perf_counter(), used.ru_utime + used.ru_stime,
                   used.ru_utime)


def take_turns(runs: Mapping[str, Callable[[], Any]],
               rounds: int) -> Dict[str, Seconds]:
    """Median seconds of each run; the first, unmeasured one warms up.

    Args:
        runs: by name.
        rounds: in each of them every run has its turn, at least 1.

    >>> found = take_turns(dict(nothing=lambda: None), 3)
    >>> found['nothing'].wall < 1
    True
    """
    for run in runs.values():
        run()
    found: Dict[str, List[Seconds]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before = _now()
            run()
            found[name].append(
                Seconds(*(end - start for start, end in zip(before, _now()))))
    return {
        name: Seconds(*map(statistics.median, zip(*each)))
        for name, each in found.items()
    }
