"""What a calibrated state says of the parts of a detector that are in float.

A detector has two attributes for it: ``float_layers``, the reason for each
name of a layer that was quantized when it was built and is no longer, and
``products``, names of the modules that multiply activations by activations.
"""
from typing import Any, Dict, List, Mapping

from torch import Tensor

from isvit_det.core.swap import QUANTIZED_LAYERS, make_float_

PARTS = ('float_layers', 'products')
# Why a layer is in float, where a state says no more than that.
IN_FLOAT = 'it is in float in the state that was loaded'
# A quantized layer has at least one of these in a calibrated state.
OWN_KEYS = ('weight_codes', 'weight_quantizer.scale', 'input_quantizer.scale')


def float_parts(model: Any) -> Dict[str, Any]:
    """What a header says of a model: its two attributes, if it has them."""
    return {part: vars(model)[part] for part in PARTS if part in vars(model)}


def take_float_parts_(model: Any, header: Mapping[str, Any],
                      state: Mapping[str, Tensor], prefix: str) -> None:
    """Turn back into float what a calibrated state has in float.

    A header of ``float_parts`` says so; without, the keys do.

    Args:
        model: that is going to load the state.
        header: of the state; empty if it has none.
        state: packed or not, calibrated or float.
        prefix: of the model's keys in it.
    """
    layers = header.get('float_layers')
    if layers is None:
        layers = dict.fromkeys(_float_by_keys(model, state, prefix), IN_FLOAT)
        if layers:
            layers = {**getattr(model, 'float_layers', {}), **layers}
    if layers or 'float_layers' in header:
        make_float_(model, layers)
        model.float_layers = layers
    if header:
        model.products = header.get('products')


def _float_by_keys(model: Any, state: Mapping[str, Tensor],
                   prefix: str) -> List[str]:
    """Names of quantized layers that are in float in a calibrated state.

    None of the backbone's: it is quantized as a whole. And none where
    nothing outside of it is quantized, which is a state of float weights or
    of another scope.
    """
    backbone = getattr(model, 'backbone', None)
    inside = set() if backbone is None else set(backbone.modules())
    in_float, found = [], False
    for name, layer in model.named_modules(remove_duplicate=False):
        if layer in inside or not isinstance(layer, QUANTIZED_LAYERS):
            continue
        if any(f'{prefix}{name}.{key}' in state for key in OWN_KEYS):
            found = True
        elif f'{prefix}{name}.weight' in state:
            in_float.append(name)
    return in_float if found else []
