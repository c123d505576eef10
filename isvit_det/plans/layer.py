"""Description of a calibrated layer in integers, for any integer engine.

The simulation multiplies decoded values. With the codes ``a`` of the input,
its zero point z and scale s, and integer weights ``w = code - zero point`` of
scale t per output channel, the same output is

    y[n] = s * t[n] * (sum_k (a[k] - z) * w[n][k]) + b[n]
         = s * t[n] * (sum_k a[k] * w[n][k] - z * sum_k w[n][k]) + b[n],

where both sums are integers and the second is a constant.
"""
from dataclasses import dataclass
from typing import Optional, Tuple, Union

import torch
from torch import Tensor

from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.core.quantizers import Quantizer, UniformQuantizer
from isvit_det.core.table_quantizer import TableQuantizer
from isvit_det.core.tables import cell_codes, look_up

# With zero points up to this, sums stay within 32 bits. Beyond it, even the
# float32 of the simulation is no longer exact.
MAX_ZERO_POINT = 2**20
# Codes, including that of padding, are stored as bytes.
MAX_CODE = 255


class Unsupported(Exception):
    """A module that cannot be described or run so; the message says why."""


@dataclass(frozen=True)
class InputCodes:
    """How an activation is quantized.

    Its value is ``(entry - zero_point) * scale``.

    Attributes:
        bits: width of the codes.
        scale: step size.
        zero_point: the entry that stands for 0; may lie outside of the range
            of the entries.
        entries: for codes that index a table of integers, the entry of each
            code, ascending, in 0..127. None where each code is its own entry.
    """
    bits: int
    scale: float
    zero_point: int
    entries: Optional[Tuple[int, ...]] = None

    @property
    def top(self) -> int:
        """The largest entry."""
        return max(self.entries) if self.entries else 2**self.bits - 1

    def cells(self) -> Tensor:
        """Code of every half step among the entries, int32, (cells,)."""
        return cell_codes(
            torch.tensor(self.entries, dtype=torch.long), 2 * (self.top + 1))

    def encode(self, x: Tensor) -> Tensor:
        """Codes of float64 values."""
        if self.entries is None:
            return ((x / self.scale).round() + self.zero_point).clamp(
                0, self.top)
        return look_up(x,
                       self.cells().to(x.dtype),
                       torch.tensor(self.scale, dtype=x.dtype),
                       torch.tensor(self.zero_point))

    def stored(self, codes: Tensor) -> Tensor:
        """What the products read for codes: their entries, uint8."""
        if self.entries is None:
            return codes.to(torch.uint8)
        return torch.tensor(self.entries, dtype=torch.uint8)[codes.long()]

    @classmethod
    def of(cls, quantizer: Quantizer) -> 'InputCodes':
        """Read a calibrated quantizer of activations.

        Raises:
            Unsupported: if the quantizer is neither uniform per tensor nor
                a table, is not fitted or disabled, or has a zero point that
                is too large.
        """
        if not isinstance(quantizer, (UniformQuantizer, TableQuantizer)):
            raise Unsupported(f'its input is quantized by a '
                              f'{type(quantizer).__name__}')
        if not (quantizer.is_fitted and quantizer.enabled):
            raise Unsupported('its input is not quantized')
        if quantizer.granularity == 'channel':
            raise Unsupported('its input has a scale per channel')
        zero_point = int(quantizer.zero_point)
        if abs(zero_point) > MAX_ZERO_POINT:
            raise Unsupported(f'the zero point {zero_point} of its input is '
                              f'larger than {MAX_ZERO_POINT}')
        entries = None
        if isinstance(quantizer, TableQuantizer) and not quantizer.is_even:
            entries = tuple(quantizer.entries.tolist())
        return cls(quantizer.bits, float(quantizer.scale), zero_point, entries)


@dataclass(frozen=True)
class LayerPlan:
    """A linear layer or a convolution in integers.

    Attributes:
        input: how the input is quantized.
        weight: ``code - zero point`` of the weights, int32, shape (outputs,
            inputs) or (outputs, kernel height, kernel width, channels).
        scale: scale of the integer sums, that of the input times that of the
            weights, float64, shape (outputs,).
        bias: float64, shape (outputs,).
        padding_code: the entry that stands for the zeros around a map.
    """
    input: InputCodes
    weight: Tensor
    scale: Tensor
    bias: Tensor
    padding_code: int = 0

    @property
    def top(self) -> int:
        """The largest entry in a product, padding included."""
        return max(self.input.top, self.padding_code)

    @property
    def correction(self) -> Tensor:
        """``-z * sum_k w[n][k]``, the share of the input's zero point z in
        the sums, int64, shape (outputs,)."""
        return -self.input.zero_point * self.weight.flatten(1).long().sum(1)


def plan_layer(layer: Union[QuantLinear, QuantConv2d]) -> LayerPlan:
    """Describe a calibrated layer in integers.

    Raises:
        Unsupported: if it is not of the described kind, with the reason.
    """
    source = InputCodes.of(layer.input_quantizer)
    quantizer = layer.weight_quantizer
    if not (quantizer.is_fitted and quantizer.enabled):
        raise Unsupported('its weight is not quantized')
    padding_code = 0
    if isinstance(layer, QuantConv2d):
        padding_code = _padding_code(layer, source)
    with torch.no_grad():
        codes = quantizer.encode(layer.weight).long()
        shape = (-1, ) + (1, ) * (codes.ndim - 1)
        weight = codes - quantizer.zero_point.long().view(shape)
        if isinstance(layer, QuantConv2d):
            weight = weight.permute(0, 2, 3, 1)
        bias = torch.zeros(len(weight), dtype=torch.float64)
        for constant in (layer.bias, getattr(layer, 'offset', None)):
            if constant is not None:
                bias = bias + constant.double().cpu()
        scale = source.scale * quantizer.scale.double().cpu()
    plan = LayerPlan(source,
                     weight.int().contiguous().cpu(), scale, bias,
                     padding_code)
    _check_sums(plan)
    return plan


def _padding_code(layer: QuantConv2d, source: InputCodes) -> int:
    if layer.groups != 1:
        raise Unsupported(f'it has {layer.groups} groups')
    if layer.padding_mode != 'zeros':
        raise Unsupported(f'its padding mode is {layer.padding_mode!r}')
    if isinstance(layer.padding, str):
        raise Unsupported(f'its padding is {layer.padding!r}')
    if not any(layer.padding):
        return 0
    # The simulation pads decoded values with exact zeros.
    if not 0 <= source.zero_point <= MAX_CODE:
        raise Unsupported('it is padded with zeros, which no code of its '
                          f'input stands for (zero point {source.zero_point})')
    return source.zero_point


def _check_sums(plan: LayerPlan) -> None:
    """Raise unless the sums fit 32 bits with and without the correction."""
    sizes = plan.weight.flatten(1).long().abs().sum(1)
    largest = (plan.top + abs(plan.input.zero_point)) * int(sizes.max())
    # Half of the range is reserved for weights that packing splits in two.
    if largest >= 2**30:
        raise Unsupported(f'its integer sums may reach {largest}, which is '
                          'more than 30 bits')
