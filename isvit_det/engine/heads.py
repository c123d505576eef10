"""Calibration of neck and heads, for ``scope='detector'``."""
import contextlib
from typing import Any, Dict, Iterator, List

import torch
from mmengine.logging import MMLogger
from torch import nn

from isvit_det.core.errors import QuantError
from isvit_det.core.layers import fit_weights_, observe, precision, quantizers
from isvit_det.engine.images import CalibrationImages


def calibrate_heads_(model: nn.Module, images: CalibrationImages,
                     logger: MMLogger) -> None:
    """Fit every quantizer outside of the backbone, without optimisation.

    The detector predicts on the calibration images with its backbone as
    calibrated and its other layers in float. A layer shared by the levels of
    a pyramid sees all levels. Layers that only ever run on detections are
    shown detections of any score if none passed the threshold.

    Raises:
        QuantError: naming the layers that never ran.
    """
    rest = [
        child for name, child in model.named_children() if name != 'backbone'
    ]
    _observe_predictions(model, rest, images)
    if _unreached(model):
        logger.warning('no detection reached some layers: calibrating them '
                       'on detections of any score')
        fitted = {
            name: quantizer.state_dict()
            for name, quantizer in quantizers(model).items()
            if quantizer.is_fitted
        }
        with _no_score_threshold(model):
            _observe_predictions(model, rest, images)
        # What had been reached keeps the ranges of true predictions.
        for name, quantizer in quantizers(model).items():
            if name in fitted:
                quantizer.load_state_dict(fitted[name])
    unreached = _unreached(model)
    if unreached:
        raise QuantError(
            f'quant.scope: {unreached} never ran on the calibration images '
            "and cannot be quantized; use scope='backbone' or other images.")
    for child in rest:
        fit_weights_(child)


def _unreached(model: nn.Module) -> List[str]:
    return [
        name for name, quantizer in quantizers(model).items()
        if quantizer.role == 'act' and not quantizer.is_fitted
    ]


def _observe_predictions(model: Any, rest: List[nn.Module],
                         images: CalibrationImages) -> None:
    with contextlib.ExitStack() as stack:
        for child in rest:
            stack.enter_context(precision(child, weights=False, acts=False))
            stack.enter_context(observe(child))
        for batch in images.batches():
            with torch.no_grad():
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
