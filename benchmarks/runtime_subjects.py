"""What bench-runtime measures: layers, backbones, detectors, a classifier.

Weights are random, but for the demo's detector, and ranges are calibrated on
one image. The float model and the quantized one have the same weights.
"""
import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Tuple

import numpy as np
import timm
import torch
from mmdet.apis import init_detector
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from torch import Tensor, nn

from benchmarks.detectors import random_detector
from benchmarks.rivals import (Elsewhere, Run, Unavailable, export,
                               load_onnxruntime, load_openvino)
from isvit_det.apis import (GivenImages, quantize_detector, save_detector,
                            without_annotations)
from isvit_det.classifiers.models import build_classifiers
from isvit_det.core.layers import (QuantConv2d, QuantLinear, fit_weights_,
                                   observe, set_precision_)
from isvit_det.core.settings import QuantConfig
from isvit_det.datasets.drawing import draw_picture
from isvit_det.inputs.configs import load_config
from isvit_det.runtime.engine import attach_runtime_, describe_engine

TORCH, COMPILED, NATIVE = 'torch', 'torch.compile', 'native'
OPENVINO, OPENVINO_BF16, ORT = 'OpenVINO', 'OpenVINO bf16', 'onnxruntime'
ENGINES = (TORCH, COMPILED, OPENVINO, OPENVINO_BF16, ORT, NATIVE)
# Ranges without a search; the codes and tables of the default method.
CALIBRATION: Mapping[str, Any] = dict(
    method='minmax',
    quant=dict(
        softmax='sulq', activation_tables=QuantConfig.activation_tables))
# Objects that every detector finds in noise, so that all do the same work.
OBJECTS = dict(score_thr=0., max_per_img=20)
COCO_SIZE = (800, 1333)


class Loaded:
    """A subject in one engine.

    Attributes:
        run: does the work once, on one input.
        facts: of the model, in plain values.
    """

    def __init__(self, run: Callable[[], Any], **facts: Any) -> None:
        self.run = run
        self.facts = facts


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Attributes:
        title: for people.
        calls: how often it is run in a row, so that it takes long enough.
    """
    title: str
    calls: int = 1

    def load(self, engine: str, bits: str, threads: int,
             folder: Path) -> Loaded:
        """Load it for one engine, and nothing for another.

        Args:
            engine: one of ``ENGINES``.
            bits: of the quantized model, such as ``'w4a4'``.
            threads: as many as the engine may use.
            folder: keeps what takes long to make, of all subjects.

        Raises:
            Unavailable: if it does not run in that engine.
        """
        raise NotImplementedError


class Module(Subject):
    """A module with one input."""

    def make(self) -> Tuple[nn.Module, Tensor]:
        """The float module, and an input."""
        raise NotImplementedError

    def quantize(self, bits: str, folder: Path) -> Tuple[Any, Any]:
        """The quantized module, and the model that holds it."""
        raise NotImplementedError

    @property
    def exported(self) -> str:
        """Name of the file for other engines than torch."""
        return self.title.replace(' ', '-')

    def load(self, engine: str, bits: str, threads: int,
             folder: Path) -> Loaded:
        model, x = self.make()
        facts: Dict[str, Any] = {}
        if engine == NATIVE:
            del model
            model, whole = self.quantize(bits, folder)
            whole.runtime.engine = NATIVE
            facts = describe_engine(whole)
        elif engine == COMPILED:
            model = torch.compile(model)  # type: ignore
        elif engine != TORCH:
            run = load_rival(engine, model, x, threads, folder, self.exported)
            del model
            return Loaded(partial(run, x))
        return Loaded(partial(_without_gradients, model, x), **facts)


def load_rival(engine: str, model: nn.Module, x: Tensor, threads: int,
               folder: Path, name: str) -> Run:
    """A float module in another engine than torch."""
    path = folder / f'{name}.onnx'
    export(model, x, path)
    if engine == ORT:
        return load_onnxruntime(path, threads)
    return load_openvino(path, threads,
                         'bf16' if engine == OPENVINO_BF16 else 'f32')


def _without_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


def calibrate_(model: nn.Module, x: Tensor) -> None:
    """Give a quantized model the whole range of its weights and values."""
    fit_weights_(model)
    with observe(model):
        model(x)
    set_precision_(model, weights=True, acts=True)


@dataclass(frozen=True)
class Linear(Module):
    """A linear layer of some tokens, inputs and outputs."""
    shape: Tuple[int, int, int] = (1, 1, 1)

    def make(self) -> Tuple[nn.Module, Tensor]:
        tokens, inputs, outputs = self.shape
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs), torch.randn(tokens, inputs)

    def quantize(self, bits: str, folder: Path) -> Tuple[Any, Any]:
        return quantize_layer(*self.make(), bits)


@dataclass(frozen=True)
class Conv(Module):
    """A convolution of some inputs, outputs, kernel, height and width."""
    shape: Tuple[int, int, int, int, int] = (1, 1, 1, 1, 1)

    def make(self) -> Tuple[nn.Module, Tensor]:
        inputs, outputs, size, height, width = self.shape
        torch.manual_seed(0)
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
        return conv, torch.randn(1, inputs, height, width)

    def quantize(self, bits: str, folder: Path) -> Tuple[Any, Any]:
        return quantize_layer(*self.make(), bits)


def quantize_layer(source: Any, x: Tensor, bits: str) -> Tuple[Any, Any]:
    """The quantized twin of a layer, twice."""
    config = QuantConfig.from_dict(dict(bits=bits, percentiles=(1., )))
    twin = QuantLinear if isinstance(source, nn.Linear) else QuantConv2d
    layer: Any = twin(source, config).eval()
    calibrate_(layer, x)
    attach_runtime_(layer)
    return layer, layer


@dataclass(frozen=True)
class Classifier(Module):
    """One of timm's classifiers on an image of its size."""
    name: str = ''

    def make(self) -> Tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model: Any = timm.create_model(self.name).eval()
        return model, torch.randn(1, *model.default_cfg['input_size'])

    def quantize(self, bits: str, folder: Path) -> Tuple[Any, Any]:
        source, x = self.make()
        config = QuantConfig.from_dict(
            dict(CALIBRATION['quant'], method='minmax', bits=bits))
        _, model = build_classifiers(self.name, source.state_dict(), config,
                                     False)
        calibrate_(model, x)
        if not hasattr(model, 'runtime'):
            attach_runtime_(model)
        return model, model


