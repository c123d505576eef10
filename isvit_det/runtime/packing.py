"""Weights of a layer in the order in which the kernels read them.

Weights are stored in blocks of 16 outputs. A block consists of groups of four
inputs, in the order of the runs, and a group of 16 x 4 bytes. Where weights do
not fit 8 bits, or lanes of 16 bits can sum next to no products, weights have
16 bits instead: the products of two inputs are then added in 32 bits, which
cannot overflow.
"""
from dataclasses import dataclass
from typing import List, Tuple

import torch
from torch import Tensor

from isvit_det.plans.layer import LayerPlan, Unsupported
from isvit_det.runtime.overflow import GROUP, MAX_GROUPS, Run, split_runs

# Outputs of a block.
BLOCK = 16
# Groups of a run from which on weights of 8 bits are faster than those of 16
# (measured): a group of the latter takes ten instructions, one of the former
# four, and the end of a run another dozen.
MIN_GROUPS = 3


@dataclass(frozen=True)
class PackedWeights:
    """The arrays of ``isvit_product`` in csrc/runtime.h.

    Attributes:
        weight: of 8 bits, shape (blocks, groups, 16, 4); or of 16, shape
            (blocks, groups, 2, 16, 2), first those of the inputs 0 and 2 of
            a group, then those of 1 and 3.
        runs: int32, shape (runs, 5): segment, segments, offset in inputs,
            groups, whether weights have 16 bits.
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
        Unsupported: if its weights do not fit 16 bits.
    """
    weight = _split_segments(plan.weight, segments)
    if int(weight.abs().max()) > torch.iinfo(torch.int16).max:
        raise Unsupported('its weights do not fit 16 bits')
    runs, is_wide = _runs_of(weight, plan.top, wide_lanes)
    pieces = []
    for run in runs:
        lines = weight[:, run.segment:run.segment + run.segments]
        inputs = lines[..., GROUP * run.first:][..., :GROUP * run.groups]
        pieces.append(inputs.flatten(1))
    flat = torch.cat(pieces, 1)
    outputs = len(flat)
    padding = -outputs % BLOCK
    flat = torch.nn.functional.pad(flat, (0, 0, 0, padding))
    groups = flat.view(-1, BLOCK, flat.shape[1] // GROUP, GROUP)
    if is_wide:
        pairs = groups.to(torch.int16).unflatten(-1, (2, 2))
        packed = pairs.permute(0, 2, 4, 1, 3)
    else:
        packed = groups.to(torch.int8).transpose(1, 2)

    def padded(values: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.pad(values, (0, padding)).to(dtype)

    return PackedWeights(packed.contiguous(), _run_rows(runs, is_wide),
                         padded(plan.correction, torch.int32),
                         padded(plan.scale, torch.float32),
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
        ``runs`` as in ``PackedWeights``, and the bytes of a weight, 1 or 2.
    """
    extremes = torch.tensor([[low], [high]]).expand(2, inputs)[:, None]
    runs, is_wide = _runs_of(extremes, top, wide_lanes)
    return _run_rows(runs, is_wide), 2 if is_wide else 1


def _run_rows(runs: List[Run], is_wide: bool) -> Tensor:
    """``PackedWeights.runs``."""
    return torch.tensor(
        [(run.segment, run.segments, GROUP * run.first, run.groups, is_wide)
         for run in runs],
        dtype=torch.int32)


def _split_segments(weight: Tensor, segments: int) -> Tensor:
    """Weights as (outputs, segments, inputs), channels padded to groups."""
    padding = -weight.shape[-1] % GROUP
    weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(len(weight), segments, -1)


def _runs_of(weight: Tensor, top: int,
             wide_lanes: bool) -> Tuple[List[Run], bool]:
    """Runs of weights (outputs, segments, inputs), as few as possible.

    Returns:
        The runs, and whether their weights have to have 16 bits.
    """
    segments, inputs = weight.shape[1:]
    if int(weight.min()) >= -128 and int(weight.max()) <= 127:
        if wide_lanes:
            return _plain_runs(segments, inputs, MAX_GROUPS), False
        runs = split_runs(weight, top)
        if runs is not None and (len(runs) * MIN_GROUPS * GROUP
                                 <= segments * inputs):
            return runs, False
    return _plain_runs(segments, inputs, MAX_GROUPS // 2), True


def _plain_runs(segments: int, inputs: int, limit: int) -> List[Run]:
    """Runs of at most ``limit`` groups."""
    groups = inputs // GROUP
    return [
        Run(segment, 1, first, min(limit, groups - first))
        for segment in range(segments) for first in range(0, groups, limit)
    ]
