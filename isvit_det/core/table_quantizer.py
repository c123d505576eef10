"""The table quantizer of activations, and which activations have one."""
from typing import Sequence

import torch
from torch import Tensor

from isvit_det.core.functional import (table_decode, uniform_decode,
                                       uniform_encode)
from isvit_det.core.observers import RangeObserver
from isvit_det.core.quantizers import Quantizer, UniformQuantizer
from isvit_det.core.search import search_affine
from isvit_det.core.settings import QuantConfig
from isvit_det.core.tables import (cell_codes, look_up, search_table,
                                   table_position, table_values)

# 0 has to be a value if more than this share of the data is exactly 0.
ZERO_SHARE = 1e-3


class TableQuantizer(Quantizer):
    """Quantizer of a whole tensor with one integer entry for each code.

    ``value = (entry[code] - zero_point) * scale``. The entries are those of
    least squared error (Lloyd-Max), unless evenly spaced codes have no
    greater one. Then entry c is c, and the quantizer computes what a
    ``UniformQuantizer`` does.

    Args:
        bits: width of the codes.
        entry_bits: width of the entries, more than ``bits``, at most 7.
        percentiles: grid of the range search.

    Buffers:
        scale: float, scalar.
        zero_point: int32, scalar; may be outside of the entries.
        entries: uint8, shape (2**bits,), ascending.
    """
    scale: Tensor
    zero_point: Tensor
    entries: Tensor

    def __init__(self, bits: int, entry_bits: int,
                 percentiles: Sequence[float]) -> None:
        super().__init__(bits, 'act')
        self.entry_bits = entry_bits
        self.percentiles = tuple(percentiles)
        self.register_buffer('scale', torch.ones(()))
        self.register_buffer('zero_point', torch.zeros((), dtype=torch.int32))
        self.register_buffer('entries',
                             torch.arange(2**bits, dtype=torch.uint8))

    @property
    def is_even(self) -> bool:
        """Whether every code is its own entry."""
        codes = torch.arange(len(self.entries), device=self.entries.device)
        return bool((self.entries == codes).all())

    def new_observer(self) -> RangeObserver:
        return RangeObserver()

    def search_(self, observer: RangeObserver) -> None:
        samples = observer.samples()
        scale, zero_point = search_affine(samples, observer.low, observer.high,
                                          self.percentiles, self.bits)
        codes = uniform_encode(samples.values, scale, zero_point, self.bits)
        error = uniform_decode(codes, scale, zero_point).sub_(samples.values)
        even_error = (error.double().square_() * samples.weights).sum()
        counts = observer.counts
        assert counts is not None
        keeps_zero = bool(observer.zeros > ZERO_SHARE * counts.sum())
        table = search_table(samples, observer.low[0], observer.high[0],
                             self.percentiles, self.bits, self.entry_bits,
                             keeps_zero)
        entries = table.entries
        if table.error < even_error:
            scale, zero_point = table.scale, table.zero_point
        else:
            entries = torch.arange(2**self.bits, device=entries.device)
        self.scale.copy_(scale.view(()))
        self.zero_point.copy_(zero_point.view(()))
        self.entries.copy_(entries)

    def _cell_codes(self) -> Tensor:
        return cell_codes(self.entries, 2**(self.entry_bits + 1))

    def _values(self) -> Tensor:
        return table_values(self.entries, self.scale, self.zero_point)

    def encode(self, x: Tensor) -> Tensor:
        return look_up(x,
                       self._cell_codes().to(x.dtype), self.scale,
                       self.zero_point)

    def decode(self, codes: Tensor) -> Tensor:
        return table_decode(codes, self._values())

    def represent(self, x: Tensor) -> Tensor:
        # One look-up instead of two.
        return look_up(x,
                       self._values()[self._cell_codes()], self.scale,
                       self.zero_point)

    def inside(self, x: Tensor) -> Tensor:
        entries = self.entries.to(x.dtype)
        low = entries[0] - (entries[1] - entries[0]) / 2
        high = entries[-1] + (entries[-1] - entries[-2]) / 2
        position = table_position(x, self.scale, self.zero_point)
        return (position >= low) & (position <= high)

    def even_version(self) -> UniformQuantizer:
        """A ``UniformQuantizer`` that is not fitted, in its place."""
        quantizer = UniformQuantizer(self.bits, self.role, self.percentiles)
        return quantizer.to(self.scale).train(self.training)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, entry_bits={self.entry_bits}'


def activation_quantizer(config: QuantConfig, place: str = '') -> Quantizer:
    """A quantizer per tensor of an activation.

    Args:
        config: its ``activation_tables`` lists the places with tables.
        place: one of ``TABLE_PLACES``; any other has evenly spaced codes.
    """
    if place in config.activation_tables and (config.act_bits
                                              < config.entry_bits):
        return TableQuantizer(config.act_bits, config.entry_bits,
                              config.percentiles)
    return UniformQuantizer(config.act_bits, 'act', config.percentiles)
