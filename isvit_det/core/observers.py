"""Observers: histograms of the values that a quantizer gets, batch by batch.

Their size is fixed, so that a range search costs the same for one window and
for a thousand images, and no tensor is too large for it.
"""
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.distributed import (all_gather, interleave, max_, min_,
                                        rank, sum_, world_size)
from isvit_det.core.errors import QuantError
from isvit_det.core.functional import log_encode, table_decode

NUM_BINS = 2048
# Values that are counted at a time, to bound the memory of their indices.
CHUNK = 2**22
# Attention below 2**-MAX_EXPONENT counts as 0.
MAX_EXPONENT = 32
# Attention probabilities kept to compare shifts by the error of attention @
# value.
NUM_SAMPLES = 2**20
# Probabilities kept of one batch, unless a single row has more, and about as
# many of the values that they weigh.
BATCH_SAMPLES = 2**14


class Samples(NamedTuple):
    """Weighted values: ``values`` and ``weights`` of shape (C, N)."""
    values: Tensor
    weights: Tensor


class KeptAttention(NamedTuple):
    """Rows of attention matrices, with the values that they multiply.

    Attributes:
        attention: shape (n, N, M).
        values: shape (n, M, D).
        inside: which rows are of no padding, (n, N, 1); None for all.
    """
    attention: Tensor
    values: Tensor
    inside: Optional[Tensor]


