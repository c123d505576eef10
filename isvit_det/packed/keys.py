"""Keys of a quantized model's state dict, by where their values come from."""
from typing import Any, Iterable, Iterator, Set, Tuple

from torch import nn

from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.core.quantizers import Quantizer

# The suffix of a key for a layer's packed weight, in place of ``weight``.
CODES = 'weight_codes'


def named_modules(model: nn.Module) -> Iterable[Tuple[str, nn.Module]]:
    """Modules by name; one that occurs twice has two names, and two keys."""
    return model.named_modules(remove_duplicate=False)


def named_layers(model: nn.Module) -> Iterator[Tuple[str, Any]]:
    """Layers with quantized weights by name."""
    for name, module in named_modules(model):
        if isinstance(module, (QuantLinear, QuantConv2d)):
            yield name, module


def named_quantizers(model: nn.Module) -> Iterator[Tuple[str, Quantizer]]:
    """Quantizers by name."""
    for name, module in named_modules(model):
        if isinstance(module, Quantizer):
            yield name, module


def _buffer_keys(name: str, module: nn.Module,
                 names: Iterable[str]) -> Set[str]:
    held = {n for n, b in module.named_buffers(recurse=False)}
    return {f'{name}.{n}' if name else n for n in names if n in held}


def own_keys(model: nn.Module) -> Set[str]:
    """Keys of the buffers that the float model does not have."""
    keys: Set[str] = set()
    for name, module in named_modules(model):
        names: Iterable[str] = getattr(module, 'own_buffers', ())
        if isinstance(module, Quantizer):
            names = [n for n, _ in module.named_buffers(recurse=False)]
        keys |= _buffer_keys(name, module, names)
    return keys


def derived_keys(model: nn.Module) -> Set[str]:
    """Keys of the buffers that a model computes from its settings."""
    keys: Set[str] = set()
    for name, module in named_modules(model):
        keys |= _buffer_keys(name, module,
                             getattr(module, 'derived_buffers', ()))
    return keys


def implied_keys(model: nn.Module) -> Set[str]:
    """Keys that a packed state leaves out, because the model knows them."""
    fitted = {f'{name}.fitted' for name, _ in named_quantizers(model)}
    return fitted | derived_keys(model)
