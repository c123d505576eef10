"""The proof of a file: what an engine runs in integers, and what in float.

An engine is asked after it has compiled the file: OpenVINO for the precision
of every node of its runtime model, onnxruntime for its optimized graph.
"""
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Set

from isvit_det.core.errors import QuantError, few_names
from isvit_det.export.engines import OPENVINO, InOnnxruntime, InOpenVINO
from isvit_det.export.graph import Product
from isvit_det.export.packages import import_extra
from isvit_det.export.windows import INDICES

# Nodes of onnxruntime that multiply bytes.
INTEGER_NODES = ('MatMulIntegerToFloat', 'MatMulInteger', 'QLinearMatMul',
                 'DynamicQuantizeMatMul')
# Nodes that compute nothing, in either engine.
SILENT = {
    'Const', 'Constant', 'Input', 'Parameter', 'Output', 'Result', 'Reshape',
    'Reorder', 'Transpose', 'Gather', 'Concat', 'Split', 'Squeeze',
    'Unsqueeze', 'Shape', 'ShapeOf', 'Slice', 'StridedSlice', 'Identity',
    'Flatten', 'Pad', 'SpaceToDepth', 'Broadcast', 'Expand', 'Range',
    'Concatenation'
}


class Proof(NamedTuple):
    """What an engine does with a file.

    Attributes:
        engine: its name and version.
        integer: names of the quantized layers that it multiplies in integers.
        in_float: those that it multiplies in float.
        others: numbers of the other nodes that compute in float, by kind.
    """
    engine: str
    integer: List[str]
    in_float: List[str]
    others: Dict[str, int]


def prove(engine: str, file: Any,
          products: Mapping[str, Sequence[Product]]) -> Proof:
    """Find out what an engine runs in integers.

    Args:
        engine: one of ``ENGINES``.
        file: as for ``load``.
        products: of the file's quantized layers, see ``Graph``.
    """
    if engine == OPENVINO:
        found = _of_openvino(file)
    else:
        found = _of_onnxruntime(file)
    in_float = [
        layer for layer, parts in products.items()
        if not all(part.node in found.integer or part.weight in found.integer
                   for part in parts)
    ]
    # OpenVINO's has the build behind a dash.
    version = import_extra(engine).__version__.split('-')[0]
    return Proof(f'{engine} {version}',
                 [layer for layer in products if layer not in in_float],
                 in_float, dict(sorted(found.others.items())))


class _Found(NamedTuple):
    """Names of nodes or of weights that are multiplied in integers, and the
    number of all else that computes in float, by kind."""
    integer: Set[str]
    others: 'Counter[str]'


def _of_openvino(file: Any) -> _Found:
    integer: Set[str] = set()
    others: 'Counter[str]' = Counter()
    compiled = InOpenVINO(file, threads=1).compiled
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = {
            key: str(_plain(value))
            for key, value in node.get_rt_info().items()
        }
        kind = facts['layerType']
        if kind in SILENT:
            continue
        # The kernel's name ends in the type that it computes in.
        if (facts['runtimePrecision'] in ('u8', 'i8')
                and facts['primitiveType'].endswith('_I8')):
            # Of a node that took in others, the name has an ending.
            names = facts['originalLayersNames'].split(',')
            integer.update(name.split('/')[0] for name in names)
        elif facts['runtimePrecision'] == 'f32':
            others[kind] += 1
    return _Found(integer, others)


def _plain(value: Any) -> Any:
    return getattr(value, 'value', value)


def _of_onnxruntime(file: Any) -> _Found:
    onnx = import_extra('onnx')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'optimized.onnx'
        InOnnxruntime(file, threads=1, optimized=path)
        nodes = onnx.load(str(path)).graph.node
    integer: Set[str] = set()
    others: 'Counter[str]' = Counter()
    for node in nodes:
        if node.op_type in INTEGER_NODES:
            integer.update(node.input)
        elif node.op_type not in SILENT and INDICES not in node.name:
            others[node.op_type] += 1
    return _Found(integer, others)


def check(proof: Proof, allowed: Sequence[str]) -> None:
    """Raise if a quantized layer would be multiplied in float.

    Args:
        proof: of a file.
        allowed: names of layers that may be.

    Raises:
        QuantError: naming those that may not be, or names that are of no
            quantized layer.
    """
    unknown = sorted(set(allowed) - {*proof.integer, *proof.in_float})
    if unknown:
        raise QuantError(
            f'--allow-float: {few_names(unknown)} is no quantized '
            'layer of the file; the layers are named as in '
            f'{few_names([*proof.integer, *proof.in_float], 2)}.')
    refused = [name for name in proof.in_float if name not in allowed]
    if refused:
        raise QuantError(
            f'{proof.engine} would multiply {len(refused)} of '
            f'{len(proof.integer) + len(proof.in_float)} quantized layers in '
            f'float: {few_names(refused)}; allow it by --allow-float NAME, or '
            'take the other format.')
