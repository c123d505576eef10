"""I&S-ViT post-training quantization for MMDetection 3 detectors."""
from isvit_det.version import __version__

__all__ = ['__version__']
