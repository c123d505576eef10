"""Quantized layers as QuantizeLinear, DequantizeLinear and a product.

All codes are bytes, and so are entries of tables; fewer bits are clipped
before QuantizeLinear. Between the two nodes codes may be moved about, which
is how padding gets codes of its own.

Engines multiply in integers where both operands come from DequantizeLinear.
Zero points are 0 there: the share of the input's zero point, which may be no
byte, is a constant and part of the bias. Weights are signed bytes.
"""
from dataclasses import dataclass
from typing import List

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isvit_det.export.graph import Graph
from isvit_det.plans.layer import MAX_CODE, InputCodes, LayerPlan

# Products of matrices are what onnxruntime multiplies in integers, and
# convolutions of one pixel what OpenVINO has the faster kernels for on CPUs
# without VNNI.
MATMUL, CONV = 'matmul', 'conv'
# CPUs without VNNI add the products of two neighbours in 16 bits, and clip
# the sum to this without a word.
MAX_PAIR = 2**15 - 1
MAX_WEIGHT = 127


@dataclass(frozen=True)
class Target:
    """How products are written.

    Attributes:
        form: ``MATMUL`` or ``CONV``.
        vnni: whether every CPU that runs the file has VNNI, and adds products
            in 32 bits. Without, weights are split where it may clip sums.
    """
    form: str
    vnni: bool = False


def quantize(graph: Graph, x: str, codes: InputCodes) -> str:
    """Quantize values to what products read, bytes: codes, or entries."""
    if codes.entries is None:
        if codes.top < MAX_CODE:
            low, high = (
                codes.scale * (end - codes.zero_point)
                for end in (0, codes.top))
            x = graph.add('Clip', x, graph.constant(low), graph.constant(high))
        return _to_bytes(graph, x, codes.scale, codes.zero_point)
    # A cell is half a step of the entries. Cells beyond the last one are
    # nearest to the same entry.
    cell = _to_bytes(
        graph, x, codes.scale / 2, 2 * codes.zero_point, is_floor=True)
    table = codes.stored(codes.cells())
    missing = MAX_CODE + 1 - len(table)
    table = F.pad(table, (0, missing), value=int(table[-1]))
    return graph.add(
        'Gather',
        graph.constant(table, np.uint8),
        graph.cast(cell, np.int32),
        axis=0)


def _to_bytes(graph: Graph,
              x: str,
              scale: float,
              zero_point: int,
              is_floor: bool = False) -> str:
    """``x / scale`` rounded, or down if ``is_floor``, plus ``zero_point``,
    within 0..255."""
    near = min(max(zero_point, 0), MAX_CODE)
    moved = scale * (zero_point - near - is_floor / 2)
    if moved:
        x = graph.add('Add', x, graph.constant(moved))
    return graph.add('QuantizeLinear', x, graph.constant(scale),
                     graph.constant(near, np.uint8))


def linear(graph: Graph, name: str, codes: str, plan: LayerPlan,
           target: Target) -> str:
    """Add a linear layer.

    Args:
        graph: gets the nodes.
        name: of the layer within the current scope.
        codes: what ``quantize`` gives, shape (..., tokens, inputs).
        plan: describes the layer.
        target: how it is written.

    Returns:
        Outputs in float, of the shape (..., tokens, outputs) in the form
        ``MATMUL``, and (1, all tokens, outputs) in the form ``CONV``.
    """
    outputs, inputs = plan.weight.shape
    is_conv = target.form == CONV
    x = graph.add('DequantizeLinear', codes, graph.constant(plan.input.scale),
                  graph.constant(0, np.uint8))
    if is_conv:
        # OpenVINO multiplies in integers if DequantizeLinear comes first.
        x = graph.reshape(x, (1, 1, -1, inputs))
        x = graph.add('Transpose', x, perm=(0, 3, 1, 2))
    terms: List[str] = []
    parts = split_weights(plan.weight, plan.top, target.vnni)
    for index, part in enumerate(parts):
        part = part[:, :, None, None] if is_conv else part.t()
        weight = graph.constant(part, np.int8)
        decoded = graph.add(
            'DequantizeLinear',
            weight,
            graph.constant(plan.scale / plan.input.scale),
            graph.constant(torch.zeros(outputs), np.int8),
            axis=0 if is_conv else 1)
        terms.append(
            graph.multiply(name, 'Conv' if is_conv else 'MatMul', x, decoded,
                           weight, index))
    # onnxruntime would multiply in float if the bias had one dimension.
    bias = plan.bias + plan.scale * plan.correction
    shape = (1, -1, 1, 1) if is_conv else (1, 1, -1)
    terms.append(graph.constant(bias.view(shape)))
    y = terms[0]
    for term in terms[1:]:
        y = graph.add('Add', y, term)
    if not is_conv:
        return y
    y = graph.add('Transpose', y, perm=(0, 2, 3, 1))
    return graph.reshape(y, (1, -1, outputs))


def split_weights(weight: Tensor, top: int, vnni: bool) -> List[Tensor]:
    """Divide weights into terms that are multiplied without an error.

    Where CPUs without VNNI might clip the sum of any two products of an
    output, no term has weights so large that they could. Weights that are no
    signed bytes are divided in any case.

    Args:
        weight: integers, shape (outputs, inputs).
        top: the largest byte that they are multiplied by.
        vnni: whether products are added in 32 bits.

    Returns:
        Integers in -127..127 whose sum is ``weight``; one term if that does.

    >>> split_weights(torch.tensor([[127, -3, 90]]), 255, vnni=False)
    [tensor([[64, -3, 64]]), tensor([[63,  0, 26]])]
    >>> len(split_weights(torch.tensor([[127, -3, 90]]), 127, vnni=False))
    1
    """
    limit = MAX_WEIGHT
    if not vnni and top * _largest_pair(weight) > MAX_PAIR:
        limit = min(MAX_WEIGHT, MAX_PAIR // (2 * top))
    terms: List[Tensor] = []
    while not terms or bool(weight.any()):
        terms.append(weight.clamp(-limit, limit))
        weight = weight - terms[-1]
    return terms


def _largest_pair(weight: Tensor) -> int:
    """The largest sum of two weights of one sign and output, by size."""
    pairs = [
        part.clamp(min=0).topk(min(2, weight.shape[1]), 1).values.sum(1)
        for part in (weight, -weight)
    ]
    return int(torch.stack(pairs).max())
