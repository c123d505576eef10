"""Quantized backbones, and which float ones they stand for."""
from isvit_det.backbones.swin import QuantSwinTransformer

# Float class (as a config names it) -> quantized class.
QUANTIZED = {
    'SwinTransformer': 'isvit_det.QuantSwinTransformer',
    'mmdet.SwinTransformer': 'isvit_det.QuantSwinTransformer',
}

__all__ = ['QUANTIZED', 'QuantSwinTransformer']
