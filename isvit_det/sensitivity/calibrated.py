"""Quantized twins of a float detector, calibrated in closed form."""
import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch
from mmengine.logging import MMLogger

from isvit_det.calibration.stages import UnitActivations, UnitCalibration
from isvit_det.calibration.store import (ActivationPool, ActivationStore,
                                         Sizes, own_states)
from isvit_det.core.layers import set_precision_, simulation
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.engine.calibrate import calibrate_detector_
from isvit_det.engine.heads import calibrate_heads_
from isvit_det.engine.images import Images
from isvit_det.packed.keys import own_keys
from isvit_det.registry import MODELS
from isvit_det.sensitivity.partial import forwards

Bits = Tuple[int, int]


def build_twin(model: Any, settings: Mapping[str, Any],
               quant: QuantConfig) -> Any:
    """A quantized detector with a float one's weights, not calibrated.

    Args:
        model: of ``quantized_detector``, with float weights.
        settings: its config.
        quant: settings of the twin.
    """
    config = copy.deepcopy(dict(settings))
    config.update(quant=quant.to_dict(), engine='simulation')
    twin = MODELS.build(config)
    # Those of quantizers have other shapes at other bits.
    own = own_keys(model)
    twin.load_state_dict({
        key: value
        for key, value in model.state_dict().items() if key not in own
    })
    twin.products = model.products
    return twin.to(next(model.parameters()).device).eval()


def calibrate_alone_(twin: Any, model: Any, images: Images, sos: SOSConfig,
                     workspace: Path, logger: MMLogger) -> None:
    """Calibrate each part of a detector as if all others were in float.

    Args:
        twin: of ``build_twin``; ends quantized.
        model: the float one.
        images: to calibrate on.
        sos: settings; there are no iterations.
        workspace: of activations that do not fit into memory.
        logger: of the calibration of the heads.
    """
    sos = dataclasses.replace(sos, iters=0, mirror_images=False)
    # Clearing it removes the whole folder.
    pool = ActivationPool(workspace / 'spilled')
    device = next(model.parameters()).device
    inputs = ActivationStore(pool)
    sizes: Sizes = []
    try:
        for image in images.tensors(model, False):
            inputs.append(image)
            sizes.append((image.shape[-2], image.shape[-1]))
        pairs = zip(twin.backbone.units(), model.backbone.units())
        for index, (unit, teacher) in enumerate(pairs):
            targets = ActivationStore(pool)
            next_sizes: Sizes = []
            with torch.no_grad():
                for _, _, state in own_states(inputs, sizes, device):
                    state = teacher.forward(state)
                    targets.append(state.x)
                    next_sizes.append(state.size)
            UnitCalibration(unit, index,
                            UnitActivations(inputs, inputs, targets,
                                            sizes), twin.quant_config, sos, 1.,
                            len(images), lambda *step: None).run()
            inputs.close()
            inputs, sizes = targets, next_sizes
        inputs.close()
    finally:
        pool.clear()
    if twin.quant_config.scope == 'detector':
        with forwards({twin.backbone: model.backbone.forward}), \
                simulation(twin):
            calibrate_heads_(twin, images, sos, logger)
    set_precision_(twin, True, True)


def calibrate_together_(twin: Any, images: Images, sos: SOSConfig,
                        workspace: Path, fingerprint: str,
                        logger: MMLogger) -> None:
    """Calibrate a whole detector in closed form, as a run does.

    Args:
        twin: of ``build_twin``; ends quantized.
        images: to calibrate on.
        sos: settings; there are no iterations.
        workspace: of its state, which is removed in the end.
        fingerprint: identifies everything that the result depends on.
        logger: gets a line for every unit.
    """
    sos = dataclasses.replace(sos, iters=0)
    calibrate_detector_(twin, images, sos, workspace, fingerprint, logger)
    shutil.rmtree(workspace, ignore_errors=True)


class Drawn(Images):
    """Some of the images of a sample.

    Args:
        images: the sample.
        places: of the images in it.
    """

    def __init__(self, images: Any, places: Sequence[int]) -> None:
        self.images = images
        self.places = list(places)
        self.asked = len(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def ids(self) -> List[Any]:
        """Id of every image."""
        return [self.images.ids()[place] for place in self.places]

    def names(self) -> List[str]:
        """File name of every image."""
        return [self.images.names()[place] for place in self.places]

    def read(self, index: int) -> Dict[str, Any]:
        return self.images.read(self.places[index])
