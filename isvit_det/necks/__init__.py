"""Necks, and norms that they and heads take by name."""
from isvit_det.necks.simple_fpn import LayerNorm2d, SimpleFPN

__all__ = ['LayerNorm2d', 'SimpleFPN']
