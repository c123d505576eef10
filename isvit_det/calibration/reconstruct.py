"""Optimise one unit so that its quantized outputs match its float ones."""
import math
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.calibration.importance import token_weights
from isvit_det.calibration.store import ActivationStore
from isvit_det.core.distributed import rank, sum_, world_size
from isvit_det.core.settings import SOSConfig
from isvit_det.core.units import State, Unit, to_device

# Items that a unit's error is measured on, in batches.
ERROR_BATCHES = 4


class ItemSampler:
    """Draws minibatches of a unit's items from all images.

    Every process draws the same and collects what is of its own images.

    Args:
        unit: whose items are drawn.
        inputs: its input of every image of this process.
        sizes: (H, W) of every input, of all processes.
        targets: its float output of every image of this process.
        sos: says what a draw is: items of the unit or whole images, and how
            many; 0 leaves it to the unit, and takes one whole image.
        generator: source of the draws.
        importance: what an error of a prefix token costs, in those of patches.
    """

    def __init__(self,
                 unit: Unit,
                 inputs: ActivationStore,
                 sizes: Sequence[Tuple[int, int]],
                 targets: ActivationStore,
                 sos: SOSConfig,
                 generator: torch.Generator,
                 importance: float = 1.) -> None:
        self.unit = unit
        self.inputs = inputs
        self.sizes = sizes
        self.targets = targets
        self.generator = generator
        self.importance = importance
        self.counts = torch.tensor([unit.num_items(size) for size in sizes])
        self.ends = self.counts.cumsum(0)
        self.device = next(unit.module.parameters()).device
        self.batch = sos.batch or unit.batch
        # Images of a draw, or 0 for items of any, and items of each of them.
        self.num_images, self.per_image = 0, int(self.counts.max())
        if sos.items == 'image':
            self.num_images = sos.batch or 1
        elif unit.items_per_image:
            self.per_image = min(sos.items_per_image or unit.items_per_image,
                                 self.batch)
            self.num_images = (
                sos.batch // self.per_image
                or self.batch * len(sizes) // int(self.ends[-1]) or 1)

    def draw(self) -> Optional[Tuple[Any, Tensor, Optional[Tensor]]]:
        """Input of a random batch of items, their float output, its weights.

        None if no item is of an image of this process.
        """
        if self.num_images:
            return self._collect(self._draw_images())
        flat = torch.randint(
            int(self.ends[-1]), (self.batch, ),
            generator=self.generator).sort().values
        images = torch.searchsorted(self.ends, flat, right=True)
        chosen = []
        for image in images.unique().tolist():
            start = self.ends[image] - self.counts[image]
            chosen.append((image, flat[images == image] - start))
        return self._collect(chosen)

    def _draw_images(self) -> List[Tuple[int, Tensor]]:
        """Random images, in order, and random items of each."""
        drawn = self._permutation(len(self.sizes))[:self.num_images]
        chosen = []
        for image in drawn.sort().values.tolist():
            count = int(self.counts[image])
            items = torch.arange(count)
            if count > self.per_image:
                items = self._permutation(count)[:self.per_image]
            chosen.append((image, items.sort().values))
        return chosen

    def _permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.generator)

    def _collect(
        self, chosen: List[Tuple[int, Tensor]]
    ) -> Optional[Tuple[Any, Tensor, Optional[Tensor]]]:
        inputs, targets, weights = [], [], []
        for image, items in chosen:
            place, owner = divmod(image, world_size())
            if owner != rank():
                continue
            size = self.sizes[image]
            state = State(self.inputs[place], size)
            inputs.append(self.unit.gather(state, items))
            output = State(self.targets[place], size)
            targets.append(self.unit.gather_target(output, size, items))
            # Prefix tokens come with every draw, however few the patches.
            share = len(items) / int(self.counts[image])
            weight = token_weights(output, self.importance, share)
            if weight is not None:
                weights.append(
                    self.unit.gather_target(
                        State(weight[None], size), size, items))
        if not inputs:
            return None
        batch = to_device(self.unit.collate(inputs), self.device)
        return (batch, torch.cat(targets).to(self.device),
                torch.cat(weights).to(self.device) if weights else None)


def _square(x: Tensor, weights: Optional[Tensor]) -> Tensor:
    return x.square() if weights is None else x.square() * weights


class Gauge:
    """Measures a unit's error on the next few draws of a sampler.

    Args:
        sampler: of the unit.
    """

    def __init__(self, sampler: ItemSampler) -> None:
        self.unit = sampler.unit
        draws = [sampler.draw() for _ in range(ERROR_BATCHES)]
        self.draws = [drawn for drawn in draws if drawn is not None]
        self.device = sampler.device

    @torch.no_grad()
    def error(self) -> float:
        """Squared error over the squared norm of the float output.

        In the unit's present mode, over the draws of all processes.
        """
        total = torch.zeros(2, dtype=torch.double, device=self.device)
        for batch, target, weights in self.draws:
            found = self.unit.run(batch)
            total[0] += _square(found - target, weights).sum()
            total[1] += _square(target, weights).sum()
        error, norm = sum_(total).tolist()
        return error / max(norm, 1e-30)


def reconstruct(sampler: ItemSampler, iters: int, lr: float,
                on_step: Callable[[int], None]) -> None:
    """Minimise the squared error of a unit's output (I&S-ViT, section 3.3).

    Adam without weight decay, a cosine from ``lr`` to 0; quantization
    parameters stay as they are, rounding passes gradients straight through.
    Processes add up their gradients, so that all take the same step.

    Args:
        sampler: of the unit, whose module is optimised in its present mode.
        iters: number of minibatches.
        lr: first learning rate.
        on_step: told the number of iterations done.

    Raises:
        RuntimeError: if the unit's module is in training mode, where
            DropPath would corrupt what it learns.
    """
    unit = sampler.unit
    if any(module.training for module in unit.module.modules()):
        raise RuntimeError(f'{unit.name}: call eval() before reconstruct().')
    params = list(unit.module.parameters())
    frozen = [param for param in params if not param.requires_grad]
    optimizer = torch.optim.Adam(params, lr=lr, foreach=True)
    try:
        for param in params:
            param.requires_grad_(True)
        for step in range(iters):
            for group in optimizer.param_groups:
                group['lr'] = lr * (1 + math.cos(math.pi * step / iters)) / 2
            optimizer.zero_grad(set_to_none=True)
            drawn = sampler.draw()
            num_rows = 0
            if drawn is not None:
                batch, target, weights = drawn
                num_rows = target.shape[:-1].numel()
                with torch.enable_grad():
                    output = unit.run(batch)
                    error = _square(output - target, weights)
                    loss = error.sum(-1).mean()
                loss.backward()
            if world_size() > 1:
                _average_gradients_(params, num_rows)
            optimizer.step()
            on_step(step + 1)
    finally:
        for param in params:
            param.grad = None
        for param in frozen:
            param.requires_grad_(False)


@torch.no_grad()
def _average_gradients_(params: Sequence[Tensor], num_rows: int) -> None:
    """Make gradients of means over rows those of the mean over all rows."""
    grads = [
        torch.zeros_like(param) if param.grad is None else param.grad
        for param in params
    ]
    flat = torch.cat([grad.flatten() for grad in grads])
    total = sum_(torch.cat([flat * num_rows, flat.new_tensor([num_rows])]))
    total = total[:-1] / total[-1]
    sizes = [grad.numel() for grad in grads]
    for param, part in zip(params, total.split(sizes)):
        param.grad = part.view_as(param)
