"""Backbones: float ViT and DeiT, and the quantized ones of every family."""
from isvit_det.backbones.quant_vit import QuantDeiT, QuantVisionTransformer
from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.backbones.vit import DeiT, VisionTransformer

# Float class (as a config names it) -> quantized class.
QUANTIZED = {
    'SwinTransformer': 'isvit_det.QuantSwinTransformer',
    'mmdet.SwinTransformer': 'isvit_det.QuantSwinTransformer',
    'isvit_det.VisionTransformer': 'isvit_det.QuantVisionTransformer',
    'isvit_det.DeiT': 'isvit_det.QuantDeiT',
}

__all__ = [
    'QUANTIZED', 'DeiT', 'QuantDeiT', 'QuantSwinTransformer',
    'QuantVisionTransformer', 'VisionTransformer'
]
