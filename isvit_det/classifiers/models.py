"""timm classifiers by name: the float one and its quantized twin."""
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
from isvit_det.core.settings import QuantConfig
from isvit_det.core.weights import check_values

BUILDERS = {'vit_': quantize_vit, 'deit': quantize_vit, 'swin_': quantize_swin}
# Where a file says how many classes it knows.
CLASS_KEYS = ('head.weight', 'head.fc.weight',
              'head.linears.0.weight_quantizer.scale')
# What timm resamples where patches, windows or the image size are others.
RESAMPLED = ('pos_embed', 'patch_embed.proj.weight',
             'relative_position_bias_table')
SHOWN_KEYS = 3


def build_classifiers(name: str, weights: Mapping[str,
                                                  Tensor], config: QuantConfig,
                      packed: bool) -> Tuple[Any, QuantClassifier]:
    """Build a timm classifier and its quantized twin.

    Args:
        name: a timm model, ``vit_*``, ``deit*`` or ``swin_*``.
        weights: its state dict, or that of a packed twin.
        config: bits and quantizers.
        packed: whether the weights are packed; then the float classifier
            has random ones.

    Returns:
        Both, in eval mode.

    Raises:
        QuantError: if the name is not supported, the weights do not fit, or
            the model has parts that the twin lacks.
    """
    builder = next(
        (b for start, b in BUILDERS.items() if name.startswith(start)), None)
    if builder is None or not timm.is_model(name):
        raise QuantError(f'model: {name!r} is not supported; give a timm '
                         f'model that starts with one of {list(BUILDERS)}.')
    classes = next((len(weights[k]) for k in CLASS_KEYS if k in weights), None)
    if classes is None:
        other = ("; these are a detector's, which tools/quantize_det.py takes"
                 if any(k.startswith('backbone.') for k in weights) else '')
        raise QuantError('weights: they have no classifier head; give those '
                         f'of a classifier, with one of {list(CLASS_KEYS[:2])}'
                         f'{other}.')
    try:
        # With weights of its own it would have timm download parts.
        source: Any = timm.create_model(
            name, pretrained=False, num_classes=classes).eval()
    # What timm cannot build of some version raises anything.
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
    if packed:
        model.load_state_dict(dict(weights))
    return source, model


def _unsupported(name: str) -> QuantError:
    return QuantError(f'model: {name} has parts beyond a plain ViT, DeiT or '
                      'Swin (Swin V1, one window size, mean or class token '
                      'pooling, patches by one convolution) and is not '
                      'supported.')


def _load_(source: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Load weights, in the names of timm or of the papers' own code.

    Names may differ and so may the shape of a patch embedding that is a
    linear layer; weights of other patches, windows or image sizes, which
    timm would resample, do not fit.

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
    # Weights of another model raise anything.
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
    # As they are in the file.
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
    """Whether tensors of any shapes and types hold the same values."""
    return torch.equal(one.flatten().double(), other.flatten().double())
