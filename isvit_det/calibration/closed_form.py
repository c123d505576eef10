"""Layers corrected for their own rounding in closed form, without SGD.

For neck and heads, whose layers are too many or too shared for reconstruction,
and as the start of a unit's stage 3.
The weights first make up for the rounding of the input (a ridge regression,
as ERQ-ViT's), then each column of them for the rounding of those before it
(GPTQ). Both need only second moments of the input.
"""
import contextlib
from typing import Callable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from isvit_det.core.distributed import sum_
from isvit_det.core.layers import QuantConv2d, QuantLinear

Layer = Union[QuantLinear, QuantConv2d]
Locations = Callable[[Layer, int, Tuple[int, int]], Optional[Tensor]]
# Most inputs that are corrected together: memory grows with the square, time
# with the cube. A wider layer is the sum of parts, each of its own inputs.
MAX_INPUTS = 4096
# Rows of input kept of an image, for each run of a layer.
ROWS_PER_CALL = 256
# Strengths of the ridge, in units of the inputs' mean variance.
RIDGES = (1e-3, 1e-2, 1e-1, 1.)
# One image in this many is held out to choose the strength.
HELD_OUT = 4
# Added to the inputs' covariance for rounding, in units of its mean variance.
DAMPING = 1e-2
BLOCK = 128


class Moments:
    """Sums over rows of quantized input q (N, D) and residual y (N, C).

    The residual is what the output lacks: what rounding the input takes from
    it, or all that a unit's output lacks.
    """

    def __init__(self, num_inputs: int, num_outputs: int,
                 device: torch.device) -> None:

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.double, device=device)

        self.count = 0.
        self.inputs = zeros(num_inputs)
        self.outputs = zeros(num_outputs)
        self.gram = zeros(num_inputs, num_inputs)
        self.cross = zeros(num_inputs, num_outputs)
        self.energy = zeros()

    def merge_(self) -> None:
        """Add the sums of the other processes."""
        count = self.gram.new_tensor(self.count)
        for total in (count, self.inputs, self.outputs, self.gram, self.cross,
                      self.energy):
            sum_(total)
        self.count = float(count)

    def add(self,
            q: Tensor,
            y: Tensor,
            weights: Optional[Tensor] = None) -> None:
        """Add rows, in float64, each as often as its weight (N, 1) says.

        Float32 products of inputs far from zero leave no covariance.
        """
        q, y = q.double(), y.double()
        if weights is None:
            weights = q.new_ones(len(q), 1)
        weights = weights.double()
        counted = q * weights
        self.count += float(weights.sum())
        self.inputs += counted.sum(0)
        self.outputs += (y * weights).sum(0)
        self.gram += counted.T @ q
        self.cross += counted.T @ y
        self.energy += (y.square() * weights).sum()

    def __add__(self, other: 'Moments') -> 'Moments':
        total = Moments(
            len(self.inputs), len(self.outputs), self.inputs.device)
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total

    def centred(self) -> Tuple[Tensor, Tensor]:
        """Covariances (D, D) of q, and (D, C) of q with y."""
        mean = self.inputs / self.count
        return (self.gram / self.count - torch.outer(mean, mean),
                self.cross / self.count -
                torch.outer(mean, self.outputs / self.count))

    def error(self, delta: Tensor, offset: Tensor) -> float:
        """Mean square of ``y - q @ delta - offset``."""
        fit = (delta * (self.gram @ delta)).sum()
        fit = fit + self.count * offset.square().sum()
        fit = fit + 2 * (self.inputs @ delta @ offset)
        mixed = (self.cross * delta).sum() + self.outputs @ offset
        return float((self.energy + fit - 2 * mixed) / self.count)


