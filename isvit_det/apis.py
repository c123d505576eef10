"""Quantizing from Python, as MMDetection's ``mmdet.apis`` does the rest."""
import copy
import hashlib
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import (Any, ContextManager, Dict, List, Mapping, Optional,
                    Sequence, Tuple, Union)

import numpy as np
from mmcv.transforms import Compose, LoadAnnotations
from mmdet.registry import TRANSFORMS
from mmdet.utils import get_test_pipeline_cfg
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger

from isvit_det.checkpoint import file_hash, plain, save_packed
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.spec import SOSConfig
from isvit_det.detector import language_model
from isvit_det.engine.calibrate import WORKSPACE, calibrate_detector_
from isvit_det.engine.configs import config_errors, quantize_config_
from isvit_det.engine.images import Images, reading_images
from isvit_det.engine.provenance import describe_origin, fingerprint
from isvit_det.packed_state import is_calibrated
from isvit_det.registry import MODELS

Image = Union[str, Path, np.ndarray]


def quantize_detector(model: Any,
                      calib_images: Sequence[Image],
                      bits: str = 'w4a4',
                      scope: str = 'backbone',
                      method: str = 'isvit',
                      iters: Optional[int] = None,
                      seed: int = 0,
                      work_dir: Optional[Union[str, Path]] = None,
                      quant: Optional[Mapping[str, Any]] = None,
                      sos: Optional[Mapping[str, Any]] = None,
                      text_prompt: Union[str, Sequence[str], None] = None,
                      custom_entities: bool = False) -> Any:
    """Make a detector in low bits from a float one.

    What is evaluated later must not be among the images; nobody checks it
    here.

    Args:
        model: of ``mmdet.apis.init_detector``; it stays as it is.
        calib_images: files, or arrays (H, W, 3) in BGR order as OpenCV reads
            them; all are used.
        bits: ``'wNaM'`` with N and M in 2..8.
        scope: ``'backbone'``, or ``'detector'`` for neck and heads as well.
        method: ``'isvit'``, ``'isvit_paper'``, ``'repq'`` or ``'minmax'``.
        iters: per unit and stage; None takes the method's.
        seed: of the minibatches.
        work_dir: keeps the state of the calibration, so that the same call
            goes on from there, or has nothing left to do; None keeps none.
        quant: other settings of ``QuantConfig``, by name.
        sos: other settings of ``SOSConfig``, by name.
        text_prompt: what a detector that reads text looks for, as
            ``inference_detector`` takes it.
        custom_entities: whether the prompt has names that end with full
            stops, and is no sentence.

    Returns:
        The detector on the same device. ``inference_detector`` takes it.

    Raises:
        QuantError: if the backbone is not supported, a setting is wrong, an
            image cannot be read, or a detector that reads text has no
            prompt or another has one.
    """
    cfg = getattr(model, 'cfg', None)
    if cfg is None:
        raise QuantError('model: it has no cfg; build it with '
                         'mmdet.apis.init_detector.')
    if hasattr(model, 'quant_config'):
        raise QuantError('model: it is quantized already; give a float one.')
    prompt = _prompt(model, text_prompt, custom_entities)
    cfg = copy.deepcopy(cfg)
    quantize_config_(cfg,
                     dict(quant or {}, bits=bits, scope=scope, method=method))
    images = GivenImages(
        calib_images, without_annotations(get_test_pipeline_cfg(cfg.copy())),
        prompt)
    with config_errors():
        quantized = MODELS.build(copy.deepcopy(cfg.model))
    settings = dict(sos or {}, num_images=len(images), seed=seed)
    if iters is not None:
        settings['iters'] = iters
    config = SOSConfig.from_dict(settings, quantized.quant_config)
    quantized.load_state_dict(model.state_dict())
    quantized.cfg, quantized.dataset_meta = cfg, model.dataset_meta
    quantized.to(next(model.parameters()).device).eval()
    origin = plain(describe_origin(quantized, None, images, config))
    if prompt:
        origin['prompt'] = plain(prompt)
    key = fingerprint(origin, images.hashes(), [cfg.model, images.pipeline],
                      quantized)
    folder: ContextManager[Any] = nullcontext(work_dir)
    if work_dir is None:
        folder = tempfile.TemporaryDirectory()
    with folder as place:
        calibrate_detector_(quantized, images, config,
                            Path(place) / WORKSPACE, key,
                            MMLogger.get_current_instance())
    if quantized.float_layers:
        cfg.model['float_layers'] = quantized.float_layers
    quantized.provenance = origin
    return quantized


