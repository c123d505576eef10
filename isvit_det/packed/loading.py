"""Loading float, calibrated and packed state dicts, each strictly.

MMEngine loads without strictness, and gives a model only the ``state_dict`` of
a file. Therefore the model itself has hooks that decode and check a state.
"""
import dataclasses
from typing import Any, Dict, Mapping, Optional

import torch
from torch import Tensor, nn

from isvit_det.core.bit_packing import unpack
from isvit_det.core.errors import QuantError, few_names
from isvit_det.core.functional import uniform_decode
from isvit_det.core.settings import QuantConfig
from isvit_det.core.swap import replace_
from isvit_det.core.table_quantizer import TableQuantizer
from isvit_det.core.weights import check_values
from isvit_det.packed.float_parts import take_float_parts_
from isvit_det.packed.header import HEADER, digest_of_classes, read_header
from isvit_det.packed.keys import (CODES, derived_keys, implied_keys,
                                   named_layers, named_quantizers, own_keys)
from isvit_det.packed.state import settings_of

# Settings that change what a model computes; the others only change how it is
# calibrated.
RUN_SETTINGS = ('weight_bits', 'act_bits', 'input_bits', 'scope', 'softmax',
                'exponent', 'overrides')
# Buffers of quantized layers that are 0 before a calibration.
UNCALIBRATED_ZERO = ('fitted', 'offset', 'padding_value')


class _LoadingHook:
    """Decodes and checks a state before a model loads it.

    A class, and not a closure, so that the model can be pickled.
    """

    def __init__(self, config: QuantConfig) -> None:
        self.config = config

    def __call__(self, module: Any, state: Dict[str, Tensor], prefix: str,
                 *args: Any) -> None:
        if prefix + HEADER in state:
            header = read_header(state, prefix)
            _check_settings(self.config, header)
            del state[prefix + HEADER]
            take_float_parts_(module, header, state, prefix)
            _drop_tables_(module, state, prefix)
            module.quant_config = dataclasses.replace(
                self.config,
                activation_tables=settings_of(header).activation_tables)
            _decode_(module, state, prefix)
            module.packed_classes = header.get('classes')
        else:
            take_float_parts_(module, {}, state, prefix)
            _drop_tables_(module, state, prefix)
        _drop_unused_(module, state, prefix)
        _check_(module, state, prefix)


def install_loading_(model: Any, config: QuantConfig) -> None:
    """Make a model decode and check every state that it is to load.

    Before that, layers that are quantized in the model, but not in a
    calibrated state, are replaced by float ones. This works for
    ``load_state_dict`` of torch and of MMEngine, strict or not, and for copies
    of the model, also pickled ones. Loading a state that does not fit raises
    QuantError, naming keys.

    Args:
        model: a quantized model.
        config: the settings that it was built with.
    """
    model.packed_classes = None
    model._register_load_state_dict_pre_hook(
        _LoadingHook(config), with_module=True)
    model.register_forward_pre_hook(check_classes_)


def check_classes_(model: Any, args: Any) -> None:
    """Compare the class names with those of a packed file, once.

    This is a forward pre-hook, because MMDetection reads the class names from
    the file after the model has loaded its state, and keeps them as
    ``model.dataset_meta``.

    Raises:
        QuantError: if they are not those of the calibration.
    """
    if model.packed_classes is not None:
        meta = getattr(model, 'dataset_meta', None) or {}
        if 'classes' in meta:
            digest = digest_of_classes(dict(dataset_meta=meta))
            if digest != model.packed_classes:
                raise QuantError(
                    'packed file: the class names in model.dataset_meta are '
                    'not those of its calibration; it was changed or damaged, '
                    'pack it again. Give other names after a prediction.')
        model.packed_classes = None


def refuse_packed(state: Mapping[str, Tensor], prefix: str, *args:
                  Any) -> None:
    """Raise if a state is still packed when a backbone loads it.

    This is the load-state-dict pre-hook of a quantized backbone. Without
    ``quantized_detector`` around the backbone, nothing decodes a packed file.
    """
    if any(k.startswith(prefix) and k.endswith(f'.{CODES}') for k in state):
        raise QuantError(
            'packed file: the model that loads it is no quantized detector; '
            "give its config model.type='isvit_det.quantized_detector' and "
            "the detector's class as model.base.")


def _check_settings(config: QuantConfig, header: Mapping[str, Any]) -> None:
    """Raise if a packed state has other settings than the model."""
    packed = settings_of(header)
    differing = [
        f'{key} {_shown(packed, key)} (the config says '
        f'{_shown(config, key)})' for key in RUN_SETTINGS
        if getattr(packed, key) != getattr(config, key)
    ]
    tables, known = packed.activation_tables, config.activation_tables
    if set(tables) - set(known):
        differing.append(f'activation_tables {list(tables)} (the config says '
                         f'{list(known)})')
    if tables and packed.entry_bits != config.entry_bits:
        differing.append(f'entry_bits {packed.entry_bits} (the config says '
                         f'{config.entry_bits})')
    if differing:
        raise QuantError(
            f'packed file: made with {", ".join(differing)}; load it with '
            'the config it was made from, or calibrate anew.')


