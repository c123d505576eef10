"""Progress of a calibration: its plan, a line for each unit, time left."""
import time
from typing import Any, Dict, Sequence

from mmengine.logging import MMLogger
from rich.progress import TaskID

from isvit_det.calibration.events import Event
from isvit_det.core.layers import quantized_layers
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.core.units import Unit
from isvit_det.screen.progress import Pace, bars, duration

STAGES = {
    1: 'stage 1: float weights',
    2: 'stage 2: one scale',
    3: 'stage 3: low-bit weights'
}


def announcement(quant: QuantConfig,
                 sos: SOSConfig,
                 num_units: int,
                 num_images: int,
                 scope: str = '') -> str:
    """What a calibration is going to do.

    Args:
        quant: its settings.
        sos: its settings.
        num_units: of the backbone.
        num_images: without their mirror images.
        scope: which parts of a detector are quantized; '' for a classifier,
            which is quantized as a whole.
    """
    part = f', scope {scope}' if scope else ''
    mirrored = ' and their mirror images' * sos.mirror_images
    how = 'without optimization'
    if sos.iters:
        how = (f'each in 3 stages ({sos.iters_of(1)} iterations in stage 1, '
               f'{sos.iters_of(3)} in stage 3), learning rate {sos.lr:g}')
    return (f'calibrating {quant.label} by {quant.method}{part}: {num_units} '
            f'units on {num_images} images{mirrored}, {how}')


class CalibrationProgress:
    """Shows calibration events; a context manager.

    Args:
        logger: gets a line for every unit and warning.
        units: that are calibrated.
        visible: whether bars are drawn; rank 0 draws them.
    """

    def __init__(self,
                 logger: MMLogger,
                 units: Sequence[Unit],
                 visible: bool = True) -> None:
        self.logger = logger
        # A unit takes about as long as it has layers.
        self.costs = [
            max(1, len(quantized_layers(unit.module))) for unit in units
        ]
        self.bars = bars('units', visible)
        self.tasks: Dict[int, TaskID] = {}
        self.pace = Pace()
        self._start = time.monotonic()
        self._began = -1
        # Sums over the units that this run has calibrated itself.
        self._cost = 0
        self._seconds = 0.

    def __enter__(self) -> 'CalibrationProgress':
        self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event.kind == 'warning':
            self.logger.warning(event.message)
        elif event.kind == 'images':
            self._start = time.monotonic()
            self.tasks = {
                stage:
                self.bars.add_task(text, total=event.num_units, note='')
                for stage, text in STAGES.items()
            }
        elif event.kind == 'step':
            self._began = event.index
            share = event.step / event.num_steps if event.num_steps else 1
            self._show(event.stage, event.index + share, event.unit)
            done = event.index + (event.stage - 1 + share) / len(STAGES)
            is_step_line = self.bars.disable and event.num_steps > 1
            if is_step_line and self.pace.is_due(done / event.num_units):
                self.logger.info(
                    f'  unit {event.index + 1}/{event.num_units} stage '
                    f'{event.stage}: {event.step}/{event.num_steps} '
                    'iterations')
        elif event.kind == 'unit':
            # A unit that is taken from an earlier run has no step events.
            for stage in STAGES:
                self._show(stage, event.index + 1, event.unit)
            self.pace.rest((event.index + 1) / event.num_units)
            self.logger.info(f'unit {event.index + 1}/{event.num_units} '
                             f'{event.unit}: {event.message}'
                             f'{self._left(event)}')

    def _left(self, event: Event) -> str:
        """The estimated time for the units after this one, if it is known."""
        now = time.monotonic()
        seconds, self._start = now - self._start, now
        # A unit that is taken from an earlier run has not begun, and its time
        # says nothing.
        if self._began == event.index:
            self._cost += self.costs[event.index]
            self._seconds += seconds
        rest = sum(self.costs[event.index + 1:])
        if not rest or not self._cost:
            return ''
        return f', about {duration(self._seconds / self._cost * rest)} left'

    def _show(self, stage: int, units_done: float, unit: str) -> None:
        self.bars.update(self.tasks[stage], completed=units_done, note=unit)