def without_annotations(
        pipeline: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Transforms of a test, less those that read what images show.

    Those of panoptic segmentation ask for a package when they are built.
    """
    kinds = [TRANSFORMS.get(step['type']) for step in pipeline]
    return [
        step for step, kind in zip(pipeline, kinds)
        if not (isinstance(kind, type) and issubclass(kind, LoadAnnotations))
    ]


def _prompt(model: Any, text: Union[str, Sequence[str], None],
            custom_entities: bool) -> Dict[str, Any]:
    """What the test pipeline is given beside an image.

    Raises:
        QuantError: if there is no prompt for a model that reads one, or one
            for another.
    """
    if language_model(model) is None:
        if text:
            raise QuantError(f'text_prompt: a {type(model).__name__} reads no '
                             'text; leave it out.')
        return {}
    if not text:
        raise QuantError(f'text_prompt: a {type(model).__name__} looks for '
                         "what a text says; give one, such as 'cat. dog.' "
                         'with custom_entities=True.')
    return dict(text=text, custom_entities=custom_entities)


def save_detector(model: Any, folder: Union[str, Path]) -> Tuple[str, str]:
    """Write what MMDetection's tools need to run a quantized detector.

    Args:
        model: of ``quantize_detector``.
        folder: made if it is not there.

    Returns:
        Paths of the config and the packed checkpoint, ``config.py`` and
        ``packed.pth``, for ``mmdet.apis.init_detector`` and all others.

    Raises:
        QuantError: if the model is not quantized, or nothing can be written.
    """
    if not hasattr(model, 'provenance') or not is_calibrated(model):
        raise QuantError('model: it is not of quantize_detector; quantize it '
                         'first.')
    config, packed = Path(folder) / 'config.py', Path(folder) / 'packed.pth'
    save_packed(model, packed, model.provenance, model.dataset_meta)
    text = model.cfg.pretty_text.encode()
    write_atomically(config, lambda file: file.write(text))
    return str(config), str(packed)


class GivenImages(Images):
    """Images that somebody has at hand.

    Args:
        images: files or arrays (H, W, 3).
        pipeline: transforms of the test, the first of which reads a file.
        prompt: what they are given beside an image.

    Attributes:
        asked: how many there are.
    """

    def __init__(self, images: Sequence[Image],
                 pipeline: List[Dict[str, Any]],
                 prompt: Optional[Mapping[str, Any]] = None) -> None:
        if isinstance(images, (str, Path)) or len(images) == 0:
            raise QuantError('calib_images: give a list of at least 1 file or '
                             'array.')
        self.images = list(images)
        self.asked = len(self.images)
        self.pipeline = pipeline
        self.prompt = dict(prompt or {})
        from_file = Compose(pipeline)
        from_array = Compose(
            [dict(type='mmdet.LoadImageFromNDArray'), *pipeline[1:]])
        self._pipelines = from_file, from_array

    def __len__(self) -> int:
        return len(self.images)

    def ids(self) -> List[int]:
        """Number of every image."""
        return list(range(len(self)))

    def names(self) -> List[str]:
        """File name of every image; arrays have none."""
        return [
            'array' if isinstance(image, np.ndarray) else Path(image).name
            for image in self.images
        ]

    def hashes(self) -> List[str]:
        """SHA-256 of every image's content.

        Raises:
            QuantError: naming a file that cannot be read.
        """
        with reading_images():
            return [
                hashlib.sha256(image.tobytes()).hexdigest() if isinstance(
                    image, np.ndarray) else file_hash(Path(image))
                for image in self.images
            ]

    def read(self, index: int) -> Dict[str, Any]:
        image = self.images[index]
        with reading_images():
            if isinstance(image, np.ndarray):
                data = self._pipelines[1](dict(self.prompt, img=image, img_id=index))
            else:
                data = self._pipelines[0](
                    dict(self.prompt, img_path=str(image), img_id=index))
        return pseudo_collate([data])