def _shown(config: QuantConfig, key: str) -> str:
    """A setting as a config has it."""
    return repr(config.to_dict().get(key, []))


def _drop_tables_(model: Any, state: Mapping[str, Tensor],
                  prefix: str) -> None:
    """Replace table quantizers that a calibrated state has no entries for.

    The state was made with tables at fewer places, or before there were any.
    Its codes are evenly spaced there, and the model goes on with these.
    """
    replacements: Dict[nn.Module, nn.Module] = {
        quantizer: quantizer.even_version()
        for name, quantizer in named_quantizers(model)
        if isinstance(quantizer, TableQuantizer) and f'{prefix}{name}.scale' in
        state and f'{prefix}{name}.entries' not in state
    }
    replace_(model, replacements)


def _drop_unused_(model: nn.Module, state: Dict[str, Tensor],
                  prefix: str) -> None:
    """Drop the weights of modules that have them in a file of their own."""
    for name, module in model.named_modules():
        if getattr(module, 'weights_elsewhere', False):
            for key in [k for k in state if k.startswith(f'{prefix}{name}.')]:
                del state[key]


def _decode_(model: nn.Module, state: Dict[str, Tensor], prefix: str) -> None:
    """Replace the packed entries of a state by those that the model has."""
    own = model.state_dict()
    for key in implied_keys(model):
        state.setdefault(prefix + key, own[key])
    for name, layer in named_layers(model):
        base = prefix + name
        packed = state.pop(f'{base}.{CODES}', None)
        scale = state.get(f'{base}.weight_quantizer.scale')
        zero_point = state.get(f'{base}.weight_quantizer.zero_point')
        quantizer = layer.weight_quantizer
        # ``_check_`` names what is missing or has another shape.
        if (packed is None or scale is None or zero_point is None
                or scale.shape != quantizer.scale.shape
                or zero_point.shape != quantizer.zero_point.shape):
            continue
        shape = layer.weight.shape
        codes = unpack(packed, quantizer.bits, shape).to(scale.dtype)
        broadcast = (-1, ) + (1, ) * (len(shape) - 1)
        zero_point = zero_point.int()
        state[f'{base}.weight_quantizer.zero_point'] = zero_point
        state[f'{base}.weight'] = uniform_decode(codes, scale.view(broadcast),
                                                 zero_point.view(broadcast))
    for name, quantizer in named_quantizers(model):
        state[f'{prefix}{name}.fitted'] = torch.tensor(
            quantizer.bits, dtype=torch.uint8)


def _check_(model: nn.Module, state: Dict[str, Tensor], prefix: str) -> None:
    """Raise unless a state has the keys, shapes and values that a model needs.

    A float state has none of the keys of the quantizers, a calibrated one has
    all of them. Buffers that the state may lack are added to it: those of the
    quantizers as they are before a calibration, others as the model has them.
    """
    expected = model.state_dict()
    given = {
        k[len(prefix):]: v
        for k, v in state.items() if k.startswith(prefix)
    }
    own = set(own_keys(model))
    optional = set(derived_keys(model))
    if not own & set(given):
        optional |= own
    problems = []
    missing = [k for k in expected if k not in given and k not in optional]
    if missing:
        problems.append(f'{len(missing)} keys missing: {few_names(missing)}')
    extra = [k for k in given if k not in expected]
    if extra:
        problems.append(f'{len(extra)} keys unknown: {few_names(extra)}')
    shapes = [
        f'{k} {tuple(v.shape)} instead of {tuple(expected[k].shape)}'
        for k, v in given.items()
        if k in expected and v.shape != expected[k].shape
    ]
    if shapes:
        problems.append(f'{len(shapes)} shapes differ: {few_names(shapes)}')
    widths = {
        name: quantizer.bits
        for name, quantizer in named_quantizers(model)
    }
    other_widths = [
        f'{name} (here of {bits} bits)' for name, bits in widths.items()
        if not _is_of_width(given.get(f'{name}.fitted'), bits)
    ]
    if other_widths:
        problems.append(f'{len(other_widths)} quantizers of other bits: '
                        f'{few_names(other_widths)}')
    if problems:
        raise QuantError('checkpoint does not fit the model: ' +
                         '; '.join(problems) +
                         '. Give the checkpoint of this architecture.')
    check_values(given, expected)
    # Otherwise MMEngine would warn of keys that no float state has.
    for key in optional:
        value = expected[key]
        if key.rsplit('.', 1)[-1] in UNCALIBRATED_ZERO:
            value = torch.zeros_like(value)
        state.setdefault(prefix + key, value)


def _is_of_width(fitted: Optional[Tensor], bits: int) -> bool:
    return fitted is None or fitted.numel() != 1 or int(fitted) in (0, bits)
