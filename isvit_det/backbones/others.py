"""Backbones of other packages: what to use instead of one."""
from typing import Any

# By parts of a class's name, the first that fits.
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
    """What to use instead of a backbone that is not supported, or ''.

    Args:
        kind: as a config gives it, a name or a class.

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
