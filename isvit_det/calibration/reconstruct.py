"""Reconstruction: optimise a unit so that its output matches the float one."""
import math
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from isvit_det.calibration.importance import token_weights
from isvit_det.calibration.store import ActivationStore
from isvit_det.core.distributed import rank, sum_, world_size
from isvit_det.core.settings import SOSConfig
from isvit_det.core.units import State, Unit, to_device

# Minibatches on which the error of a unit is measured.
ERROR_BATCHES = 4


class ItemSampler:
    """Draws minibatches of a unit's calibration items from all images.

    All processes draw the same items, and each collects those of its own
    images.

    Args:
        unit: the unit.
        inputs: its inputs, for the images of this process.
        sizes: (H, W) of the inputs, for the images of all processes.
        targets: its outputs in the float model, for the images of this
            process.
        sos: decides whether a minibatch holds items or whole images, and how
            many; see its ``items``, ``batch`` and ``items_per_image``.
        generator: of the random numbers.
        importance: weight of an error of a prefix token, relative to that of
            a patch.
        images: numbers of the images that items are drawn from, among those
            of all processes; None draws from all.
    """

    def __init__(self,
                 unit: Unit,
                 inputs: ActivationStore,
                 sizes: Sequence[Tuple[int, int]],
                 targets: ActivationStore,
                 sos: SOSConfig,
                 generator: torch.Generator,
                 importance: float = 1.,
                 images: Optional[Sequence[int]] = None) -> None:
        self.unit = unit
        self.inputs = inputs
        self.sizes = sizes
        self.targets = targets
        self.generator = generator
        self.importance = importance
        self.counts = torch.tensor([unit.num_items(size) for size in sizes])
        self.images = torch.tensor(
            range(len(sizes)) if images is None else images)
        self.ends = self.counts[self.images].cumsum(0)
        self.device = next(unit.module.parameters()).device
        self.batch = sos.batch or unit.batch
        # Number of images of a minibatch and of items drawn from each; 0
        # images means that items are drawn from all images alike.
        self.num_images, self.per_image = 0, int(self.counts.max())
        if sos.items == 'image':
            self.num_images = sos.batch or 1
        elif unit.items_per_image:
            self.per_image = min(sos.items_per_image or unit.items_per_image,
                                 self.batch)
            self.num_images = (
                sos.batch // self.per_image
                or self.batch * len(self.images) // int(self.ends[-1]) or 1)

    def draw(self) -> Optional[Tuple[Any, Tensor, Optional[Tensor]]]:
        """Draw a minibatch.

        Returns:
            The items' input, their float output (rows, C), and weights of its
            rows (rows, 1) or None; altogether None if none of the items is
            from an image of this process.
        """
        if self.num_images:
            return self._collect(self._draw_images())
        flat = torch.randint(
            int(self.ends[-1]), (self.batch, ),
            generator=self.generator).sort().values
        places = torch.searchsorted(self.ends, flat, right=True)
        chosen = []
        for place in places.unique().tolist():
            image = int(self.images[place])
            start = self.ends[place] - self.counts[image]
            chosen.append((image, flat[places == place] - start))
        return self._collect(chosen)

    def _draw_images(self) -> List[Tuple[int, Tensor]]:
        """Random images, in ascending order, and random items of each."""
        order = self._permutation(len(self.images))[:self.num_images]
        drawn = self.images[order]
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
            position, owner = divmod(image, world_size())
            if owner != rank():
                continue
            size = self.sizes[image]
            state = State(self.inputs[position], size)
            inputs.append(self.unit.gather(state, items))
            output = State(self.targets[position], size)
            targets.append(self.unit.gather_target(output, size, items))
            # Prefix tokens are in every minibatch, patches by a share.
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


class ErrorMeter:
    """Measures the error of a unit on a few fixed minibatches.

    Args:
        sampler: the minibatches are the next ones that it draws.
    """

    def __init__(self, sampler: ItemSampler) -> None:
        self.unit = sampler.unit
        batches = [sampler.draw() for _ in range(ERROR_BATCHES)]
        self.batches = [batch for batch in batches if batch is not None]
        self.device = sampler.device

    @torch.no_grad()
    def error(self) -> float:
        """Squared error relative to the squared norm of the float output.

        The unit runs in its present mode, and the error is over the
        minibatches of all processes.
        """
        total = torch.zeros(2, dtype=torch.double, device=self.device)
        for batch, target, weights in self.batches:
            output = self.unit.run(batch)
            total[0] += _square(output - target, weights).sum()
            total[1] += _square(target, weights).sum()
        error, norm = sum_(total).tolist()
        return error / max(norm, 1e-30)


def reconstruct(sampler: ItemSampler, iters: int,
                rates: Sequence[Tuple[Sequence[nn.Parameter], float]],
                on_step: Callable[[int], None]) -> None:
    """Minimise the squared error of a unit's output (I&S-ViT, section 3.3).

    The optimizer is Adam without weight decay; learning rates fall to 0 along
    a cosine. The parameters of the quantizers are fixed,
    and gradients pass rounding by the straight-through estimator. All
    processes take the same step, by the gradient over the whole minibatch.

    Args:
        sampler: of the unit, whose module is optimised in its present mode.
        iters: number of minibatches.
        rates: groups of parameters to optimise, none empty, each with its
            initial learning rate.
        on_step: is called with the number of iterations done.

    Raises:
        RuntimeError: if the unit's module is in training mode, where
            DropPath would corrupt what it learns.
    """
    unit = sampler.unit
    if any(module.training for module in unit.module.modules()):
        raise RuntimeError(f'{unit.name}: call eval() before reconstruct().')
    params = [param for group, _ in rates for param in group]
    optimised = {id(param) for param in params}
    required = [(param, param.requires_grad)
                for param in unit.module.parameters()]
    optimizer = torch.optim.Adam(
        [dict(params=group, lr=lr) for group, lr in rates], foreach=True)
    initial = [group['lr'] for group in optimizer.param_groups]
    try:
        for param, _ in required:
            param.requires_grad_(id(param) in optimised)
        for step in range(iters):
            share = (1 + math.cos(math.pi * step / iters)) / 2
            for group, lr in zip(optimizer.param_groups, initial):
                group['lr'] = lr * share
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
        for param, requires_grad in required:
            param.grad = None
            param.requires_grad_(requires_grad)


@torch.no_grad()
def _average_gradients_(params: Sequence[Tensor], num_rows: int) -> None:
    """Replace the gradients by those of the mean over all processes' rows.

    Args:
        params: their gradients are of the mean over this process's rows.
        num_rows: number of rows of this process, which may be 0.
    """
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
