"""Quantized products of attention, in float between bytes.

Engines have no integer product for what SULQ gives, whose levels are no
integers. Products are therefore in float, of integers that it holds exactly.
"""
import math

import numpy as np

from isvit_det.core.quantizers import (AttentionQuantizer, Quantizer,
                                       ShiftUniformLog2Quantizer)
from isvit_det.export.graph import Graph
from isvit_det.export.layers import quantize
from isvit_det.plans.layer import InputCodes


def centered(graph: Graph, codes: str, center: int) -> str:
    """Bytes as floats, minus a number."""
    return graph.add('Sub', graph.cast(codes, np.float32),
                     graph.constant(center))


def represent_probabilities(graph: Graph, p: str, quantizer: Quantizer) -> str:
    """Values that stand for probabilities, by their quantizer.

    SULQ's are computed by logarithm and exponential: OpenVINO does not compile
    comparisons with every limit of 4 bits, and onnxruntime's look-up is slow.

    Args:
        graph: gets the nodes.
        p: probabilities in float.
        quantizer: a calibrated one of attention.
    """
    if not isinstance(quantizer, AttentionQuantizer):
        codes = InputCodes.of(quantizer)
        x = centered(graph, quantize(graph, p, codes), codes.zero_point)
        return graph.add('Mul', x, graph.constant(codes.scale))
    low, step = float(quantizer.low), float(quantizer.step)
    shift = float(quantizer.offset)
    if shift:
        p = graph.add('Add', p, graph.constant(shift))
    position = _affine(graph, graph.add('Log', p), -1 / (math.log(2) * step),
                       -low / step)  # yapf: disable
    code = graph.add('Clip', graph.add('Round', position), graph.constant(0),
                     graph.constant(2**quantizer.bits - 1))
    if (isinstance(quantizer, ShiftUniformLog2Quantizer)
            and quantizer.config.exponent == 'table'):
        power = graph.add(
            'Exp', _affine(graph, code, -step * math.log(2),
                           -low * math.log(2)))
        return graph.add('Relu', graph.add('Sub', power,
                                           graph.constant(shift)))
    table = graph.constant(quantizer.table())
    return graph.add('Gather', table, graph.cast(code, np.int32), axis=0)


def _affine(graph: Graph, x: str, factor: float, constant: float) -> str:
    x = graph.add('Mul', x, graph.constant(factor))
    return graph.add('Add', x, graph.constant(constant))
