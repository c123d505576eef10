"""Calibration of neck and heads, for ``scope='detector'``."""
import contextlib
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, ContextManager, Dict, Iterator, List

import torch
from mmengine.logging import MMLogger
from torch import nn

from isvit_det.calibration.closed_form import correct_
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import (fit_weights_, observe, precision,
                                   quantized_layers, quantizers)
from isvit_det.core.quantizers import Quantizer
from isvit_det.core.ranks import mine
from isvit_det.core.spec import SOSConfig
from isvit_det.engine.images import Images
from isvit_det.engine.locations import Locations


def calibrate_heads_(model: nn.Module, images: Images, sos: SOSConfig,
                     logger: MMLogger) -> None:
    """Fit every quantizer outside of the backbone, without optimisation.

    The detector predicts on the calibration images with its backbone as
    calibrated and its other layers in float. A layer shared by the levels of
    a pyramid sees all levels. Layers that only ever run on detections are
    shown detections of any score if none passed the threshold.

    Args:
        model: a detector whose backbone is calibrated.
        images: to predict on, once or twice; once more to correct.
        sos: says whether weights make up for rounding, in closed form, and
            whether dense heads are calibrated where they find objects.
        logger: is told of layers that no detection reached.

    Raises:
        QuantError: naming the layers that never ran.
    """
    rest = nn.ModuleDict({
        name: child
        for name, child in model.named_children() if name != 'backbone'
    })
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
            # What was reached keeps the ranges of true predictions.
            unreached = nn.ModuleList(_unreached(rest).values())
            with observe(unreached), threshold():
                _predict(model, images)
        if _unreached(rest):
            raise QuantError(
                f'quant.scope: {sorted(_unreached(rest))} never ran on the '
                'calibration images and cannot be quantized; use '
                "scope='backbone' or other images.")
        if sos.correct_heads:
            with correct_(
                    quantized_layers(rest),
                    locations=locations.of_layer) as correction, threshold():
                _predict(model, images, correction.start_image)
        else:
            fit_weights_(rest)


def _unreached(rest: nn.Module) -> Dict[str, Quantizer]:
    return {
        name: quantizer
        for name, quantizer in quantizers(rest).items()
        if quantizer.role == 'act' and not quantizer.is_fitted
    }


def _predict(model: Any,
             images: Images,
             start_image: Callable[[int], None] = lambda image: None) -> None:
    with torch.no_grad():
        for image, batch in zip(mine(len(images)), images.batches()):
            start_image(image)
            model.test_step(batch)


@contextlib.contextmanager
def _no_score_threshold(model: nn.Module) -> Iterator[None]:
    """Let detections of any score pass while the context lasts."""
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
