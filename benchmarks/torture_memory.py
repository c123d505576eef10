"""Peak memory against the number of images, with and without a budget."""
import json
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from benchmarks.torture_children import fork, wait
from benchmarks.torture_models import make_detector
from isvit_det.commands import quantize_det
from isvit_det.core.errors import QuantError

NUM_IMAGES = (8, 16, 32, 64)
# GB for activations; None keeps all in memory.
BUDGETS = ('0.02', None)
SCALE = (512, 384)


def measure_memory(folder: Path, notes: Dict[str, Any], save: Callable[[],
                                                                       None],
                   scale: float, deadline: float) -> None:
    """Calibrate on more and more images and note the peaks, in bytes.

    Args:
        folder: to work in.
        notes: peaks so far by budget and number; is changed.
        save: keeps the notes.
        scale: of the greatest number.
        deadline: of ``time.monotonic``.

    Raises:
        QuantError: if a run fails.
    """
    place = folder / 'memory'

    def make() -> int:
        make_detector(place, max(NUM_IMAGES), SCALE)
        return 0

    wait([fork(make, place / 'models.log')])
    argv = make_detector(place, max(NUM_IMAGES), SCALE)
    numbers = [n for n in NUM_IMAGES if n <= scale * NUM_IMAGES[-1]]
    for number in numbers or NUM_IMAGES[:1]:
        for budget in BUDGETS:
            key = f'{number} {budget}'
            if key in notes or time.monotonic() > deadline:
                continue
            work_dir = place / 'work'
            shutil.rmtree(work_dir, ignore_errors=True)
            more = [] if budget is None else ['--store-gb', budget]
            words = [
                *argv, '--iters', '2', '--no-float-eval', '--calib-images',
                str(number), '--work-dir',
                str(work_dir), *more
            ]
            log = place / 'run.log'
            if set(
                    wait([fork(lambda: quantize_det.main(words),
                               log)]).values()) != {0}:
                raise QuantError(f'torture: a calibration failed, see {log}.')
            result = json.loads((work_dir / 'result.json').read_text())
            notes[key] = result['peak_memory']['host']
            save()


def memory_rows(notes: Dict[str, Any]) -> List[Dict[str, str]]:
    """Rows of the table of peaks."""

    def peak(number: int, budget: Any) -> str:
        value = notes.get(f'{number} {budget}')
        return '-' if value is None else f'{value / 1e6:.0f}'

    return [{
        'calibration images': str(number),
        f'peak MB with --store-gb {BUDGETS[0]}': peak(number, BUDGETS[0]),
        'peak MB with all in memory': peak(number, None)
    } for number in NUM_IMAGES]
