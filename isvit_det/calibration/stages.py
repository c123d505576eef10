"""The three stages of one unit (I&S-ViT, section 3.3)."""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import nn

from isvit_det.calibration.closed_form import correct_
from isvit_det.calibration.importance import num_prefix, token_weights
from isvit_det.calibration.reconstruct import (ErrorMeter, ItemSampler,
                                               reconstruct)
from isvit_det.calibration.store import ActivationStore, Sizes, own_states
from isvit_det.core.layers import (fit_weights_, observe, precision,
                                   quantized_layers, set_precision_)
from isvit_det.core.padding import leave_out
from isvit_det.core.quantizers import Quantizer
from isvit_det.core.reparam import (NormLinear, fold_channel_scales_,
                                    use_channel_scales_,
                                    widen_narrow_channels_)
from isvit_det.core.rotation import rotate_heads_
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.core.table_quantizer import TableQuantizer
from isvit_det.core.units import State, Unit

# Of a stage that may be undone, errors are measured on one image in this many.
HELD_OUT = 8


class UnitActivations(NamedTuple):
    """Inputs and outputs of one unit, of the images of this process.

    Attributes:
        teacher_inputs: its input in the float model.
        student_inputs: its input in the quantized model, where the units
            before it are calibrated. For the first unit it is the same
            store as ``teacher_inputs``.
        targets: its output in the float model, for the teacher's inputs.
        sizes: (H, W) of the inputs, for the images of all processes.
    """
    teacher_inputs: ActivationStore
    student_inputs: ActivationStore
    targets: ActivationStore
    sizes: Sizes

    def stage_one_inputs(self, sos: SOSConfig) -> ActivationStore:
        """The inputs on which ranges are searched and stage 1 is run."""
        if sos.stage_one_inputs == 'quantized':
            return self.student_inputs
        return self.teacher_inputs