class _Watcher:
    """Collects a layer's moments, on some images for holding out.

    Args:
        layer: what is watched.
        explained: the residual is not what rounding the input takes from the
            layer's output, but given after each run.
        locations: see ``correct_``.
    """

    def __init__(self, layer: Layer, explained: bool,
                 locations: Optional[Locations]) -> None:
        weight = layer.weight.detach().flatten(1)
        self.weight = weight
        self.locations = locations
        self.parts = parts_of(weight.shape[1])
        self.used, self.held = ([
            Moments(part.stop - part.start, len(weight), weight.device)
            for part in self.parts
        ] for _ in range(2))
        # What the whole output lacks cannot be told apart by parts.
        self.explained = explained and len(self.parts) == 1
        self.generator = torch.Generator()
        self.start_image(0)

    def start_image(self, image: int, first: int = 0) -> None:
        """Note which image the next calls are for."""
        self.moments = self.held if image % HELD_OUT == HELD_OUT - 1 \
            else self.used
        self.generator.manual_seed(image)
        self.image = image
        self.first = first
        self.pending: Optional[Tuple[Tensor, Tensor, Tensor]] = None

    @torch.no_grad()
    def __call__(self, layer: Layer, args: Tuple[Tensor]) -> None:
        x = args[0]
        if x.numel() == 0:
            return
        q = layer.input_quantizer.decode(layer.input_quantizer.encode(x))
        views = [_rows(layer, values) for values in (x, q)]
        rows, counts = self._choose(layer, *views[0].shape[:3])
        x, q = (_take(view, rows) for view in views)
        counts = counts.to(q)
        if self.explained:
            self.pending = rows, q, counts
            return
        for part, moments in zip(self.parts, self.moments):
            lost = (x[:, part] - q[:, part]) @ self.weight[:, part].T
            moments.add(q[:, part], lost, counts)

    def _choose(self, layer: Layer, num: int, height: int,
                width: int) -> Tuple[Tensor, Tensor]:
        """Numbers of the rows that are looked at, of ``num`` maps.

        And how often each counts, shape (n, 1): once, but rows that are there
        in any case by the share that is drawn of the others.
        """
        if self.locations is not None and num == 1:
            found = self.locations(layer, self.image, (height, width))
            if found is not None:
                return found, torch.ones(len(found), 1)
        total = num * height * width
        if total <= ROWS_PER_CALL:
            return torch.arange(total), torch.ones(total, 1)
        drawn = torch.randint(
            self.first, total, (ROWS_PER_CALL, ), generator=self.generator)
        rows = torch.cat([torch.arange(self.first), drawn])
        counts = torch.ones(len(rows), 1)
        counts[:self.first] = ROWS_PER_CALL / (total - self.first)
        return rows, counts

    def explain(self, residual: Tensor, weights: Optional[Tensor]) -> None:
        """Give what rows of the last run's output lack, if there was one."""
        if self.pending is None:
            return
        rows, q, counts = self.pending
        moments, = self.moments
        if weights is not None:
            counts = counts * weights[rows]
        moments.add(q, residual[rows], counts)


def rows_of_input(layer: Layer, x: Tensor, rows: Tensor) -> Tensor:
    """Rows of what a layer multiplies, shape (n, D).

    Args:
        layer: a linear one, or a convolution that ``is_correctable``.
        x: its input.
        rows: numbers of the rows, which are tokens, or the pixels of the
            output maps, image by image.
    """
    return _take(_rows(layer, x), rows)


