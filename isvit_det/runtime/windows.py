"""Windows of attention as indices of tokens, and their position biases."""
import functools
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from isvit_det.backbones.layout import window_layout
from isvit_det.backbones.vit_weights import resize_relative
from isvit_det.plans.block import BlockPlan
from isvit_det.runtime.packing import BLOCK

# Bias of keys that only fill up a block: their probability becomes 0.
NOWHERE = -1e30


class Windows(NamedTuple):
    """The windows of a map with N positions each.

    Attributes:
        token: index of the token at each position, int32, shape (windows, N);
            padding has the number of tokens as its index.
        region: number of the region at each position, int32, shape (windows, N
            rounded up to a multiple of 16); tokens attend only within their
            region. None if each window is a single region.
        size: height and width of a window.
    """
    token: Tensor
    region: Optional[Tensor]
    size: Tuple[int, int]


@functools.lru_cache(maxsize=256)
def find_windows(window: int, shift: int, size: Tuple[int, int],
                 tokens: int) -> Windows:
    """Divide a map into windows.

    Args:
        window: side of a window; 0 for global attention, one window with all
            tokens.
        shift: of the windows, see ``window_layout``.
        size: (H, W) of the map.
        tokens: H * W, or more where there are prefix tokens.
    """
    if not window:
        token = torch.arange(tokens, dtype=torch.int32)[None]
        return Windows(token, None, size)
    layout = window_layout(*size, window, shift)
    region = layout.regions
    if region is not None:
        region = F.pad(region, (0, -region.shape[1] % BLOCK))
        region = region.int().contiguous()
    token = layout.tokens.int().contiguous()
    return Windows(token, region, (window, window))


class Bias(NamedTuple):
    """Position biases of attention logits, see ``isvit_windows``.

    Attributes:
        added: bias of every head, query and key, float32, shape (heads or 1, N
            or 1, N rounded up to a multiple of 16); broadcast where it is 1.
        rows, columns: tables of decomposed relative positions, or None; see
            ``_relative_table``.
    """
    added: Tensor
    rows: Optional[Tensor] = None
    columns: Optional[Tensor] = None


def make_bias(plan: BlockPlan, positions: int, size: Tuple[int, int]) -> Bias:
    """Prepare the position biases of a block for one size of windows.

    Args:
        plan: describes the block.
        positions: number of positions in a window.
        size: height and width of a window.
    """
    if plan.position_bias is not None:
        return Bias(_pad_keys(plan.position_bias))
    # One row, shared by all queries of all heads.
    nothing = _pad_keys(torch.zeros(1, positions)).expand(1, 1, -1)
    if plan.relative_positions is None:
        return Bias(nothing)
    rows, columns = (_relative_table(table, length)
                     for table, length in zip(plan.relative_positions, size))
    return Bias(nothing, rows, columns)


def _pad_keys(bias: Tensor) -> Tensor:
    filled = F.pad(bias, (0, -bias.shape[-1] % BLOCK), value=NOWHERE)
    return filled.contiguous()


def _relative_table(table: Tensor, length: int) -> Tensor:
    """Relative position embeddings along one axis, as the kernels read them.

    Args:
        table: ViTDet's parameter, shape (2 L - 1, C / heads) for the length L
            of its training, ordered by query position minus key position.
        length: of the window along this axis.

    Returns:
        The table resized to ``length``, reversed, transposed and padded, shape
        (C / heads, 2 * length + BLOCK rounded up to a multiple of BLOCK).
        Column ``length - 1 + d`` is for keys d positions after the query.
    """
    table = resize_relative(table, 2 * length - 1).flip(0).t()
    filled = -(-(2 * length + BLOCK) // BLOCK) * BLOCK
    return F.pad(table, (0, filled - table.shape[1])).float().contiguous()
