"""Second moments of a layer's quantized input and of its output residual."""
from typing import Callable, List, Optional, Tuple

import torch
from torch import Tensor

from isvit_det.calibration.layer_inputs import Layer, take_rows, view_rows
from isvit_det.core.distributed import sum_

# For a layer, the number of an image and the size (H, W) of the layer's output
# map: flat indices of the pixels to use, or None to draw some of all.
RowChoice = Callable[[Layer, int, Tuple[int, int]], Optional[Tensor]]
# Most inputs that are corrected together: memory grows with the square of
# their number, time with the cube. A wider layer is a sum of parts, each with
# its own inputs.
MAX_INPUTS = 4096
# Number of rows of the input that are used from each call of a layer.
ROWS_PER_CALL = 256
# One image in this many is held out to choose the strength of the ridge.
HELD_OUT = 4


class Moments:
    """Sums over rows of a quantized input q (N, D) and a residual y (N, C).

    The residual is the difference that a change of the weights is to cancel.

    Args:
        num_inputs: D.
        num_outputs: C.
        device: of the sums, which are in float64.

    Attributes:
        count: sum of the rows' weights.
        inputs: sum of q, shape (D,).
        outputs: sum of y, shape (C,).
        gram: ``q.T @ q``, shape (D, D).
        cross: ``q.T @ y``, shape (D, C).
        energy: sum of the squares of y, scalar.
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
        """Add rows, each with its weight.

        Args:
            q: quantized input, shape (N, D).
            y: residual, shape (N, C).
            weights: shape (N, 1); None weighs all rows by 1.
        """
        # In float32 the products of inputs far from 0 would hide their
        # covariance.
        q, y = q.double(), y.double()
        if weights is None:
            weights = q.new_ones(len(q), 1)
        weights = weights.double()
        weighted = q * weights
        self.count += float(weights.sum())
        self.inputs += weighted.sum(0)
        self.outputs += (y * weights).sum(0)
        self.gram += weighted.T @ q
        self.cross += weighted.T @ y
        self.energy += (y.square() * weights).sum()

    def __add__(self, other: 'Moments') -> 'Moments':
        total = Moments(
            len(self.inputs), len(self.outputs), self.inputs.device)
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total

    def centred(self) -> Tuple[Tensor, Tensor]:
        """Covariance (D, D) of q, and that (D, C) of q with y."""
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


class MomentCollector:
    """A forward pre-hook that collects the moments of a layer's input.

    Args:
        layer: the layer, an ``is_matrix_product``.
        residual_given: the residual is given by ``add_residual`` after each
            call of the layer. Otherwise it is what the quantization of the
            input changes in the output.
        choose_rows: which rows to use, see ``correct_``.

    Attributes:
        weight: of the layer, shape (C, D).
        parts: parts of the D inputs that are corrected together.
        used: moments of each part, to fit the weights by.
        held_out: moments of each part on other images, to choose the
            strength of the ridge by.
    """

    def __init__(self, layer: Layer, residual_given: bool,
                 choose_rows: Optional[RowChoice]) -> None:
        weight = layer.weight.detach().flatten(1)
        self.weight = weight
        self.choose_rows = choose_rows
        self.parts = parts_of(weight.shape[1])
        self.used, self.held_out = ([
            Moments(part.stop - part.start, len(weight), weight.device)
            for part in self.parts
        ] for _ in range(2))
        # A residual of the whole output cannot be attributed to parts.
        self.residual_given = residual_given and len(self.parts) == 1
        self.generator = torch.Generator()
        self.start_image(0)

    def start_image(self, image: int, num_prefix: int = 0) -> None:
        """Prepare for the calls of the layer on another image.

        Args:
            image: number of the image.
            num_prefix: rows at the start of each input that are always used.
        """
        self.moments = self.held_out if image % HELD_OUT == HELD_OUT - 1 \
            else self.used
        self.generator.manual_seed(image)
        self.image = image
        self.num_prefix = num_prefix
        self._pending: Optional[Tuple[Tensor, Tensor, Tensor]] = None

    @torch.no_grad()
    def __call__(self, layer: Layer, args: Tuple[Tensor]) -> None:
        x = args[0]
        if x.numel() == 0:
            return
        q = layer.input_quantizer.represent(x)
        views = [view_rows(layer, values) for values in (x, q)]
        inside = layer.input_quantizer.inside_map
        if inside is None:
            rows, weights = self._draw_rows(layer, *views[0].shape[:3])
        else:
            # Tokens without the padding of windows.
            tokens = inside.flatten().nonzero()[:, 0]
            drawn, weights = self._draw_rows(layer, len(tokens), 1, 1)
            rows = tokens[drawn.to(tokens.device)]
        x, q = (take_rows(view, rows) for view in views)
        weights = weights.to(q)
        if self.residual_given:
            self._pending = rows, q, weights
            return
        for part, moments in zip(self.parts, self.moments):
            residual = (x[:, part] - q[:, part]) @ self.weight[:, part].T
            moments.add(q[:, part], residual, weights)

    def _draw_rows(self, layer: Layer, num: int, height: int,
                   width: int) -> Tuple[Tensor, Tensor]:
        """Indices (n,) and weights (n, 1) of the rows to use of ``num`` maps.

        Rows that are always used weigh less than 1, by the share that is
        drawn of the others.
        """
        if self.choose_rows is not None and num == 1:
            chosen = self.choose_rows(layer, self.image, (height, width))
            if chosen is not None:
                return chosen, torch.ones(len(chosen), 1)
        total = num * height * width
        if total <= ROWS_PER_CALL:
            return torch.arange(total), torch.ones(total, 1)
        drawn = torch.randint(
            self.num_prefix,
            total, (ROWS_PER_CALL, ),
            generator=self.generator)
        rows = torch.cat([torch.arange(self.num_prefix), drawn])
        weights = torch.ones(len(rows), 1)
        weights[:self.num_prefix] = ROWS_PER_CALL / (total - self.num_prefix)
        return rows, weights

    def add_residual(self, residual: Tensor,
                     weights: Optional[Tensor]) -> None:
        """Give the residual of the layer's last call, if there was one."""
        if self._pending is None:
            return
        rows, q, row_weights = self._pending
        moments, = self.moments
        if weights is not None:
            row_weights = row_weights * weights[rows]
        moments.add(q, residual[rows], row_weights)


def parts_of(num_inputs: int) -> List[slice]:
    """Parts of a layer's inputs that are corrected together, of equal size.

    >>> [(part.start, part.stop) for part in parts_of(5001)]
    [(0, 2501), (2501, 5001)]
    """
    size = -(-num_inputs // -(-num_inputs // MAX_INPUTS))
    return [
        slice(start, min(start + size, num_inputs))
        for start in range(0, num_inputs, size)
    ]
