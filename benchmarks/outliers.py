"""Backbones with outlier channels: the same function, harder to quantize.

Large vision transformers have channels whose activations are many times as
large as the others'. Small models that were trained for a short time have
none. Here they get some, by rescaling that is exact: a channel of an
activation is multiplied by a power of two, and what reads it is divided by
it. No rounding changes, so the float model computes bit for bit what it did.
"""
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def add_outliers_(backbone: Any,
                  factor: int = 16,
                  share: float = 1 / 16) -> None:
    """Multiply channels of activations, and divide the weights behind them.

    Channels behind norms are multiplied, which the paper's stage 2 evens out
    again, and channels of queries and values, which share one scale with all
    others. Keys are divided by what queries are multiplied by.

    Args:
        backbone: quantized, with float weights that are not calibrated.
        factor: a power of two.
        share: of the channels of each, at least one; the same for all heads.

    Raises:
        ValueError: if the factor is no power of two, or less than 1.
    """
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f'factor: {factor} is not allowed; give a power of '
                         'two, with which rescaling is exact.')
    for unit in backbone.units():
        for norm, linear, _ in unit.pairs():
            channels = _spread(norm.weight.numel(), share)
            norm.weight[channels] *= factor
            norm.bias[channels] *= factor
            linear.weight[:, channels] /= factor
        for heads in unit.heads():
            _scale_heads_(heads, factor, share)


def _scale_heads_(heads: Any, factor: int, share: float) -> None:
    width = heads.proj.in_features // heads.num_heads
    channels = _spread(width, share)
    parts = [heads.qkv.weight, heads.qkv.bias]
    for part in parts:
        if part is None:
            continue
        # A view: rows by query, key or value, by head, and by channel.
        rows = part.view(3, heads.num_heads, width, -1)
        rows[0, :, channels] *= factor
        rows[1, :, channels] /= factor
        rows[2, :, channels] *= factor
    columns = heads.proj.weight.view(-1, heads.num_heads, width)
    columns[:, :, channels] /= factor
    for table in heads.query_tables:
        table[:, channels] /= factor


def _spread(num: int, share: float) -> Tensor:
    """Indices of some of ``num`` channels, evenly spread."""
    step = max(1, round(1 / share))
    return torch.arange(min(step, num) // 2, num, step)
