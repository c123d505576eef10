"""The speed of a packed detector in float, in the simulation and natively."""
import contextlib
import copy
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence

import torch
from torch import nn

from isvit_det.core.hooks import forward_hooks
from isvit_det.core.layers import precision, quantized_layers
from isvit_det.report.timing import Seconds, take_turns

# 'float' is the detector with its quantizers off, run by torch.
FLOAT = 'float'


@contextlib.contextmanager
def running(part: nn.Module, runtime: Any, engine: str) -> Iterator[None]:
    """Run a calibrated model, or a part of it, in an engine in this context.

    Args:
        part: whose quantizers are off for ``FLOAT``.
        runtime: of the model.
        engine: ``FLOAT``, ``'simulation'`` or ``'native'``.
    """
    is_float = engine == FLOAT
    before = runtime.engine
    runtime.engine = 'simulation' if is_float else engine
    try:
        with precision(part, not is_float, not is_float), torch.no_grad():
            yield
    finally:
        runtime.engine = before


def predicting(model: Any, batch: Mapping[str, Any],
               engine: str) -> Callable[[], Any]:
    """A function that predicts a batch in an engine.

    Args:
        model: of ``quantized_detector``, calibrated, in eval mode.
        batch: as a data loader yields it; it stays as it is.
        engine: as for ``running``.
    """

    def predict() -> Any:
        with running(model, model.runtime, engine):
            # Preprocessing may change its samples.
            return model.test_step(copy.deepcopy(dict(batch)))

    return predict


def time_model(model: Any, batch: Mapping[str, Any], engines: Sequence[str],
               rounds: int) -> Dict[str, Seconds]:
    """Seconds of a prediction in each engine, which take turns."""
    return take_turns(
        {engine: predicting(model, batch, engine)
         for engine in engines}, rounds)


def time_layers(model: Any, batch: Mapping[str, Any], engines: Sequence[str],
                rounds: int) -> List[Dict[str, Any]]:
    """Seconds of each quantized layer by itself, for all its calls.

    Each call is repeated on its own input while the model predicts a batch.

    Returns:
        For each layer that a prediction runs: ``name``; ``shape``, that of
        its weight; ``calls``, a number; ``seconds``, wall-clock, by engine;
        ``reason``, why it has no native kernel, or ''.
    """
    names = {layer: name for name, layer in model.named_modules()}
    found: Dict[nn.Module, Dict[str, Any]] = {}

    def run(layer: Any, x: torch.Tensor, engine: str) -> Any:
        with running(layer, model.runtime, engine):
            # Not a call of the layer, which has a hook.
            return layer.forward(x)

    def note(layer: Any, args: Any, output: Any) -> None:
        row = found.setdefault(
            layer,
            dict(
                name=names[layer],
                shape=list(layer.weight.shape),
                calls=0,
                seconds=dict.fromkeys(engines, 0.)))
        row['calls'] += 1
        runs = {
            engine: partial(run, layer, args[0], engine)
            for engine in engines
        }
        for engine, seconds in take_turns(runs, rounds).items():
            row['seconds'][engine] += seconds.wall
        row['reason'] = getattr(layer.native, 'reason', '')

    layers: Sequence[Any] = quantized_layers(model)
    with forward_hooks((layer, note) for layer in layers):
        predicting(model, batch, engines[-1])()
    return list(found.values())


def kind_of(shape: Sequence[int]) -> str:
    """A layer by the shape of its weight.

    >>> kind_of((64, 32)), kind_of((64, 32, 3, 3))
    ('linear 32-64', 'conv 3x3 32-64')
    """
    outputs, inputs, *kernel = shape
    name = f'conv {"x".join(map(str, kernel))}' if kernel else 'linear'
    return f'{name} {inputs}-{outputs}'
