"""Calling the kernels of csrc/ on tensors, through ctypes.

The structures mirror those of csrc/runtime.h.
"""
import ctypes
import enum
import functools
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from isvit_det.plans.layer import InputCodes
from isvit_det.runtime.build import load_library
from isvit_det.runtime.overflow import GROUP
from isvit_det.runtime.packing import PackedWeights
from isvit_det.runtime.steps import Steps, gelu_steps, table_steps

INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Isa(enum.IntEnum):
    """Instruction sets that there are kernels for, the fastest last."""
    PORTABLE = 0
    AVX2 = 1
    AVXVNNI = 2
    AVX512VNNI = 3

    @property
    def wide_lanes(self) -> bool:
        """Whether the kernels sum products in 32 bits instead of 16."""
        return self in (Isa.AVXVNNI, Isa.AVX512VNNI)


class Product(ctypes.Structure):
    """``isvit_product``."""
    _fields_ = [('weight', POINTER), ('correction', POINTER),
                ('scale', POINTER), ('bias', POINTER), ('runs', POINTER),
                ('num_runs', INT), ('block_bytes', INT), ('blocks', INT),
                ('outputs', INT)]


class StepTree(ctypes.Structure):
    """``isvit_steps``."""
    _fields_ = [('limits', POINTER), ('values', POINTER), ('depth', INT)]


class Quantizer(ctypes.Structure):
    """``isvit_quantizer``."""
    _fields_ = [('scale', ctypes.c_float), ('zero_point', INT), ('top', INT),
                ('steps', StepTree)]


class _Map(ctypes.Structure):
    _fields_ = [('images', INT), ('height', INT), ('width', INT),
                ('channels', INT), ('padding_top', INT), ('padding_left', INT),
                ('padding_bottom', INT), ('padding_right', INT),
                ('padding_code', ctypes.c_uint8)]


class _Rows(ctypes.Structure):
    _fields_ = [('codes', POINTER), ('images', INT), ('height', INT),
                ('width', INT), ('image_stride', LONG), ('line_stride', LONG),
                ('pixel_stride', LONG), ('segments', POINTER)]


class _Output(ctypes.Structure):
    _fields_ = [('values', POINTER), ('image_stride', LONG),
                ('pixel_stride', LONG), ('channel_stride', LONG)]


class Rows(NamedTuple):
    """The rows of codes that a layer multiplies, ``isvit_rows``.

    There is one row for each output position of a grid of maps.

    Attributes:
        codes: uint8.
        grid: number of images, height and width.
        strides: bytes between the rows of successive images, lines and pixels.
        segments: offset in bytes of each segment from the start of a row.
    """
    codes: Tensor
    grid: Tuple[int, int, int]
    strides: Tuple[int, int, int]
    segments: Tuple[int, ...] = (0, )


def kernel(isa: Isa, name: str) -> Callable[..., None]:
    """A function of csrc/runtime.h or csrc/blocks.h for an instruction set.

    Its first argument, the number of threads, is torch's and bound already.
    """
    function = getattr(load_library(), f'isvit_{name}_{isa.name.lower()}')
    return functools.partial(function, INT(torch.get_num_threads()))


def supported_isas() -> List[Isa]:
    """Instruction sets that this CPU supports, the fastest first.

    Raises:
        NoLibrary: if the native library is not available.
    """
    found = load_library().isvit_supported()
    return [isa for isa in sorted(Isa, reverse=True) if found >> isa & 1]


def encode_map(isa: Isa,
               x: Tensor,
               source: InputCodes,
               padding: Tuple[int, int, int, int] = (0, 0, 0, 0),
               padding_code: int = 0) -> Tensor:
    """Quantize and pad feature maps.

    Args:
        isa: kernels to use.
        x: float32, shape (images, channels, height, width), any strides.
        source: how ``x`` is quantized.
        padding: lines or columns to add at the top, left, bottom and right.
        padding_code: the entry that fills them.

    Returns:
        uint8, shape (images, padded height, padded width, channels); channels
        are filled up with zeros to a multiple of four.
    """
    images, channels, height, width = x.shape
    top, left, bottom, right = padding
    filled = -(-channels // GROUP) * GROUP
    codes = x.new_empty(
        (images, top + height + bottom, left + width + right, filled),
        dtype=torch.uint8)
    layout = _Map(images, height, width, filled, top, left, bottom, right,
                  padding_code)
    strides = (LONG * 4)(*x.stride())
    quantizer, _kept = quantizer_structure(source)
    kernel(isa, 'encode')(ctypes.byref(quantizer), POINTER(x.data_ptr()),
                          strides, INT(channels), ctypes.byref(layout),
                          POINTER(codes.data_ptr()))
    return codes


def multiply(isa: Isa, weights: PackedWeights, rows: Rows, out: Tensor,
             strides: Tuple[int, int, int]) -> Tensor:
    """Compute a layer's outputs for rows of codes.

    Args:
        isa: kernels to use; the weights have to be packed for its lanes.
        weights: of the layer.
        rows: inputs, in as many segments as the weights were packed for.
        out: float32, receives the outputs.
        strides: of ``out``, in elements, between images, pixels and channels.

    Returns:
        ``out``.
    """
    product = product_structure(weights)
    segments = (LONG * len(rows.segments))(*rows.segments)
    inputs = _Rows(rows.codes.data_ptr(), *rows.grid, *rows.strides,
                   ctypes.addressof(segments))
    output = _Output(out.data_ptr(), *strides)
    kernel(isa, 'multiply')(ctypes.byref(product), ctypes.byref(inputs),
                            ctypes.byref(output))
    return out


def product_structure(weights: PackedWeights) -> Product:
    """``isvit_product`` of a layer, whose weights have to outlive it."""
    weight = weights.weight
    return Product(weight.data_ptr(), weights.correction.data_ptr(),
                   weights.scale.data_ptr(), weights.bias.data_ptr(),
                   weights.runs.data_ptr(), len(weights.runs),
                   weight[0].numel() * weight.element_size(), len(weight),
                   weights.outputs)


def steps_structure(steps: Optional[Steps]) -> StepTree:
    """``isvit_steps``; the steps have to outlive it."""
    if steps is None:
        return StepTree(None, None, 0)
    return StepTree(steps.limits.data_ptr(), steps.values.data_ptr(),
                    steps.depth)


@functools.lru_cache(maxsize=1024)
def quantizer_structure(
        codes: InputCodes,
        is_gelu: bool = False) -> Tuple[Quantizer, Optional[Steps]]:
    """``isvit_quantizer``, and what it points to.

    Args:
        codes: describes the quantizer.
        is_gelu: whether it quantizes the GELU of what it is given.
    """
    steps = gelu_steps(codes) if is_gelu else table_steps(codes)
    return Quantizer(codes.scale, codes.zero_point, codes.top,
                     steps_structure(steps)), steps
