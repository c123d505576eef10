"""Cutting maps into windows and patches, and the unit of windowed blocks."""
import functools
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from isvit_det.core.padding import Padding
from isvit_det.core.units import State, Unit


class WindowLayout(NamedTuple):
    """The partition of a map into windows.

    Attributes:
        tokens: index of the token at each position of each window, H * W for
            padding; shape (windows, positions).
        inverse: flat position of each token in the windows, shape (H * W,).
        regions: the part of the map from which each position comes, if a
            shift has brought several parts into one window; attention is
            within parts. Shape as ``tokens``, or None without shift.
    """
    tokens: Tensor
    inverse: Tensor
    regions: Optional[Tensor]

    def cut(self, x: Tensor, padding: Tensor) -> Tensor:
        """Cut maps (B, H * W, C) into windows.

        Args:
            x: the maps.
            padding: value of the padding, shape (C,).

        Returns:
            Shape (B * windows, positions, C).
        """
        num, _, channels = x.shape
        padding = padding.to(x.dtype).expand(num, 1, channels)
        padded = torch.cat([x, padding], 1)
        tokens = self.tokens.to(x.device)
        return padded[:, tokens.flatten()].view(-1, tokens.shape[1], channels)

    def join(self, windows: Tensor) -> Tensor:
        """Undo ``cut``, and drop the padding."""
        num = len(windows) // len(self.tokens)
        flat = windows.view(num, -1, windows.shape[-1])
        return flat[:, self.inverse.to(windows.device)]


@functools.lru_cache(maxsize=256)
def window_layout(height: int,
                  width: int,
                  window: int,
                  shift: int = 0) -> WindowLayout:
    """Layout of a map, which is padded at the right and the bottom.

    Args:
        height, width: of the map, in tokens.
        window: side of a window, in tokens.
        shift: cyclic shift of the map before it is cut, in tokens.
    """
    rows = -(-height // window) * window
    columns = -(-width // window) * window
    tokens = torch.arange(height * width).view(height, width)
    index = F.pad(
        tokens, (0, columns - width, 0, rows - height), value=height * width)
    regions = None
    if shift > 0:
        index = index.roll((-shift, -shift), (0, 1))
        regions = (
            _shift_regions(rows, window, shift)[:, None] * 3 +
            _shift_regions(columns, window, shift))
        regions = _partition(regions, window)
    index = _partition(index, window)
    # All padding shares the last place.
    inverse = index.new_empty(height * width + 1)
    inverse[index.flatten()] = torch.arange(index.numel())
    return WindowLayout(index, inverse[:-1], regions)


def _shift_regions(length: int, window: int, shift: int) -> Tensor:
    """0 before the last window, 1 in it, 2 where the shift has wrapped."""
    position = torch.arange(length)
    return (position >= length - window).int() + (position >= length - shift)


def _partition(grid: Tensor, window: int) -> Tensor:
    """Cut (H, W) into windows, shape (windows, window * window)."""
    height, width = grid.shape
    grid = grid.view(height // window, window, width // window, window)
    return grid.transpose(1, 2).reshape(-1, window * window)


class WindowItems(NamedTuple):
    """Windows of a block.

    Attributes:
        tokens: shape (n, N, C).
        inside: which of the tokens are inside of the map, shape (n, N).
        regions: see ``WindowLayout``, shape (n, N); None without shift.
    """
    tokens: Tensor
    inside: Tensor
    regions: Optional[Tensor]


class WindowUnit(Unit):
    """A block with attention within windows; its items are windows.

    Subclasses name the attention, define the layout and run the windows. At
    positions outside of the map, ``gather`` returns arbitrary tokens; ``run``
    has to replace them by the padding value after the norm.
    """

    def attention(self) -> Any:
        """The module that runs on windows."""
        raise NotImplementedError

    def layout(self, size: Tuple[int, int]) -> WindowLayout:
        """Layout of a map of ``size`` (H, W)."""
        raise NotImplementedError

    def padding(self, size: Tuple[int, int]) -> Optional[Padding]:
        inside = self.layout(size).tokens < size[0] * size[1]
        if inside.all():
            return None
        attn = self.attention()
        # Not those of its keys and values, which tokens attend to.
        return Padding([
            attn.query_key.left_quantizer, attn.attention_value.left_quantizer,
            attn.proj.input_quantizer
        ], inside)

    def num_items(self, size: Tuple[int, int]) -> int:
        return len(self.layout(size).tokens)

    def gather(self, state: State, items: Tensor) -> WindowItems:
        index, _, regions = self.layout(state.size)
        index = index[items]
        inside = index < state.x.shape[1]
        tokens = state.x[0, torch.where(inside, index, 0)]
        return WindowItems(tokens, inside,
                           None if regions is None else regions[items])

    def gather_target(self, state: State, size: Tuple[int, int],
                      items: Tensor) -> Tensor:
        index = self.layout(size).tokens[items]
        return state.x[0, index[index < state.x.shape[1]]]


def grid_size(size: Tuple[int, int], patch: Tuple[int,
                                                  int]) -> Tuple[int, int]:
    """Number of rows and of columns of patches of an image, rounded up."""
    return -(-size[0] // patch[0]), -(-size[1] // patch[1])


def pad_to_patches(x: Tensor, patch: Tuple[int, int]) -> Tensor:
    """Pad images with zeros at the right and the bottom to whole patches."""
    rows, columns = grid_size((x.shape[-2], x.shape[-1]), patch)
    right = columns * patch[1] - x.shape[-1]
    bottom = rows * patch[0] - x.shape[-2]
    return F.pad(x, (0, right, 0, bottom)) if right or bottom else x


def cut_patches(x: Tensor, patch: Tuple[int, int], items: Tensor) -> Tensor:
    """Cut some patches out of an image.

    Args:
        x: shape (1, C, H, W).
        patch: height and width of a patch.
        items: indices of patches in row order, shape (n,).

    Returns:
        Shape (n, C, height, width).
    """
    x = pad_to_patches(x, patch)[0]
    rows, columns = x.shape[-2] // patch[0], x.shape[-1] // patch[1]
    x = x.view(-1, rows, patch[0], columns, patch[1])
    return x[:, items // columns, :, items % columns]
