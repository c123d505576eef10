"""``export_detector``: a calibrated detector's backbone for other engines."""
import json
from pathlib import Path
from typing import (Any, Dict, List, NamedTuple, Optional, Sequence, Tuple,
                    Union)

import numpy as np
import torch

from isvit_det.core.errors import QuantError
from isvit_det.core.layers import simulation
from isvit_det.export import FORMATS
from isvit_det.export.backbones import (IMAGE, Shape, check_calibrated,
                                        write_backbone)
from isvit_det.export.engines import ONNXRUNTIME, OPENVINO, load
from isvit_det.export.files import facts_text, save_openvino, unfinished
from isvit_det.export.graph import Graph
from isvit_det.export.layers import CONV, MATMUL, Target
from isvit_det.export.proof import Proof, check, prove
from isvit_det.version import __version__

# Name of the report beside a file.
REPORT = 'export.json'
# Engine that proves each format, and the file's name.
ENGINE_OF = dict(onnx=ONNXRUNTIME, openvino=OPENVINO)
NAME_OF = dict(onnx='backbone.onnx', openvino='backbone.xml')
# Size of the noise that a file for all sizes is tried on.
TRIED_SIZE = (224, 320)
# Relative errors of outputs up to which an engine is taken to compute the
# same: this one, in which a single code at the edge of rounding may result in
# small models, and this many times what a change of the image by as little as
# rounding makes of it in the simulation.
SMALL_ERROR, TIMES_ROUNDING = .3, 4.
ROUNDING = 1e-6


class Exported(NamedTuple):
    """An exported file.

    Attributes:
        path: of the ``.onnx`` or the ``.xml``.
        report: content of ``export.json`` beside it.
    """
    path: Path
    report: Dict[str, Any]


def export_detector(model: Any,
                    folder: Union[str, Path],
                    to: str = 'openvino',
                    shape: Optional[Sequence[int]] = None,
                    allow_float: Sequence[str] = (),
                    vnni: bool = False) -> Exported:
    """Write the backbone of a calibrated detector for other engines.

    Before a file is written, the engine that it is for compiles it. A
    quantized layer that it would multiply in float is an error, and so is an
    output far from that of the simulation.

    Args:
        model: of ``quantize_detector``, or of ``init_detector`` with a packed
            file; it stays as it is.
        folder: gets ``backbone.onnx``, or ``backbone.xml`` and
            ``backbone.bin``, and ``export.json``; files of these names are
            replaced.
        to: ``'openvino'``, or ``'onnx'`` for onnxruntime and others.
        shape: (height, width) of the images as the detector pads them; None
            for any, which a ViT cannot.
        allow_float: names of quantized layers that may run in float.
        vnni: whether all CPUs that will run the file have VNNI. By default
            8-bit weights are divided into two layers where a CPU without it
            would clip sums.

    Raises:
        QuantError: if the model is not calibrated or cannot be written, an
            argument is wrong, a package is missing, a quantized layer would
            run in float, or the file cannot be written.
    """
    if to not in FORMATS:
        raise QuantError(f'to: {to!r} is not allowed; expected one of '
                         f'{list(FORMATS)}.')
    backbone = getattr(model, 'backbone', None)
    check_calibrated(backbone)
    size = check_shape(model, shape)
    engine = ENGINE_OF[to]
    target = Target(CONV if to == 'openvino' else MATMUL, vnni)
    graph = write_backbone(backbone, size, target)
    facts = _facts(model, size)
    metadata = facts_text(facts)
    content = graph.model(metadata).SerializeToString()
    folder = Path(folder)
    with unfinished(folder) as place:
        path = place / NAME_OF[to]
        if to == 'openvino':
            save_openvino(content, metadata, path)
        else:
            path.write_bytes(content)
        proof = prove(engine, str(path), graph.products)
        check(proof, allow_float)
        errors, rounding = _errors(
            backbone, engine, path, size
            or _padded(TRIED_SIZE, divisor_of(model)))
        report = dict(
            facts,
            to=to,
            vnni=vnni,
            engine=proof.engine,
            files={
                one.name: one.stat().st_size
                for one in sorted(place.iterdir())
            },
            integer_layers=proof.integer,
            float_layers=proof.in_float,
            divided_layers=_divided(graph),
            others_in_float=proof.others,
            errors=errors,
            errors_of_rounding=rounding)
        _check_errors(proof, errors, rounding)
        (place / REPORT).write_text(json.dumps(report, indent=2) + '\n')
    return Exported(folder / NAME_OF[to], report)


