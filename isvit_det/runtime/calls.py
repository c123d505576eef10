"""Which calls of a model's parts may be run by other means than theirs."""
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.core.quantizers import Quantizer


def is_hooked(holder: Any, prefix: str = '') -> bool:
    """Whether forward hooks watch a module."""
    return bool(
        getattr(holder, f'{prefix}_forward_hooks')
        or getattr(holder, f'{prefix}_forward_pre_hooks'))


def is_plain_input(x: Any) -> bool:
    """Whether a float32 tensor on the CPU is asked for no more than a result:
    no gradients, traces or hooks of all modules."""
    return (type(x) is Tensor and x.dtype is torch.float32
            and x.device.type == 'cpu' and not torch.is_grad_enabled()
            and not is_hooked(torch_module, '_global')
            and not torch.jit.is_tracing() and not _is_autocast())


def _is_autocast() -> bool:
    try:
        return torch.is_autocast_enabled('cpu')
    except TypeError:
        # torch before 2.4 asks by another name.
        return torch.is_autocast_cpu_enabled()


class Survey(NamedTuple):
    """What is in a part of a model.

    Attributes:
        obstacle: why it cannot be run as a whole; '' if it can.
        tensors: its parameters and buffers.
        quantizers: all that it has.
    """
    obstacle: str
    tensors: List[Tensor]
    quantizers: List[Quantizer]


def survey(part: nn.Module) -> Survey:
    """Look through a calibrated part, once at every forward.

    It cannot be run as a whole where anyone watches, trains or simulates
    something in it.
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
    """The kernels for a part of a model that ``attach_parts_`` exchanged.

    Returns:
        The ``Isa``; None where the part is to run as MMDetection has it.
    """
    if part.native is None or part.training:
        return None
    if not all(is_plain_input(x) for x in inputs):
        return None
    return part.native.choose().isa


class Kept:
    """What was made of a module's tensors, for as long as these stay."""

    def __init__(self) -> None:
        self._key: Optional[Tuple[Any, ...]] = None
        self._held: List[Tensor] = []
        self._made: Any = None

    def get(self, tensors: List[Tensor], make: Callable[[], Any], *more:
            Any) -> Any:
        """What ``make`` gives, or gave for the same tensors and ``more``."""
        key = (*more, *((t.data_ptr(), 0 if t.is_inference() else t._version)
                        for t in tensors))
        if key != self._key:
            # No other tensor takes the place of one that is held.
            self._held = [tensor.detach() for tensor in tensors]
            self._made = make()
            self._key = key
        return self._made
