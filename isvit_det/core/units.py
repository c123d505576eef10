"""Units: the steps of a backbone's forward pass, each able to run alone."""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.layers import QuantLinear
from isvit_det.core.reparam import NormLinear
from isvit_det.core.rotation import Heads


class State(NamedTuple):
    """What flows between units for one image.

    Attributes:
        x: an image (1, 3, H, W), or tokens (1, H * W, C), behind those
            that a backbone puts before the patches; (1, 1, classes) at the
            end of a classifier, which runs batches as well.
        size: (H, W) of ``x``.
    """
    x: Tensor
    size: Tuple[int, int]


class Unit:
    """One step of a backbone: it runs whole maps, or a draw of its items.

    Items are what a unit computes independently of each other, such as the
    windows of a Swin block. Running all units in order is the backbone's
    forward pass up to its output norms.

    Where the items of an image share most of their work, such as the keys
    that all query rows of global attention attend to, some items are drawn
    of each of a few images, and not some of all images alike.

    Args:
        name: the module's name in the backbone.
        module: what reconstruction optimises, an ``nn.Module``.
        batch: items per iteration when the settings leave it open; with
            ``items_per_image``, items that the images drawn have together.
        items_per_image: items drawn of an image whose items share work; 0
            draws from all images alike.
    """

    def __init__(self,
                 name: str,
                 module: Any,
                 batch: int,
                 items_per_image: int = 0) -> None:
        self.name = name
        self.module = module
        self.batch = batch
        self.items_per_image = items_per_image

    def pairs(self) -> List[NormLinear]:
        """Pairs that stage 2 reparameterizes."""
        raise NotImplementedError

    def last_layer(self) -> Optional[QuantLinear]:
        """The layer whose output is the unit's, or is added to the rest.

        Its rows are all tokens of the output in order. None if no layer is
        like that.
        """
        return None

    def heads(self) -> List[Heads]:
        """Attention whose heads may be rotated."""
        return []

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
            A named tuple of tensors with n rows, or None, each; or a tuple
            of anything, if ``collate`` is the unit's own.
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


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of ``Unit.gather`` with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if not isinstance(batch, tuple):
        return batch
    moved = [to_device(field, device) for field in batch]
    # Named tuples take their fields one by one.
    return type(batch)(*moved) if hasattr(batch, '_fields') else tuple(moved)
