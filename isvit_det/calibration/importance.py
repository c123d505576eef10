"""How much tokens before the patches matter, against the patches."""
from typing import Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.distributed import sum_
from isvit_det.core.units import State, Unit

# Images that gradients are taken of.
NUM_IMAGES = 16


@torch.no_grad()
def prefix_importance(units: Sequence[Unit],
                      images: Iterable[Tuple[int, State]]) -> List[float]:
    """What an error of a prefix token costs, against one of a patch.

    The squared gradients of random sums of the model's output by the output
    of each unit, the diagonal of what output distillation loses to second
    order (as LS-ViT weighs outputs). All units take one backward pass, which
    holds the intermediate values of one unit at a time.

    Args:
        units: of a float model, whose last state is its output, but for
            tokens before the patches of a map. The first one puts these in
            place, if there are any.
        images: numbers and states, on the units' device, of those of this
            process; only the first ones of all processes are used.

    Returns:
        For each unit, the mean squared gradient of its prefix tokens over
        that of its patches, at most so much that they count together as all
        patches of an image do; 1 where it has no prefix tokens.
    """
    device = next(units[0].module.parameters()).device
    totals = torch.zeros(len(units), 4, dtype=torch.double, device=device)
    for number, state in images:
        if number >= NUM_IMAGES:
            break
        generator = torch.Generator().manual_seed(number)
        state = units[0].forward(state)
        if not num_prefix(state):
            # Spares the passes where there is nothing to weigh.
            break
        states = [state]
        for unit in units[1:]:
            states.append(unit.forward(states[-1]))
        last = states[-1].x
        signs = torch.randint(2, last.shape, generator=generator) * 2 - 1
        grad = signs.to(last)
        # A map goes on without the tokens before its patches.
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
    found = []
    for first, rest, num, others in sum_(totals).tolist():
        # The numbers are of prefix tokens and of patches in all images.
        found.append(
            min(first / max(rest, 1e-30), 1.) * others / num if num else 1.)
    return found


def _pull_back(unit: Unit, state: State, grad: Tensor) -> Tensor:
    """Gradient by a unit's input of what has ``grad`` by its output."""
    x = state.x.detach().requires_grad_()
    with torch.enable_grad():
        output = unit.forward(State(x, state.size)).x
    return torch.autograd.grad(output, x, grad)[0]


def num_prefix(state: State) -> int:
    """Tokens before the patches; an image has none."""
    return max(0, state.x.shape[1] - state.size[0] * state.size[1])


def token_weights(state: State,
                  ratio: float,
                  share: float = 1.) -> Optional[Tensor]:
    """Weights of mean 1 of all tokens, (N, 1); None if they are equal.

    Args:
        state: output of a unit.
        ratio: of ``prefix_importance``.
        share: of the patches that are looked at, beside all prefix tokens,
            which count by so much less.
    """
    num = num_prefix(state)
    if not num or ratio == 1:
        return None
    weights = state.x.new_ones(state.x.shape[1], 1)
    weights[:num] = ratio * share
    return weights / weights.mean()
