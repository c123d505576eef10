"""Calibrated layers prepared for the native kernels."""
from typing import Tuple

import torch
from torch import Tensor

from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.runtime import native
from isvit_det.runtime.native import Isa, Rows
from isvit_det.runtime.packing import pack_layer
from isvit_det.runtime.plan import plan_layer


class NativeLinear:
    """What a calibrated ``QuantLinear`` computes.

    Args:
        layer: as it is now; later changes of it are not seen.
        isa: kernels to use.

    Raises:
        Unsupported: if the kernels cannot run it, with the reason.
    """

    def __init__(self, layer: QuantLinear, isa: Isa) -> None:
        self.isa = isa
        self.plan = plan_layer(layer)
        self.weights = pack_layer(self.plan, wide_lanes=isa.wide_lanes)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs of float32 inputs (..., inputs), shape (..., outputs)."""
        rows = x.reshape(-1, x.shape[-1])
        # A map of one column, whose channels are the inputs.
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
    """What a calibrated ``QuantConv2d`` computes.

    The product is implicit: the inputs of an output lie in the lines of its
    kernel, or for a dilated one in its single positions, and are read where
    they are in a map of codes, channels last.

    Args:
        layer: as it is now; later changes of it are not seen.
        isa: kernels to use.
        channels_last: whether channels lie last in every output's memory, or
            only where they do in the input's.

    Raises:
        Unsupported: if the kernels cannot run it, with the reason.
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
        """Output of float32 maps (images, channels, height, width)."""
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
        """Bytes from the first input of an output to its segments."""
        starts = [y * self.dilation[0] * line for y in range(self.kernel[0])]
        if self.is_dilated:
            return tuple(start + x * self.dilation[1] * pixel
                         for start in starts for x in range(self.kernel[1]))
        return tuple(starts)


def _pair(value) -> Tuple[int, int]:  # type: ignore
    return (int(value[0]), int(value[1]))
