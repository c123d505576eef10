"""Weights of a plan in the order in which the kernels read them.

A block holds 16 outputs. In it, group by group of four inputs in the order of
the runs, lie 16 x 4 bytes. Weights that do not fit eight bits, or whose pairs
of products do not fit 16, are split as ``w = 16 * high + low``; all products
with the high parts come first and are shifted before those with the low parts
are added.
"""
from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from isvit_det.runtime.overflow import GROUP, MAX_GROUPS, Run, split_runs
from isvit_det.runtime.plan import LayerPlan, Unsupported

BLOCK = 16
SHIFT = 4


@dataclass(frozen=True)
class PackedWeights:
    """What ``isvit_product`` of csrc/runtime.h points to.

    Attributes:
        weight: int8, shape (blocks, groups, 16, 4).
        runs: int32, shape (runs, 5): segment, segments, offset in inputs,
            groups, shift.
        correction: int32, shape (blocks * 16,).
        scale: float32, likewise.
        bias: float32, likewise.
        outputs: those that are not padding.
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
        plan: of the layer.
        segments: stretches of memory that the inputs of a row lie in; of a
            convolution the lines of its kernel, or its single positions.
        wide_lanes: whether the kernels add products in 32 bits, so that there
            is nothing to prove.

    Raises:
        Unsupported: if not even two parts of the weights can be summed
            exactly.
    """
    parts = [_segmented(plan.weight, segments)]
    cut = _cut(parts, plan.top, wide_lanes)
    if cut is None:
        parts = _halves(parts[0])
        cut = _cut(parts, plan.top, wide_lanes)
    if cut is None:
        raise Unsupported('a pair of its products does not fit 16 bits, even '
                          'with weights in two parts')
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
    """Runs for products with any weights from ``low`` to ``high``.

    That is what the second operand of a product of activations is, whose
    codes the kernels pack as they come.

    Args:
        inputs: of the products, a multiple of 4.
        top: the largest code of the first operand.
        low: the least weight, not positive.
        high: the greatest, not negative.
        wide_lanes: as for ``pack_layer``.

    Returns:
        ``runs`` as in ``PackedWeights``, and the parts that the weights have
        to be split into, 1 or 2.
    """
    extremes = torch.tensor([[low], [high]]).expand(2, inputs)[:, None]
    parts = [extremes]
    cut = _cut(parts, top, wide_lanes)
    if cut is None:
        half = 2**(SHIFT - 1)
        # Whatever the weights are, their lower parts are all from -half on.
        rest = torch.tensor([[-half], [half - 1]]).expand(2, inputs)[:, None]
        parts = [_halves(extremes)[0], rest]
        cut = _cut(parts, top, wide_lanes)
    assert cut is not None, (inputs, top, low, high)
    return torch.tensor(_run_rows(cut), dtype=torch.int32), len(parts)


def _run_rows(cut: List[List[Run]]) -> List[Tuple[int, ...]]:
    """Rows of ``PackedWeights.runs`` of all parts of the weights."""
    return [(run.segment, run.segments, GROUP * run.first, run.groups,
             SHIFT if runs is not cut[-1] and run is runs[-1] else 0)
            for runs in cut for run in runs]


def _segmented(weight: Tensor, segments: int) -> Tensor:
    """Weights (outputs, segments, inputs), channels filled up to groups."""
    padding = -weight.shape[-1] % GROUP
    weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(len(weight), segments, -1)


def _cut(parts: List[Tensor], top: int,
         wide_lanes: bool) -> Optional[List[List[Run]]]:
    """Runs of every part of the weights, None if there are no exact ones."""
    cut = []
    for weight in parts:
        if int(weight.min()) < -128 or int(weight.max()) > 127:
            return None
        runs: Optional[List[Run]] = _plain_runs(*weight.shape[1:])
        if not wide_lanes:
            runs = split_runs(weight, top)
        if runs is None:
            return None
        cut.append(runs)
    return cut


def _plain_runs(segments: int, inputs: int) -> List[Run]:
    groups = inputs // GROUP
    return [
        Run(segment, 1, first, min(MAX_GROUPS, groups - first))
        for segment in range(segments)
        for first in range(0, groups, MAX_GROUPS)
    ]


def _halves(weight: Tensor) -> List[Tensor]:
    """``high`` and ``low`` with ``16 * high + low == weight``."""
    half = 2**(SHIFT - 1)
    high = torch.div(weight + half, 2**SHIFT, rounding_mode='floor')
    return [high, weight - high * 2**SHIFT]
