"""Units: the steps of a backbone's forward pass, each able to run alone."""
from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.reparam import NormLinear


class State(NamedTuple):
    """What flows between units for one image.

    Attributes:
        x: an image (1, 3, H, W), or tokens (1, H * W, C).
        size: (H, W) of ``x``.
    """
    x: Tensor
    size: Tuple[int, int]


class Unit:
    """One step of a backbone: it runs whole maps, or a draw of its items.

    Items are what a unit computes independently of each other, such as the
    windows of a Swin block. Running all units in order is the backbone's
    forward pass up to its output norms.

    Args:
        name: the module's name in the backbone.
        module: what reconstruction optimises, an ``nn.Module``.
        batch: items per iteration when the settings leave it open.
    """

    def __init__(self, name: str, module: Any, batch: int) -> None:
        self.name = name
        self.module = module
        self.batch = batch

    def pairs(self) -> List[NormLinear]:
        """Pairs that stage 2 reparameterizes."""
        raise NotImplementedError

    def forward(self, state: State) -> State:
        """Advance the state of one image by this step."""
        raise NotImplementedError

    def num_items(self, size: Tuple[int, int]) -> int:
        """Number of items in a map of this size."""
        raise NotImplementedError

    def gather(self, state: State, items: Tensor) -> Any:
        """Input of some items of one image.

        Args:
            state: input state of the image.
            items: indices below ``num_items``, shape (n,).

        Returns:
            A named tuple of tensors with n rows, or None, each.
        """
        raise NotImplementedError

    def collate(self, batches: Sequence[Any]) -> Any:
        """Join what ``gather`` returned for several images."""
        if len(batches) == 1:
            return batches[0]
        return type(
            batches[0])(*(None if field[0] is None else torch.cat(field)
                          for field in zip(*batches)))

    def gather_target(self, state: State, size: Tuple[int, int],
                      items: Tensor) -> Tensor:
        """Rows of an output state that ``run`` gives for the same items.

        Args:
            state: output state of the image.
            size: size of its input state.
            items: as for ``gather``.

        Returns:
            Tensor of shape (tokens, C).
        """
        raise NotImplementedError

    def run(self, batch: Any) -> Tensor:
        """Output of the items of ``gather``, shape (tokens, C)."""
        raise NotImplementedError
