"""State dicts of quantized models: packing them, and loading them strictly.

MMEngine always loads without strictness and hands a model only the
``state_dict`` of a file. So a packed state carries a header of its own, and a
hook of the model decodes and checks what comes in.
"""
from typing import (Any, Dict, Iterable, Iterator, List, Mapping, Optional,
                    Set, Tuple)

import torch
from torch import Tensor, nn

from isvit_det.core.errors import QuantError
from isvit_det.core.float_parts import float_parts, take_float_parts_
from isvit_det.core.functional import uniform_decode
from isvit_det.core.layers import QuantConv2d, QuantLinear, quantizers
from isvit_det.core.packing import pack, unpack
from isvit_det.core.quantizers import Quantizer
from isvit_det.core.settings import QuantConfig
from isvit_det.core.weights import check_values
from isvit_det.packed_header import (FORMAT_VERSION, HEADER, describe_others,
                                     digest_of_classes, read_header,
                                     write_header)

CODES = 'weight_codes'
# Settings that change what a model computes, not how it was calibrated.
RUN_SETTINGS = ('weight_bits', 'act_bits', 'input_bits', 'scope', 'softmax',
                'exponent')
# Own buffers that decide what a model without calibration computes.
UNCALIBRATED_ZERO = ('fitted', 'offset', 'padding_value')
SHOWN_KEYS = 5


def is_calibrated(model: nn.Module) -> bool:
    """Whether all quantizers of a model are fitted.

    Raises:
        QuantError: if some are and some are not, naming those.
    """
    all_quantizers = quantizers(model)
    unfitted = [n for n, q in all_quantizers.items() if not q.is_fitted]
    if unfitted and len(unfitted) < len(all_quantizers):
        raise QuantError(f'the model is calibrated in part: {_few(unfitted)} '
                         'have no range; calibrate it as a whole.')
    return not unfitted


def pack_state(
        model: nn.Module,
        config: QuantConfig,
        others: Optional[Mapping[str, Any]] = None) -> Dict[str, Tensor]:
    """State of a calibrated model with weights as dense codes.

    Args:
        model: all its quantizers are fitted. What its ``float_layers`` and
            ``products`` say, if it has them, goes into the header.
        config: what it was built with.
        others: what lies beside the state in its file, by name; plain.

    Returns:
        CPU tensors by name. ``X.weight`` of a quantized layer becomes
        ``X.weight_codes`` (uint8, dense) beside the scales; zero points take
        the smallest integer type; what a model derives by itself is left
        out; the header holds the settings and a checksum.
    """
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    for key in _implied_keys(model):
        del state[key]
    for name, layer in _quantized_layers(model):
        quantizer = layer.weight_quantizer
        codes = quantizer.encode(layer.weight.detach())
        del state[f'{name}.weight']
        state[f'{name}.{CODES}'] = pack(codes, quantizer.bits).cpu()
        key = f'{name}.weight_quantizer.zero_point'
        state[key] = _smallest(state[key])
    header = dict(version=FORMAT_VERSION, quant=config.to_dict())
    header.update(float_parts(model))
    header.update(describe_others(others or {}))
    state[HEADER] = write_header(header, state)
    return state


def _settings_of(header: Mapping[str, Any]) -> QuantConfig:
    """Settings that a state with this header was packed with."""
    try:
        return QuantConfig.from_dict(header['quant'])
    except QuantError as error:
        raise QuantError(f'packed file: made with settings that are not '
                         f'known here ({str(error).rstrip(".")}); use the '
                         'isvit_det that wrote it.') from error


def packed_config(state: Mapping[str, Tensor],
                  given: Mapping[str, Any]) -> QuantConfig:
    """Settings of a packed state, which those that are given may only repeat.

    Raises:
        QuantError: naming the settings that the state has not.
    """
    found = _settings_of(read_header(state))
    asked = QuantConfig.from_dict(given)
    differing = [
        f'{key} {getattr(found, key)} (asked for {getattr(asked, key)})'
        for key in given if getattr(found, key) != getattr(asked, key)
    ]
    if differing:
        raise QuantError(f'packed file: made with {", ".join(differing)}; '
                         'leave that out, or give a float checkpoint to '
                         'calibrate.')
    return found


