"""I&S-ViT post-training quantization for MMDetection 3 detectors."""
import contextlib

from isvit_det.version import __version__

# Quantizers and calibration need torch alone; without MMEngine there are no
# configs to find. check_host() reports an MMEngine that is missing or too old.
with contextlib.suppress(Exception):
    from isvit_det import scope  # noqa: F401

__all__ = ['__version__']
