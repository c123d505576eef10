"""The smooth optimization strategy: all units of a backbone, one by one.

A unit goes through all three stages before the next one starts. Activations
of all images are kept for one unit at a time: those of the float model, the
teacher, and those of the quantized one, the student. Both are advanced from
unit to unit and never computed from the images again. The processes of a run
share the images, and each keeps the activations of its own ones.
"""
import copy
import time
from pathlib import Path
from typing import Any, Callable, Iterable, List, Optional, Protocol, Tuple

import torch
from torch import Tensor

from isvit_det.calibration.events import Event, UnitRecord
from isvit_det.calibration.importance import prefix_importance
from isvit_det.calibration.resume import ProgressFiles
from isvit_det.calibration.stages import UnitActivations, UnitCalibration
from isvit_det.calibration.store import (ActivationPool, ActivationStore,
                                         Sizes, own_states)
from isvit_det.core.distributed import (all_gather, broadcast_,
                                        broadcast_object, interleave, rank)
from isvit_det.core.errors import QuantError
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.core.units import Unit


class HasUnits(Protocol):
    """A backbone that lists the steps of its forward pass in order."""

    def units(self) -> List[Unit]:
        ...


def calibrate(student: Any,
              images: Iterable[Tensor],
              quant: QuantConfig,
              sos: SOSConfig,
              workspace: Path,
              fingerprint: str,
              store_gb: Optional[float] = None,
              on_event: Optional[Callable[[Event], None]] = None,
              teacher: Optional[HasUnits] = None) -> List[UnitRecord]:
    """Calibrate and reconstruct a quantized backbone (I&S-ViT, Algorithm 1).

    Every finished unit is saved in ``workspace``. A run that was killed
    resumes there, and ends with the codes that it would have had.

    Args:
        student: lists ``units()``; float weights, in eval mode. Ends
            quantized.
        images: tensors (1, 3, H, W) of this process, read once. The images
            of all processes come in ``sos.num_views`` views, all images in
            one view after all in the other.
        quant: the settings that ``student`` was built with.
        sos: the settings of the run.
        workspace: directory of the state to resume from, which process 0
            writes, and of activations that do not fit into memory.
        fingerprint: identifies everything that the result depends on; state
            with another fingerprint is discarded.
        store_gb: memory for activations in GB (1e9 bytes).
        on_event: is called with the progress.
        teacher: a copy of ``student`` that shares nothing with it and stays
            as it is; None makes one.

    Raises:
        RuntimeError: if ``student`` is in training mode.
        QuantError: if there are no images.
        ValueError: if their number is no multiple of ``sos.num_views``.
    """
    if student.training:
        raise RuntimeError('call eval() before calibrate().')
    if teacher is None:
        teacher = copy.deepcopy(student)
    calibration = _Calibration(student, teacher, quant, sos, workspace,
                               fingerprint, store_gb, on_event
                               or (lambda event: None))
    try:
        return calibration.run(images)
    finally:
        # After an error, too, so that a full disk has room again.
        calibration.pool.clear()


