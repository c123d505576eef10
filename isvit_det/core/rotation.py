"""Rotating the channels of attention heads, without changing a model."""
from typing import Any, NamedTuple, Tuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """The layers around a multi-head attention.

    Attributes:
        qkv: linear layer of 3 * C outputs, by query, key and value, then by
            head, then by channel.
        proj: linear layer that reads the values that heads return.
        num_heads: heads of D = C / num_heads channels.
        of_query: tables (L, D) that queries are multiplied with, if any.
    """
    qkv: Any
    proj: Any
    num_heads: int
    of_query: Tuple[Tensor, ...] = ()


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix that spreads each channel over many others.

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
    """Fold a rotation R of each head's channels into the layers around.

    ``(Q R)(K R)^T = Q K^T`` and ``(P V R)(R^T W) = P V W``: the function
    stays, and no channel of query, key or value stands out, so that one
    scale serves all (QuaRot, arXiv 2404.00456, section 4).
    """
    qkv, proj, num_heads, of_query = heads
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
    for table in of_query:
        rotate_(table)
