"""Calibration that restarts from the images, a reference for benchmarks only.

As in the published code, for every unit and stage the float and the quantized
network run from the images again, the unit's inputs and outputs of all images
are held in memory, and every iteration runs and differentiates one whole map.
As in ours, a unit goes through all stages before the next one starts.
"""
import math
from typing import Any, Iterable, List, NamedTuple

import torch
from torch import Tensor

from isvit_det.core.layers import (fit_weights_, observe, precision,
                                   set_precision_)
from isvit_det.core.reparam import (fold_channel_scales_, use_channel_scales_,
                                    widen_narrow_channels_)
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.core.units import State, Unit


class Cached(NamedTuple):
    """What a unit sees and shall give for one image."""
    state: State
    target: Tensor


def calibrate_by_restart(student: Any, teacher: Any, images: Iterable[Tensor],
                         quant: QuantConfig, sos: SOSConfig) -> None:
    """Calibrate a backbone, in place, and leave its copy as it is."""
    every = list(images)
    units = student.units()
    teachers = teacher.units()
    generator = torch.Generator().manual_seed(sos.seed)
    for index, unit in enumerate(units):
        pairs = unit.pairs() if quant.channelwise else []
        for pair in pairs:
            use_channel_scales_(pair)
        cached = _from_images(units, teachers, index, every,
                              sos.stage_one_inputs == 'quantized')
        with precision(unit.module, weights=False, acts=False):
            with observe(unit.module):
                for item in cached:
                    unit.forward(item.state)
        for pair in pairs:
            widen_narrow_channels_(pair.linear.input_quantizer)
        with precision(unit.module, weights=False, acts=True):
            _optimise(unit, cached, sos, generator)
            for pair in pairs:
                fold_channel_scales_(pair)
        fit_weights_(unit.module)
        set_precision_(unit.module, weights=True, acts=True)
        del cached
        cached = _from_images(units, teachers, index, every, True)
        _optimise(unit, cached, sos, generator)


@torch.no_grad()
def _from_images(units: List[Unit], teachers: List[Unit], index: int,
                 images: List[Tensor], quantized: bool) -> List[Cached]:
    """Run both networks up to a unit, for all images."""
    cached = []
    for image in images:
        size = image.shape[-2], image.shape[-1]
        reference = state = State(image, size)
        for teacher in teachers[:index]:
            reference = teacher.forward(reference)
        if quantized:
            for unit in units[:index]:
                state = unit.forward(state)
        else:
            state = reference
        target = teachers[index].forward(reference).x
        cached.append(Cached(state, target))
    return cached


def _optimise(unit: Unit, cached: List[Cached], sos: SOSConfig,
              generator: torch.Generator) -> None:
    params = list(unit.module.parameters())
    optimizer = torch.optim.Adam(params, lr=sos.lr)
    for step in range(sos.iters):
        for group in optimizer.param_groups:
            group['lr'] = sos.lr * (1 +
                                    math.cos(math.pi * step / sos.iters)) / 2
        chosen = int(torch.randint(len(cached), (), generator=generator))
        item = cached[chosen]
        output = unit.forward(item.state).x
        loss = (output - item.target).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