def divisor_of(model: Any) -> int:
    """What a detector's preprocessor pads the sides of images to."""
    return int(getattr(model.data_preprocessor, 'pad_size_divisor', 1))


def check_shape(model: Any, shape: Optional[Sequence[int]]) -> Shape:
    """(height, width) of images of a detector, or None.

    Raises:
        QuantError: if there are no such images.
    """
    if shape is None:
        return None
    sides = list(shape)
    if len(sides) != 2 or not all(
            isinstance(side, int) and side > 0 for side in sides):
        raise QuantError(f'shape: {shape!r} is not allowed; expected height '
                         'and width in pixels.')
    divisor = divisor_of(model)
    height, width = sides
    if height % divisor or width % divisor:
        padded = 'x'.join(map(str, _padded((height, width), divisor)))
        raise QuantError(
            f'shape: {height}x{width} is not allowed; the detector pads its '
            f'images to multiples of {divisor}, such as {padded}.')
    return height, width


def _padded(size: Tuple[int, int], divisor: int) -> Tuple[int, int]:
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def _facts(model: Any, size: Shape) -> Dict[str, Any]:
    """What a file says of itself, and what whoever runs it needs to know."""
    prepared = model.data_preprocessor
    return dict(
        isvit_det=__version__,
        part='backbone',
        backbone=type(model.backbone).__name__,
        bits=model.quant_config.label,
        scope=model.quant_config.scope,
        shape=None if size is None else list(size),
        mean=_numbers(getattr(prepared, 'mean', None)),
        std=_numbers(getattr(prepared, 'std', None)),
        bgr_to_rgb=bool(getattr(prepared, '_channel_conversion', False)),
        pad_size_divisor=divisor_of(model))


def _numbers(values: Optional[torch.Tensor]) -> Optional[List[float]]:
    return None if values is None else values.flatten().tolist()


def _divided(graph: Graph) -> List[str]:
    """Names of layers whose weights are in more than one product."""
    return [
        name for name, parts in graph.products.items()
        if any(part.term for part in parts)
    ]


def _errors(backbone: Any, engine: str, path: Path,
            size: Tuple[int, int]) -> Tuple[List[float], List[float]]:
    """Relative errors of each output on noise, against the simulation.

    Returns:
        Those of the engine; and those of the simulation itself, with an image
        that is changed by as little as rounding.
    """
    generator = np.random.default_rng(0)
    shape = (1, 3, *size)
    image = generator.standard_normal(shape, np.float32)
    changed = image + ROUNDING * generator.standard_normal(shape, np.float32)
    found = [
        torch.from_numpy(one)
        for one in load(engine, str(path)).run({IMAGE: image})
    ]
    device = next(backbone.parameters()).device
    with torch.no_grad(), simulation(backbone):
        expected, other = ([
            one.cpu() for one in backbone(torch.from_numpy(x).to(device))
        ] for x in (image, changed.astype(np.float32)))
    return _relative(found, expected), _relative(other, expected)


def _relative(found: Sequence[torch.Tensor],
              expected: Sequence[torch.Tensor]) -> List[float]:
    return [
        float((one - other).norm() / other.norm())
        for one, other in zip(found, expected)
    ]


def _check_errors(proof: Proof, errors: Sequence[float],
                  rounding: Sequence[float]) -> None:
    for index, (error, least) in enumerate(zip(errors, rounding)):
        # A comparison with NaN is false.
        if not error <= max(SMALL_ERROR, TIMES_ROUNDING * least):
            raise QuantError(
                f'{proof.engine} computes something else than the simulation: '
                f'output {index} differs by {error:.2g} of its size, and '
                f'rounding would explain {least:.2g}. No file is written; '
                'take the other format, and report this.')
