"""Optimise one unit so that its quantized outputs match its float ones."""
import math
from typing import Any, Callable, List, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.calibration.store import ActivationStore
from isvit_det.core.spec import SOSConfig
from isvit_det.core.units import State, Unit, to_device

# Items that a unit's error is measured on, in batches.
ERROR_BATCHES = 4


class ItemSampler:
    """Draws minibatches of a unit's items from all images.

    Args:
        unit: whose items are drawn.
        inputs: its input of every image.
        sizes: (H, W) of every input.
        targets: its float output of every image.
        sos: says what a draw is: items of the unit or whole images, and how
            many; 0 leaves it to the unit, and takes one whole image.
        generator: source of the draws.
    """

    def __init__(self, unit: Unit, inputs: ActivationStore,
                 sizes: Sequence[Tuple[int, int]], targets: ActivationStore,
                 sos: SOSConfig, generator: torch.Generator) -> None:
        self.unit = unit
        self.inputs = inputs
        self.sizes = sizes
        self.targets = targets
        self.generator = generator
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
                or self.batch // int(self.counts.double().mean()) or 1)

    def draw(self) -> Tuple[Any, Tensor]:
        """Input of a random batch of items, and their float output."""
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
        images = self._permutation(len(self.sizes))[:self.num_images]
        chosen = []
        for image in images.sort().values.tolist():
            count = int(self.counts[image])
            items = torch.arange(count)
            if count > self.per_image:
                items = self._permutation(count)[:self.per_image]
            chosen.append((image, items.sort().values))
        return chosen

    def _permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.generator)

    def _collect(self, chosen: List[Tuple[int, Tensor]]) -> Tuple[Any, Tensor]:
        inputs, targets = [], []
        for image, items in chosen:
            size = self.sizes[image]
            state = State(self.inputs[image], size)
            inputs.append(self.unit.gather(state, items))
            output = State(self.targets[image], size)
            targets.append(self.unit.gather_target(output, size, items))
        batch = to_device(self.unit.collate(inputs), self.device)
        return batch, torch.cat(targets).to(self.device)


@torch.no_grad()
def relative_error(sampler: ItemSampler) -> float:
    """Squared error of a unit over the squared norm of its float output.

    Measured on the next few draws of the sampler, in the unit's mode.
    """
    error = norm = 0.
    for _ in range(ERROR_BATCHES):
        batch, target = sampler.draw()
        error += (sampler.unit.run(batch) - target).square().sum().item()
        norm += target.square().sum().item()
    return error / max(norm, 1e-30)


def reconstruct(sampler: ItemSampler, iters: int, lr: float,
                on_step: Callable[[int], None]) -> None:
    """Minimise the squared error of a unit's output (I&S-ViT, section 3.3).

    Adam without weight decay, a cosine from ``lr`` to 0; quantization
    parameters stay as they are, rounding passes gradients straight through.

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
            batch, target = sampler.draw()
            with torch.enable_grad():
                output = unit.run(batch)
                loss = (output - target).square().sum(-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            on_step(step + 1)
    finally:
        for param in params:
            param.grad = None
        for param in frozen:
            param.requires_grad_(False)
