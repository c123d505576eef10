"""Progress of a calibration: bars with time left, and a log line a unit."""
from typing import Any, Dict

from mmengine.logging import MMLogger
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TaskID,
                           TextColumn, TimeRemainingColumn)

from isvit_det.calibration.sos import Event
from isvit_det.core.settings import QuantConfig, SOSConfig

STAGES = {
    1: 'stage 1: float weights',
    2: 'stage 2: one scale',
    3: 'stage 3: low-bit weights'
}


def announcement(quant: QuantConfig, sos: SOSConfig, num_images: int) -> str:
    """What a calibration is going to do."""
    mirrored = ' and their mirror images' * sos.mirror_images
    return (f'calibrating {quant.bits} by {quant.method}, scope '
            f'{quant.scope}: {num_images} images{mirrored}, {sos.iters} '
            f'iterations per unit and stage, learning rate {sos.lr:g}')


class CalibrationProgress:
    """Shows calibration events; a context manager.

    Args:
        logger: gets a line for every unit and warning.
        visible: whether bars are drawn; rank 0 draws them.
    """

    def __init__(self, logger: MMLogger, visible: bool = True) -> None:
        self.logger = logger
        self.bars = Progress(
            TextColumn('{task.description}'),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn('units, left'),
            TimeRemainingColumn(),
            TextColumn('{task.fields[unit]}'),
            disable=not visible)
        self.tasks: Dict[int, TaskID] = {}

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
            self.tasks = {
                stage:
                self.bars.add_task(text, total=event.num_units, unit='')
                for stage, text in STAGES.items()
            }
        elif event.kind == 'step':
            share = event.step / event.num_steps if event.num_steps else 1
            self._show(event.stage, event.index + share, event.unit)
        elif event.kind == 'unit':
            # One taken from an earlier run went through no stage in this.
            for stage in STAGES:
                self._show(stage, event.index + 1, event.unit)
            self.logger.info(f'unit {event.index + 1}/{event.num_units} '
                             f'{event.unit}: {event.message}')

    def _show(self, stage: int, units_done: float, unit: str) -> None:
        self.bars.update(self.tasks[stage], completed=units_done, unit=unit)
