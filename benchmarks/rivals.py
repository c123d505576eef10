"""Other engines that run a float model: OpenVINO and onnxruntime.

Both read a model that torch exports. They are no part of the environment;
``make bench-runtime`` adds what requirements/export.txt lists.
"""
import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any, Callable, List, Sequence

import torch
from torch import Tensor, nn

OPSET = 17
# Maps of a model's inputs to its outputs.
Run = Callable[[Tensor], List[Tensor]]


class Unavailable(Exception):
    """An engine that is not there; the message says why in one line."""


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write a model as ONNX, for inputs of one size, unless it is there.

    Args:
        model: float, in eval mode.
        x: an input.
        path: of the file, which is written whole or not at all.

    Raises:
        Unavailable: if onnx is not installed, or torch cannot export it.
    """
    if path.exists():
        return
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise _missing('onnx') from error
    unfinished = path.with_suffix('.partial')
    # What tracing warns of is right for one size.
    with warnings.catch_warnings(), torch.no_grad(), \
            contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        try:
            torch.onnx.export(
                model, (x, ),
                str(unfinished),
                dynamo=False,
                opset_version=OPSET)
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().split('\n')[0]
            raise Unavailable(f'torch cannot export it: {reason}') from error
    os.replace(unfinished, path)


def load_openvino(path: Path, threads: int, precision: str = 'f32') -> Run:
    """A model of ``export`` in OpenVINO.

    Args:
        path: of the file.
        threads: as many as it may use.
        precision: ``'f32'`` or ``'bf16'``. Its default on some CPUs is bf16.

    Raises:
        Unavailable: if OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise _missing('openvino') from error
    settings = dict(
        INFERENCE_NUM_THREADS=threads,
        INFERENCE_PRECISION_HINT=precision,
        NUM_STREAMS=1)
    model = openvino.Core().compile_model(str(path), 'CPU', settings)
    request = model.create_infer_request()

    def run(x: Tensor) -> List[Tensor]:
        found = request.infer([x.numpy()],
                              share_inputs=True,
                              share_outputs=True)
        return _tensors(list(found.values()))

    return run


def load_onnxruntime(path: Path, threads: int) -> Run:
    """A model of ``export`` in onnxruntime.

    Raises:
        Unavailable: if onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing('onnxruntime') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(path), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> List[Tensor]:
        return _tensors(session.run(None, {name: x.numpy()}))

    return run


def _tensors(arrays: Sequence[Any]) -> List[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def _missing(name: str) -> Unavailable:
    return Unavailable(f'{name} is not installed; make bench-runtime installs '
                       'it')


class Elsewhere(nn.Module):
    """A part of a detector that another engine runs."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> List[Tensor]:
        return self.run(x)
