"""Predictions of a detector with a part exchanged, from that part on.

A prediction of the detector as it is leaves the outputs of its backbone's
units and of its children. With a part exchanged, what runs before it gives
the same outputs again, and only the part and what comes after it are
computed.
"""
import contextlib
import copy
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

import torch
from torch import Tensor, nn

from isvit_det.core.hooks import forward_hooks
from isvit_det.core.layers import precision, quantizers, simulation
from isvit_det.core.mixed import named_parts
from isvit_det.sensitivity.parts import Part

Forward = Callable[..., Any]


class Recorded:
    """Outputs of a detector's modules in one prediction.

    Args:
        model: predicts as it is.
        batch: of one image, as a data loader yields it; it stays as it is.

    Attributes:
        sample: the prediction.
        outputs: by module, of those that were called once.
        layers: output of the first call of each quantized layer outside of
            the backbone, by name.
    """

    def __init__(self, model: Any, batch: Mapping[str, Any]) -> None:
        self.model = model
        self.batch = batch
        calls: Dict[nn.Module, List[Any]] = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            calls.setdefault(module, []).append(output)

        modules = [unit.module for unit in model.backbone.units()]
        modules += [child for _, child in model.named_children()]
        with forward_hooks((module, note) for module in modules), \
                first_outputs(model) as self.layers:
            self.sample = predict(model, batch)
        self.outputs = {
            module: found[0]
            for module, found in calls.items() if len(found) == 1
        }

    def before(self, part: Part) -> Dict[nn.Module, Forward]:
        """Forwards of the modules that run before a part, from memory."""
        if part.unit is not None:
            units = self.model.backbone.units()
            modules = [unit.module for unit in units[:part.unit]]
        else:
            modules = []
            for name, child in self.model.named_children():
                if name == part.child:
                    break
                # Its data samples would be filled again.
                if name != 'data_preprocessor':
                    modules.append(child)
        return {
            module: _giving(self.outputs[module])
            for module in modules if module in self.outputs
        }


def _giving(output: Any) -> Forward:
    return lambda *args, **kwargs: output


@contextlib.contextmanager
def first_outputs(model: Any) -> Iterator[Dict[str, Tensor]]:
    """Keep the first outputs of quantized layers outside of the backbone.

    Yields:
        The outputs by name; filled as the model runs.
    """
    found: Dict[str, Tensor] = {}

    def noting(name: str) -> Callable[..., None]:

        def note(layer: nn.Module, args: Any, output: Tensor) -> None:
            found.setdefault(name, output)

        return note

    with forward_hooks((part, noting(name))
                       for name, part in named_parts(model)
                       if not name.startswith('backbone.')):
        yield found


@torch.no_grad()
def predict(model: Any, batch: Mapping[str, Any]) -> Any:
    """The data sample of a batch of one image, which stays as it is."""
    with simulation(model):
        return model.test_step(copy.deepcopy(dict(batch)))[0]


@torch.no_grad()
def features(model: Any, batch: Mapping[str, Any]) -> List[Tensor]:
    """The maps that the heads of a detector get of one image."""
    with simulation(model):
        data = model.data_preprocessor(copy.deepcopy(dict(batch)), False)
        return list(model.extract_feat(data['inputs']))


@contextlib.contextmanager
def forwards(exchanged: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let modules compute something else in this context."""
    for module, forward in exchanged.items():
        # An attribute of the module hides the method of its class.
        module.forward = forward  # type: ignore
    try:
        yield
    finally:
        for module in exchanged:
            del module.forward


@contextlib.contextmanager
def exchange(model: Any,
             other: Any,
             part: Part,
             quantized: Optional[bool] = None) -> Iterator[None]:
    """Let a part of a model compute what it does in another one.

    Args:
        model: whose part is exchanged.
        other: of the same architecture.
        part: of both.
        quantized: whether the part alone is quantized in the other model's
            unit (True), or is in float there alone (False); None takes the
            other model as it is.
    """
    there = dict(other.named_modules())
    here = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        if part.unit is not None:
            unit = other.backbone.units()[part.unit].module
            if quantized is not None:
                stack.enter_context(_alone(unit, there, part, quantized))
            mine = model.backbone.units()[part.unit].module
            stack.enter_context(forwards({mine: unit.forward}))
        else:
            stack.enter_context(
                forwards({
                    here[name]: there[name].forward
                    for name in part.layers if name in there
                }))
        yield


@contextlib.contextmanager
def _alone(unit: nn.Module, there: Mapping[str, nn.Module], part: Part,
           quantized: bool) -> Iterator[None]:
    """Turn the quantizers of a part on or off, and the unit's others."""
    inside = {
        quantizer
        for name in part.layers
        for quantizer in quantizers(there[name]).values()
    }
    with precision(unit, True, True):
        for quantizer in quantizers(unit).values():
            quantizer.enabled = (quantizer in inside) == quantized
        yield
