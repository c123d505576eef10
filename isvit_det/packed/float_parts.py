"""The parts of a detector that stay in float, in the header of a state.

A detector has two attributes for them: ``float_layers``, which gives the
reason for each layer that was built quantized and was turned back into float,
and ``products``, the names of the modules that multiply activations by
activations.
"""
from typing import Any, Dict, List, Mapping

from torch import Tensor

from isvit_det.core.swap import QUANTIZED_LAYERS, make_float_

PARTS = ('float_layers', 'products')
# The reason for a layer, if the state does not give one.
IN_FLOAT = 'it is in float in the state that was loaded'
# A calibrated state has at least one of these keys for each quantized layer.
OWN_KEYS = ('weight_codes', 'weight_quantizer.scale', 'input_quantizer.scale')


def float_parts(model: Any) -> Dict[str, Any]:
    """Entries of a header: those of the two attributes that a model has."""
    return {part: vars(model)[part] for part in PARTS if part in vars(model)}


def take_float_parts_(model: Any, header: Mapping[str, Any],
                      state: Mapping[str, Tensor], prefix: str) -> None:
    """Turn the layers back into float that a calibrated state has in float.

    The header names them; without a header, the keys of the state do.

    Args:
        model: the model that is to load the state.
        header: of the state; empty if it has none.
        state: float or calibrated, packed or not.
        prefix: of the model's keys in the state.
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

    Layers of the backbone are not among them: it is quantized as a whole. If
    nothing outside of the backbone is quantized, there are none either: then
    the state has float weights, or was calibrated with another scope.
    """
    backbone = getattr(model, 'backbone', None)
    inside = set() if backbone is None else set(backbone.modules())
    in_float, has_quantized = [], False
    for name, layer in model.named_modules(remove_duplicate=False):
        if layer in inside or not isinstance(layer, QUANTIZED_LAYERS):
            continue
        if any(f'{prefix}{name}.{key}' in state for key in OWN_KEYS):
            has_quantized = True
        elif f'{prefix}{name}.weight' in state:
            in_float.append(name)
    return in_float if has_quantized else []
