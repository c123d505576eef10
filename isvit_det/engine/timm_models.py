"""timm classifiers by name: the float one and its quantized twin."""
from typing import Any, Mapping, Tuple

import timm
from torch import Tensor

from isvit_det.backbones.classifier import QuantClassifier, is_same_function
from isvit_det.backbones.timm_swin import quantize_swin
from isvit_det.backbones.timm_vit import quantize_vit
from isvit_det.core.errors import QuantError
from isvit_det.core.spec import QuantConfig

BUILDERS = {'vit_': quantize_vit, 'deit': quantize_vit, 'swin_': quantize_swin}
# Where a file says how many classes it knows.
CLASS_KEYS = ('head.weight', 'head.fc.weight',
              'head.linears.0.weight_quantizer.scale')


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
        raise QuantError('weights: they have no classifier head; give those '
                         f'of a classifier, with one of {list(CLASS_KEYS[:2])}'
                         '.')
    overlay = dict(state_dict=dict(weights), custom_load=False)
    try:
        source: Any = timm.create_model(
            name,
            pretrained=not packed,
            num_classes=classes,
            pretrained_cfg_overlay=None if packed else dict(
                overlay, num_classes=classes)).eval()
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise QuantError(f'weights: they do not fit {name} '
                         f'({" ".join(lines)[:300]}).') from error
    try:
        model = builder(source, config).eval()
        size = source.patch_embed.img_size
        same = is_same_function(source, model, size)
    except (AttributeError, RuntimeError, TypeError, QuantError):
        same = False
    if not same:
        raise QuantError(f'model: {name} has parts beyond a plain ViT, DeiT '
                         'or Swin (Swin V1, one window size, mean or class '
                         'token pooling) and is not supported.')
    if packed:
        model.load_state_dict(dict(weights))
    return source, model