@dataclass(frozen=True)
class Detector(Subject):
    """A whole detector, from an image in memory to its masks.

    Other engines than torch run the backbone, and torch the rest.

    Attributes:
        config: of the float detector.
        overrides: of its settings, by dotted key.
        scope: of the quantization.
        weights: file of float weights; '' draws them.
    """
    config: str = ''
    overrides: Tuple[Tuple[str, Any], ...] = ()
    scope: str = 'detector'
    weights: str = ''

    def load(self, engine: str, bits: str, threads: int,
             folder: Path) -> Loaded:
        facts: Dict[str, Any] = {}
        if engine == NATIVE:
            model = self.quantized(bits, folder)
            model.runtime.engine = NATIVE
            facts = describe_engine(model)
        elif engine == COMPILED:
            raise Unavailable('of whole detectors only the backbone compiles')
        else:
            model = self.float_detector()
        batch = self.batch(model.cfg)
        if engine not in (TORCH, NATIVE):
            model.backbone = Elsewhere(
                load_rival(engine, model.backbone, prepare(model, batch),
                           threads, folder, self.stem))

        def run() -> Any:
            with torch.no_grad():
                # Preprocessing may change its samples.
                return model.test_step(copy.deepcopy(batch))

        return Loaded(run, **facts)

    @property
    def stem(self) -> str:
        """Name of the config, by which subjects share files."""
        return Path(self.config).stem

    def read_config(self) -> Config:
        cfg = load_config(self.config, dict(self.overrides))
        # Weights of the backbone alone would be downloaded.
        cfg.model.backbone.pop('init_cfg', None)
        for part in _as_list(cfg.model.test_cfg.rcnn):
            if not self.weights:
                part.update(OBJECTS)
        return cfg

    def float_detector(self) -> Any:
        """The float detector, as ``init_detector`` gives it."""
        if self.weights:
            return init_detector(self.config, self.weights, device='cpu')
        return random_detector(self.read_config())

    def quantized(self, bits: str, folder: Path) -> Any:
        """The quantized detector; it is calibrated once and kept."""
        place = folder / f'{self.stem}_{bits}_{self.scope}_tables'
        if not (place / 'packed.pth').exists():
            model = quantize_detector(
                self.float_detector(), [self.image()],
                bits=bits,
                scope=self.scope,
                **CALIBRATION)
            save_detector(model, place)
        return init_detector(
            str(place / 'config.py'), str(place / 'packed.pth'), device='cpu')

    def image(self) -> np.ndarray:
        """An image (H, W, 3): a drawn one for weights that know these."""
        if self.weights:
            return draw_picture((0, 1, 0)).pixels
        generator = np.random.default_rng(0)
        return generator.integers(0, 256, (*COCO_SIZE, 3), np.uint8)

    def batch(self, cfg: Config) -> Dict[str, Any]:
        pipeline = without_annotations(get_test_pipeline_cfg(cfg.copy()))
        return GivenImages([self.image()], pipeline).read(0)


