"""Choice of the engine of a quantized model: native kernels or simulation.

``attach_runtime_`` gives every quantized layer of a model a native forward. At
each call that decides whether it can run. Whatever it cannot run, such as
training, other devices or inner modules with hooks, is simulated in float.
"""
import os
from typing import Any, Dict, List, NamedTuple, Optional, Union

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from isvit_det.backbones.quant_vit import QuantVisionTransformer
from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.core.errors import QuantError, few_names
from isvit_det.core.layers import QuantConv2d, QuantLinear, quantized_layers
from isvit_det.plans.layer import Unsupported
from isvit_det.runtime import ENGINES
from isvit_det.runtime.build import NoLibrary
from isvit_det.runtime.calls import (Kept, is_autocast, is_hooked,
                                     is_plain_input)
from isvit_det.runtime.float_parts import attach_parts_, entrances
from isvit_det.runtime.layers import NativeConv, NativeLinear
from isvit_det.runtime.native import Isa, supported_isas
from isvit_det.runtime.parts import NativeParts
from isvit_det.runtime.swin_backbone import SwinForward
from isvit_det.runtime.vit_backbone import VitForward

# Read at every forward; takes precedence over ``model.engine``.
VARIABLE = 'ISVIT_DET_ENGINE'
# Layers or blocks that a line in the log lists with their reasons.
SHOWN_LAYERS = 3

Layer = Union[QuantLinear, QuantConv2d]


def check_engine(name: str, value: Any) -> str:
    """Check that a value names an engine, and return it.

    Args:
        name: of the setting, for the error.
        value: of the setting.

    Raises:
        QuantError: if there is no such engine.

    >>> check_engine('model.engine', 'fast')
    Traceback (most recent call last):
    ...
    isvit_det.core.errors.QuantError: model.engine: 'fast' is not allowed; \
expected one of ['auto', 'native', 'simulation'].
    """
    if value not in ENGINES:
        raise QuantError(f'{name}: {value!r} is not allowed; expected one of '
                         f'{list(ENGINES)}.')
    return value


class Choice(NamedTuple):
    """The kernels to use.

    Attributes:
        isa: their instruction set; None for the simulation.
        reason: of this choice.
    """
    isa: Optional[Isa]
    reason: str


class Runtime:
    """The choice of an engine for all layers of a model.

    Args:
        engine: ``'native'`` uses the native kernels wherever they can run,
            ``'auto'`` only on CPUs where they are known to be faster than the
            simulation, and ``'simulation'`` never.

    Attributes:
        engine: may be set at any time.
        announced: the choice that the log has last reported.
    """

    def __init__(self, engine: str = 'auto') -> None:
        self.engine = check_engine('model.engine', engine)
        self.announced: Optional[Choice] = None

    def choose(self) -> Choice:
        """Choose by the current settings and the CPU.

        Raises:
            QuantError: if ``ISVIT_DET_ENGINE`` names no engine.
        """
        if is_autocast():
            return Choice(None, 'autocast is on')
        engine = os.environ.get(VARIABLE)
        source = VARIABLE
        if engine:
            check_engine(VARIABLE, engine)
        else:
            engine, source = self.engine, 'model.engine'
        if engine == 'simulation':
            return Choice(None, f"{source} is 'simulation'")
        try:
            isa = supported_isas()[0]
        except NoLibrary as error:
            return Choice(None, f'there is no native library: {error}')
        if engine == 'auto' and isa is Isa.PORTABLE:
            return Choice(
                None, 'for this CPU there are only portable kernels, which '
                f'may be slower; {VARIABLE}=native uses them')
        return Choice(isa, f'{source} is {engine!r}')


class _Forward:
    """The native forward of one layer; can be copied and pickled.

    Attributes:
        channels_last: see ``NativeConv``.
        reason: why the layer cannot run natively, once ``prepare`` was called;
            '' if it can.
    """

    def __init__(self, runtime: Runtime, channels_last: bool = False) -> None:
        self.runtime = runtime
        self.channels_last = channels_last
        self._kept = Kept()
        self.reason = ''

    def __getstate__(self) -> Dict[str, Any]:
        # Packed weights have pointers; a copy prepares its own.
        return vars(_Forward(self.runtime, self.channels_last))

    def __call__(self, layer: Any, x: Tensor) -> Optional[Tensor]:
        if not _is_plain_call(layer, x):
            return None
        isa = self.runtime.choose().isa
        prepared = None if isa is None else self.prepare(layer, isa)
        if prepared is None:
            return None
        for quantizer in (layer.input_quantizer, layer.weight_quantizer):
            quantizer.num_calls += x.numel() > 0
        return prepared(x)

    def prepare(self, layer: Layer,
                isa: Isa) -> Union[NativeLinear, NativeConv, None]:
        """The native form of the layer, packed again if it has changed.

        Returns:
            None if the kernels cannot run it; ``reason`` then says why.
        """

        def make() -> Union[NativeLinear, NativeConv, None]:
            self.reason = ''
            try:
                if isinstance(layer, QuantConv2d):
                    return NativeConv(layer, isa, self.channels_last)
                return NativeLinear(layer, isa)
            except Unsupported as error:
                self.reason = str(error)
                return None

        return self._kept.get(_tensors_of(layer), make, isa)


