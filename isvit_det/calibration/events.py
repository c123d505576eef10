"""What a calibration reports: events while it runs, a record for each unit."""
from dataclasses import dataclass, field
from typing import Dict


@dataclass(frozen=True)
class Event:
    """Progress of a calibration, for a callback.

    Attributes:
        kind: ``'warning'``, ``'images'`` (all images are read), ``'step'``
            (of a stage) or ``'unit'`` (finished or resumed).
        unit: name of the unit, or ''.
        index: index of the unit, from 0.
        num_units: number of units.
        stage: 1, 2 or 3, or 0.
        step: iterations of this stage that are done.
        num_steps: iterations of this stage.
        message: text for people.
    """
    kind: str
    unit: str = ''
    index: int = 0
    num_units: int = 0
    stage: int = 0
    step: int = 0
    num_steps: int = 0
    message: str = ''


@dataclass
class UnitRecord:
    """Result of the calibration of one unit.

    Attributes:
        name: name of the unit.
        errors: squared error relative to the squared norm of the float
            output, on a few batches of items: ``before_stage_1`` and
            ``after_stage_1`` with float weights, ``after_stage_2``, and
            ``before_stage_3`` and ``after_stage_3`` with quantized weights.
            Tokens are weighed as in the reconstruction.
        seconds: wall time, including that of the unit's forward passes on
            whole images.
        num_iters: mean of the iterations of stages 1 and 3.
        resumed: whether an earlier run had finished the unit.
        undone: by stage, such as ``stage_3``, the errors at which iterations
            ended that were taken back; ``errors`` has those of what was kept.
    """
    name: str
    errors: Dict[str, float]
    seconds: float
    num_iters: int
    resumed: bool = False
    undone: Dict[str, float] = field(default_factory=dict)

    def describe(self) -> str:
        """The record in one line."""
        if self.resumed:
            return 'taken from an earlier run'
        before = self.errors['before_stage_3']
        after = self.errors['after_stage_3']
        # Without optimization stage 3 changes nothing.
        change = f'{before:.4g} -> {after:.4g}' if self.num_iters else (
            f'{after:.4g}')
        for stage, error in self.undone.items():
            change += (f', {stage.replace("_", " ")} undone, which ended at '
                       f'{error:.4g}')
        return f'error {change} ({self.seconds:.1f} s)'
