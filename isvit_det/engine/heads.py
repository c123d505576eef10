"""Calibration of neck and heads, for ``scope='detector'``."""
import contextlib
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, ContextManager, Dict, Iterator, List

import torch
from mmdet.models.roi_heads.base_roi_head import BaseRoIHead
from mmengine.logging import MMLogger
from torch import nn

from isvit_det.calibration.closed_form import correct_
from isvit_det.core.distributed import own_indices, world_size
from isvit_det.core.errors import QuantError, describe_error
from isvit_det.core.layers import (fit_weights_, observe, precision,
                                   quantized_layers, quantizers)
from isvit_det.core.quantizers import Quantizer
from isvit_det.core.settings import SOSConfig
from isvit_det.core.swap import QUANTIZED_LAYERS, make_float_
from isvit_det.engine.images import Images
from isvit_det.engine.locations import Locations
from isvit_det.engine.products import watch_products
from isvit_det.screen.progress import track

# Exceptions of a model that does not fit its data, settings or packages.
PREDICTION_ERRORS = (RuntimeError, ValueError, TypeError, LookupError,
                     AttributeError, AssertionError, ImportError)
NOT_RUN = 'no prediction on the calibration images runs it'


def calibrate_heads_(model: nn.Module, images: Images, sos: SOSConfig,
                     logger: MMLogger) -> None:
    """Fit every quantizer outside of the backbone, without optimisation.

    The detector predicts on the calibration images, with its backbone
    quantized and its other layers in float, and their quantizers observe. A
    layer that is shared by the levels of a pyramid observes all levels. If a
    layer runs on detections only, and no detection passes the score
    threshold, it observes detections of any score. A layer that does not run
    even then, on any process, is turned back into float and named in
    ``model.float_layers``.

    Args:
        model: a detector whose backbone is calibrated.
        images: the calibration images.
        sos: decides whether weights are corrected in closed form, and whether
            dense heads are calibrated mostly where they find objects.
        logger: gets a line on layers that no detection reached, and on those
            that are turned back.

    Raises:
        QuantError: if no layer of a head ran, naming its layers.
    """
    rest = _all_but_backbone(model)
    threshold: Callable[[], ContextManager] = nullcontext
    with precision(rest, weights=False, acts=False):
        locations = Locations(rest if sos.weigh_locations else nn.Module())
        with observe(rest), locations:
            _predict(model, images, locations.start_image)
        locations.fit_()
        if _unreached(rest):
            logger.warning('no detection reached some layers: calibrating '
                           'them on detections of any score')
            threshold = partial(_no_score_threshold, model)
            # The others keep the ranges of real predictions.
            unreached = nn.ModuleList(_unreached(rest).values())
            with observe(unreached), threshold():
                _predict(model, images)
        _turn_back_unreached_(model, logger)
        rest = _all_but_backbone(model)
        if sos.correct_heads:
            with correct_(
                    quantized_layers(rest),
                    choose_rows=locations.of_layer) as correction, threshold():
                _predict(model, images, correction.start_image)
        else:
            fit_weights_(rest)


def find_products(model: Any, images: Images) -> List[str]:
    """Names of the modules that multiply activations by activations.

    Every process predicts on the first image, with detections of any score.

    Args:
        model: with float weights, not calibrated.
        images: the calibration images.

    Raises:
        QuantError: if the model cannot predict.
    """
    batch = images.read(0)
    try:
        with _no_score_threshold(model), watch_products(model) as products:
            model.test_step(batch)
    except PREDICTION_ERRORS as error:
        raise QuantError(
            f'model: this {type(model).__name__} cannot predict on a '
            'calibration image, before anything is quantized '
            f'({describe_error(error)}); test it with the tools '
            'of MMDetection first.') from error
    return [
        name for name, module in model.named_modules()
        if module in products.multiplying
    ]


def _all_but_backbone(model: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({
        name: child
        for name, child in model.named_children() if name != 'backbone'
    })


def _turn_back_unreached_(model: Any, logger: MMLogger) -> None:
    """Turn layers that never ran back into float.

    Raises:
        QuantError: if no layer of a whole head ran.
    """
    rest = _all_but_backbone(model)
    unreached = [
        name for name, layer in rest.named_modules()
        if isinstance(layer, QUANTIZED_LAYERS)
        and not layer.input_quantizer.is_fitted
    ]
    silent = [
        name for name in unreached if any(
            name.startswith(f'{head}.') for head in _silent_heads(model))
    ]
    if silent:
        raise QuantError(f'quant.scope: {sorted(silent)} never ran on the '
                         'calibration images and cannot be quantized; use '
                         "scope='backbone' or other images.")
    if unreached:
        logger.info(f'these stay in float, since {NOT_RUN}: '
                    f'{", ".join(unreached)}')
        make_float_(model, unreached)
        model.float_layers.update(dict.fromkeys(unreached, NOT_RUN))


def _silent_heads(model: nn.Module) -> List[str]:
    """Names of the parts of a detector of which no layer has run.

    The parts are the children of the detector, and instead of a RoI head the
    children of that: its box head, its mask head and so on.
    """
    parts = dict(_all_but_backbone(model).items())
    for name, child in list(parts.items()):
        if isinstance(child, BaseRoIHead):
            del parts[name]
            parts.update({
                f'{name}.{inner}': part
                for inner, part in child.named_children()
            })
    layers = {name: quantized_layers(part) for name, part in parts.items()}
    return [
        name for name, own in layers.items()
        if own and not any(layer.input_quantizer.is_fitted for layer in own)
    ]


def _unreached(rest: nn.Module) -> Dict[str, Quantizer]:
    return {
        name: quantizer
        for name, quantizer in quantizers(rest).items()
        if quantizer.role == 'act' and not quantizer.is_fitted
    }


def _predict(model: Any,
             images: Images,
             start_image: Callable[[int], None] = lambda image: None) -> None:
    with torch.no_grad(), track('neck and heads', len(images)) as advance:
        for image, batch in zip(own_indices(len(images)), images.batches()):
            start_image(image)
            model.test_step(batch)
            advance(world_size())


@contextlib.contextmanager
def _no_score_threshold(model: nn.Module) -> Iterator[None]:
    """Set all score thresholds to 0 in this context."""
    changed: List[Any] = []
    for module in model.modules():
        cfg: Dict[str, Any] = getattr(module, 'test_cfg', None) or {}
        for part in (cfg, cfg.get('rcnn') or {}):
            if 'score_thr' in part:
                changed.append((part, part['score_thr']))
                part['score_thr'] = 0.
    try:
        yield
    finally:
        for part, value in reversed(changed):
            part['score_thr'] = value