class UnitCalibration:
    """Calibrates one unit: its module ends quantized.

    Args:
        unit: of the student, with float weights.
        index: its index, from which its random seed is derived.
        activations: of the unit.
        quant: settings of the quantizers.
        sos: settings of the run.
        importance: weight of an error of a prefix token, relative to that of
            a patch.
        num_images: number of different images, of which ``activations`` may
            hold several views.
        on_step: is called with the stage, the iterations done and their
            number.

    Attributes:
        undone: see ``UnitRecord``.
    """

    def __init__(self, unit: Unit, index: int, activations: UnitActivations,
                 quant: QuantConfig, sos: SOSConfig, importance: float,
                 num_images: int, on_step: Callable[[int, int, int],
                                                    None]) -> None:
        self.unit = unit
        self.index = index
        self.activations = activations
        self.quant = quant
        self.sos = sos
        self.importance = importance
        self.num_images = num_images
        self.on_step = on_step
        self.undone: Dict[str, float] = {}
        self.device = next(unit.module.parameters()).device

    def run(self) -> Dict[str, float]:
        """Run the stages; the errors as in ``UnitRecord``."""
        unit = self.unit
        pairs = unit.pairs() if self.quant.channelwise else []
        student_inputs = self.activations.student_inputs
        stage_one_inputs = self.activations.stage_one_inputs(self.sos)
        errors = {}
        meter = last_meter = ErrorMeter(self._sampler(0, stage_one_inputs))
        if stage_one_inputs is not student_inputs:
            last_meter = ErrorMeter(self._sampler(0, student_inputs))
        if self.sos.rotate_heads:
            for heads in unit.heads():
                rotate_heads_(heads)
        final = [use_channel_scales_(pair) for pair in pairs]
        self._fit_ranges(stage_one_inputs, unit.module)
        for pair in pairs:
            widen_narrow_channels_(pair.linear.input_quantizer)
        with precision(unit.module, weights=False, acts=True):
            errors.update(self._reconstruct(1, stage_one_inputs, meter))
            for pair in pairs:
                fold_channel_scales_(pair)
            self._fit_tables(pairs, final, stage_one_inputs)
            errors['after_stage_2'] = meter.error()
            self.on_step(2, 1, 1)
        if self.sos.closed_form_start:
            self._correct()
        else:
            fit_weights_(unit.module)
        set_precision_(unit.module, weights=True, acts=True)
        errors.update(self._reconstruct(3, student_inputs, last_meter))
        return errors

    def _fit_tables(self, pairs: List[NormLinear], final: List[Quantizer],
                    inputs: ActivationStore) -> None:
        """Fit tables for post-LayerNorm activations of folded scales.

        Args:
            pairs: folded.
            final: for each pair, the input quantizer that its layer was built
                with.
            inputs: of the unit.
        """
        tables: List[TableQuantizer] = []
        for pair, quantizer in zip(pairs, final):
            if isinstance(quantizer, TableQuantizer):
                pair.linear.input_quantizer = quantizer
                tables.append(quantizer)
        if tables:
            self._fit_ranges(inputs, nn.ModuleList(tables))
            for table in tables:
                table.enabled = True

    def _fit_ranges(self, inputs: ActivationStore, observed: Any) -> None:
        """Fit activation quantizers, everything being in float.

        Args:
            inputs: of the unit.
            observed: the module that has these quantizers.
        """
        with precision(self.unit.module, weights=False, acts=False):
            with observe(observed):
                for _, _, state in own_states(inputs, self.activations.sizes,
                                              self.device):
                    self._forward(state)

    def _forward(self, state: State) -> State:
        """Run the unit on an image for observers or closed forms."""
        padding = None
        if self.sos.leave_out_padding:
            padding = self.unit.padding(state.size)
        with leave_out(padding):
            return self.unit.forward(state)

    @torch.no_grad()
    def _correct(self) -> None:
        """Round the weights in closed form, as the start of stage 3.

        The unit's last layer is corrected after the others, when their
        weights are rounded. It is fitted to the whole residual of the unit's
        output, which includes the errors of the units before.
        """
        module, last = self.unit.module, self.unit.last_layer()
        _, inputs, targets, sizes = self.activations
        others = [
            layer for layer in quantized_layers(module) if layer is not last
        ]
        with precision(module, weights=False, acts=True):
            if others:
                with correct_(others, as_codes=False) as correction:
                    for _, image, state in own_states(inputs, sizes,
                                                      self.device):
                        correction.start_image(image % self.num_images,
                                               num_prefix(state))
                        self._forward(state)
            if last is None:
                return
            for layer in others:
                layer.weight_quantizer.enabled = True
            with correct_([last], as_codes=False,
                          residual_given=True) as correction:
                for position, image, state in own_states(
                        inputs, sizes, self.device):
                    correction.start_image(image % self.num_images,
                                           num_prefix(state))
                    output = self._forward(state)
                    target = State(targets[position].to(self.device),
                                   output.size)
                    correction.add_residual(
                        last, (target.x - output.x)[0],
                        token_weights(target, self.importance))

    def _sampler(self, stage: int, inputs: ActivationStore) -> ItemSampler:
        """Minibatches that depend on the seed, the unit and the stage only."""
        generator = torch.Generator().manual_seed(
            (self.sos.seed * 1000 + self.index) * 4 + stage)
        return ItemSampler(self.unit, inputs, self.activations.sizes,
                           self.activations.targets, self.sos, generator,
                           self.importance, self._images(stage == 0))

    def _images(self, measured: bool) -> Optional[List[int]]:
        """Images for measuring errors, or for minibatches; None for all."""
        if not self.sos.roll_back or self.num_images < HELD_OUT:
            return None
        return [
            image for image in range(len(self.activations.sizes))
            if (image % self.num_images % HELD_OUT == HELD_OUT - 1) == measured
        ]

    def _reconstruct(self, stage: int, inputs: ActivationStore,
                     meter: ErrorMeter) -> Dict[str, float]:
        """Run the iterations of a stage; its errors as in ``UnitRecord``."""
        iters = self.sos.iters_of(stage)
        rates = [group for group in self._rates(stage) if group[0]]
        before = after = meter.error()
        # A single layer may have nothing but a weight that stays as rounded.
        if iters == 0 or not rates:
            self.on_step(stage, 0, 0)
        else:
            params = list(self.unit.module.parameters())
            saved = [param.detach().clone() for param in params]
            reconstruct(
                self._sampler(stage, inputs), iters, rates,
                lambda step: self.on_step(stage, step, iters))
            after = meter.error()
            # Not a number is no improvement either.
            if self.sos.roll_back and not after <= before:
                self.undone[f'stage_{stage}'] = after
                after = before
                with torch.no_grad():
                    for param, value in zip(params, saved):
                        param.copy_(value)
        return {f'before_stage_{stage}': before, f'after_stage_{stage}': after}

    def _rates(self, stage: int) -> List[Tuple[List[nn.Parameter], float]]:
        """The parameters that a stage optimises, with their learning rates."""
        layers = quantized_layers(self.unit.module)
        weights = [layer.weight for layer in layers]
        others = [
            param for param in self.unit.module.parameters()
            if all(param is not weight for weight in weights)
        ]
        sos = self.sos
        if (stage == 3 and len(layers) == 1 and sos.freeze_single_layers
                and sos.closed_form_start):
            weights = []
        return [(weights, sos.lr), (others, sos.lr * sos.other_lr_ratio)]
