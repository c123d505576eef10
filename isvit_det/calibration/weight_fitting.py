"""Fitting weights to second moments: ridge regression, and rounding (GPTQ)."""
from typing import Tuple

import torch
from torch import Tensor

from isvit_det.calibration.moments import Moments
from isvit_det.core.quantizers import UniformQuantizer

# Strengths of the ridge, in units of the inputs' mean variance.
RIDGES = (1e-3, 1e-2, 1e-1, 1.)
# Added to the inputs' covariance for rounding, in units of its mean variance.
DAMPING = 1e-2
# Columns that are rounded before the rest is compensated.
BLOCK = 128


def ridge_regression(used: Moments, held_out: Moments,
                     has_bias: bool) -> Tensor:
    """Change of the weights, (D, C), that fits the residual.

    The strength of the ridge is the one with the least error on the rows that
    are held out. If none improves on the weights as they are, the change is
    0.

    Args:
        used: moments that the change is fitted to.
        held_out: moments of other rows.
        has_bias: whether a bias takes up the mean of the residual.
    """
    best = torch.zeros_like(used.cross)
    offset = used.outputs / used.count
    if has_bias:
        covariance, cross = used.centred()
    else:
        covariance, cross = used.gram / used.count, used.cross / used.count
        offset = torch.zeros_like(offset)
    if not held_out.count:
        return best
    least = held_out.error(best, offset)
    variance = covariance.diagonal().mean()
    # The covariance of constant inputs is nothing but rounding errors.
    if variance <= 1e-12 * used.gram.diagonal().mean() / used.count:
        return best
    eye = torch.eye(
        len(covariance), dtype=torch.double, device=covariance.device)
    for ridge in RIDGES:
        factor = torch.linalg.cholesky(covariance + ridge * variance * eye)
        delta = torch.cholesky_solve(cross, factor)
        shift = offset
        if has_bias:
            shift = offset - used.inputs @ delta / used.count
        error = held_out.error(delta, shift)
        if error < least:
            best, least = delta, error
    return best


def round_columns(weight: Tensor, covariance: Tensor, power: Tensor,
                  quantizer: UniformQuantizer) -> Tuple[Tensor, Tensor]:
    """Round weights column by column, with error compensation.

    The rounding error of a column is compensated by the columns after it, as
    far as their inputs are correlated (GPTQ, arXiv 2210.17323, Algorithm 1).

    Args:
        weight: shape (C, D).
        covariance: of the inputs, (D, D).
        power: mean square of the inputs, which bounds the rounding error of
            the covariance itself.
        quantizer: of the weights, fitted.

    Returns:
        The decoded weights, and the compensated weights before they were
        rounded, clipped to the range: both have the same codes.
    """
    variance = covariance.diagonal().mean().clamp(
        min=max(1e-12, 1e-10 * float(power)))
    damped = covariance.clone()
    damped.diagonal().add_(DAMPING * variance)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    scale = quantizer.scale.double()
    zero_point = quantizer.zero_point.double()
    top = 2**quantizer.bits - 1
    remaining, rounded = weight.clone(), torch.empty_like(weight)
    unrounded = torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.empty_like(remaining[:, start:end])
        for column in range(start, end):
            value = remaining[:, column]
            position = (value / scale + zero_point).clamp_(-.49, top + .49)
            unrounded[:, column] = (position - zero_point) * scale
            codes = torch.round(position).clamp_(0, top)
            rounded[:, column] = (codes - zero_point) * scale
            error = (value - rounded[:, column]) / factor[column, column]
            remaining[:, column:end] -= torch.outer(error, factor[column,
                                                                  column:end])
            errors[:, column - start] = error
        remaining[:, end:] -= errors @ factor[start:end, end:]
    return rounded, unrounded
