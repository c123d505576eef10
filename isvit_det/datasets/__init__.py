"""The data set that the project draws itself."""
from isvit_det.datasets.drawn import DrawnDataset

__all__ = ['DrawnDataset']
