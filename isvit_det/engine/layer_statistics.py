"""Measures what each layer of a calibrated model does to its values."""
import contextlib
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import (Any, Callable, Dict, Iterator, List, Optional, Sequence,
                    Tuple)

import numpy as np
import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from isvit_det.core.hooks import forward_hooks
from isvit_det.core.layers import (QuantConv2d, QuantLinear, QuantMatMul,
                                   simulation)
from isvit_det.core.quantizers import AttentionQuantizer, Quantizer
from isvit_det.costs.operations import (FLOAT_LAYERS, factor_bits,
                                        multiplications)
from isvit_det.page.write import unless_it_fails
from isvit_det.report.layer_file import (NUM_BINS, LayerFile, LayerRecord,
                                         SiteRecord)
from isvit_det.runtime.engine import describe_engine

# Images on which layers are measured.
NUM_IMAGES = 4
# Histograms of activations reach beyond the codes by this share of their span.
MARGIN = .25
# Attention below 2**-MAX_EXPONENT counts as that.
MAX_EXPONENT = 24


def keep_statistics(model: nn.Module, predict: Callable[[int],
                                                        Any], num_images: int,
                    path: Path, key: str, logger: MMLogger) -> None:
    """Measure layers and parts of a model for the report; or warn.

    Args:
        model: calibrated, in eval mode.
        predict: predicts the image of an index below ``num_images``.
        num_images: at least 1.
        path: of the file to write.
        key: of the predictions of the model.
        logger: gets a warning if that fails.
    """
    logger.info('measuring the layers for the report')
    with unless_it_fails('the layers are not in the report', logger):
        # What an earlier run has left is not of this one.
        path.unlink(missing_ok=True)
        found = measure_layers(model, predict, num_images)
        found.seconds = time_parts(model, predict, num_images)
        found.engine = describe_engine(model)['engine']
        found.key = key
        found.save(path)


def measure_layers(model: nn.Module, predict: Callable[[int], Any],
                   num_images: int) -> LayerFile:
    """Statistics of all layers of a calibrated model, in the simulation.

    Errors compare a layer with itself on the same input, so those of the
    layers before are not in them.

    Args:
        model: in eval mode.
        predict: predicts the image of an index below ``num_images``.
        num_images: at least 1.
    """
    meters = [
        _Meter(name, module) for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, QuantConv2d, QuantMatMul,
                               *FLOAT_LAYERS))
    ]
    hooks = [(meter.module, meter.note) for meter in meters]
    with forward_hooks(hooks), simulation(model), torch.no_grad():
        for index in range(num_images):
            predict(index)
    return LayerFile(
        num_images, layers=[meter.finish(num_images) for meter in meters])


class _Meter:
    """Statistics of one layer, call by call."""

    def __init__(self, name: str, module: Any) -> None:
        self.module = module
        kind = 'linear'
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            kind = 'conv'
        self.record = LayerRecord(name, name.split('.')[0], kind)
        self.sites: List['_SiteMeter'] = []
        # Squared norms of the output, of its error, and of that by
        # activations alone.
        self.sums = torch.zeros(3, dtype=torch.float64)
        if isinstance(module, (QuantLinear, QuantConv2d, QuantMatMul)):
            self.record.factor_bits = factor_bits(module)
        if isinstance(module, QuantMatMul):
            self.record.kind = 'matmul'
            self.sites = [
                _SiteMeter('left', module.left_quantizer),
                _SiteMeter('right', module.right_quantizer)
            ]
            return
        self.record.num_weights = module.weight.numel()
        self.record.weight_bits = 32
        if isinstance(module, (QuantLinear, QuantConv2d)):
            self.record.weight_bits = module.weight_quantizer.bits
            self.sites = [_SiteMeter('input', module.input_quantizer)]

    @property
    def quantizers(self) -> List[Quantizer]:
        """Those of activations first."""
        own = [site.quantizer for site in self.sites]
        weight = getattr(self.module, 'weight_quantizer', None)
        return own if weight is None else [*own, weight]

    def note(self, module: Any, args: Tuple[Tensor, ...],
             output: Tensor) -> None:
        """Count a call; a forward hook."""
        if not output.numel():
            return
        self.record.macs += multiplications(module, args, output)
        if not self.sites:
            return
        for site, values in zip(self.sites, args):
            site.update(values)
        plain = self._compute(0, args).double()
        acts_alone = self._compute(len(self.sites), args)
        errors = [output.double() - plain, acts_alone.double() - plain]
        self.sums += torch.stack(
            [x.square().sum().cpu() for x in (plain, *errors)])

    def _compute(self, num_kept: int, args: Tuple[Tensor, ...]) -> Tensor:
        """What the layer computes with its first quantizers alone."""
        quantizers = self.quantizers
        before = [q.enabled for q in quantizers]
        for quantizer in quantizers[num_kept:]:
            quantizer.enabled = False
        try:
            return self.module.forward(*args)
        finally:
            for quantizer, enabled in zip(quantizers, before):
                quantizer.enabled = enabled

    def finish(self, num_images: int) -> LayerRecord:
        """The record of what was measured."""
        record = self.record
        record.macs /= num_images
        record.sites = [site.record for site in self.sites]
        norm, error, error_of_acts = self.sums.tolist()
        if self.sites and norm > 0:
            record.error = error / norm
            record.error_of_acts = error_of_acts / norm
        weight = getattr(self.module, 'weight_quantizer', None)
        if weight is not None:
            record.weight_counts, record.code_counts = _weights(
                self.module.weight.detach(), weight)
        return record


