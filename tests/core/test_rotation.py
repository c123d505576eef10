"""Hadamard matrices; laws.check_rotation folds them into backbones."""
import pytest
import torch

from isvit_det.core.rotation import hadamard


@pytest.mark.parametrize('size', [1, 2, 12, 24, 32, 64])
def test_it_is_orthogonal_and_spreads_a_channel_evenly(size):
    matrix = hadamard(size)
    assert matrix.shape == (size, size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size).double())
    # The largest power of 2 that divides the size.
    spread = size & -size
    assert ((matrix.abs() > 0).sum(0) == spread).all()
    assert matrix.abs().max() == pytest.approx(spread**-.5)