@dataclass(frozen=True)
class Backbone(Module):
    """The backbone of a detector, on the detector's own image.

    Attributes:
        detector: that is quantized.
    """
    detector: Detector = Detector('')

    @property
    def exported(self) -> str:
        return self.detector.stem

    def make(self) -> Tuple[nn.Module, Tensor]:
        model = self.detector.float_detector()
        x = prepare(model, self.detector.batch(model.cfg))
        return model.backbone, x

    def quantize(self, bits: str, folder: Path) -> Tuple[Any, Any]:
        model = self.detector.quantized(bits, folder)
        # Its layers alone are counted.
        model.backbone.runtime = model.runtime
        return model.backbone, model.backbone


def prepare(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """What a detector's backbone gets, (1, 3, H, W)."""
    return model.data_preprocessor(copy.deepcopy(dict(batch)), False)['inputs']


def _as_list(value: Any) -> List[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


SWIN = 'mmdet::swin/mask-rcnn_swin-{}-p4-w7_fpn_ms-crop-3x_coco.py'
CASCADE = 'configs/swin/cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc_' \
    'ms-crop-3x_coco.py'
SWIN_S = 'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py'
VIT_B = 'configs/vit/mask-rcnn_vit-b-p16_sfpn_lsj-100e_coco.py'
DRAWN = 'configs/drawn/mask-rcnn_swin-mini_fpn_drawn'
# As a user would run it on images of COCO's usual size.
OF_VIT_B = (('test_dataloader.dataset.pipeline.1.scale', (1333, 800)),
            ('model.data_preprocessor.pad_size_divisor', 32))

MASK_SWIN_T = Detector('Mask R-CNN Swin-T, whole', config=SWIN.format('t'))
SUBJECTS: Dict[str, Subject] = {
    'swin-t':
    Backbone('Swin-T backbone', detector=MASK_SWIN_T),
    'swin-s':
    Backbone(
        'Swin-S backbone',
        detector=Detector('', config=SWIN_S, scope='backbone')),
    'vit-b':
    Backbone(
        'ViT-B (ViTDet) backbone',
        detector=Detector(
            '', config=VIT_B, overrides=OF_VIT_B, scope='backbone')),
    'deit-s':
    Classifier('DeiT-S at 224', calls=3, name='deit_small_patch16_224'),
    'mask-rcnn':
    MASK_SWIN_T,
    'cascade':
    Detector('Cascade Mask R-CNN Swin-T, whole', config=CASCADE),
    'demo':
    Detector(
        "the demo's Mask R-CNN, whole",
        calls=2,
        config=f'{DRAWN}.py',
        weights=f'{DRAWN}.pth'),
}
# Tokens, inputs, outputs, and calls; then inputs, outputs, kernel, height and
# width of maps.
LINEARS = ((67200, 96, 384, 1), (4200, 384, 1536, 2), (1050, 3072, 768, 2))
CONVS = ((256, 256, 1, 100, 168, 4), (256, 256, 3, 100, 168, 1), (64, 64, 3,
                                                                  56, 56, 20))
for *_size, _calls in LINEARS:
    _name = 'linear-' + 'x'.join(map(str, _size))
    SUBJECTS[_name] = Linear(_name.replace('-', ' '), _calls,
                             tuple(_size))  # type: ignore
for *_size, _calls in CONVS:
    _name = 'conv{2}x{2}-{0}-{1}-{3}x{4}'.format(*_size)
    SUBJECTS[_name] = Conv('conv {2}x{2} {0}-{1} {3}x{4}'.format(*_size),
                           _calls, tuple(_size))  # type: ignore
LAYERS = tuple(name for name in SUBJECTS if name.startswith(('lin', 'conv')))