class _SiteMeter:
    """Statistics of the values that a quantizer of activations is given."""

    def __init__(self, place: str, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        is_log = isinstance(quantizer, AttentionQuantizer)
        self.record = record = SiteRecord(place,
                                          type(quantizer).__name__,
                                          quantizer.bits, is_log)
        if quantizer.granularity == 'channel':
            return
        with torch.no_grad():
            buffer = next(b for b in quantizer.buffers()
                          if b.is_floating_point())
            codes = torch.arange(
                2**quantizer.bits, dtype=buffer.dtype, device=buffer.device)
            levels = quantizer.decode(codes).double().cpu().numpy()
        record.levels = levels
        span = max(levels.max() - levels.min(), 1e-12)
        record.low = float(levels.min() - MARGIN * span)
        record.high = float(levels.max() + MARGIN * span)
        if is_log:
            record.low, record.high = 0., float(MAX_EXPONENT)

    def update(self, values: Tensor) -> None:
        """Add the values of a call."""
        record = self.record
        record.total += values.numel()
        inside = self.quantizer.inside(values)
        record.clipped += int((~inside).sum())
        if not len(record.levels):
            return
        if record.is_log:
            values = values.clamp_min(2.**-MAX_EXPONENT).log2().neg_()
        record.counts += histogram(values, record.low, record.high)


def histogram(values: Tensor, low: float, high: float) -> np.ndarray:
    """Counts of values in 96 equal bins, (96,); the outer ones are open.

    >>> histogram(torch.tensor([-9., .5, 95.5, 99.]), 0., 96.)[[0, 1, 95]]
    array([2, 0, 2])
    """
    position = (values.flatten().float() - low) * (NUM_BINS / (high - low))
    index = position.floor_().clamp_(0, NUM_BINS - 1).long()
    return torch.bincount(index, minlength=NUM_BINS).cpu().numpy()


def _weights(weight: Tensor, quantizer: Any) -> Tuple[np.ndarray, np.ndarray]:
    """Histogram of weights in units of codes, and counts of the codes."""
    num_codes = 2**quantizer.bits
    rows = weight.movedim(quantizer.axis, 0).flatten(1)
    scale, zero_point = quantizer.scale, quantizer.zero_point
    place = rows / scale.view(-1, 1) + zero_point.view(-1, 1)
    codes = quantizer.encode(weight).long().flatten()
    return (histogram(place, -.5, num_codes - .5),
            torch.bincount(codes, minlength=num_codes).cpu().numpy())


def time_parts(model: nn.Module, predict: Callable[[int], Any],
               num_images: int) -> Dict[str, float]:
    """Median seconds of an image by child of a model, and of ``'all'``.

    Args:
        model: in the engine to be measured.
        predict: predicts the image of an index below ``num_images``.
        num_images: the first of them warms up, unless it is the only one.
    """
    device = next(model.parameters()).device
    spent: Dict[str, float] = defaultdict(float)
    found: Dict[str, List[float]] = defaultdict(list)

    def now() -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with contextlib.ExitStack() as timed, torch.no_grad():
        for name, child in model.named_children():
            timed.enter_context(_timed(child, name, spent, now))
        for index in range(num_images):
            spent.clear()
            start = now()
            predict(index)
            spent['all'] = now() - start
            if index or num_images == 1:
                for name, seconds in spent.items():
                    found[name].append(seconds)
    return {name: statistics.median(each) for name, each in found.items()}


@contextlib.contextmanager
def _timed(child: Any, name: str, spent: Dict[str, float],
           now: Callable[[], float]) -> Iterator[None]:
    """Add the seconds of a child's calls to ``spent`` in this context.

    Detectors call ``predict`` of their heads, and ``forward`` of the rest.
    """
    method = 'predict' if hasattr(child, 'predict') else 'forward'
    original = getattr(child, method)

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return original(*args, **kwargs)
        finally:
            spent[name] += now() - start

    own = child.__dict__.get(method)
    child.__dict__[method] = measured
    try:
        yield
    finally:
        if own is None:
            del child.__dict__[method]
        else:
            child.__dict__[method] = own


def spread(indices: Sequence[int], count: Optional[int] = None) -> List[int]:
    """At most ``count`` of the indices, evenly spread.

    >>> spread(range(10), 3)
    [0, 3, 6]
    """
    count = min(len(indices), NUM_IMAGES if count is None else count)
    return [indices[place * len(indices) // count] for place in range(count)]
