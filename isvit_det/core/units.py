"""Units: the parts of a backbone that are calibrated one after the other."""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from isvit_det.core.layers import QuantLinear
from isvit_det.core.padding import Padding
from isvit_det.core.reparam import NormLinear
from isvit_det.core.rotation import Heads


class State(NamedTuple):
    """Input or output of a unit for one image.

    Attributes:
        x: an image (1, 3, H, W), or tokens (1, N, C), where the H * W patches
            may follow prefix tokens such as a class token. The output of a
            classifier is (1, 1, classes). In a classifier's forward pass the
            first dimension may be a batch.
        size: (H, W) of ``x``.
    """
    x: Tensor
    size: Tuple[int, int]


class Unit:
    """A part of a backbone, which runs on whole images or on single items.

    Calibration items are parts of a unit's input that it processes
    independently of each other, such as the windows of a Swin block.
    Reconstruction draws its minibatches from them. Running all units in order
    is the backbone's forward pass without its output norms.

    If the items of an image share most of their computation, such as the keys
    of global attention, which all query rows attend to, a minibatch has
    several items of each of a few images instead of items of all images.

    Args:
        name: name of the module in the backbone.
        module: the ``nn.Module`` that reconstruction optimises.
        batch: items of a minibatch if the settings do not say; with
            ``items_per_image``, the sum over its images.
        items_per_image: items drawn from each image of a minibatch; 0 draws
            from all images alike.
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
        """Pairs of a norm and a linear layer that stage 2 reparameterizes."""
        raise NotImplementedError

    def last_layer(self) -> Optional[QuantLinear]:
        """The layer whose output is the unit's output, or is added to it.

        The rows of its output are the tokens of the unit's output, in order.
        None if the unit has no such layer.
        """
        return None

    def heads(self) -> List[Heads]:
        """Attention layers whose heads may be rotated."""
        return []

    def padding(self, size: Tuple[int, int]) -> Optional[Padding]:
        """The padding of windows of a map of this size (H, W), if any."""
        return None

    def forward(self, state: State) -> State:
        """Run the unit on one image."""
        raise NotImplementedError

    def num_items(self, size: Tuple[int, int]) -> int:
        """Number of items in an input of this size (H, W)."""
        raise NotImplementedError

    def gather(self, state: State, items: Tensor) -> Any:
        """Collect the input of some items of one image.

        Args:
            state: input state of the image.
            items: indices below ``num_items``, shape (n,).

        Returns:
            A named tuple, each field of which is None or a tensor with n
            rows; a unit with its own ``collate`` may return another tuple.
        """
        raise NotImplementedError

    def collate(self, batches: Sequence[Any]) -> Any:
        """Concatenate the results of ``gather`` for several images."""
        if len(batches) == 1:
            return batches[0]
        return type(
            batches[0])(*(None if field[0] is None else torch.cat(field)
                          for field in zip(*batches)))

    def gather_target(self, state: State, size: Tuple[int, int],
                      items: Tensor) -> Tensor:
        """Collect the output of some items, in the layout of ``run``.

        Args:
            state: output state of the image.
            size: size of its input state.
            items: as for ``gather``.

        Returns:
            Tensor of shape (tokens, C).
        """
        raise NotImplementedError

    def run(self, batch: Any) -> Tensor:
        """Compute the output of items, shape (tokens, C)."""
        raise NotImplementedError


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a minibatch of ``Unit.gather`` to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if not isinstance(batch, tuple):
        return batch
    moved = [to_device(field, device) for field in batch]
    # Named tuples take their fields one by one.
    return type(batch)(*moved) if hasattr(batch, '_fields') else tuple(moved)
