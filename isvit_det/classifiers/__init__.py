"""Quantized versions of timm's classifiers, their images and their run."""