class _Calibration:
    """Advances teacher and student through the units, calibrating each."""

    def __init__(self, student: HasUnits, teacher: HasUnits,
                 quant: QuantConfig, sos: SOSConfig, workspace: Path,
                 fingerprint: str, store_gb: Optional[float],
                 on_event: Callable[[Event], None]) -> None:
        self.quant = quant
        self.sos = sos
        self.on_event = on_event
        self.pool = ActivationPool(workspace / 'spilled' / str(rank()),
                                   store_gb)
        self.pool.clear()
        self.files: Optional[ProgressFiles] = None
        if rank() == 0:
            self.files = ProgressFiles(workspace / 'units', fingerprint)
        self.units = student.units()
        self.teacher_units = teacher.units()
        self.device = next(self.units[0].module.parameters()).device

    def run(self, images: Iterable[Tensor]) -> List[UnitRecord]:
        if self.files and self.files.discarded:
            self.on_event(
                Event(
                    'warning',
                    message='the calibration state found is of other '
                    'settings, weights or images: starting anew'))
        store, sizes = self._read(images)
        self.num_images = len(sizes) // self.sos.num_views
        self.on_event(Event('images', num_units=len(self.units)))
        self.importance = [1.] * len(self.units)
        if self.sos.weigh_tokens:
            self.importance = prefix_importance(
                self.teacher_units,
                ((image, state)
                 for _, image, state in own_states(store, sizes, self.device)))
        # The inputs of the first unit are the images, for both models.
        teacher_inputs = student_inputs = store
        records = []
        for index in range(len(self.units)):
            record, teacher_inputs, student_inputs, sizes = self._run_unit(
                index, teacher_inputs, student_inputs, sizes)
            records.append(record)
        for inputs in (teacher_inputs, student_inputs):
            inputs.close()
        return records

    def _read(self, images: Iterable[Tensor]) -> Tuple[ActivationStore, Sizes]:
        """Keep all images of this process; sizes of those of all processes.

        Raises:
            QuantError: if there are none.
            ValueError: if their number is no multiple of the views.
        """
        store = ActivationStore(self.pool)
        own_sizes: Sizes = []
        for image in images:
            store.append(image)
            own_sizes.append((image.shape[-2], image.shape[-1]))
        sizes = interleave(all_gather(own_sizes))
        if len(sizes) % self.sos.num_views:
            raise ValueError(f'{len(sizes)} images do not come '
                             f'{self.sos.num_views} times.')
        if not sizes:
            raise QuantError('calibration set: 0 images; give at least 1.')
        return store, sizes

    def _run_unit(
        self, index: int, teacher_inputs: ActivationStore,
        student_inputs: ActivationStore, sizes: Sizes
    ) -> Tuple[UnitRecord, ActivationStore, ActivationStore, Sizes]:
        """Calibrate a unit, or resume it, and advance both models by it.

        Returns:
            The record, the inputs of the next unit in the teacher and in the
            student, and their sizes.
        """
        start = time.perf_counter()
        unit = self.units[index]
        # Unless stage 1 reads them, the teacher's inputs are no longer needed
        # once its outputs are there.
        is_shared = teacher_inputs is student_inputs
        is_last_use = (not is_shared
                       and self.sos.stage_one_inputs == 'quantized')
        targets, next_sizes = self._advance(self.teacher_units[index],
                                            teacher_inputs, sizes, is_last_use)
        record = self._resume(index)
        if record is None:
            calibration = UnitCalibration(
                unit, index,
                UnitActivations(teacher_inputs, student_inputs, targets,
                                sizes), self.quant, self.sos,
                self.importance[index], self.num_images,
                lambda *step: self._report_step(index, *step))
            record = UnitRecord(
                unit.name,
                calibration.run(),
                0.,
                self.sos.iters,
                undone=calibration.undone)
        if not is_shared:
            teacher_inputs.close()
        outputs, _ = self._advance(unit, student_inputs, sizes, True)
        if not record.resumed:
            record.seconds = time.perf_counter() - start
            # The processes differ by the order of their sums; they continue
            # with the values of one.
            broadcast_(list(unit.module.state_dict().values()))
            if self.files:
                self.files.save(index, unit, vars(record))
        self.on_event(
            Event(
                'unit',
                unit.name,
                index,
                len(self.units),
                message=record.describe()))
        return record, targets, outputs, next_sizes

    def _resume(self, index: int) -> Optional[UnitRecord]:
        """Load the state of a unit if an earlier run has finished it."""
        unit = self.units[index]
        values = broadcast_object(self.files and self.files.load(index, unit))
        if self.files and self.files.damaged:
            self.on_event(
                Event(
                    'warning',
                    message=f'the state saved of unit {unit.name} is damaged: '
                    'it is calibrated again'))
        if values is None:
            return None
        state = unit.module.state_dict()
        broadcast_(list(state.values()))
        # Loading also marks the quantizers as fitted.
        unit.module.load_state_dict(state)
        return UnitRecord(**{**values, 'resumed': True})

    @torch.no_grad()
    def _advance(self, unit: Unit, inputs: ActivationStore, sizes: Sizes,
                 is_last_use: bool) -> Tuple[ActivationStore, Sizes]:
        """Run a unit on whole images.

        Args:
            unit: to run.
            inputs: of this process.
            sizes: of the inputs, of all processes.
            is_last_use: drop every input as soon as it has been used.

        Returns:
            Its outputs, and their sizes.
        """
        outputs = ActivationStore(self.pool)
        own_sizes: Sizes = []
        for position, _, state in own_states(inputs, sizes, self.device):
            state = unit.forward(state)
            if is_last_use:
                inputs.drop(position)
            outputs.append(state.x)
            own_sizes.append(state.size)
        return outputs, interleave(all_gather(own_sizes))

    def _report_step(self, index: int, stage: int, step: int,
                     num_steps: int) -> None:
        self.on_event(
            Event('step', self.units[index].name, index, len(self.units),
                  stage, step, num_steps))
