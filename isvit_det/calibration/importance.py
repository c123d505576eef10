"""Importance of prefix tokens, such as a class token, relative to patches."""
from typing import Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.distributed import sum_
from isvit_det.core.units import State, Unit

# Images on which gradients are computed.
NUM_IMAGES = 16


@torch.no_grad()
def prefix_importance(units: Sequence[Unit],
                      images: Iterable[Tuple[int, State]]) -> List[float]:
    """Loss caused by an error of a prefix token, relative to a patch's error.

    Random sums of the model's output are differentiated with respect to the
    output of each unit. The squared gradient is the diagonal of the second
    order expansion of the distillation loss on the output, by which LS-ViT
    weighs outputs. One backward pass serves all units, and keeps the
    intermediate values of one unit at a time.

    Args:
        units: of a float model. The output of the last one is the model's
            output, apart from prefix tokens. The output of the first one has
            the prefix tokens, if there are any.
        images: index and state of the images of this process, on the units'
            device. Only the first 16 images of all processes are used.

    Returns:
        For each unit, the mean squared gradient of the prefix tokens over
        that of the patches. It is limited so that all prefix tokens together
        count at most as much as all patches of an image. It is 1 without
        prefix tokens.
    """
    device = next(units[0].module.parameters()).device
    totals = torch.zeros(len(units), 4, dtype=torch.double, device=device)
    for number, state in images:
        if number >= NUM_IMAGES:
            break
        generator = torch.Generator().manual_seed(number)
        state = units[0].forward(state)
        if not num_prefix(state):
            # There is nothing to weigh.
            break
        states = [state]
        for unit in units[1:]:
            states.append(unit.forward(states[-1]))
        last = states[-1].x
        signs = torch.randint(2, last.shape, generator=generator) * 2 - 1
        grad = signs.to(last)
        # The output map does not include prefix tokens.
        grad[:, :num_prefix(states[-1])] = 0
        for index in reversed(range(len(units))):
            state = states.pop()
            if index + 1 < len(units):
                grad = _pull_back(units[index + 1], state, grad)
            total, num = totals[index], num_prefix(state)
            energy = grad[0].double().square().mean(1)
            total += torch.stack([
                energy[:num].sum(), energy[num:].sum(),
                energy.new_tensor(num),
                energy.new_tensor(len(energy) - num)
            ])
    ratios = []
    for prefix, patches, num_prefixes, num_patches in sum_(totals).tolist():
        ratio = min(prefix / max(patches, 1e-30), 1.)
        ratios.append(ratio * num_patches /
                      num_prefixes if num_prefixes else 1.)
    return ratios


def _pull_back(unit: Unit, state: State, grad: Tensor) -> Tensor:
    """Gradient with respect to a unit's input, from that of its output."""
    x = state.x.detach().requires_grad_()
    with torch.enable_grad():
        output = unit.forward(State(x, state.size)).x
    return torch.autograd.grad(output, x, grad)[0]


def num_prefix(state: State) -> int:
    """Number of tokens before the patches; 0 for an image."""
    return max(0, state.x.shape[1] - state.size[0] * state.size[1])


def token_weights(state: State,
                  ratio: float,
                  share: float = 1.) -> Optional[Tensor]:
    """Weights of all tokens, with mean 1.

    Args:
        state: output of a unit.
        ratio: of ``prefix_importance``.
        share: share of the patches that are used beside all prefix tokens,
            whose weight is multiplied by it.

    Returns:
        Shape (N, 1), or None if all weights are equal.
    """
    num = num_prefix(state)
    if not num or ratio == 1:
        return None
    weights = state.x.new_ones(state.x.shape[1], 1)
    weights[:num] = ratio * share
    return weights / weights.mean()
