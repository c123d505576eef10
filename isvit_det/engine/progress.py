"""Progress of a calibration: bars with time left, and a log line a unit."""
from typing import Any

from mmengine.logging import MMLogger
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn,
                           TimeElapsedColumn, TimeRemainingColumn)

from isvit_det.calibration.sos import Event

STAGES = {
    1: 'stage 1, float weights',
    2: 'stage 2, one scale per tensor',
    3: 'stage 3, quantized weights'
}


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
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('elapsed'),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(),
            disable=not visible)
        self.tasks: dict = {}

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
                stage: self.bars.add_task(text, total=None)
                for stage, text in STAGES.items()
            }
        elif event.kind == 'step':
            # A stage without iterations still has its units to pass.
            steps = max(1, event.num_steps)
            self._set(event.stage, event,
                      event.index * steps + (event.step or steps), steps)
        elif event.kind == 'unit':
            self.logger.info(f'unit {event.index + 1}/{event.num_units} '
                             f'{event.unit}: {event.message}')

    def _set(self, stage: int, event: Event, done: int, steps: int) -> None:
        self.bars.update(
            self.tasks[stage],
            completed=done,
            total=event.num_units * steps,
            description=f'{STAGES[stage]} ({event.unit})')