class _LoadingHook:
    """Decodes and checks a state before a model loads it; can be pickled."""

    def __init__(self, config: QuantConfig) -> None:
        self.config = config

    def __call__(self, module: Any, state: Dict[str, Tensor], prefix: str,
                 *args: Any) -> None:
        if prefix + HEADER in state:
            header = read_header(state, prefix)
            _check_settings(self.config, header)
            del state[prefix + HEADER]
            take_float_parts_(module, header, state, prefix)
            _decode_(module, state, prefix)
            module.packed_classes = header.get('classes')
        else:
            take_float_parts_(module, {}, state, prefix)
        _check_(module, state, prefix)


def install_loading_(model: Any, config: QuantConfig) -> None:
    """Make a model decode and check every state it is asked to load.

    Layers that are quantized in the model and in float in a calibrated state
    are turned back into float before. Works for ``load_state_dict`` of torch
    and of MMEngine, strict or not. A state that does not fit raises
    QuantError, naming keys. Copies of the model, pickled ones too, do the
    same.
    """
    model.packed_classes = None
    model._register_load_state_dict_pre_hook(
        _LoadingHook(config), with_module=True)
    model.register_forward_pre_hook(check_classes_)


def check_classes_(model: Any, args: Any) -> None:
    """Compare class names with a packed file's, once, before a prediction.

    MMDetection reads them from the file after the model has loaded its
    state, and keeps them as ``model.dataset_meta``.

    Raises:
        QuantError: if they are not those of the calibration.
    """
    if model.packed_classes is not None:
        meta = getattr(model, 'dataset_meta', None) or {}
        if 'classes' in meta:
            found = digest_of_classes(dict(dataset_meta=meta))
            if found != model.packed_classes:
                raise QuantError(
                    'packed file: the class names in model.dataset_meta are '
                    'not those of its calibration; it was changed or damaged, '
                    'pack it again. Give other names after a prediction.')
        model.packed_classes = None


def refuse_packed(state: Mapping[str, Tensor], prefix: str, *args:
                  Any) -> None:
    """Raise if a state is still packed when a part of a model loads it.

    The pre-hook of a quantized backbone: built without
    ``quantized_detector``, nothing decodes a packed file.
    """
    if any(k.startswith(prefix) and k.endswith(f'.{CODES}') for k in state):
        raise QuantError(
            'packed file: the model that loads it is no quantized detector; '
            "give its config model.type='isvit_det.quantized_detector' and "
            "the detector's class as model.base.")


def _check_settings(config: QuantConfig, header: Mapping[str, Any]) -> None:
    """Raise if a file's settings compute anything but the model's do."""
    found = _settings_of(header)
    differing = [
        f'{key} {getattr(found, key)!r} (the config says '
        f'{getattr(config, key)!r})' for key in RUN_SETTINGS
        if getattr(found, key) != getattr(config, key)
    ]
    if differing:
        raise QuantError(
            f'packed file: made with {", ".join(differing)}; load it with '
            'the config it was made from, or calibrate anew.')


def _decode_(model: nn.Module, state: Dict[str, Tensor], prefix: str) -> None:
    """Replace the packed entries of a state by what the model holds."""
    own = model.state_dict()
    for key in _implied_keys(model):
        state.setdefault(prefix + key, own[key])
    for name, layer in _quantized_layers(model):
        base = prefix + name
        packed = state.pop(f'{base}.{CODES}', None)
        scale = state.get(f'{base}.weight_quantizer.scale')
        zero_point = state.get(f'{base}.weight_quantizer.zero_point')
        quantizer = layer.weight_quantizer
        # What is missing or misshapen is named by the check that follows.
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
    for name, quantizer in _quantizers(model):
        state[f'{prefix}{name}.fitted'] = torch.tensor(
            quantizer.bits, dtype=torch.uint8)


