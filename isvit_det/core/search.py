"""Choosing ranges, and SULQ's shift, from the histograms of observers."""
from typing import Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.distributed import sum_
from isvit_det.core.functional import (log_encode, log_table, range_to_affine,
                                       sulq_table, table_decode,
                                       uniform_decode, uniform_encode)
from isvit_det.core.observers import AttentionObserver, Samples


def quantiles(samples: Samples, shares: Sequence[float]) -> Tensor:
    """Weighted quantiles of each row, linear between the values.

    Args:
        samples: C rows of N values, each ascending.
        shares: K numbers in [0, 1].

    Returns:
        Tensor of shape (K, C).
    """
    values, weights = samples
    total = weights.double().cumsum(1)
    # A value stands in the middle of its weight; 0 and 1 are the extremes.
    middles = total - weights.double() / 2
    first, last = middles[:, :1], middles[:, -1:]
    targets = first + (last - first) * torch.tensor(
        shares, dtype=torch.double, device=values.device)
    right = torch.searchsorted(middles, targets).clamp(1, values.shape[1] - 1)
    left = right - 1
    span = middles.gather(1, right) - middles.gather(1, left)
    fraction = (targets - middles.gather(1, left)) / span.clamp(min=1e-12)
    low, high = values.gather(1, left), values.gather(1, right)
    out = low + (high - low) * fraction.clamp(0, 1).to(values.dtype)
    return out.transpose(0, 1)


def search_affine(samples: Samples, low: Tensor, high: Tensor,
                  percentiles: Sequence[float],
                  bits: int) -> Tuple[Tensor, Tensor]:
    """The range of least squared error among percentiles, for each row.

    Args:
        samples: C rows of values, ascending.
        low: exact minima, shape (C,).
        high: exact maxima, shape (C,).
        percentiles: K shares; p keeps [quantile(1 - p), quantile(p)], and 1
            the whole range.
        bits: width of the codes.

    Returns:
        ``scale`` and ``zero_point`` of shape (C,). This is RepQ-ViT's search
        with another grid.
    """
    best_scale, best_zero = range_to_affine(low, high, bits)
    if tuple(percentiles) == (1., ):
        return best_scale, best_zero
    lows = quantiles(samples, [1 - share for share in percentiles])
    highs = quantiles(samples, percentiles)
    best_error = torch.full_like(best_scale, float('inf'))
    for share, row_low, row_high in zip(percentiles, lows, highs):
        if share == 1:
            row_low, row_high = low, high
        scale, zero = range_to_affine(row_low, row_high, bits)
        codes = uniform_encode(samples.values, scale[:, None], zero[:, None],
                               bits)
        decoded = uniform_decode(codes, scale[:, None], zero[:, None])
        error = (
            decoded.sub_(samples.values).square_().mul_(
                samples.weights).sum(1))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def search_sulq(observer: AttentionObserver, shifts: Sequence[float],
                percentiles: Sequence[float], bits: int,
                exponent: str) -> Tuple[Tensor, Tensor, Tensor]:
    """Shift and exponent range of least error (I&S-ViT, section 3.2).

    For every shift eta, the codes are spread over ``-log2(x + eta)`` from the
    largest attention that is not clipped to the smallest one. The clipping is
    at the maximum or at one of the percentiles, whichever has the least error
    of attention. The paper's form rounds to an integer zero point. The shift
    chosen has the least error of attention @ value if the observer has kept
    values, else of attention.

    Args:
        observer: has observed the attention.
        shifts: grid of eta.
        percentiles: grid of the share of attention that is not clipped.
        bits: width of the codes.
        exponent: ``'table'`` or ``'integer'``.

    Returns:
        ``shift``, ``low`` and ``step``, scalars.
    """
    samples = observer.samples()
    highest = [observer.high]
    if tuple(percentiles) != (1., ):
        highest += list(quantiles(samples, percentiles)[:, 0])
    candidates, errors = [], []
    for value in shifts:
        shift = observer.high.new_tensor(value)
        last = -torch.log2(observer.low + shift)
        ranges, range_errors = [], []
        for high in highest:
            first = -torch.log2(high + shift)
            step = ((last - first) / (2**bits - 1)).clamp(min=1e-6)
            low = first
            if exponent == 'integer':
                low = -step * torch.round(-first / step)
            table = sulq_table(shift, low, step, bits, exponent)
            ranges.append((shift, low, step, table))
            range_errors.append(
                _attention_error(samples, shift, low, step, bits, table))
        error = torch.stack(range_errors)
        best = ranges[int(error.argmin())]
        candidates.append(best[:3])
        errors.append(
            torch.stack([error.min(),
                         observer.output_error(*best, bits)]))
    by_attention, by_output = torch.stack(errors, 1)
    # Each process has kept the attention of its own images.
    sum_(by_output)
    # All errors are 0 if no values were kept.
    total = by_output if by_output.any() else by_attention
    return candidates[int(total.argmin())]


def search_log(observer: AttentionObserver, percentiles: Sequence[float],
               bits: int, steps_per_octave: int) -> Tuple[Tensor, Tensor]:
    """Range of least error for log2 and log-sqrt2 quantizers.

    Args:
        observer: has observed the attention.
        percentiles: grid of the share of attention that is not clipped.
        bits: width of the codes.
        steps_per_octave: 1 for log2, 2 for log-sqrt2.

    Returns:
        ``low``, the exponent of code 0, and ``step``, scalars.
    """
    samples = observer.samples()
    highest = [observer.high, *quantiles(samples, percentiles)[:, 0]]
    zero = observer.high.new_zeros(())
    step = observer.high.new_tensor(1 / steps_per_octave)
    errors = []
    for high in highest:
        low = -torch.log2(high)
        errors.append(
            _attention_error(samples, zero, low, step, bits,
                             log_table(low, step, bits)))
    best = int(torch.stack(errors).argmin())
    return -torch.log2(highest[best]), step


def _attention_error(samples: Samples, shift: Tensor, low: Tensor,
                     step: Tensor, bits: int, table: Tensor) -> Tensor:
    """Squared error of a log quantizer on a sample of attention."""
    codes = log_encode(samples.values, shift, low, step, bits)
    error = table_decode(codes, table) - samples.values
    return (error.square() * samples.weights).sum()
