"""Advice for backbones that are not supported."""
from typing import Any

# Parts of class names, and what to use instead; the first match counts.
INSTEAD = (
    ('SwinTransformerV2', "version 2 is another network; use MMDetection's "
     "'SwinTransformer'"),
    ('Swin', "use MMDetection's 'SwinTransformer', which starts from the "
     "weights of Swin's own release"),
    ('TIMM', "use MMDetection's 'SwinTransformer', 'isvit_det.DeiT' or "
     "'isvit_det.VisionTransformer'; the last two take timm's weights"),
    ('DistilledVisionTransformer', "use 'isvit_det.DeiT'"),
    ('DeiT', "use 'isvit_det.DeiT'"),
    ('VisionTransformer', "use 'isvit_det.VisionTransformer'"),
    ('ViT', "use 'isvit_det.VisionTransformer'"),
)


def advice(kind: Any) -> str:
    """What to use instead of an unsupported backbone, or ''.

    Args:
        kind: the type in a config, a name or a class.

    >>> advice('mmpretrain.VisionTransformer')
    "use 'isvit_det.VisionTransformer'"
    >>> advice('ResNet')
    ''
    """
    name = getattr(kind, '__name__', str(kind)).split('.')[-1]
    for part, words in INSTEAD:
        if part.lower() in name.lower():
            return words
    return ''
