"""Calibrated linear layers and convolutions on the native kernels."""
from typing import Tuple

import torch
from torch import Tensor

from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.plans.layer import plan_layer
from isvit_det.runtime import native
from isvit_det.runtime.native import Isa, Rows
from isvit_det.runtime.packing import pack_layer


class NativeLinear:
    """Native form of a calibrated ``QuantLinear``.

    Args:
        layer: its weights are packed now; later changes have no effect.
        isa: kernels to use.

    Raises:
        Unsupported: if the kernels cannot run the layer, with the reason.
    """

    def __init__(self, layer: QuantLinear, isa: Isa) -> None:
        self.isa = isa
        self.plan = plan_layer(layer)
        self.weights = pack_layer(self.plan, wide_lanes=isa.wide_lanes)

    def __call__(self, x: Tensor) -> Tensor:
        """Map float32 inputs (..., inputs) to outputs (..., outputs)."""
        rows = x.reshape(-1, x.shape[-1])
        # The rows are encoded as a map of one column, inputs being channels.
        codes = native.encode_map(self.isa,
                                  rows.t()[None, :, :, None], self.plan.input)
        outputs = self.weights.outputs
        out = x.new_empty((*x.shape[:-1], outputs))
        grid = (1, 1, len(rows))
        native.multiply(self.isa, self.weights,
                        Rows(codes, grid, (0, 0, codes.shape[-1])), out,
                        (0, outputs, 1))
        return out


class NativeConv:
    """Native form of a calibrated ``QuantConv2d``.

    It is an implicit matrix product, which copies no patches: with channels
    last, each line of the kernel is a contiguous segment of the map of codes,
    or each single position if the kernel is dilated.

    Args:
        layer: its weights are packed now; later changes have no effect.
        isa: kernels to use.
        channels_last: whether the output's memory format is always channels
            last, or else that of the input.

    Raises:
        Unsupported: if the kernels cannot run the layer, with the reason.
    """

    def __init__(self,
                 layer: QuantConv2d,
                 isa: Isa,
                 channels_last: bool = False) -> None:
        self.isa = isa
        self.channels_last = channels_last
        self.plan = plan_layer(layer)
        self.kernel = _pair(layer.kernel_size)
        self.stride = _pair(layer.stride)
        self.padding = _pair(layer.padding)
        self.dilation = _pair(layer.dilation)
        self.is_dilated = self.dilation[1] != 1 and self.kernel[1] != 1
        segments = self.kernel[0] * (self.kernel[1] if self.is_dilated else 1)
        self.weights = pack_layer(self.plan, segments, isa.wide_lanes)

    def __call__(self, x: Tensor) -> Tensor:
        """Map float32 (images, channels, height, width) to the outputs."""
        down, right = self.padding
        codes = native.encode_map(self.isa, x, self.plan.input,
                                  (down, right, down, right),
                                  self.plan.padding_code)
        images, lines, columns, pixel = codes.shape
        line = columns * pixel
        height = self._output_size(lines, 0)
        width = self._output_size(columns, 1)
        rows = Rows(
            codes, (images, height, width),
            (lines * line, self.stride[0] * line, self.stride[1] * pixel),
            self._segments(line, pixel))
        memory = torch.contiguous_format
        if self.channels_last or not x.is_contiguous() and x.is_contiguous(
                memory_format=torch.channels_last):
            memory = torch.channels_last
        out = torch.empty((images, self.weights.outputs, height, width),
                          dtype=x.dtype,
                          memory_format=memory)
        across = out.stride(3) if width > 1 else out.stride(2)
        if width == height == 1:
            across = 1
        return native.multiply(self.isa, self.weights, rows, out,
                               (out.stride(0), across, out.stride(1)))

    def _output_size(self, padded: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (padded - reach) // self.stride[axis] + 1

    def _segments(self, line: int, pixel: int) -> Tuple[int, ...]:
        """Offset in bytes of each segment from an output's first input."""
        starts = [y * self.dilation[0] * line for y in range(self.kernel[0])]
        if self.is_dilated:
            return tuple(start + x * self.dilation[1] * pixel
                         for start in starts for x in range(self.kernel[1]))
        return tuple(starts)


def _pair(value) -> Tuple[int, int]:  # type: ignore
    return (int(value[0]), int(value[1]))
