"""Quantizers: modules with the parameters of ``functional``'s formulas."""
from typing import Any, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from isvit_det.core.functional import (StraightThrough, log_encode,
                                       log_position, log_table, sulq_table,
                                       table_decode, uniform_decode,
                                       uniform_encode)
from isvit_det.core.observers import AttentionObserver, RangeObserver, Samples
from isvit_det.core.search import search_affine, search_log, search_sulq
from isvit_det.core.settings import QuantConfig

Observer = Union[RangeObserver, AttentionObserver]


class Quantizer(nn.Module):
    """Base class: fake quantization with a straight-through gradient.

    A quantizer is disabled until it is fitted or its state is loaded;
    ``precision`` enables and disables it. Every buffer has its final shape
    from the start.

    Args:
        bits: width of the codes, 2..8.
        role: ``'weight'`` or ``'act'``.

    Attributes:
        enabled: whether ``forward`` quantizes.
        observer: is given the input of ``forward`` while ranges are
            searched.
        inside_map: which tokens of windows are no padding, booleans
            (windows, N), for inputs (windows, ..., N, C); None for all. The
            observer gets no others.
        num_calls: number of times that ``forward`` has quantized values; it
            proves that a site ran.

    Buffers:
        fitted: uint8, the bits that the quantizer is fitted for, or 0 if it
            is not.
    """
    fitted: Tensor
    inside_map: Optional[Tensor] = None

    def __init__(self, bits: int, role: str) -> None:
        super().__init__()
        self.bits = bits
        self.role = role
        self.enabled = False
        self.observer: Optional[Observer] = None
        self.num_calls = 0
        self.register_buffer('fitted', torch.zeros((), dtype=torch.uint8))
        self._is_fitted = False

    @property
    def is_fitted(self) -> bool:
        """Whether ranges have been searched or loaded."""
        return self._is_fitted

    @property
    def granularity(self) -> str:
        """``'tensor'`` or ``'channel'``."""
        return 'tensor'

    def new_observer(self) -> Observer:
        """An observer of the kind that ``fit_`` takes."""
        raise NotImplementedError

    def search_(self, observer: Any) -> None:
        """Set the parameters by what an observer has recorded."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Codes of ``x``: integers in ``[0, 2**bits - 1]``, dtype of x."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Real values of codes."""
        raise NotImplementedError

    def represent(self, x: Tensor) -> Tensor:
        """The values that stand for ``x``: ``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def inside(self, x: Tensor) -> Tensor:
        """Where ``x`` is not clipped, as booleans."""
        raise NotImplementedError

    def without_padding(self, x: Tensor) -> Tensor:
        """The values of tokens that are no padding, (tokens, ..., C).

        Without padding, ``x`` itself.
        """
        if self.inside_map is None:
            return x
        return x.movedim(-2, 1)[self.inside_map.to(x.device)]

    def mark_fitted_(self) -> None:
        """Declare the parameters valid."""
        self.fitted.fill_(self.bits)
        self._is_fitted = True

    def fit_(self, observer: Observer) -> None:
        """Set the parameters by what ``observer`` has recorded."""
        self.search_(observer)
        self.mark_fitted_()

    def forward(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``, or ``x`` itself while disabled.

        Raises:
            RuntimeError: if it is enabled before ``fit_``.
        """
        if self.observer is not None:
            self.observer.update(self.without_padding(x))
        if not self.enabled:
            return x
        if not self._is_fitted:
            raise RuntimeError(f'{type(self).__name__} used before fit_(): '
                               'calibrate the model first.')
        self.num_calls += x.numel() > 0
        with torch.no_grad():
            decoded = self.represent(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return decoded
        return StraightThrough.apply(x, decoded, self.inside(x.detach()))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # A model that loads a calibrated state runs quantized, and one that
        # loads float weights again does not.
        self._is_fitted = self.enabled = bool(self.fitted)

    def extra_repr(self) -> str:
        return f'bits={self.bits}, {self.granularity}, role={self.role}'


class UniformQuantizer(Quantizer):
    """Affine quantizer per tensor or per channel (I&S-ViT, Eq. 1).

    Args:
        bits: width of the codes.
        role: ``'weight'`` or ``'act'``.
        percentiles: grid of the range search.
        num_channels: C, or None for one scale for the whole tensor.
        axis: dimension of the channels.

    Buffers:
        scale: float, shape () or (C,).
        zero_point: int32, same shape; may be outside of the code range.
    """
    scale: Tensor
    zero_point: Tensor

    def __init__(self,
                 bits: int,
                 role: str,
                 percentiles: Sequence[float] = (1., ),
                 num_channels: Optional[int] = None,
                 axis: int = -1) -> None:
        super().__init__(bits, role)
        self.percentiles = tuple(percentiles)
        self.num_channels = num_channels
        self.axis = axis
        shape = () if num_channels is None else (num_channels, )
        self.register_buffer('scale', torch.ones(shape))
        self.register_buffer('zero_point',
                             torch.zeros(shape, dtype=torch.int32))

    @property
    def granularity(self) -> str:
        return 'tensor' if self.num_channels is None else 'channel'

    def new_observer(self) -> RangeObserver:
        return RangeObserver(self.num_channels or 1, self.axis)

    def search_(self, observer: RangeObserver) -> None:
        self._set_(*search_affine(observer.samples(), observer.low,
                                  observer.high, self.percentiles, self.bits))

    def fit_tensor_(self, x: Tensor) -> None:
        """Fit to all values of one tensor, such as a weight."""
        x = x.detach()
        rows = (
            x.reshape(1, -1) if self.num_channels is None else x.movedim(
                self.axis, 0).reshape(self.num_channels, -1))
        rows = rows.sort(1).values
        # search_affine interpolates between two values at least.
        rows = rows if rows.shape[1] > 1 else rows.expand(-1, 2)
        self._set_(*search_affine(
            Samples(rows, torch.ones_like(rows)), rows[:, 0], rows[:, -1],
            self.percentiles, self.bits))
        self.mark_fitted_()

    def _set_(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale.copy_(scale.view_as(self.scale))
        self.zero_point.copy_(zero_point.view_as(self.zero_point))

    def _broadcast(self, state: Tensor, ndim: int) -> Tensor:
        if self.num_channels is None or self.axis == -1:
            return state
        shape = [1] * ndim
        shape[self.axis] = -1
        return state.view(shape)

    def encode(self, x: Tensor) -> Tensor:
        return uniform_encode(x, self._broadcast(self.scale, x.ndim),
                              self._broadcast(self.zero_point, x.ndim),
                              self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return uniform_decode(codes, self._broadcast(self.scale, codes.ndim),
                              self._broadcast(self.zero_point, codes.ndim))

    def inside(self, x: Tensor) -> Tensor:
        scale = self._broadcast(self.scale, x.ndim)
        zero_point = self._broadcast(self.zero_point, x.ndim)
        low = (-.5 - zero_point) * scale
        high = (2**self.bits - .5 - zero_point) * scale
        return (x >= low) & (x <= high)


class AttentionQuantizer(Quantizer):
    """Quantizer of post-softmax attention with a table of values.

    Buffers:
        low: exponent of code 0, scalar.
        step: difference of the exponents of adjacent codes, scalar.
    """
    low: Tensor
    step: Tensor

    def __init__(self, bits: int, config: QuantConfig) -> None:
        super().__init__(bits, 'act')
        self.config = config
        self.register_buffer('low', torch.zeros(()))
        self.register_buffer('step', torch.ones(()))

    def new_observer(self) -> AttentionObserver:
        return AttentionObserver()

    @property
    def offset(self) -> Tensor:
        """Value added to the attention before the logarithm, scalar."""
        return self.low.new_zeros(())

    def table(self) -> Tensor:
        """Value of every code, shape (2**bits,), not negative."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        return log_encode(x, self.offset, self.low, self.step, self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return table_decode(codes, self.table())

    def inside(self, x: Tensor) -> Tensor:
        position = log_position(x, self.offset, self.low, self.step)
        return (position >= -.5) & (position <= 2**self.bits - .5)


class ShiftUniformLog2Quantizer(AttentionQuantizer):
    """SULQ (I&S-ViT, Eq. 7 and 8): shift, log2, then uniform codes.

    With ``exponent='table'`` the exponent of a code is not rounded, so all
    2**bits codes decode to different values; ``'integer'`` is the paper's.

    Buffers:
        shift: eta, scalar.
    """
    shift: Tensor

    def __init__(self, bits: int, config: QuantConfig) -> None:
        super().__init__(bits, config)
        self.register_buffer('shift', torch.ones(()))

    def new_observer(self) -> AttentionObserver:
        return AttentionObserver(self.config.shift_error == 'output')

    def search_(self, observer: AttentionObserver) -> None:
        shift, low, step = search_sulq(observer, self.config.shifts,
                                       self.config.percentiles, self.bits,
                                       self.config.exponent)
        self.shift.copy_(shift)
        self.low.copy_(low)
        self.step.copy_(step)

    @property
    def offset(self) -> Tensor:
        return self.shift

    def table(self) -> Tensor:
        return sulq_table(self.shift, self.low, self.step, self.bits,
                          self.config.exponent)


class Log2Quantizer(AttentionQuantizer):
    """log2 or log-sqrt2 attention quantizer, a baseline.

    Args:
        bits: width of the codes.
        config: its ``softmax`` is ``'log2'`` or ``'log_sqrt2'``.
    """

    def search_(self, observer: AttentionObserver) -> None:
        steps = 2 if self.config.softmax == 'log_sqrt2' else 1
        low, step = search_log(observer, self.config.percentiles, self.bits,
                               steps)
        self.low.copy_(low)
        self.step.copy_(step)

    def table(self) -> Tensor:
        return log_table(self.low, self.step, self.bits)


def attention_quantizer(config: QuantConfig) -> Quantizer:
    """The post-softmax quantizer that ``config.softmax`` names."""
    if config.softmax == 'uniform':
        return UniformQuantizer(config.act_bits, 'act', config.percentiles)
    if config.softmax == 'sulq':
        return ShiftUniformLog2Quantizer(config.act_bits, config)
    return Log2Quantizer(config.act_bits, config)