class RangeObserver:
    """Histogram of each channel, whose bins depend on its extremes alone.

    The width of a bin is a power of two, and bins start at multiples of it.
    So the result depends neither on the order of the batches nor on which
    process observes which of them.

    Args:
        num_channels: C; 1 for one histogram of the whole tensor.
        axis: dimension of the channels, ignored for C = 1.

    Attributes:
        counts: int64, shape (C, 2048); None before the first batch.
        low: minimum of each channel, shape (C,).
        high: maximum of each channel, shape (C,).
        zeros: number of values that are exactly 0, int64, shape (C,).
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
        self.zeros += (rows == 0).sum(1)
        step = max(1, CHUNK // self.num_channels)
        for chunk in rows.split(step, dim=1):
            self._count_(chunk)

    def merge_(self, like: Tensor) -> None:
        """Add what the other processes have observed.

        Args:
            like: a tensor with the device, and with the dtype for a process
                that has observed nothing.
        """
        if world_size() == 1:
            return
        nothing = like.new_full((self.num_channels, ), float('inf'))
        low, high = nothing, -nothing
        if self.counts is not None:
            low, high = self.low, self.high
        low, high = _common_extremes(low, high)
        if (low <= high).all():
            self._widen_(low, high)
            sum_(self.counts)  # type: ignore
            sum_(self.zeros)

    def _widen_(self, low: Tensor, high: Tensor) -> None:
        """Extend the bins to values from ``low`` to ``high``."""
        if self.counts is None:
            self.low, self.high = low, high
            self.exponent, self.first = _grid(low, high)
            self.counts = torch.zeros(
                self.num_channels,
                NUM_BINS,
                dtype=torch.int64,
                device=low.device)
            self.zeros = torch.zeros_like(self.counts[:, 0])
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
        # Half precision cannot represent the indices of the bins.
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
        """Centres of the bins with their counts, in the observed dtype."""
        assert self.counts is not None
        bins = torch.arange(NUM_BINS, device=self.low.device) + .5
        centres = (self.first[:, None] + bins) * self._width()[:, None]
        dtype = self.low.dtype
        return Samples(
            torch.minimum(
                torch.maximum(centres.to(dtype), self.low[:, None]),
                self.high[:, None]), self.counts.to(dtype))


def _grid(low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
    """The narrowest bins that reach from ``low`` to ``high``.

    Returns:
        The exponent of a bin's width, and the index of the first bin, where
        bin 0 starts at 0; int64, shape (C,).
    """
    low, high = low.double(), high.double()
    # Indices stay below 2**40, also where all values are equal.
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


class AttentionObserver:
    """Histogram of attention probabilities over their exponent.

    Args:
        keep_values: also keep a bounded sample of attention rows with the
            values that they multiply, for ``output_error``.

    Attributes:
        counts: int64, shape (2049,), the last one for 0; None before the
            first batch.
        low: minimum, scalar.
        high: maximum, scalar.
        pairs: the rows kept with their values.
    """

    def __init__(self, keep_values: bool = False) -> None:
        self.keep_values = keep_values
        self.counts: Optional[Tensor] = None
        self.pairs: List[KeptAttention] = []
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
            # The exponent of 0 is infinite and goes into the last bin.
            index = chunk.log2().neg_().mul_(NUM_BINS / MAX_EXPONENT)
            index = index.clamp_(0, NUM_BINS).long()
            self.counts += torch.bincount(index, minlength=NUM_BINS + 1)

    def keep_(self,
              x: Tensor,
              values: Tensor,
              inside: Optional[Tensor] = None) -> None:
        """Keep a sample of attention (..., N, M) with values (..., M, D).

        Some attention matrices of a batch are kept, and some rows of large
        ones. Which ones changes from batch to batch, so that all heads are
        sampled. The first batch that exceeds the bound ends the sample.

        Args:
            x: attention.
            values: that it multiplies.
            inside: which rows are no padding, (windows, N), where ``x`` is
                (windows, heads, N, M); None for all.
        """
        if not self.keep_values or self._is_full or x.numel() == 0:
            return
        if inside is not None:
            inside = inside.to(x.device)[:, None].expand(x.shape[:-1])
            inside = inside.reshape(-1, x.shape[-2])
        x = x.detach().reshape(-1, *x.shape[-2:])
        values = values.detach().reshape(-1, *values.shape[-2:])
        num_kept = min(len(x), max(1, BATCH_SAMPLES // values[0].numel()))
        num_rows = min(x.shape[1],
                       max(1, BATCH_SAMPLES // (num_kept * x.shape[2])))
        # Index of this batch among those of all processes.
        batch = len(self.pairs) * world_size() + rank()
        kept = (_spread(len(x), num_kept, x.device) + batch) % len(x)
        rows = (_spread(x.shape[1], num_rows, x.device) + batch) % x.shape[1]
        if inside is not None:
            inside = inside[kept[:, None], rows][..., None]
        self.pairs.append(
            KeptAttention(x[kept[:, None], rows], values[kept], inside))
        self._truncate_([_sizes(self.pairs)], 0)

    def _truncate_(self, sizes: List[List[int]], own: int) -> None:
        """Drop the pairs beyond the bound on those of all processes.

        Args:
            sizes: numbers of probabilities in the pairs of each process.
            own: index of this process in ``sizes``.
        """
        order = interleave([[(process, size) for size in each]
                            for process, each in enumerate(sizes)])
        total = num_own = 0
        for process, size in order:
            total += size
            if total > NUM_SAMPLES:
                self._is_full = True
                break
            num_own += process == own
        del self.pairs[num_own:]

    def merge_(self, like: Tensor) -> None:
        """Add what the other processes have observed, batch by batch.

        Args:
            like: a tensor with the device, and with the dtype for a process
                that has observed nothing.
        """
        if world_size() == 1:
            return
        if self.counts is None:
            self.counts = torch.zeros(
                NUM_BINS + 1, dtype=torch.int64, device=like.device)
            self.low = like.new_tensor(float('inf'))
            self.high = -self.low
        sum_(self.counts)
        self.low, self.high = _common_extremes(self.low, self.high)
        self._truncate_(all_gather(_sizes(self.pairs)), rank())
        if not self.counts.any():
            self.counts = None

    def output_error(self, shift: Tensor, low: Tensor, step: Tensor,
                     table: Tensor, bits: int) -> Tensor:
        """Squared error of attention @ value on the pairs kept, scalar.

        Args:
            shift, low, step, bits: of ``log_encode``.
            table: value of every code, shape (2**bits,).
        """
        total = low.new_zeros(())
        for attention, values, inside in self.pairs:
            codes = log_encode(attention, shift, low, step, bits)
            error = (table_decode(codes, table) - attention) @ values
            if inside is not None:
                error = error * inside
            total = total + error.square().sum()
        return total

    def samples(self) -> Samples:
        """Centres of the bins, ascending, with their counts; (1, N)."""
        assert self.counts is not None
        bins = torch.arange(NUM_BINS, device=self.counts.device) + .5
        centres = torch.exp2(-bins * (MAX_EXPONENT / NUM_BINS))
        values = torch.cat([centres, centres.new_zeros(1)]).flip(0)
        return Samples(
            values.to(self.low.dtype).clamp(self.low, self.high)[None],
            self.counts.flip(0).to(self.low.dtype)[None])


def _check_finite(low: Tensor, high: Tensor) -> None:
    # NaN goes through amin and amax.
    if not (low.isfinite() & high.isfinite()).all():
        raise QuantError('calibration: the float model computes infinite '
                         'values or NaN on the calibration images; check '
                         'its checkpoint.')


def _common_extremes(low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
    """Extremes over the processes, which may have observed other dtypes."""
    return (min_(low.double()).to(low.dtype),
            max_(high.double()).to(high.dtype))


def _sizes(pairs: Sequence[KeptAttention]) -> List[int]:
    return [pair.attention.numel() for pair in pairs]


def _spread(length: int, count: int, device: torch.device) -> Tensor:
    """``count`` different indices spread over ``length``."""
    return torch.arange(count, device=device) * length // count
