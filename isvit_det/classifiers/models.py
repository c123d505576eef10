"""timm classifiers by name: the float model and its quantized version."""
from typing import Any, Mapping, Tuple

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import swin_transformer, vision_transformer
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from isvit_det.classifiers.head import QuantClassifier, is_same_function
from isvit_det.classifiers.swin import quantize_swin
from isvit_det.classifiers.vit import quantize_vit
from isvit_det.core.errors import QuantError
from isvit_det.core.mixed import set_bits_, settle_protocol
from isvit_det.core.settings import QuantConfig
from isvit_det.core.swap import QUANTIZED_LAYERS
from isvit_det.core.weights import check_values

BUILDERS = {'vit_': quantize_vit, 'deit': quantize_vit, 'swin_': quantize_swin}
# Entries whose length is the number of classes.
CLASS_KEYS = ('head.weight', 'head.fc.weight',
              'head.linears.0.weight_quantizer.scale')
# Entries that timm resamples for other patch, window or image sizes.
RESAMPLED = ('pos_embed', 'patch_embed.proj.weight',
             'relative_position_bias_table')
SHOWN_KEYS = 3


def build_classifiers(name: str, weights: Mapping[str,
                                                  Tensor], config: QuantConfig,
                      packed: bool) -> Tuple[Any, QuantClassifier]:
    """Build a timm classifier and its quantized version.

    Args:
        name: a timm model, ``vit_*``, ``deit*`` or ``swin_*``.
        weights: its state dict, or a packed state.
        config: bits and quantizers.
        packed: whether the weights are packed; the float classifier then has
            random weights.

    Returns:
        Both, in eval mode.

    Raises:
        QuantError: if the name is not supported, the weights do not fit, or
            the model has parts that are not supported, or an override of
            bits covers nothing.
    """
    builder = next(
        (b for start, b in BUILDERS.items() if name.startswith(start)), None)
    if builder is None:
        raise QuantError(f'model: {name!r} is not supported; give a timm '
                         f'model that starts with one of {list(BUILDERS)}.')
    if not timm.is_model(name):
        raise QuantError(f'model: timm {timm.__version__} has no {name!r}; '
                         'give a name that timm.list_models() lists.')
    classes = next((len(weights[k]) for k in CLASS_KEYS if k in weights), None)
    if classes is None:
        other = ("; these are a detector's, which tools/quantize_det.py takes"
                 if any(k.startswith('backbone.') for k in weights) else '')
        raise QuantError('weights: they have no classifier head; give those '
                         f'of a classifier, with one of {list(CLASS_KEYS[:2])}'
                         f'{other}.')
    try:
        # With pretrained=True timm would download weights.
        source: Any = timm.create_model(
            name, pretrained=False, num_classes=classes).eval()
    # A model that timm cannot build can raise any exception.
    except Exception as error:
        raise _unsupported(name) from error
    if type(getattr(source, 'patch_embed', None)) is not PatchEmbed:
        raise _unsupported(name)
    if not packed:
        _load_(source, weights, name)
    try:
        model = builder(source, config).eval()
        size = source.patch_embed.img_size
        same = is_same_function(source, model, size)
    except (AttributeError, RuntimeError, TypeError, QuantError):
        same = False
    if not same:
        raise _unsupported(name)
    ends = [
        name for name, layer in model.named_modules()
        if isinstance(layer, QUANTIZED_LAYERS) and (name.startswith(
            'head.') or layer in set(model.units()[0].module.modules()))
    ]
    model.quant_config = settle_protocol(model, config, ends)
    set_bits_(model, model.quant_config)
    if packed:
        model.load_state_dict(dict(weights))
    return source, model


def _unsupported(name: str) -> QuantError:
    return QuantError(f'model: {name} has parts beyond a plain ViT, DeiT or '
                      'Swin (Swin V1, one window size, mean or class token '
                      'pooling, patches by one convolution) and is not '
                      'supported.')


def _load_(source: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Load weights with the names of timm or of the papers' own code.

    timm's filters convert the names, and a patch embedding that is a linear
    layer. Weights for another patch, window or image size, which these
    filters would resample, are refused.

    Raises:
        QuantError: naming weights that are missing, unknown, of other shapes
            or no finite floating numbers.
    """
    known = source.state_dict()
    try:
        if isinstance(source, SwinTransformer):
            given = swin_transformer.checkpoint_filter_fn(
                dict(weights), source)
        else:
            given = vision_transformer.checkpoint_filter_fn(
                dict(weights), source, adapt_layer_scale=True)
    # Weights of another model can raise any exception.
    except Exception as error:
        raise QuantError(f'weights: they do not fit {name}; give those of '
                         'this model.') from error
    check_values(given, known)
    problems = [
        f'{len(keys)} {what}: {keys[:SHOWN_KEYS]}' for what, keys in (
            ('missing', [key for key in known if key not in given]),
            ('unknown', [key for key in given if key not in known]),
        ) if keys
    ]
    # As the file has them, before timm's filter.
    own = {
        key: weights.get(key, value) if key.endswith(RESAMPLED) else value
        for key, value in given.items()
    }
    problems += [
        f'{key} is {tuple(own[key].shape)} instead of {tuple(value.shape)}'
        for key, value in known.items() if key in given and
        (given[key].shape != value.shape or not _is_same(own[key], given[key]))
    ][:SHOWN_KEYS]
    if problems:
        raise QuantError(f'weights: they do not fit {name} '
                         f'({"; ".join(problems)}); give those of this '
                         'model.')
    source.load_state_dict(given)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, in any shape and type."""
    return torch.equal(one.flatten().double(), other.flatten().double())
