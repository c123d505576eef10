"""Mixed precision: quantizers of the bits that overrides give a layer."""
import copy
import dataclasses
import difflib
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from torch import nn

from isvit_det.core.errors import QuantError, few_names
from isvit_det.core.layers import QuantConv2d, QuantLinear, QuantMatMul
from isvit_det.core.overrides import Override
from isvit_det.core.settings import QuantConfig

# What the practical protocol gives first and last layers, and the most that
# they may add to all weights.
PRACTICAL_BITS = 8
MAX_SHARE = .01
WITH_BITS = (QuantLinear, QuantConv2d, QuantMatMul)


def named_parts(model: nn.Module) -> Iterator[Tuple[str, Any]]:
    """Quantized layers and products by name, once each, in order."""
    for name, module in model.named_modules():
        if isinstance(module, WITH_BITS):
            yield name, module


def renew_(part: Any, config: QuantConfig) -> None:
    """Replace the quantizers of a layer or product by new ones.

    They are not fitted, on the same device and in the same mode.

    Args:
        part: of ``named_parts``.
        config: the settings of this part.
    """
    device = next(part.buffers()).device
    part.make_quantizers_(config)
    for child in part.children():
        child.to(device).train(part.training)


def copy_at(part: Any, config: QuantConfig) -> Any:
    """A copy of a layer or product with quantizers of other settings.

    It shares the weight. Its quantizers are not fitted.

    Args:
        part: of ``named_parts``; it stays as it is.
        config: the settings of the copy.
    """
    copied = copy.copy(part)
    # Children are kept in a dict, which the copy would share.
    copied._modules = {}
    copied.make_quantizers_(config)
    return copied


def set_bits_(model: nn.Module, config: QuantConfig) -> None:
    """Give the layers and products that overrides cover their own bits.

    Their quantizers are replaced and are not fitted. A layer that occurs
    several times in the model is covered by any of its names.

    Args:
        model: the whole model, built with ``config``.
        config: has the overrides.

    Raises:
        QuantError: naming an override that covers nothing, and similar names;
            or one that gives ``weight_bits`` to products alone.
    """
    if not config.overrides:
        return
    names: Dict[nn.Module, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WITH_BITS):
            names.setdefault(module, []).append(name)
    for override in config.overrides:
        covered = [
            module for module, own in names.items()
            if any(map(override.covers, own))
        ]
        if not covered:
            raise QuantError(_no_match(override.match, config, names.values()))
        if override.act_bits is None and not any(
                hasattr(module, 'weight') for module in covered):
            raise QuantError(
                f'quant.overrides: {override.match!r} covers products of two '
                'activations alone, which have no weights; give act_bits.')
    for module, own in names.items():
        name = next((name for name in own if any(
            one.covers(name) for one in config.overrides)), None)
        if name is not None:
            renew_(module, config.at(name))


def settle_protocol(model: nn.Module, config: QuantConfig,
                    ends: Sequence[str]) -> QuantConfig:
    """The settings with the overrides that their protocol stands for.

    ``'practical'`` keeps the first layer and the predictors in 8 bits, the
    smallest first, as long as they add at most 1 % to all weights together.
    The overrides given come after these and may change them. Settings that
    have them already stay as they are.

    Args:
        model: quantized.
        config: its settings.
        ends: names of the first layer and the predictors.
    """
    if config.protocol != 'practical':
        return config
    modules = dict(model.named_modules())
    total = sum(part.weight.numel() * config.at(name).weight_bits
                for name, part in named_parts(model)
                if hasattr(part, 'weight'))
    added = 0
    kept = []
    for name in sorted(ends, key=lambda one: modules[one].weight.numel()):
        added += modules[name].weight.numel() * (
            PRACTICAL_BITS - config.weight_bits)
        if added <= MAX_SHARE * total:
            kept.append(name)
    own = tuple(
        Override(name, PRACTICAL_BITS, PRACTICAL_BITS) for name in ends
        if name in kept)
    if config.overrides[:len(own)] == own:
        return config
    return dataclasses.replace(config, overrides=own + config.overrides)


def _no_match(pattern: str, config: QuantConfig, names: Any) -> str:
    """What to say of a pattern that covers nothing."""
    every = [name for own in names for name in own]
    shown: Dict[str, None] = {}
    for name in every:
        parts = name.split('.')
        for num in range(1, len(parts) + 1):
            shown['.'.join(parts[:num])] = None
    bare = pattern.strip('*.') or pattern
    ends = [name for name in shown if bare and name.endswith(bare)]
    near = ends or difflib.get_close_matches(bare, shown, 3, 0.3)
    scope = ''
    if config.scope == 'backbone':
        scope = " (scope 'backbone' quantizes no neck and no heads)"
    return (f'quant.overrides: {pattern!r} matches no quantized layer or '
            f'unit{scope}; is it {few_names(near, 3)}? Give a name '
            "of the report's sites without .weight_quantizer and the like, "
            'or a pattern such as backbone.stages.0.*')
