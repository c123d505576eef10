"""Weights of a layer in the order in which the kernels read them.

Weights are stored in blocks of 16 outputs. A block consists of groups of four
inputs, in the order of the runs, and a group of 16 x 4 bytes. Weights that do
not fit 8 bits, or whose products with two neighbouring codes might overflow
16 bits, are split as ``w = 16 * high + low``: the kernels sum all products
with the high parts, shift the sums by four bits, and add the products with the
low parts.
"""
from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from isvit_det.runtime.overflow import GROUP, MAX_GROUPS, Run, split_runs
from isvit_det.runtime.plan import LayerPlan, Unsupported

# Outputs of a block.
BLOCK = 16
# Bits of the low parts of split weights.
SHIFT = 4


@dataclass(frozen=True)
class PackedWeights:
    """The arrays of ``isvit_product`` in csrc/runtime.h.

    Attributes:
        weight: int8, shape (blocks, groups, 16, 4).
        runs: int32, shape (runs, 5): segment, segments, offset in inputs,
            groups, shift.
        correction: int32, shape (blocks * 16,).
        scale: float32, shape (blocks * 16,).
        bias: float32, shape (blocks * 16,).
        outputs: number of outputs; what exceeds it is zero.
    """
    weight: Tensor
    runs: Tensor
    correction: Tensor
    scale: Tensor
    bias: Tensor
    outputs: int


def pack_layer(plan: LayerPlan,
               segments: int = 1,
               wide_lanes: bool = False) -> PackedWeights:
    """Pack the weights of a layer.

    Args:
        plan: describes the layer.
        segments: number of contiguous pieces of memory that the inputs of an
            output lie in: for a convolution, the lines of its kernel, or its
            single positions if it is dilated.
        wide_lanes: whether the kernels sum in 32 bits, where no overflow is
            possible.

    Raises:
        Unsupported: if sums might overflow even with split weights.
    """
    parts = [_split_segments(plan.weight, segments)]
    cut = _runs_of_parts(parts, plan.top, wide_lanes)
    if cut is None:
        parts = _split_weight(parts[0])
        cut = _runs_of_parts(parts, plan.top, wide_lanes)
    if cut is None:
        raise Unsupported('the sum of two of its products may overflow 16 '
                          'bits, even with its weights split in two')
    pieces = []
    for part, runs in zip(parts, cut):
        for run in runs:
            lines = part[:, run.segment:run.segment + run.segments]
            inputs = lines[..., GROUP * run.first:][..., :GROUP * run.groups]
            pieces.append(inputs.flatten(1))
    flat = torch.cat(pieces, 1)
    outputs = len(flat)
    padding = -outputs % BLOCK
    flat = torch.nn.functional.pad(flat, (0, 0, 0, padding))
    packed = flat.view(-1, BLOCK, flat.shape[1] // GROUP, GROUP)

    def padded(values: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.pad(values, (0, padding)).to(dtype)

    return PackedWeights(
        packed.transpose(1, 2).to(torch.int8).contiguous(),
        torch.tensor(_run_rows(cut), dtype=torch.int32),
        padded(plan.correction, torch.int32), padded(plan.scale,
                                                     torch.float32),
        padded(plan.bias, torch.float32), outputs)


def operand_runs(inputs: int, top: int, low: int, high: int,
                 wide_lanes: bool) -> Tuple[Tensor, int]:
    """Runs for weights of which only the range is known.

    In the product of two activations, the kernels pack the second operand as
    weights at run time.

    Args:
        inputs: length of the sums, a multiple of 4.
        top: the largest code of the first operand.
        low: the smallest weight, at most 0.
        high: the largest weight, at least 0.
        wide_lanes: as for ``pack_layer``.

    Returns:
        ``runs`` as in ``PackedWeights``, and the number of parts that weights
        have to be split into, 1 or 2.
    """
    extremes = torch.tensor([[low], [high]]).expand(2, inputs)[:, None]
    parts = [extremes]
    cut = _runs_of_parts(parts, top, wide_lanes)
    if cut is None:
        half = 2**(SHIFT - 1)
        # The low parts of any weights lie in -half..half - 1.
        rest = torch.tensor([[-half], [half - 1]]).expand(2, inputs)[:, None]
        parts = [_split_weight(extremes)[0], rest]
        cut = _runs_of_parts(parts, top, wide_lanes)
    assert cut is not None, (inputs, top, low, high)
    return torch.tensor(_run_rows(cut), dtype=torch.int32), len(parts)


def _run_rows(cut: List[List[Run]]) -> List[Tuple[int, ...]]:
    """``PackedWeights.runs`` for the runs of each part of the weights."""
    return [(run.segment, run.segments, GROUP * run.first, run.groups,
             SHIFT if runs is not cut[-1] and run is runs[-1] else 0)
            for runs in cut for run in runs]


def _split_segments(weight: Tensor, segments: int) -> Tensor:
    """Weights as (outputs, segments, inputs), channels padded to groups."""
    padding = -weight.shape[-1] % GROUP
    weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(len(weight), segments, -1)


def _runs_of_parts(parts: List[Tensor], top: int,
                   wide_lanes: bool) -> Optional[List[List[Run]]]:
    """The runs of each part of the weights; None if sums might overflow."""
    cut = []
    for weight in parts:
        if int(weight.min()) < -128 or int(weight.max()) > 127:
            return None
        runs: Optional[List[Run]] = _wide_runs(*weight.shape[1:])
        if not wide_lanes:
            runs = split_runs(weight, top)
        if runs is None:
            return None
        cut.append(runs)
    return cut


def _wide_runs(segments: int, inputs: int) -> List[Run]:
    """Runs for sums in 32 bits, which are limited by the cache alone."""
    groups = inputs // GROUP
    return [
        Run(segment, 1, first, min(MAX_GROUPS, groups - first))
        for segment in range(segments)
        for first in range(0, groups, MAX_GROUPS)
    ]


def _split_weight(weight: Tensor) -> List[Tensor]:
    """Split weights into ``high`` and ``low``, ``16 * high + low``."""
    half = 2**(SHIFT - 1)
    high = torch.div(weight + half, 2**SHIFT, rounding_mode='floor')
    return [high, weight - high * 2**SHIFT]
