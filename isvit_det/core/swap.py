"""Replacing layers of a model by quantized ones, and back."""
from typing import Iterable, Mapping

from torch import nn

from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.core.settings import QuantConfig

QUANTIZED_LAYERS = (QuantLinear, QuantConv2d)


def quantized_version(layer: nn.Module,
                      config: QuantConfig,
                      place: str = '') -> nn.Module:
    """A quantized layer that shares the parameters of a float one.

    Args:
        layer: a Linear or Conv2d.
        config: bits and range search.
        place: of the layer's input, see ``activation_quantizer``.
    """
    if isinstance(layer, nn.Linear):
        quantized: nn.Module = QuantLinear(layer, config, place)
    else:
        assert isinstance(layer, nn.Conv2d)
        quantized = QuantConv2d(layer, config, place=place)
    return quantized.train(layer.training)


def float_version(layer: nn.Module) -> nn.Module:
    """A float layer that shares the parameters of a quantized one."""
    if isinstance(layer, QuantLinear):
        replacement: nn.Module = nn.Linear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            device='meta')
    else:
        assert isinstance(layer, QuantConv2d)
        replacement = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore
            layer.stride,  # type: ignore
            layer.padding,  # type: ignore
            layer.dilation,  # type: ignore
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device='meta')
    replacement.weight = layer.weight
    replacement.bias = layer.bias  # type: ignore
    return replacement.train(layer.training)


def replace_(model: nn.Module, replacements: Mapping[nn.Module,
                                                     nn.Module]) -> None:
    """Replace modules of a model by others, at all places where they occur."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def make_float_(model: nn.Module, names: Iterable[str]) -> None:
    """Turn quantized layers back into float ones with the same parameters.

    A layer that occurs several times in the model is turned back everywhere.

    Args:
        model: has the layers.
        names: of the layers; names of other modules are ignored.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {modules[name] for name in names if name in modules}
    replace_(
        model, {
            layer: float_version(layer)
            for layer in layers if isinstance(layer, QUANTIZED_LAYERS)
        })