def _is_plain_call(layer: Any, x: Tensor) -> bool:
    """Whether a call can be replaced: nothing but its output is wanted."""
    inner = (layer.input_quantizer, layer.weight_quantizer)
    return (not layer.training and is_plain_input(x)
            and layer.weight.dtype is torch.float32
            and x.ndim >= (4 if isinstance(layer, QuantConv2d) else 1) and all(
                q.enabled and q.observer is None and not is_hooked(q)
                for q in inner))


def _tensors_of(layer: Layer) -> List[Tensor]:
    """The tensors that determine a layer's native form."""
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    tensors = (layer.weight, layer.bias,
               getattr(layer, 'offset', None), inputs.scale, inputs.zero_point,
               getattr(inputs, 'entries',
                       None), weights.scale, weights.zero_point)
    return [tensor for tensor in tensors if tensor is not None]


def attach_runtime_(model: Any, engine: str = 'auto') -> None:
    """Let a model's quantized layers run natively.

    ``model.runtime`` is set to the model's ``Runtime``. A layer is packed
    again whenever its tensors were replaced or changed in place. Changes
    through ``.data`` go unnoticed, since torch does not count them.

    Before the first prediction of a calibrated model, a line in the log says
    which engine runs it and why.

    Args:
        model: a quantized detector or classifier.
        engine: ``'auto'``, ``'native'`` or ``'simulation'``, see ``Runtime``.

    Raises:
        QuantError: if there is no such engine.
    """
    model.runtime = Runtime(engine)
    for layer in quantized_layers(model):
        layer.native = _Forward(model.runtime)
    for module in model.modules():
        if isinstance(module, QuantSwinTransformer):
            module.native = SwinForward(model.runtime)
        elif isinstance(module, QuantVisionTransformer):
            module.native = VitForward(model.runtime)
    attach_parts_(model, model.runtime)
    for layer in entrances(model):
        layer.native.channels_last = True
    model.register_forward_pre_hook(_announce)


def describe_engine(model: nn.Module) -> Dict[str, Any]:
    """Report which engine runs a calibrated model, and why.

    All layers are packed for this, as the next prediction needs them.

    Args:
        model: one that ``attach_runtime_`` was called on.

    Returns:
        A dictionary with ``engine``, ``'native'`` or ``'simulation'``;
        ``kernels``, the name of the instruction set, or None; ``reason``, why
        these were chosen; ``native_layers``, the number of quantized layers
        that run natively; ``simulated``, the names of the others with the
        reason for each; ``unfused``, the names of blocks that run layer by
        layer instead of as a whole, with the reason for each.
    """
    choice = model.runtime.choose()  # type: ignore
    device = next(model.parameters()).device.type
    if choice.isa is not None and device != 'cpu':
        choice = Choice(None, f'the model is on a device of type {device!r}')
    names = {module: name for name, module in model.named_modules()}
    wholes: Dict[nn.Module, str] = {}
    for backbone in names if choice.isa is not None else ():
        native = getattr(backbone, 'native', None)
        if isinstance(native, NativeParts):
            wholes.update(native.describe(backbone, choice.isa))
    fused = {
        layer
        for whole, reason in wholes.items() if not reason
        for layer in whole.modules()
    }
    simulated: Dict[str, str] = {}
    num_native = 0
    for layer in quantized_layers(model):
        reason = ''
        if choice.isa is None:
            reason = 'the whole model is simulated'
        elif not isinstance(layer.native, _Forward):
            reason = 'it was replaced'
        elif layer not in fused:
            layer.native.prepare(layer, choice.isa)
            reason = layer.native.reason
        if reason:
            simulated[names[layer]] = reason
        else:
            num_native += 1
    is_native = num_native > 0
    return dict(
        engine='native' if is_native else 'simulation',
        kernels=choice.isa.name if is_native and choice.isa else None,
        reason=choice.reason,
        native_layers=num_native,
        simulated=simulated,
        unfused={
            names[whole]: reason
            for whole, reason in wholes.items() if reason
        })


def engine_line(found: Dict[str, Any]) -> str:
    """The report of ``describe_engine`` as one line."""
    simulated = found['simulated']
    total = found['native_layers'] + len(simulated)
    if found['engine'] == 'simulation':
        return (f'engine: all {total} quantized layers are simulated in '
                f'float, since {found["reason"]}')
    text = (f'engine: {found["native_layers"]} of {total} quantized layers '
            f'run in integers ({found["kernels"]} kernels; '
            f'{found["reason"]}), all else in float')
    if simulated:
        text += f'; simulated: {_with_reasons(simulated)}'
    # Reports of earlier versions lack this key.
    if found.get('unfused'):
        text += ('; blocks that run layer by layer: '
                 f'{_with_reasons(found["unfused"])}')
    return text


def _with_reasons(reasons: Dict[str, str]) -> str:
    names = [f'{name} ({reason})' for name, reason in reasons.items()]
    return few_names(names, SHOWN_LAYERS)


def _announce(model: Any, args: Any) -> None:
    """Log which engine runs a calibrated model, once for each choice."""
    choice = model.runtime.choose()
    if (model.training or choice == model.runtime.announced
            or not quantized_layers(model)):
        return
    if all(layer.input_quantizer.enabled for layer in quantized_layers(model)):
        model.runtime.announced = choice
        line = engine_line(describe_engine(model))
        MMLogger.get_current_instance().info(line)
