"""Where the patches and windows of a map lie, and units that draw them."""
import functools
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from isvit_det.core.units import State, Unit


class WindowLayout(NamedTuple):
    """Where the tokens of a map go when it is cut into windows.

    Attributes:
        tokens: token of every window position, H * W for padding, shape
            (windows, positions).
        inverse: position of every token among all windows', shape (H * W,).
        regions: parts of the map that a shift brought together; positions
            of one window attend within their region. Like ``tokens``, or
            None without shift.
    """
    tokens: Tensor
    inverse: Tensor
    regions: Optional[Tensor]

    def cut(self, x: Tensor, padding: Tensor) -> Tensor:
        """Cut maps (B, H * W, C), padded with (C,), into windows.

        Returns:
            Shape (B * windows, positions, C).
        """
        num, _, channels = x.shape
        padding = padding.to(x.dtype).expand(num, 1, channels)
        padded = torch.cat([x, padding], 1)
        tokens = self.tokens.to(x.device)
        return padded[:, tokens.flatten()].view(-1, tokens.shape[1], channels)

    def join(self, windows: Tensor) -> Tensor:
        """Undo ``cut``, dropping what is padding."""
        num = len(windows) // len(self.tokens)
        flat = windows.view(num, -1, windows.shape[-1])
        return flat[:, self.inverse.to(windows.device)]


@functools.lru_cache(maxsize=256)
def window_layout(height: int,
                  width: int,
                  window: int,
                  shift: int = 0) -> WindowLayout:
    """Layout of a map of this size, padded at the right and the bottom."""
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
    inverse = index.flatten().argsort(stable=True)[:height * width]
    return WindowLayout(index, inverse, regions)


def _shift_regions(length: int, window: int, shift: int) -> Tensor:
    """0 up to the last window, 1 in it, 2 for what the shift wrapped."""
    position = torch.arange(length)
    return (position >= length - window).int() + (position >= length - shift)


def _partition(grid: Tensor, window: int) -> Tensor:
    """Cut (H, W) into windows, shape (windows, window * window)."""
    height, width = grid.shape
    grid = grid.view(height // window, window, width // window, window)
    return grid.transpose(1, 2).reshape(-1, window * window)


class WindowItems(NamedTuple):
    """Windows of a block: tokens (n, N, C), which of them are inside of the
    map (n, N), and their regions (n, N) or None."""
    tokens: Tensor
    inside: Tensor
    regions: Optional[Tensor]


class WindowUnit(Unit):
    """A block that attends within windows; item: a window.

    Subclasses say how the map is cut, and run the windows. What stands in
    for padding before the norm has to be replaced after it.
    """

    def layout(self, size: Tuple[int, int]) -> WindowLayout:
        """Layout of a map of ``size`` (H, W)."""
        raise NotImplementedError

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
    """Rows and columns of patches of an image, padded where they stand out."""
    return -(-size[0] // patch[0]), -(-size[1] // patch[1])


def pad_to_patches(x: Tensor, patch: Tuple[int, int]) -> Tensor:
    """Pad images with zeros at the right and the bottom to whole patches."""
    rows, columns = grid_size((x.shape[-2], x.shape[-1]), patch)
    right = columns * patch[1] - x.shape[-1]
    bottom = rows * patch[0] - x.shape[-2]
    return F.pad(x, (0, right, 0, bottom)) if right or bottom else x


def cut_patches(x: Tensor, patch: Tuple[int, int], items: Tensor) -> Tensor:
    """Some patches of an image in row order.

    Args:
        x: shape (1, C, H, W).
        patch: height and width of a patch.
        items: indices of patches, shape (n,).

    Returns:
        Shape (n, C, height, width).
    """
    x = pad_to_patches(x, patch)[0]
    rows, columns = x.shape[-2] // patch[0], x.shape[-1] // patch[1]
    x = x.view(-1, rows, patch[0], columns, patch[1])
    return x[:, items // columns, :, items % columns]
