"""Rotation of the channels of attention heads, which changes no output."""
from typing import Any, NamedTuple, Tuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """The layers before and after a multi-head attention.

    Attributes:
        qkv: linear layer of 3 * C outputs, by query, key and value, then by
            head, then by channel.
        proj: linear layer after the heads.
        num_heads: number of heads, of D = C / num_heads channels each.
        query_tables: tables (L, D) that queries are multiplied with, such as
            those of relative positions.
    """
    qkv: Any
    proj: Any
    num_heads: int
    query_tables: Tuple[Tensor, ...] = ()


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix that mixes each channel with many others.

    A Hadamard matrix of the largest power of 2 that divides ``size``,
    repeated along the diagonal; float64, shape (size, size).
    """
    matrix = torch.ones(1, 1, dtype=torch.double)
    while size % (2 * len(matrix)) == 0:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], 1),
             torch.cat([matrix, -matrix], 1)])
    blocks = [matrix / len(matrix)**.5] * (size // len(matrix))
    return torch.block_diag(*blocks)


@torch.no_grad()
def rotate_heads_(heads: Heads) -> None:
    """Fold a rotation R of each head's channels into the adjacent layers.

    ``(Q R)(K R)^T = Q K^T`` and ``(P V R)(R^T W) = P V W``, so the output
    stays the same. The channels of query, key and value become similar in
    range, so that one scale suits all of them (QuaRot, arXiv 2404.00456,
    section 4).
    """
    qkv, proj, num_heads, query_tables = heads
    size = proj.weight.shape[1] // num_heads
    rotation = hadamard(size).to(qkv.weight.device)

    def rotate_(weight: Tensor) -> None:
        """Rotate the last dimension, of blocks of D."""
        blocks = weight.double().unflatten(-1, (-1, size)) @ rotation
        weight.copy_(blocks.flatten(-2).to(weight.dtype))

    rotate_(qkv.weight.T)
    if qkv.bias is not None:
        rotate_(qkv.bias)
    rotate_(proj.weight)
    for table in query_tables:
        rotate_(table)