def _check_(model: nn.Module, state: Dict[str, Tensor], prefix: str) -> None:
    """Raise unless a state has keys, shapes and values that a model needs.

    A float state has none of our own keys, a calibrated one has all. What
    the state may lack is added to it: buffers of ours as they are before a
    calibration, others as the model has them.
    """
    expected = model.state_dict()
    given = {
        k[len(prefix):]: v
        for k, v in state.items() if k.startswith(prefix)
    }
    own = set(_own_keys(model))
    optional = set(_derived_keys(model))
    if not own & set(given):
        optional |= own
    problems = []
    missing = [k for k in expected if k not in given and k not in optional]
    if missing:
        problems.append(f'{len(missing)} keys missing: {_few(missing)}')
    extra = [k for k in given if k not in expected]
    if extra:
        problems.append(f'{len(extra)} keys unknown: {_few(extra)}')
    shapes = [
        f'{k} {tuple(v.shape)} instead of {tuple(expected[k].shape)}'
        for k, v in given.items()
        if k in expected and v.shape != expected[k].shape
    ]
    if shapes:
        problems.append(f'{len(shapes)} shapes differ: {_few(shapes)}')
    widths = {name: quantizer.bits for name, quantizer in _quantizers(model)}
    other_widths = [
        f'{name} (here of {bits} bits)' for name, bits in widths.items()
        if not _is_of_width(given.get(f'{name}.fitted'), bits)
    ]
    if other_widths:
        problems.append(f'{len(other_widths)} quantizers of other bits: '
                        f'{_few(other_widths)}')
    if problems:
        raise QuantError('checkpoint does not fit the model: ' +
                         '; '.join(problems) +
                         '. Give the checkpoint of this architecture.')
    check_values(given, expected)
    # MMEngine would warn of keys that a float state cannot have.
    for key in optional:
        value = expected[key]
        if key.rsplit('.', 1)[-1] in UNCALIBRATED_ZERO:
            value = torch.zeros_like(value)
        state.setdefault(prefix + key, value)


def _is_of_width(fitted: Optional[Tensor], bits: int) -> bool:
    return fitted is None or fitted.numel() != 1 or int(fitted) in (0, bits)


def _few(names: List[str]) -> str:
    more = '' if len(names) <= SHOWN_KEYS else ', ...'
    return ', '.join(names[:SHOWN_KEYS]) + more


def _modules(model: nn.Module) -> Iterable[Tuple[str, nn.Module]]:
    # A module that occurs twice has two sets of keys.
    return model.named_modules(remove_duplicate=False)


def _quantized_layers(model: nn.Module) -> Iterator[Tuple[str, Any]]:
    for name, module in _modules(model):
        if isinstance(module, (QuantLinear, QuantConv2d)):
            yield name, module


def _quantizers(model: nn.Module) -> Iterator[Tuple[str, Quantizer]]:
    for name, module in _modules(model):
        if isinstance(module, Quantizer):
            yield name, module


def _buffer_keys(name: str, module: nn.Module,
                 names: Iterable[str]) -> Set[str]:
    held = {n for n, b in module.named_buffers(recurse=False)}
    return {f'{name}.{n}' if name else n for n in names if n in held}


def _own_keys(model: nn.Module) -> Set[str]:
    """Keys of buffers that a float model does not have."""
    keys: Set[str] = set()
    for name, module in _modules(model):
        names: Iterable[str] = getattr(module, 'own_buffers', ())
        if isinstance(module, Quantizer):
            names = [n for n, _ in module.named_buffers(recurse=False)]
        keys |= _buffer_keys(name, module, names)
    return keys


def _derived_keys(model: nn.Module) -> Set[str]:
    """Keys of buffers that a model computes from its settings."""
    keys: Set[str] = set()
    for name, module in _modules(model):
        keys |= _buffer_keys(name, module,
                             getattr(module, 'derived_buffers', ()))
    return keys


def _implied_keys(model: nn.Module) -> Set[str]:
    """Keys that a packed state leaves out."""
    fitted = {f'{name}.fitted' for name, _ in _quantizers(model)}
    return fitted | _derived_keys(model)


def _smallest(values: Tensor) -> Tensor:
    """Integers in the smallest signed type that holds them all."""
    for dtype in (torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= int(values.min()) and int(values.max()) <= info.max:
            return values.to(dtype)
    return values
