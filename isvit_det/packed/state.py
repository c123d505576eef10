"""Packing the state dict of a calibrated model, and the settings in it."""
from typing import Any, Dict, Mapping, Optional

import torch
from torch import Tensor, nn

from isvit_det.core.bit_packing import pack
from isvit_det.core.errors import QuantError
from isvit_det.core.settings import QuantConfig
from isvit_det.packed.float_parts import float_parts
from isvit_det.packed.header import (FORMAT_VERSION, HEADER, describe_others,
                                     read_header, write_header)
from isvit_det.packed.keys import CODES, implied_keys, named_layers

# Values of the settings that files written before lack: what they did.
EARLIER = dict(activation_tables=())


def pack_state(
        model: nn.Module,
        config: QuantConfig,
        others: Optional[Mapping[str, Any]] = None) -> Dict[str, Tensor]:
    """State of a calibrated model with weights as dense codes.

    Args:
        model: all its quantizers are fitted. Its attributes ``float_layers``
            and ``products``, if it has them, are stored in the header.
        config: the settings that it was built with.
        others: the other entries of the file by name, in plain values.

    Returns:
        CPU tensors by name. ``X.weight`` of a quantized layer becomes
        ``X.weight_codes`` (uint8, dense) beside the scales. Zero points have
        the smallest integer type that holds them. Buffers that the model
        computes by itself are left out. The header holds the settings and a
        checksum.
    """
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    for key in implied_keys(model):
        del state[key]
    for name, layer in named_layers(model):
        quantizer = layer.weight_quantizer
        codes = quantizer.encode(layer.weight.detach())
        del state[f'{name}.weight']
        state[f'{name}.{CODES}'] = pack(codes, quantizer.bits).cpu()
        key = f'{name}.weight_quantizer.zero_point'
        state[key] = _in_smallest_type(state[key])
    header = dict(version=FORMAT_VERSION, quant=config.to_dict())
    header.update(float_parts(model))
    header.update(describe_others(others or {}))
    state[HEADER] = write_header(header, state)
    return state


def settings_of(header: Mapping[str, Any]) -> QuantConfig:
    """Settings that the state of a header was packed with.

    Raises:
        QuantError: if this version does not know them.
    """
    try:
        return QuantConfig.from_dict({**EARLIER, **header['quant']})
    except QuantError as error:
        raise QuantError(f'packed file: made with settings that are not '
                         f'known here ({str(error).rstrip(".")}); use the '
                         'isvit_det that wrote it.') from error


def packed_config(state: Mapping[str, Tensor],
                  given: Mapping[str, Any]) -> QuantConfig:
    """Settings of a packed state, which must agree with those that are given.

    Args:
        state: packed.
        given: values of ``QuantConfig`` that a user gave.

    Raises:
        QuantError: naming the settings that differ.
    """
    packed = settings_of(read_header(state))
    asked = QuantConfig.from_dict(given)
    differing = [
        f'{key} {_shown(packed, key)} (asked for {_shown(asked, key)})'
        for key in given if getattr(packed, key) != getattr(asked, key)
    ]
    if differing:
        raise QuantError(f'packed file: made with {", ".join(differing)}; '
                         'leave that out, or give a float checkpoint to '
                         'calibrate.')
    return packed


def _shown(config: QuantConfig, key: str) -> Any:
    """A setting in plain values, or ``bits``, which stands for two."""
    return config.to_dict().get(key, getattr(config, key))


def _in_smallest_type(values: Tensor) -> Tensor:
    """Integers in the smallest signed type that can hold all of them."""
    for dtype in (torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= int(values.min()) and int(values.max()) <= info.max:
            return values.to(dtype)
    return values
