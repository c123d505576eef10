"""The engines that run exported files on a CPU: OpenVINO and onnxruntime."""
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from isvit_det.core.errors import QuantError
from isvit_det.export.packages import import_extra

OPENVINO, ONNXRUNTIME = 'openvino', 'onnxruntime'
ENGINES = (OPENVINO, ONNXRUNTIME)


class Loaded:
    """A file in one engine.

    Attributes:
        compiled: OpenVINO's compiled model, or onnxruntime's session.
    """
    compiled: Any

    def run(self, inputs: Dict[str, np.ndarray]) -> List[np.ndarray]:
        """The outputs, in the order of the file."""
        raise NotImplementedError

    def metadata(self, key: str) -> Any:
        """What a file has under a key of its metadata, None if nothing."""
        raise NotImplementedError


class InOpenVINO(Loaded):
    """A file in OpenVINO, in float32 where it has no integers.

    Its default on some CPUs is bfloat16, which is not what was calibrated.

    Args:
        file: path of an ``.onnx`` or ``.xml``, or the content of the former.
        threads: as many as it may use; 0 leaves it to OpenVINO.
    """

    def __init__(self, file: Any, threads: int = 0) -> None:
        openvino = import_extra('openvino')
        settings: Dict[str, Any] = dict(
            INFERENCE_PRECISION_HINT='f32', NUM_STREAMS=1)
        if threads:
            settings['INFERENCE_NUM_THREADS'] = threads
        core = openvino.Core()
        self.model = core.read_model(file)
        self.compiled = core.compile_model(self.model, 'CPU', settings)
        self._request = self.compiled.create_infer_request()

    def run(self, inputs: Dict[str, np.ndarray]) -> List[np.ndarray]:
        # A result is asked for once: each time, the model would run again.
        found = self._request.infer(inputs, share_inputs=True)
        return [np.array(found[output]) for output in self.compiled.outputs]

    def metadata(self, key: str) -> Any:
        # That of an ONNX file is put under another key.
        for path in ([key], ['framework', key]):
            if self.model.has_rt_info(path):
                return self.model.get_rt_info(path).value
        return None


class InOnnxruntime(Loaded):
    """A file in onnxruntime.

    Args:
        file: path of an ``.onnx``, or its content.
        threads: as many as it may use; 0 leaves it to onnxruntime.
        optimized: file to which the optimized graph is written.
    """

    def __init__(self,
                 file: Any,
                 threads: int = 0,
                 optimized: Optional[Path] = None) -> None:
        onnxruntime = import_extra('onnxruntime')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Errors only: it warns of every file that is optimized for one CPU.
        options.log_severity_level = 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        self.compiled = onnxruntime.InferenceSession(
            file, options, providers=['CPUExecutionProvider'])

    def run(self, inputs: Dict[str, np.ndarray]) -> List[np.ndarray]:
        return self.compiled.run(None, inputs)

    def metadata(self, key: str) -> Any:
        return self.compiled.get_modelmeta().custom_metadata_map.get(key)


def load(engine: str, file: Any, threads: int = 0) -> Loaded:
    """Load a file in an engine.

    Args:
        engine: one of ``ENGINES``.
        file: its path as a text, or the content of an ``.onnx``.
        threads: as many as it may use; 0 leaves it to the engine.

    Raises:
        QuantError: if there is no such engine, its package is missing, or it
            cannot read the file.
    """
    if engine not in ENGINES:
        raise QuantError(f'engine: {engine!r} is not allowed; expected one of '
                         f'{list(ENGINES)}.')
    kind = InOpenVINO if engine == OPENVINO else InOnnxruntime
    if isinstance(file, str) and not Path(file).is_file():
        raise QuantError(f'file: there is no {file}; give one of export_det.')
    try:
        return kind(file, threads)
    except QuantError:
        raise
    except Exception as error:
        # Each engine has classes of its own for what a file may have wrong.
        lines = str(error).strip().splitlines() or ['no message']
        endings = ['.onnx', '.xml'] if engine == OPENVINO else ['.onnx']
        raise QuantError(
            f'file: {engine} cannot read {file} ({lines[-1]}); give a file '
            f'of export_det that ends with one of {endings}, or the other '
            'engine.') from error
