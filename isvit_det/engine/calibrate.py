"""Calibration of a whole detector: backbone, then neck and heads."""
from pathlib import Path
from typing import Any, List, Optional

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger

from isvit_det.calibration.events import UnitRecord
from isvit_det.calibration.sos import calibrate
from isvit_det.core.distributed import broadcast_
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import is_calibrated, set_precision_, simulation
from isvit_det.core.settings import SOSConfig
from isvit_det.engine.heads import calibrate_heads_, find_products
from isvit_det.engine.images import Images
from isvit_det.report.progress import CalibrationProgress, announcement

# Folder in the work directory for the state of an unfinished calibration.
WORKSPACE = 'calibration'


def calibrate_detector_(model: Any,
                        images: Images,
                        sos: SOSConfig,
                        workspace: Path,
                        fingerprint: str,
                        logger: MMLogger,
                        store_gb: Optional[float] = None,
                        teacher: Any = None) -> List[UnitRecord]:
    """Calibrate a detector of ``quantized_detector``, which ends quantized.

    Its attributes ``float_layers`` and ``products`` are set as well.

    Args:
        model: in eval mode, with float weights.
        images: to calibrate on; the processes of a run share them.
        sos: settings of the run.
        workspace: directory of the resume state and of spilled activations.
        fingerprint: identifies everything that the result depends on; state
            with another fingerprint is discarded.
        logger: gets a line for every unit.
        store_gb: memory for activations in GB (1e9 bytes); None takes half
            of what is available.
        teacher: a copy of the float backbone, which stays as it is; None
            makes one.

    Raises:
        QuantError: if an image cannot be read, the detector cannot predict
            on the first one, or a layer to be quantized never ran on the
            images.
    """
    units = model.backbone.units()
    if not units:
        raise QuantError(
            f'model.backbone.type: a {type(model.backbone).__name__} has no '
            'weights to calibrate; give the config of the backbone itself.')
    if model.products is None:
        model.products = find_products(model, images)
    quant = model.quant_config
    logger.info(announcement(quant, sos, len(units), len(images), quant.scope))
    with images.naming_failures(model), simulation(model), CalibrationProgress(
            logger, units, is_main_process()) as progress:
        records = calibrate(
            model.backbone,
            images.tensors(model, sos.mirror_images),
            quant,
            sos,
            workspace,
            fingerprint,
            store_gb=store_gb,
            on_event=progress,
            teacher=teacher)
    if quant.scope == 'detector':
        logger.info(f'calibrating neck and heads on {len(images)} images')
        with images.naming_failures(model), simulation(model):
            calibrate_heads_(model, images, sos, logger)
    set_precision_(model, weights=True, acts=True)
    if not is_calibrated(model):
        raise QuantError('quant: nothing in the model was quantized.')
    # The processes differ by the order of their sums; all of them end with
    # the values of process 0.
    broadcast_(list(model.state_dict().values()))
    return records
