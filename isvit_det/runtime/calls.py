"""Which calls of a module may run natively instead of by its own forward."""
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.core.quantizers import Quantizer


def is_hooked(holder: Any, prefix: str = '') -> bool:
    """Whether a module has forward hooks.

    Args:
        holder: the module, or torch's module of hooks for all modules.
        prefix: of the names of its dictionaries of hooks.
    """
    return bool(
        getattr(holder, f'{prefix}_forward_hooks')
        or getattr(holder, f'{prefix}_forward_pre_hooks'))


def is_plain_input(x: Any) -> bool:
    """Whether an input can be run natively.

    It has to be a float32 tensor on the CPU, and nothing else than the result
    may be wanted: no gradients, tracing, autocast or global module hooks.
    """
    return (type(x) is Tensor and x.dtype is torch.float32
            and x.device.type == 'cpu' and not torch.is_grad_enabled()
            and not is_hooked(torch_module, '_global')
            and not torch.jit.is_tracing() and not is_autocast())


def is_autocast() -> bool:
    """Whether torch runs CPU code in half precision at present."""
    try:
        return torch.is_autocast_enabled('cpu')
    except TypeError:
        # torch before 2.4 asks by another name.
        return torch.is_autocast_cpu_enabled()


class Survey(NamedTuple):
    """The state of a part of a model, such as a transformer block.

    Attributes:
        obstacle: why it cannot run natively as a whole; '' if it can.
        tensors: its parameters and buffers.
        quantizers: its quantizers.
    """
    obstacle: str
    tensors: List[Tensor]
    quantizers: List[Quantizer]


def survey(part: nn.Module) -> Survey:
    """Inspect all modules of a calibrated part, once at every forward.

    The part cannot run natively as a whole if one of its modules is being
    trained, calibrated or simulated, or has forward hooks.
    """
    tensors: List[Optional[Tensor]] = []
    quantizers: List[Quantizer] = []
    for module in part.modules():
        obstacle = _obstacle(module)
        if obstacle:
            names = {each: name for name, each in part.named_modules()}
            return Survey(f'{names[module] or "it"} {obstacle}', [], [])
        tensors += module._parameters.values()
        tensors += module._buffers.values()
        if isinstance(module, Quantizer):
            quantizers.append(module)
    return Survey('', [t for t in tensors if t is not None], quantizers)


def _obstacle(module: nn.Module) -> str:
    if module.training:
        return 'is in training mode'
    if is_hooked(module):
        return 'has forward hooks'
    if isinstance(module, Quantizer):
        if not module.enabled:
            return 'is off'
        if module.observer is not None:
            return 'is observed'
    if isinstance(module, (QuantLinear, QuantConv2d)):
        if module.native is None:
            return 'is simulated'
        if module.weight.dtype is not torch.float32:
            return f'has weights in {module.weight.dtype}'
    return ''


def native_isa(part: Any, *inputs: Tensor) -> Any:
    """The kernels for a float part whose class ``attach_parts_`` replaced.

    Returns:
        The ``Isa``; None if MMDetection's own forward is to run.
    """
    if part.native is None or part.training:
        return None
    if not all(is_plain_input(x) for x in inputs):
        return None
    return part.native.choose().isa


class Kept:
    """A cache of one value, which is valid until its tensors change."""

    def __init__(self) -> None:
        self._key: Optional[Tuple[Any, ...]] = None
        self._held: List[Tensor] = []
        self._made: Any = None

    def get(self, tensors: List[Tensor], make: Callable[[], Any], *more:
            Any) -> Any:
        """The cached value, which ``make`` computes again if necessary.

        Args:
            tensors: what the value is made of; changes in place are noticed by
                their version counters.
            make: computes the value.
            *more: further objects that it depends on.
        """
        key = (*more, *((t.data_ptr(), 0 if t.is_inference() else t._version)
                        for t in tensors))
        if key != self._key:
            # While they are held, their addresses are not reused.
            self._held = [tensor.detach() for tensor in tensors]
            self._made = make()
            self._key = key
        return self._made
