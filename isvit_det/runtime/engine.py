"""Which engine runs a quantized model: the native kernels or a simulation.

``attach_runtime_`` gives every quantized layer of a model a way to run
natively. It is asked at every forward of the layer, and leaves what it cannot
run, such as training, other devices or observed inner modules, to the
simulation in float.
"""
import os
from typing import Any, Dict, List, NamedTuple, Optional, Union

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from isvit_det.backbones.quant_vit import QuantVisionTransformer
from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import QuantConv2d, QuantLinear, quantized_layers
from isvit_det.runtime import ENGINES
from isvit_det.runtime.build import NoLibrary
from isvit_det.runtime.calls import Kept, is_hooked, is_plain_input
from isvit_det.runtime.float_parts import attach_parts_, entrances
from isvit_det.runtime.layers import NativeConv, NativeLinear
from isvit_det.runtime.native import Isa, supported_isas
from isvit_det.runtime.parts import NativeParts
from isvit_det.runtime.plan import Unsupported
from isvit_det.runtime.swin_backbone import SwinForward
from isvit_det.runtime.vit_backbone import VitForward

# Read at every forward; stands above what the model was built with.
VARIABLE = 'ISVIT_DET_ENGINE'
SHOWN_LAYERS = 3

Layer = Union[QuantLinear, QuantConv2d]


def check_engine(name: str, value: Any) -> str:
    """An engine's name as it is.

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
    """The kernels that are used, or why none are."""
    isa: Optional[Isa]
    reason: str


class Runtime:
    """Decides for all layers of a model which engine runs them.

    Args:
        engine: ``'auto'`` takes the native kernels where they are known to
            be faster than the simulation, ``'native'`` wherever they run,
            ``'simulation'`` nowhere.

    Attributes:
        engine: may be set at any time.
    """

    def __init__(self, engine: str = 'auto') -> None:
        self.engine = check_engine('model.engine', engine)
        self.announced: Optional[Choice] = None

    def choose(self) -> Choice:
        """What the settings and this machine say now."""
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
                None, 'this CPU has only portable kernels, which '
                f'are not known to be faster; {VARIABLE}=native takes them')
        return Choice(isa, f'{source} is {engine!r}')


class _Forward:
    """Runs one layer natively where it can; can be copied and pickled.

    Attributes:
        channels_last: of a convolution, as for ``NativeConv``.
    """

    def __init__(self, runtime: Runtime, channels_last: bool = False) -> None:
        self.runtime = runtime
        self.channels_last = channels_last
        self._kept = Kept()
        self.reason = ''

    def __getstate__(self) -> Dict[str, Any]:
        # What was prepared is made anew.
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
        """The layer as it is now, packed; None, with ``reason``, if it cannot
        be run."""

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
    """Whether a layer's output is all that anyone wants of a call."""
    inner = (layer.input_quantizer, layer.weight_quantizer)
    return (not layer.training and is_plain_input(x)
            and layer.weight.dtype is torch.float32
            and x.ndim >= (4 if isinstance(layer, QuantConv2d) else 1) and all(
                q.enabled and q.observer is None and not is_hooked(q)
                for q in inner))


def _tensors_of(layer: Layer) -> List[Tensor]:
    """All that a plan is made of."""
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    tensors = (layer.weight, layer.bias,
               getattr(layer, 'offset', None), inputs.scale, inputs.zero_point,
               getattr(inputs, 'entries',
                       None), weights.scale, weights.zero_point)
    return [tensor for tensor in tensors if tensor is not None]


def attach_runtime_(model: Any, engine: str = 'auto') -> None:
    """Let a model's quantized layers run natively.

    A layer is packed again whenever its tensors were exchanged or changed in
    place, but for changes by way of ``.data``, which torch does not count.

    ``model.runtime`` becomes its ``Runtime``. Before the first prediction of
    a calibrated model a line in the log says what runs how and why.

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
    """What runs a calibrated model of ``attach_runtime_``, and why.

    What is packed for that is what the next prediction runs.

    Returns:
        ``engine``, ``'native'`` or ``'simulation'``; ``kernels``, of which
        CPU, or None; ``reason``; ``native_layers``, a number; ``simulated``,
        the other quantized layers by name with the reason for each;
        ``unfused``, the blocks by name whose layers are run one by one,
        with the reason for each.
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
            reason = 'it was exchanged'
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
    """What ``describe_engine`` found, as one line."""
    simulated = found['simulated']
    total = found['native_layers'] + len(simulated)
    if found['engine'] == 'simulation':
        return (f'engine: all {total} quantized layers are simulated in '
                f'float, since {found["reason"]}')
    text = (f'engine: {found["native_layers"]} of {total} quantized layers '
            f'run in integers ({found["kernels"]} kernels; '
            f'{found["reason"]}), all else in float')
    if simulated:
        text += f'; simulated: {_few(simulated)}'
    # Reports of earlier versions do not have these.
    if found.get('unfused'):
        text += f'; blocks that run layer by layer: {_few(found["unfused"])}'
    return text


def _few(reasons: Dict[str, str]) -> str:
    shown = [f'{name} ({reason})' for name, reason in reasons.items()]
    more = ', ...' if len(shown) > SHOWN_LAYERS else ''
    return ', '.join(shown[:SHOWN_LAYERS]) + more


def _announce(model: Any, args: Any) -> None:
    """Log once which engine runs a calibrated model, and when it changes."""
    choice = model.runtime.choose()
    if model.training or choice == model.runtime.announced:
        return
    if all(layer.input_quantizer.enabled for layer in quantized_layers(model)):
        model.runtime.announced = choice
        line = engine_line(describe_engine(model))
        MMLogger.get_current_instance().info(line)
