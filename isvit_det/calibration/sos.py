"""The smooth optimization strategy: three stages, unit by unit, streaming.

A unit goes through all three stages before the next one starts. Its float
input and the one the quantized units before it produce advance side by side
and are never recomputed from the images. Several processes share the images
in turn, and each has the activations of its own ones.
"""
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import (Any, Callable, Dict, Iterable, Iterator, List, Optional,
                    Protocol, Tuple)

import torch
from torch import Tensor

from isvit_det.calibration.closed_form import correct_
from isvit_det.calibration.importance import (num_prefix, prefix_importance,
                                              token_weights)
from isvit_det.calibration.reconstruct import Gauge, ItemSampler, reconstruct
from isvit_det.calibration.resume import ProgressFiles
from isvit_det.calibration.store import ActivationPool, ActivationStore
from isvit_det.core.distributed import (all_gather, broadcast_,
                                        broadcast_object, interleave,
                                        own_indices, rank)
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import (fit_weights_, observe, precision,
                                   quantized_layers, set_precision_)
from isvit_det.core.reparam import (fold_channel_scales_, use_channel_scales_,
                                    widen_narrow_channels_)
from isvit_det.core.rotation import rotate_heads_
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.core.units import State, Unit

Sizes = List[Tuple[int, int]]


class HasUnits(Protocol):
    """A backbone that lists the steps of its forward pass in order."""

    def units(self) -> List[Unit]:
        ...


@dataclass(frozen=True)
class Event:
    """Something to tell whoever watches.

    Attributes:
        kind: ``'warning'``, ``'images'`` (all are read), ``'step'`` (of a
            stage) or ``'unit'`` (finished or resumed).
        unit: the unit's name, or ''.
        index: its position, from 0.
        num_units: how many there are.
        stage: 1, 2 or 3, else 0.
        step: iterations of this stage done.
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
    """What happened to one unit.

    Attributes:
        name: the unit's.
        errors: squared error relative to the float output, on a few batches
            of items: ``before_stage_1`` and ``after_stage_1`` with float
            weights, ``after_stage_2``, and ``before_stage_3`` and
            ``after_stage_3`` with quantized ones; of tokens as they are
            weighed.
        seconds: wall time, advancing the streams included.
        num_iters: iterations of stages 1 and 3, in the mean.
        resumed: whether an earlier run had finished it.
    """
    name: str
    errors: Dict[str, float]
    seconds: float
    num_iters: int
    resumed: bool = False


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

    Every finished unit is saved in ``workspace``, so that a run that was
    killed resumes there and ends with the codes it would have had.

    Args:
        student: lists ``units()``; float weights, in eval mode. Ends
            quantized.
        images: tensors (1, 3, H, W) of this process, read once. All
            processes' images come ``sos.rounds`` times, in other forms, one
            round after the other.
        quant: the settings that ``student`` was built with.
        sos: the settings of the run.
        workspace: directory of the resume state, which process 0 keeps, and
            of spilled activations.
        fingerprint: names everything the result depends on; state of
            another fingerprint is discarded.
        store_gb: memory for activations in GB (1e9 bytes).
        on_event: is told of progress.
        teacher: a copy of ``student`` to compare with, which shares nothing
            with it and stays as it is; None makes one.

    Raises:
        RuntimeError: if ``student`` is in training mode.
        QuantError: if there are no images.
        ValueError: if they do not come ``sos.rounds`` times.
    """
    if student.training:
        raise RuntimeError('call eval() before calibrate().')
    if teacher is None:
        teacher = copy.deepcopy(student)
    run = _Run(student, teacher, quant, sos, workspace, fingerprint, store_gb,
               on_event or (lambda event: None))
    try:
        return run.all_units(images)
    finally:
        # A full disk has room again.
        run.pool.clear()


