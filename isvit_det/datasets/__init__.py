"""The drawn data set: synthetic images for demo and tests."""
from isvit_det.datasets.drawn import DrawnDataset

__all__ = ['DrawnDataset']