def _take(view: Tensor, rows: Tensor) -> Tensor:
    height, width = view.shape[1:3]
    rows = rows.to(view.device)
    index = (rows // (height * width), rows // width % height, rows % width)
    return view[index].flatten(1)


def _rows(layer: Layer, x: Tensor) -> Tensor:
    """View (N, H, W, ...) of the rows of what a layer multiplies."""
    if isinstance(layer, QuantConv2d):
        return _patches(layer, x)
    return x.reshape(-1, 1, 1, x.shape[-1])


def _patches(layer: QuantConv2d, x: Tensor) -> Tensor:
    """View (N, H, W, C, kH, kW) of a map's patches, one per output pixel."""
    top, left = map(int, layer.padding)
    x = nn.functional.pad(x, (left, left, top, top))
    for axis in (0, 1):
        x = x.unfold(axis + 2, layer.kernel_size[axis], layer.stride[axis])
    return x.permute(0, 2, 3, 1, 4, 5)


class Correction:
    """Watches the layers of a model to correct their weights.

    Args:
        layers: watched until ``close``.
        explained: correct them for what ``explain`` says, and not for the
            rounding of their inputs; those in parts for that all the same.
        locations: see ``correct_``.
    """

    def __init__(self, layers: Sequence[Layer], explained: bool,
                 locations: Optional[Locations]) -> None:
        self.layers = layers
        self.watchers = {
            layer: _Watcher(layer, explained, locations)
            for layer in layers if is_correctable(layer)
        }
        self.handles = [
            layer.register_forward_pre_hook(watcher)
            for layer, watcher in self.watchers.items()
        ]

    def start_image(self, image: int, first: int = 0) -> None:
        """Say which image the model runs next.

        Args:
            image: its number; every fourth is held out to choose the ridge.
            first: rows at the start of each input that are looked at however
                few are drawn of the others, such as a class token's.
        """
        for watcher in self.watchers.values():
            watcher.start_image(image, first)

    def explain(self,
                layer: Layer,
                residual: Tensor,
                weights: Optional[Tensor] = None) -> None:
        """Say what the output of a layer lacks, whatever the reason.

        Args:
            layer: one of those watched, which has just run.
            residual: wanted minus found, shape (N, C), one row for each of
                the layer's input.
            weights: how much each row of ``residual`` counts, (N, 1).
        """
        if layer in self.watchers:
            self.watchers[layer].explain(residual, weights)

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()

    def apply_(self, as_codes: bool) -> None:
        """Correct and fit the weights by what has been seen."""
        for layer in self.layers:
            watcher = self.watchers.get(layer)
            if watcher is not None:
                for moments in watcher.used + watcher.held:
                    moments.merge_()
            if watcher is None or not watcher.used[0].count:
                layer.weight_quantizer.fit_tensor_(layer.weight)
            else:
                _correct_layer_(layer, watcher, as_codes)


@contextlib.contextmanager
def correct_(layers: Sequence[Layer],
             as_codes: bool = True,
             explained: bool = False,
             locations: Optional[Locations] = None) -> Iterator[Correction]:
    """Watch what layers see, and correct and fit their weights at the end.

    Run their model on calibration images meanwhile, with fitted activation
    quantizers and with float weights in these layers, telling what is
    yielded the number of each image before it. Processes that have images
    of their own end with the same weights. A layer with more than 4096 inputs
    is corrected in parts of its inputs, each for its own rounding. Layers
    that do not run, or that are grouped, dilated or padded with other than
    zeros, only get their weight quantizers fitted.

    Args:
        layers: with float weights.
        as_codes: end with decoded codes; or with what each code was rounded
            from, for an optimisation to go on from.
        explained: see ``Correction``.
        locations: says for a layer, the number of an image and the size
            (H, W) of the layer's output map which of its pixels to look at,
            or None for some of all.
    """
    correction = Correction(layers, explained, locations)
    try:
        yield correction
    finally:
        correction.close()
    correction.apply_(as_codes)


def parts_of(num_inputs: int) -> List[slice]:
    """Parts of a layer's inputs that are corrected together, of one size.

    >>> [(part.start, part.stop) for part in parts_of(5001)]
    [(0, 2501), (2501, 5001)]
    """
    size = -(-num_inputs // -(-num_inputs // MAX_INPUTS))
    return [
        slice(start, min(start + size, num_inputs))
        for start in range(0, num_inputs, size)
    ]


def is_correctable(layer: Layer) -> bool:
    """Whether a layer is none of those that only get fitted."""
    if isinstance(layer, QuantLinear):
        return True
    return (layer.groups == 1 and layer.dilation == (1, 1)
            and layer.padding_mode == 'zeros'
            and not isinstance(layer.padding, str))


@torch.no_grad()
def _correct_layer_(layer: Layer, watcher: _Watcher, as_codes: bool) -> None:
    """Ridge, then rounding column by column, then the mean of the output."""
    weight = layer.weight.flatten(1).double()
    bias: Optional[Tensor] = layer.bias
    if bias is None and isinstance(layer, QuantLinear):
        bias = layer.offset
    target = weight + torch.cat([
        _ridge(used, held, bias is not None)
        for used, held in zip(watcher.used, watcher.held)
    ]).T
    layer.weight.copy_(target.view_as(layer.weight))
    layer.weight_quantizer.fit_tensor_(layer.weight)
    kept = torch.empty_like(layer.weight).flatten(1)
    for part, used, held in zip(watcher.parts, watcher.used, watcher.held):
        total = used + held
        covariance = total.centred()[0] if bias is not None else (total.gram /
                                                                  total.count)
        power = total.gram.diagonal().mean() / total.count
        rounded, before = _round_columns(target[:, part], covariance, power,
                                         layer)
        kept[:, part] = rounded if as_codes else before
        if bias is not None:
            moved = (weight[:, part] - rounded) @ total.inputs + total.outputs
            bias.add_((moved / total.count).to(bias.dtype))
    layer.weight.copy_(kept.view_as(layer.weight))


def _ridge(used: Moments, held: Moments, has_bias: bool) -> Tensor:
    """The change of the weights, (D, C), that held-out rows like best.

    No change is among the choices.
    """
    best = torch.zeros_like(used.cross)
    offset = used.outputs / used.count
    if has_bias:
        covariance, cross = used.centred()
    else:
        covariance, cross = used.gram / used.count, used.cross / used.count
        offset = torch.zeros_like(offset)
    if not held.count:
        return best
    least = held.error(best, offset)
    variance = covariance.diagonal().mean()
    # Of constant inputs, rounding of their sums is all that there is.
    if variance <= 1e-12 * used.gram.diagonal().mean() / used.count:
        return best
    eye = torch.eye(
        len(covariance), dtype=torch.double, device=covariance.device)
    for ridge in RIDGES:
        factor = torch.linalg.cholesky(covariance + ridge * variance * eye)
        delta = torch.cholesky_solve(cross, factor)
        shift = offset
        if has_bias:
            shift = offset - used.inputs @ delta / used.count
        error = held.error(delta, shift)
        if error < least:
            best, least = delta, error
    return best


def _round_columns(weight: Tensor, covariance: Tensor, power: Tensor,
                   layer: Layer) -> Tuple[Tensor, Tensor]:
    """Weights (C, D) in codes whose error matters least to the output.

    The rounding error of a column is passed on to the columns after it, as
    far as their inputs go together (GPTQ, arXiv 2210.17323, Algorithm 1).

    Args:
        weight: shape (C, D).
        covariance: of the inputs, (D, D).
        power: mean square of the inputs, which bounds the covariance's own
            rounding.
        layer: its weight quantizer is fitted.

    Returns:
        Decoded weights, and weights of the same codes as they were when it
        was their turn to be rounded, inside of the range.
    """
    variance = covariance.diagonal().mean().clamp(
        min=max(1e-12, 1e-10 * float(power)))
    damped = covariance.clone()
    damped.diagonal().add_(DAMPING * variance)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    quantizer = layer.weight_quantizer
    scale = quantizer.scale.double()
    zero_point = quantizer.zero_point.double()
    top = 2**quantizer.bits - 1
    left, rounded = weight.clone(), torch.empty_like(weight)
    before = torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            value = left[:, column]
            position = (value / scale + zero_point).clamp_(-.49, top + .49)
            before[:, column] = (position - zero_point) * scale
            codes = torch.round(position).clamp_(0, top)
            rounded[:, column] = (codes - zero_point) * scale
            error = (value - rounded[:, column]) / factor[column, column]
            left[:, column:end] -= torch.outer(error, factor[column,
                                                             column:end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return rounded, before