class _Run:
    """One calibration: the two streams and how they advance."""

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

    def all_units(self, images: Iterable[Tensor]) -> List[UnitRecord]:
        num_units = len(self.units)
        if self.files and self.files.discarded:
            self.on_event(
                Event(
                    'warning',
                    message='the calibration state found is of other '
                    'settings, weights or images: starting anew'))
        store = ActivationStore(self.pool)
        own_sizes: Sizes = []
        for image in images:
            store.append(image)
            own_sizes.append((image.shape[-2], image.shape[-1]))
        sizes = interleave(all_gather(own_sizes))
        rounds = self.sos.rounds
        self.num_images, more = divmod(len(sizes), rounds)
        if more:
            raise ValueError(f'{len(sizes)} images do not come {rounds} '
                             'times.')
        if not sizes:
            raise QuantError('calibration set: 0 images; give at least 1.')
        self.on_event(Event('images', num_units=num_units))
        self.importance = [1.] * num_units
        if self.sos.weigh_tokens:
            self.importance = prefix_importance(
                self.teacher_units,
                ((image, state)
                 for _, image, state in self._own(store, sizes)))
        # Both streams start from the images; teacher inputs, student inputs.
        streams = store, store
        records = []
        for index, unit in enumerate(self.units):
            start = time.perf_counter()
            # What nothing reads again goes as the teacher passes over it.
            free = self._first(streams) is not streams[0]
            targets, next_sizes = self._advance(self.teacher_units[index],
                                                streams[0], sizes, free)
            record = self._resume(index)
            if record is None:
                errors = self._three_stages(index, streams, sizes, targets)
                record = UnitRecord(unit.name, errors, 0., self.sos.iters)
            if streams[0] is not streams[1]:
                streams[0].close()
            outputs, _ = self._advance(unit, streams[1], sizes, True)
            streams, sizes = (targets, outputs), next_sizes
            if not record.resumed:
                record.seconds = time.perf_counter() - start
                # Equal up to the order of sums; go on from the same.
                broadcast_(list(unit.module.state_dict().values()))
                if self.files:
                    self.files.save(index, unit, vars(record))
            records.append(record)
            self.on_event(
                Event(
                    'unit',
                    unit.name,
                    index,
                    num_units,
                    message=_describe(record)))
        for stream in streams:
            stream.close()
        return records

    def _resume(self, index: int) -> Optional[UnitRecord]:
        """Put the state of a unit finished by an earlier run in place."""
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
        # Loading also notes that the quantizers are fitted.
        unit.module.load_state_dict(state)
        return UnitRecord(**{**values, 'resumed': True})

    def _own(self, inputs: ActivationStore,
             sizes: Sizes) -> Iterator[Tuple[int, int, State]]:
        """Images of this process: place in a store, number, whole map."""
        for place, image in enumerate(own_indices(len(sizes))):
            yield place, image, State(inputs[place].to(self.device),
                                      sizes[image])

    @torch.no_grad()
    def _advance(self, unit: Unit, inputs: ActivationStore, sizes: Sizes,
                 free: bool) -> Tuple[ActivationStore, Sizes]:
        """Run whole maps through a unit, freeing its inputs if told to."""
        outputs = ActivationStore(self.pool)
        out_sizes: Sizes = []
        for place, _, state in self._own(inputs, sizes):
            state = unit.forward(state)
            if free:
                inputs.drop(place)
            outputs.append(state.x)
            out_sizes.append(state.size)
        return outputs, interleave(all_gather(out_sizes))

    def _first(
            self, streams: Tuple[ActivationStore,
                                 ActivationStore]) -> ActivationStore:
        """The stream that ranges and stage 1 see."""
        return streams[self.sos.stage_one_inputs == 'quantized']

    def _three_stages(self, index: int, streams: Tuple[ActivationStore,
                                                       ActivationStore],
                      sizes: Sizes,
                      targets: ActivationStore) -> Dict[str, float]:
        unit = self.units[index]
        pairs = unit.pairs() if self.quant.channelwise else []
        first = self._first(streams)
        errors = {}
        gauge = last_gauge = Gauge(
            self._sampler(index, 0, first, sizes, targets))
        if first is not streams[1]:
            last_gauge = Gauge(
                self._sampler(index, 0, streams[1], sizes, targets))
        if self.sos.rotate_heads:
            for heads in unit.heads():
                rotate_heads_(heads)
        for pair in pairs:
            use_channel_scales_(pair)
        self._fit_ranges(unit, first, sizes)
        for pair in pairs:
            widen_narrow_channels_(pair.linear.input_quantizer)
        with precision(unit.module, weights=False, acts=True):
            errors['before_stage_1'] = gauge.error()
            self._optimise(index, 1, first, sizes, targets)
            errors['after_stage_1'] = gauge.error()
            for pair in pairs:
                fold_channel_scales_(pair)
            errors['after_stage_2'] = gauge.error()
            self._step(index, 2, 1, 1)
        if self.sos.closed_form_start:
            self._correct(index, streams[1], sizes, targets)
        else:
            fit_weights_(unit.module)
        set_precision_(unit.module, weights=True, acts=True)
        errors['before_stage_3'] = last_gauge.error()
        self._optimise(index, 3, streams[1], sizes, targets)
        errors['after_stage_3'] = last_gauge.error()
        return errors

    def _fit_ranges(self, unit: Unit, inputs: ActivationStore,
                    sizes: Sizes) -> None:
        with precision(unit.module, weights=False, acts=False):
            with observe(unit.module):
                for _, _, state in self._own(inputs, sizes):
                    unit.forward(state)

    @torch.no_grad()
    def _correct(self, index: int, inputs: ActivationStore, sizes: Sizes,
                 targets: ActivationStore) -> None:
        """Round the weights column by column, as a start of stage 3.

        The last layer comes after the others, whose weights are rounded by
        then, and makes up for all that the unit's output lacks, also from
        the units before.
        """
        unit = self.units[index]
        last = unit.last_layer()
        rest = [
            layer for layer in quantized_layers(unit.module)
            if layer is not last
        ]
        with precision(unit.module, weights=False, acts=True):
            if rest:
                with correct_(rest, as_codes=False) as correction:
                    for _, image, state in self._own(inputs, sizes):
                        correction.start_image(image % self.num_images)
                        unit.forward(state)
            if last is None:
                return
            for layer in rest:
                layer.weight_quantizer.enabled = True
            with correct_([last], as_codes=False,
                          residual_given=True) as correction:
                for place, image, state in self._own(inputs, sizes):
                    correction.start_image(image % self.num_images,
                                           num_prefix(state))
                    found = unit.forward(state)
                    wanted = State(targets[place].to(self.device), found.size)
                    correction.add_residual(
                        last, (wanted.x - found.x)[0],
                        token_weights(wanted, self.importance[index]))

    def _sampler(self, index: int, stage: int, inputs: ActivationStore,
                 sizes: Sizes, targets: ActivationStore) -> ItemSampler:
        """Draws that depend on nothing but the seed, the unit, the stage."""
        generator = torch.Generator().manual_seed(
            (self.sos.seed * 1000 + index) * 4 + stage)
        return ItemSampler(self.units[index], inputs, sizes, targets, self.sos,
                           generator, self.importance[index])

    def _optimise(self, index: int, stage: int, inputs: ActivationStore,
                  sizes: Sizes, targets: ActivationStore) -> None:
        iters = self.sos.iters_of(stage)
        if iters == 0:
            self._step(index, stage, 0, 0)
            return
        reconstruct(
            self._sampler(index, stage, inputs, sizes, targets), iters,
            self.sos.lr, lambda step: self._step(index, stage, step, iters))

    def _step(self, index: int, stage: int, step: int, num_steps: int) -> None:
        self.on_event(
            Event('step', self.units[index].name, index, len(self.units),
                  stage, step, num_steps))


def _describe(record: UnitRecord) -> str:
    if record.resumed:
        return 'taken from an earlier run'
    before = record.errors['before_stage_3']
    after = record.errors['after_stage_3']
    return f'error {before:.4g} -> {after:.4g} ({record.seconds:.1f} s)'
