"""Where the tokens of a map attend: windows, and what their positions add."""
import functools
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from isvit_det.backbones.layout import window_layout
from isvit_det.backbones.vit_weights import resize_relative
from isvit_det.runtime.block_plan import BlockPlan
from isvit_det.runtime.packing import BLOCK

# Stands for minus infinity where a window has no position.
NOWHERE = -1e30


class Windows(NamedTuple):
    """Windows of maps of one size.

    Attributes:
        token: at each position, int32, shape (windows, N); the number of
            tokens stands for padding.
        region: of each position, int32, shape (windows, N filled up to whole
            blocks); None for a single region.
        size: height and width of a window.
    """
    token: Tensor
    region: Optional[Tensor]
    size: Tuple[int, int]


@functools.lru_cache(maxsize=256)
def find_windows(window: int, shift: int, size: Tuple[int, int],
                 tokens: int) -> Windows:
    """Windows of a map.

    Args:
        window: their side; 0 for one window with all tokens.
        shift: see ``window_layout``.
        size: (H, W) of the map.
        tokens: H * W, or more with prefix tokens.
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
    """What is added to logits, see ``isvit_windows`` of csrc/blocks.h.

    Attributes:
        added: float32, shape (heads or 1, N or 1, N filled up to whole
            blocks); where it is 1, the entry serves all.
        rows, columns: tables of decomposed relative positions, or None.
    """
    added: Tensor
    rows: Optional[Tensor] = None
    columns: Optional[Tensor] = None


def make_bias(plan: BlockPlan, positions: int, size: Tuple[int, int]) -> Bias:
    """What is added to the logits of a block.

    Args:
        plan: of the block.
        positions: of a window.
        size: height and width of a window.
    """
    if plan.position_bias is not None:
        return Bias(_filled(plan.position_bias))
    # All queries of all heads share one row.
    nothing = _filled(torch.zeros(1, positions)).expand(1, 1, -1)
    if plan.relative_positions is None:
        return Bias(nothing)
    rows, columns = (_relative_table(table, length)
                     for table, length in zip(plan.relative_positions, size))
    return Bias(nothing, rows, columns)


def _filled(bias: Tensor) -> Tensor:
    filled = F.pad(bias, (0, -bias.shape[-1] % BLOCK), value=NOWHERE)
    return filled.contiguous()


def _relative_table(table: Tensor, length: int) -> Tensor:
    """Embeddings by how far a key lies behind the query, from ``1 - length``.

    Args:
        table: shape (2 L - 1, C / heads) for some L; by how far a query lies
            behind the key.
        length: of a side of the window.

    Returns:
        Shape (C / heads, 2 * length + BLOCK filled up to whole blocks).
    """
    table = resize_relative(table, 2 * length - 1).flip(0).t()
    filled = -(-(2 * length + BLOCK) // BLOCK) * BLOCK
    return F.pad(table, (0, filled - table.shape[1])).float().contiguous()
