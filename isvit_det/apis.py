"""Quantizing, saving and exporting a detector, beside ``mmdet.apis``."""
import copy
import hashlib
import inspect
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import (Any, ContextManager, Dict, List, Mapping, Optional,
                    Sequence, Tuple, Union)

import numpy as np
import torch
from mmcv.transforms import Compose, LoadAnnotations, LoadImageFromFile
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper

from isvit_det.checkpoint import save_packed
from isvit_det.core.digests import file_hash
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.layers import is_calibrated
from isvit_det.core.plain import plain
from isvit_det.core.settings import SOSConfig
from isvit_det.detector import language_model
from isvit_det.engine.calibrate import WORKSPACE, calibrate_detector_
from isvit_det.engine.images import Images
from isvit_det.export.detector import export_detector  # noqa: F401
from isvit_det.inputs.config_forms import class_of, name_types_
from isvit_det.inputs.configs import (config_errors, is_replaceable,
                                      quantize_config_)
from isvit_det.inputs.data_errors import GuardedPipeline
from isvit_det.inputs.given_images import Image, as_images
from isvit_det.registry import MODELS
from isvit_det.report.provenance import describe_origin, fingerprint


# The caller may be in a context that disables gradients.
@torch.inference_mode(False)
@torch.enable_grad()
def quantize_detector(model: Any,
                      calib_images: Any,
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

    Images that are evaluated later must not be among the calibration images;
    this is not checked here.

    Args:
        model: of ``mmdet.apis.init_detector``, maybe wrapped for several
            devices or of half precision; it stays as it is.
        calib_images: files, arrays (H, W, 3) of uint8 in BGR order as OpenCV
            reads them, or images of Pillow; see ``as_images``. All are used.
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
        The detector in float32 on the same device. ``inference_detector``
        takes it.

    Raises:
        QuantError: if the backbone is not supported, a setting is wrong, an
            image cannot be read, or a detector that reads text has no
            prompt or another has one.
    """
    for name, value in (('quant', quant), ('sos', sos)):
        if not isinstance(value or {}, Mapping):
            raise QuantError(f'{name}: expected a dict of settings, got '
                             f'{value!r}.')
    if work_dir is not None:
        work_dir = _folder('work_dir', work_dir)
    model = _bare(model)
    cfg = _config_of(model)
    state = _state_of(model)
    prompt = _prompt(model, text_prompt, custom_entities)
    with config_errors():
        quantize_config_(
            cfg, dict(quant or {}, bits=bits, scope=scope, method=method))
        quantized = MODELS.build(copy.deepcopy(cfg.model))
        images = GivenImages(
            calib_images,
            without_annotations(get_test_pipeline_cfg(cfg.copy())), prompt)
    settings = dict(sos or {}, num_images=len(images), seed=seed)
    if iters is not None:
        settings['iters'] = iters
    config = SOSConfig.from_dict(settings, quantized.quant_config)
    quantized.load_state_dict(state)
    quantized.cfg, quantized.dataset_meta = cfg, model.dataset_meta
    device = next(model.parameters()).device
    quantized.to(device).eval()
    origin = plain(describe_origin(quantized, None, images, config))
    if prompt:
        origin['prompt'] = plain(prompt)
    key = fingerprint(origin, images.hashes(), [cfg.model, images.pipeline],
                      quantized)
    folder: ContextManager[Any] = nullcontext(work_dir)
    if work_dir is None:
        folder = tempfile.TemporaryDirectory()
    with folder as place, torch.autocast(device.type, enabled=False):
        images.check(quantized)
        calibrate_detector_(quantized, images, config,
                            Path(place) / WORKSPACE, key,
                            MMLogger.get_current_instance())
    if quantized.float_layers:
        cfg.model['float_layers'] = quantized.float_layers
    quantized.provenance = origin
    return quantized


def without_annotations(
        pipeline: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Transforms of a test pipeline without those that load annotations.

    Those of panoptic segmentation need another package when they are built.
    """
    kinds = [class_of(step['type']) for step in pipeline]
    return [
        step for step, kind in zip(pipeline, kinds)
        if not (isinstance(kind, type) and issubclass(kind, LoadAnnotations))
    ]


def _prompt(model: Any, text: Union[str, Sequence[str], None],
            custom_entities: bool) -> Dict[str, Any]:
    """Entries that the test pipeline gets beside an image.

    Raises:
        QuantError: if a model that reads text has no prompt, or another model
            has one.
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


def _bare(model: Any) -> Any:
    """A model without wrappers for several devices or for compilation."""
    while is_model_wrapper(model) or hasattr(model, '_orig_mod'):
        model = model.module if is_model_wrapper(model) else model._orig_mod
    return model


def _state_of(model: Any) -> Dict[str, torch.Tensor]:
    """The weights of a float detector, parts of which may be compiled.

    Raises:
        QuantError: if they cannot be stored in a checkpoint as they are.
    """
    state = {
        name.replace('_orig_mod.', ''): value
        for name, value in model.state_dict().items()
    }
    for name, value in state.items():
        if '.parametrizations.' in name:
            raise QuantError(f'model: {name.split(".parametrizations.")[0]} '
                             'has a parametrization; remove it with torch.nn.'
                             'utils.parametrize.remove_parametrizations.')
        if value.is_meta:
            raise QuantError(f'model: {name} is on the meta device and has no '
                             'values; load a checkpoint.')
    return state


def _folder(name: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise QuantError(f'{name}: expected the path of a folder, got '
                         f'{value!r}.')
    return Path(value)


def _config_of(model: Any) -> Config:
    """A copy of a float detector's config.

    Raises:
        QuantError: if it is no detector of ``init_detector``, or quantized.
    """
    if hasattr(model, 'quant_config'):
        raise QuantError('model: it is quantized already; give a float one.')
    for name in ('cfg', 'dataset_meta'):
        if getattr(model, name, None) is None:
            raise QuantError(f'model: it has no {name}; build it with '
                             'mmdet.apis.init_detector.')
    cfg = copy.deepcopy(model.cfg)
    cfg = cfg if isinstance(cfg, Config) else Config(dict(cfg))
    if not cfg.get('test_dataloader'):
        raise QuantError('model: its cfg has no test_dataloader, whose '
                         'pipeline prepares images; build it with '
                         'mmdet.apis.init_detector and a whole config.')
    name_types_(cfg)
    return cfg


def save_detector(model: Any, folder: Union[str, Path]) -> Tuple[str, str]:
    """Write what MMDetection's tools need to run a quantized detector.

    Args:
        model: of ``quantize_detector``.
        folder: created if it does not exist.

    Returns:
        Paths of the config and the packed checkpoint, ``config.py`` and
        ``packed.pth``, for ``mmdet.apis.init_detector`` and other tools.

    Raises:
        QuantError: if the model is not quantized, the folder holds another
            ``config.py``, or nothing can be written.
    """
    model = _bare(model)
    if not hasattr(model, 'provenance') or not is_calibrated(model):
        raise QuantError('model: it is not of quantize_detector; quantize it '
                         'first.')
    folder = _folder('folder', folder)
    config, packed = folder / 'config.py', folder / 'packed.pth'
    if not is_replaceable(config):
        raise QuantError(f'folder: {config} would be replaced; give another '
                         'folder.')
    save_packed(model, packed, model.provenance, model.dataset_meta)
    text = model.cfg.pretty_text.encode()
    write_atomically(config, lambda file: file.write(text))
    return str(config), str(packed)


class GivenImages(Images):
    """Calibration images that the caller gives.

    Args:
        images: what ``as_images`` takes.
        pipeline: transforms of the test.
        prompt: entries that the transforms get beside an image.

    Attributes:
        asked: number of images.
    """

    def __init__(self,
                 images: Any,
                 pipeline: List[Dict[str, Any]],
                 prompt: Optional[Mapping[str, Any]] = None) -> None:
        self.images = as_images(images)
        self.asked = len(self.images)
        self.pipeline = pipeline
        self.prompt = dict(prompt or {})
        self._pipelines = [
            GuardedPipeline(Compose(transforms))
            for transforms in (pipeline, _from_array(pipeline))
        ]

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
        try:
            return [_content_hash(image) for image in self.images]
        except OSError as error:
            raise QuantError(f'calib_images: {error.filename} cannot be read '
                             f'({error.strerror}).') from error

    def read(self, index: int) -> Dict[str, Any]:
        image = self.images[index]
        is_array = isinstance(image, np.ndarray)
        source: Dict[str, Any] = dict(self.prompt, img_id=index)
        source.update(
            dict(img=image) if is_array else dict(img_path=str(image)))
        try:
            data = self._pipelines[is_array](source)
        except QuantError as error:
            raise QuantError(f'calib_images[{index}]: {error}') from error
        return pseudo_collate([data])


def _from_array(pipeline: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """A pipeline that takes an array in place of reading a file.

    The transform that reads a file is replaced; if none is known to, the
    first one is, as in ``inference_detector``.
    """
    readers = [
        place for place, step in enumerate(pipeline)
        if inspect.isclass(class_of(step.get('type')))
        and issubclass(class_of(step['type']), LoadImageFromFile)
    ]
    changed = list(pipeline)
    place = readers[0] if readers else 0
    changed[place] = dict(pipeline[place], type='mmdet.LoadImageFromNDArray')
    return changed


def _content_hash(image: Image) -> str:
    """SHA-256 of a file, or of an array's type, shape and values."""
    if not isinstance(image, np.ndarray):
        return file_hash(Path(image))
    digest = hashlib.sha256(f'{image.dtype.str} {image.shape}\n'.encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
