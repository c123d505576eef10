"""Seconds of each layer on the native kernels as a function of its bits."""
import copy
from functools import partial
from typing import Any, Dict, Mapping, Sequence, Tuple

import torch
from torch import Tensor, nn

from isvit_det.core.errors import QuantError
from isvit_det.core.hooks import forward_hooks
from isvit_det.core.layers import (QuantConv2d, quantized_layers,
                                   set_precision_, simulation)
from isvit_det.core.mixed import copy_at
from isvit_det.core.quantizers import Quantizer
from isvit_det.core.settings import QuantConfig
from isvit_det.core.table_quantizer import TableQuantizer
from isvit_det.plans.layer import Unsupported
from isvit_det.report.timing import take_turns
from isvit_det.runtime.layers import NativeConv, NativeLinear

# Bits of weights and of activations.
Bits = Tuple[int, int]


def layer_seconds(model: Any,
                  batch: Mapping[str, Any],
                  config: QuantConfig,
                  pairs: Sequence[Bits],
                  rounds: int = 3) -> Dict[str, Dict[Bits, float]]:
    """Seconds of all calls of each layer in one prediction, at several bits.

    Each layer runs by itself, with ranges of its own input, which need no
    calibration. What a layer's time depends on beside its bits (the spread
    of its weights decides how many products fit 16 bits) is that of
    min-max ranges.

    Args:
        model: of ``quantized_detector``; it predicts as it is.
        batch: of one image, as a data loader yields it; it stays as it is.
        config: settings of the quantizers.
        pairs: bits to time.
        rounds: measurements of each call, of which the median counts.

    Returns:
        Seconds by the layer's name and by bits; a layer that the kernels
        cannot run at some bits lacks these.

    Raises:
        QuantError: if there are no native kernels, or the model is not on
            a CPU.
    """
    device = next(model.parameters()).device.type
    if device != 'cpu':
        raise QuantError('seconds: the native kernels run on a CPU, and the '
                         f'model is on a device of type {device!r}; give '
                         '--device cpu.')
    choice = model.runtime.choose()
    if choice.isa is None:
        raise QuantError('seconds: there are no native kernels to time '
                         f'({choice.reason}).')
    names = {layer: name for name, layer in model.named_modules()}
    found: Dict[str, Dict[Bits, float]] = {}
    missing = set()

    def note(layer: Any, args: Any, output: Any) -> None:
        runs = {}
        for pair in pairs:
            twin = ranged(layer, args[0], config, pair)
            kind = NativeConv if isinstance(layer,
                                            QuantConv2d) else (NativeLinear)
            try:
                native = kind(twin, choice.isa)  # type: ignore
            except Unsupported:
                missing.add((names[layer], pair))
                continue
            runs[str(pair)] = partial(native, args[0])
        seconds = take_turns(runs, rounds)
        own = found.setdefault(names[layer], {})
        for pair in pairs:
            if str(pair) in seconds:
                own[pair] = own.get(pair, 0.) + seconds[str(pair)].wall

    hooks = [(layer, note) for layer in quantized_layers(model)]
    with forward_hooks(hooks), simulation(model), torch.no_grad():
        # Preprocessing may change its samples.
        model.test_step(copy.deepcopy(dict(batch)))
    for name, pair in missing:
        found[name].pop(pair, None)
    return found


@torch.no_grad()
def ranged(layer: Any, x: Tensor, config: QuantConfig, bits: Bits) -> Any:
    """A copy of a layer that is quantized by the ranges of one input.

    Args:
        layer: a quantized layer, which stays as it is.
        x: its input.
        config: settings of the quantizers.
        bits: of weights and activations.
    """
    twin = copy_at(layer, config.of_bits(*bits))
    _set_range_(twin.input_quantizer, x.min()[None], x.max()[None])
    rows = layer.weight.flatten(1)
    _set_range_(twin.weight_quantizer, rows.amin(1), rows.amax(1))
    twin.eval()
    set_precision_(twin, True, True)
    return twin


def _set_range_(quantizer: Quantizer, low: Tensor, high: Tensor) -> None:
    """Spread the codes of a quantizer over ranges that include 0, (C,)."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**quantizer.bits - 1
    if isinstance(quantizer, TableQuantizer):
        top = 2**quantizer.entry_bits - 1
        spread = torch.linspace(0, top, 2**quantizer.bits)
        quantizer.entries.copy_(spread.round())
    scale = ((high - low) / top).clamp(min=1e-8)
    state: nn.Module = quantizer
    state.scale.copy_(scale.view_as(state.scale))  # type: ignore
    state.zero_point.copy_(  # type: ignore
        (-low / scale).round().view_as(state.zero_point))  # type: ignore
    quantizer.mark_fitted_()
