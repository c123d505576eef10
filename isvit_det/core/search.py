"""Choosing ranges and SULQ's shift from a stream of batches.

Observers summarise what a quantizer sees in histograms of fixed size, so a
search costs the same for one window and for a thousand images, and no tensor
is too large for it.
"""
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.errors import QuantError
from isvit_det.core.functional import (log_encode, log_table, range_to_affine,
                                       sulq_table, table_decode,
                                       uniform_decode, uniform_encode)
from isvit_det.core.ranks import (gather, highest_, interleave, lowest_,
                                  num_ranks, rank, sum_)

NUM_BINS = 2048
CHUNK = 2**22
# Attention below 2**-MAX_EXPONENT counts as 0.
MAX_EXPONENT = 32
# Values of attention kept to weigh shifts by the error of attention @ value.
NUM_SAMPLES = 2**20
# Those of a batch, unless one row of one matrix is more; as many of values.
BATCH_SAMPLES = 2**14


class Samples(NamedTuple):
    """Weighted values: ``values`` and ``weights`` of shape (C, N)."""
    values: Tensor
    weights: Tensor


class RangeObserver:
    """Histogram of each channel, on a grid that only its extremes decide.

    Bins are as wide as a power of two and start at multiples of that, so the
    order of what is seen, and which process sees what, change nothing.

    Args:
        num_channels: C; 1 for one histogram of the whole tensor.
        axis: dimension of the channels, ignored for C = 1.

    Attributes:
        counts: int64, shape (C, 2048); None before anything was seen.
        low: least value of each channel, shape (C,).
        high: largest value of each channel, shape (C,).
    """

    def __init__(self, num_channels: int = 1, axis: int = -1) -> None:
        self.num_channels = num_channels
        self.axis = axis
        self.counts: Optional[Tensor] = None

    def update(self, x: Tensor) -> None:
        """Add a batch of any shape with C channels along ``axis``.

        Raises:
            QuantError: if it holds infinite values or NaN.
        """
        x = x.detach()
        if self.num_channels == 1:
            rows = x.reshape(1, -1)
        else:
            rows = x.movedim(self.axis, 0).reshape(self.num_channels, -1)
        if rows.numel() == 0:
            return
        low, high = rows.amin(1), rows.amax(1)
        _check_finite(low, high)
        self._widen_(low, high)
        step = max(1, CHUNK // self.num_channels)
        for chunk in rows.split(step, dim=1):
            self._count_(chunk)

    def merge_(self, like: Tensor) -> None:
        """Add what the other processes have seen.

        Args:
            like: has the device and, where nothing was seen, the dtype.
        """
        if num_ranks() == 1:
            return
        nothing = like.new_full((self.num_channels, ), float('inf'))
        low, high = nothing, -nothing
        if self.counts is not None:
            low, high = self.low, self.high
        low, high = _common_extremes(low, high)
        if (low <= high).all():
            self._widen_(low, high)
            sum_(self.counts)  # type: ignore

    def _widen_(self, low: Tensor, high: Tensor) -> None:
        """Make the grid hold values in between as well."""
        if self.counts is None:
            self.low, self.high = low, high
            self.exponent, self.first = _grid(low, high)
            self.counts = torch.zeros(
                self.num_channels,
                NUM_BINS,
                dtype=torch.int64,
                device=low.device)
            return
        self.low = torch.minimum(self.low, low)
        self.high = torch.maximum(self.high, high)
        exponent, first = _grid(self.low, self.high)
        moved = (exponent != self.exponent) | (first != self.first)
        if moved.any():
            bins = torch.arange(NUM_BINS, device=low.device)
            bins = bins + self.first[moved, None]
            bins >>= (exponent - self.exponent)[moved, None]
            # Bins beyond the extremes are empty.
            bins = (bins - first[moved, None]).clamp_(0, NUM_BINS - 1)
            old = self.counts[moved]
            self.counts[moved] = torch.zeros_like(old).scatter_add_(
                1, bins, old)
            self.exponent, self.first = exponent, first

    def _count_(self, rows: Tensor) -> None:
        counts = self.counts
        assert counts is not None
        # Half precision does not hold the numbers of bins.
        dtype = torch.promote_types(rows.dtype, torch.float32)
        width = self._width().to(dtype)[:, None]
        index = (rows.to(dtype) / width).floor_()
        index = index.sub_(self.first.to(dtype)[:, None]).long()
        if self.num_channels > 1:
            channels = torch.arange(self.num_channels, device=rows.device)
            index += channels[:, None] * NUM_BINS
        counts += torch.bincount(
            index.flatten(), minlength=counts.numel()).view_as(counts)

    def _width(self) -> Tensor:
        return torch.exp2(self.exponent.double())

    def samples(self) -> Samples:
        """Bin centres with their counts, in the dtype of what was seen."""
        assert self.counts is not None
        bins = torch.arange(NUM_BINS, device=self.low.device) + .5
        centres = (self.first[:, None] + bins) * self._width()[:, None]
        dtype = self.low.dtype
        return Samples(
            torch.minimum(
                torch.maximum(centres.to(dtype), self.low[:, None]),
                self.high[:, None]), self.counts.to(dtype))


def _grid(low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
    """The finest grid whose bins reach from ``low`` to ``high``.

    Returns:
        Exponent of a bin's width, and number of the first bin on a grid
        that starts at 0; int64, shape (C,).
    """
    low, high = low.double(), high.double()
    # Numbers of bins stay below 2**40, also where all values are the same.
    largest = torch.maximum(low.abs(), high.abs())
    exponent = torch.frexp(largest).exponent.long() - 40
    span = torch.frexp(high - low).exponent.long() - NUM_BINS.bit_length()
    exponent = torch.where(high > low, torch.maximum(exponent, span), exponent)
    exponent.clamp_(min=-100)
    while True:
        width = torch.exp2(exponent.double())
        first = torch.floor(low / width).long()
        too_fine = torch.floor(high / width).long() - first >= NUM_BINS
        if not too_fine.any():
            return exponent, first
        exponent += too_fine


def quantiles(samples: Samples, shares: Sequence[float]) -> Tensor:
    """Weighted quantiles of each row, linear between the values.

    Args:
        samples: C rows of N values, ascending in each row.
        shares: K numbers in [0, 1].

    Returns:
        Tensor of shape (K, C).
    """
    values, weights = samples
    total = weights.double().cumsum(1)
    # The share at a value's own middle; 0 and 1 are the extremes.
    middles = total - weights.double() / 2
    first, last = middles[:, :1], middles[:, -1:]
    targets = first + (last - first) * torch.tensor(
        shares, dtype=torch.double, device=values.device)
    right = torch.searchsorted(middles, targets).clamp(1, values.shape[1] - 1)
    left = right - 1
    span = middles.gather(1, right) - middles.gather(1, left)
    part = (targets - middles.gather(1, left)) / span.clamp(min=1e-12)
    low, high = values.gather(1, left), values.gather(1, right)
    out = low + (high - low) * part.clamp(0, 1).to(values.dtype)
    return out.transpose(0, 1)


def search_affine(samples: Samples, low: Tensor, high: Tensor,
                  percentiles: Sequence[float],
                  bits: int) -> Tuple[Tensor, Tensor]:
    """Range of least squared error among percentiles, for each row.

    Args:
        samples: C rows of values, ascending.
        low: exact minima, shape (C,).
        high: exact maxima, shape (C,).
        percentiles: K shares; p keeps [quantile(1 - p), quantile(p)], and 1
            the whole range.
        bits: width of the codes.

    Returns:
        ``scale`` and ``zero_point`` of shape (C,) (RepQ-ViT's search, over
        any grid).
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


def _check_finite(low: Tensor, high: Tensor) -> None:
    # NaN goes through amin and amax.
    if not (low.isfinite() & high.isfinite()).all():
        raise QuantError('calibration: the float model computes infinite '
                         'values or NaN on the calibration images; check '
                         'its checkpoint.')


class AttentionObserver:
    """Histogram of attention probabilities over their exponent.

    Args:
        keep_values: also keep a bounded sample of attention rows with the
            values they multiply, for errors of attention @ value.
    """

    def __init__(self, keep_values: bool = False) -> None:
        self.keep_values = keep_values
        self.counts: Optional[Tensor] = None
        self.pairs: List[Tuple[Tensor, Tensor]] = []
        self._is_full = False

    def update(self, x: Tensor) -> None:
        """Add a batch of attention of any shape.

        Raises:
            QuantError: if it holds infinite values or NaN.
        """
        x = x.detach()
        if x.numel() == 0:
            return
        low, high = x.amin(), x.amax()
        _check_finite(low, high)
        if self.counts is None:
            self.counts = torch.zeros(
                NUM_BINS + 1, dtype=torch.int64, device=x.device)
            self.low, self.high = low, high
        self.low = torch.minimum(self.low, low)
        self.high = torch.maximum(self.high, high)
        for chunk in x.flatten().split(CHUNK):
            # Zero falls past the last exponent, into the extra bin.
            index = chunk.log2().neg_().mul_(NUM_BINS / MAX_EXPONENT)
            index = index.clamp_(0, NUM_BINS).long()
            self.counts += torch.bincount(index, minlength=NUM_BINS + 1)

    def keep_(self, x: Tensor, values: Tensor) -> None:
        """Sample attention (..., N, M) with the values (..., M, D).

        Of a batch some of the attention matrices are kept, others of each
        batch, so that all heads come up, and of large ones some of the rows.
        The first batch that does not fit is the last one looked at.
        """
        if not self.keep_values or self._is_full or x.numel() == 0:
            return
        x = x.detach().reshape(-1, *x.shape[-2:])
        values = values.detach().reshape(-1, *values.shape[-2:])
        take = min(len(x), max(1, BATCH_SAMPLES // values[0].numel()))
        num_rows = min(x.shape[1], max(1,
                                       BATCH_SAMPLES // (take * x.shape[2])))
        # Number of this batch among those of all processes.
        number = len(self.pairs) * num_ranks() + rank()
        items = (_spread(len(x), take, x.device) + number) % len(x)
        rows = (_spread(x.shape[1], num_rows, x.device) + number) % x.shape[1]
        self.pairs.append((x[items[:, None], rows], values[items]))
        self._drop_what_does_not_fit_([_sizes(self.pairs)], 0)

    def _drop_what_does_not_fit_(self, sizes: List[List[int]],
                                 mine: int) -> None:
        """Keep the pairs that come first among those of all processes."""
        order = interleave([[(part, size) for size in each]
                            for part, each in enumerate(sizes)])
        total = num_mine = 0
        for part, size in order:
            total += size
            if total > NUM_SAMPLES:
                self._is_full = True
                break
            num_mine += part == mine
        del self.pairs[num_mine:]

    def merge_(self, like: Tensor) -> None:
        """Add what the other processes have seen, a batch of each in turn.

        Args:
            like: has the device and, where nothing was seen, the dtype.
        """
        if num_ranks() == 1:
            return
        if self.counts is None:
            self.counts = torch.zeros(
                NUM_BINS + 1, dtype=torch.int64, device=like.device)
            self.low = like.new_tensor(float('inf'))
            self.high = -self.low
        sum_(self.counts)
        self.low, self.high = _common_extremes(self.low, self.high)
        self._drop_what_does_not_fit_(gather(_sizes(self.pairs)), rank())
        if not self.counts.any():
            self.counts = None

    def output_error(self, shift: Tensor, low: Tensor, step: Tensor,
                     table: Tensor, bits: int) -> Tensor:
        """Squared error of attention @ value on the pairs kept, scalar."""
        total = low.new_zeros(())
        for attention, values in self.pairs:
            codes = log_encode(attention, shift, low, step, bits)
            error = (table_decode(codes, table) - attention) @ values
            total = total + error.square().sum()
        return total

    def samples(self) -> Samples:
        """Bin centres, ascending, with their counts; shapes (1, N)."""
        assert self.counts is not None
        bins = torch.arange(NUM_BINS, device=self.counts.device) + .5
        centres = torch.exp2(-bins * (MAX_EXPONENT / NUM_BINS))
        values = torch.cat([centres, centres.new_zeros(1)]).flip(0)
        return Samples(
            values.to(self.low.dtype).clamp(self.low, self.high)[None],
            self.counts.flip(0).to(self.low.dtype)[None])


def _common_extremes(low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
    """Extremes over the processes, which may differ in what dtype they saw."""
    return (lowest_(low.double()).to(low.dtype),
            highest_(high.double()).to(high.dtype))


def _sizes(pairs: Sequence[Tuple[Tensor, Tensor]]) -> List[int]:
    return [attention.numel() for attention, _ in pairs]


def _spread(length: int, count: int, device: torch.device) -> Tensor:
    """``count`` different indices spread over ``length``."""
    return torch.arange(count, device=device) * length // count


def _attention_error(samples: Samples, shift: Tensor, low: Tensor,
                     step: Tensor, bits: int, table: Tensor) -> Tensor:
    """Squared error of a log quantizer on a sample of attention."""
    codes = log_encode(samples.values, shift, low, step, bits)
    error = table_decode(codes, table) - samples.values
    return (error.square() * samples.weights).sum()


def search_sulq(observer: AttentionObserver, shifts: Sequence[float],
                percentiles: Sequence[float], bits: int,
                exponent: str) -> Tuple[Tensor, Tensor, Tensor]:
    """Shift and exponent range of least error (I&S-ViT, section 3.2).

    For every shift eta the codes spread over ``-log2(x + eta)`` from the
    largest attention kept (one of the percentiles, or the maximum, whichever
    has the least error of attention) to the smallest one. The paper's form
    rounds to an integer zero point. The shift has the least error of
    attention, or of attention @ value where the observer has seen values.

    Args:
        observer: has seen the attention.
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
    found, errors = [], []
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
        found.append(best[:3])
        errors.append(
            torch.stack([error.min(),
                         observer.output_error(*best, bits)]))
    by_attention, by_output = torch.stack(errors, 1)
    # Each process has kept attention of its own images.
    sum_(by_output)
    # All are 0 where no values were seen.
    total = by_output if by_output.any() else by_attention
    return found[int(total.argmin())]


def search_log(observer: AttentionObserver, percentiles: Sequence[float],
               bits: int, steps_per_octave: int) -> Tuple[Tensor, Tensor]:
    """Scale of least error for log2 (1 step) and log-sqrt2 (2 steps).

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
