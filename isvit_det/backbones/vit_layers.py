"""Layers of a ViT: attention with explicit products, blocks, embedding."""
from typing import Optional, Tuple

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from isvit_det.backbones.layout import (WindowLayout, pad_to_patches,
                                        window_layout)
from isvit_det.backbones.vit_weights import resize_relative


class MatMul(nn.Module):
    """``left @ right``, a module that a quantized backbone replaces."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


class Attention(nn.Module):
    """Multi-head attention of all tokens, or of some query rows.

    Args:
        embed_dims: C.
        num_heads: heads of C / num_heads channels.
        qkv_bias: whether query, key and value have a bias.
        attn_drop: dropout of the attention.
        proj_drop: dropout of the output.
        rel_pos_size: side of the maps that relative positions are stored
            for, in tokens; 0 for none.
    """
    # Parameters that stay in float when the layers are quantized.
    float_operands = ('rel_pos_h', 'rel_pos_w')

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool,
                 attn_drop: float, proj_drop: float,
                 rel_pos_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dims = embed_dims // num_heads
        self.scale = head_dims**-0.5
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.query_key = MatMul()
        self.attn_drop = nn.Dropout(attn_drop)
        self.attention_value = MatMul()
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)
        self.has_rel_pos = rel_pos_size > 0
        if self.has_rel_pos:
            length = 2 * rel_pos_size - 1
            self.rel_pos_h = nn.Parameter(torch.zeros(length, head_dims))
            self.rel_pos_w = nn.Parameter(torch.zeros(length, head_dims))

    def forward(self,
                x: Tensor,
                size: Tuple[int, int],
                rows: Optional[Tensor] = None) -> Tensor:
        """Compute the attention to all tokens of ``x``.

        Args:
            x: shape (B, N, C).
            size: (H, W); with relative positions N = H * W.
            rows: indices of the tokens that are queries, (B, n); None for
                all.

        Returns:
            Shape (B, n, C).
        """
        num, length, channels = x.shape
        qkv = self.qkv(x).reshape(num, length, 3, self.num_heads,
                                  channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if rows is not None:
            index = rows[:, None, :, None].expand(-1, self.num_heads, -1,
                                                  query.shape[-1])
            query = query.gather(2, index)
        attn = self.query_key(query * self.scale, key.transpose(-2, -1))
        if self.has_rel_pos:
            attn = attn + self._relative_bias(query, size, rows)
        attn = self.attn_drop(attn.softmax(-1))
        out = self.attention_value(attn, value).transpose(1, 2)
        return self.proj_drop(self.proj(out.reshape(num, -1, channels)))

    def _relative_bias(self, query: Tensor, size: Tuple[int, int],
                       rows: Optional[Tensor]) -> Tensor:
        """Decomposed relative positions (MViTv2, arXiv 2112.01526, Eq. 4).

        Args:
            query: shape (B, heads, n, D), not scaled.
            size: (H, W) of the keys' map.
            rows: indices of the tokens that are queries, (B, n); None for
                all.

        Returns:
            Shape (B, heads, n, H * W).
        """
        height, width = size
        down = relative_table(self.rel_pos_h, height)
        across = relative_table(self.rel_pos_w, width)
        if rows is None:
            grid = query.unflatten(2, size)
            by_row = torch.einsum('bnhwd,hkd->bnhwk', grid, down)
            by_column = torch.einsum('bnhwd,wkd->bnhwk', grid, across)
            by_row, by_column = by_row.flatten(2, 3), by_column.flatten(2, 3)
        else:
            by_row = torch.einsum('bnqd,bqkd->bnqk', query,
                                  _look_up(down, rows // width))
            by_column = torch.einsum('bnqd,bqkd->bnqk', query,
                                     _look_up(across, rows % width))
        return (by_row[..., None] + by_column[..., None, :]).flatten(-2)


def relative_table(table: Tensor, length: int) -> Tensor:
    """Embedding of every pair of positions: (L, D) to (length, length, D)."""
    table = resize_relative(table, 2 * length - 1)
    position = torch.arange(length, device=table.device)
    return _look_up(table, position[:, None] - position + length - 1)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``, with gradients that are summed in a fixed order."""
    flat = nn.functional.embedding(index, table.flatten(1))
    return flat.unflatten(-1, table.shape[1:])


class LayerScale(nn.Module):
    """A scale for each channel, with timm's parameter name.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, ), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A transformer block with global or windowed attention.

    Windows that exceed the map are padded after the norm with
    ``padding_value``, shape (C,), which is 0 in a float model.

    Args:
        embed_dims: C.
        num_heads: of the attention.
        mlp_ratio: hidden channels divided by C.
        qkv_bias: whether query, key and value have a bias.
        layer_scale: whether branches are scaled by channel.
        drop: dropout of projection and MLP.
        attn_drop: dropout of the attention.
        drop_path: stochastic depth.
        window_size: side of windows, 0 for global attention.
        rel_pos_size: see ``Attention``.
        norm_eps: of both norms.
    """
    padding_value: Tensor

    def __init__(self, embed_dims: int, num_heads: int, mlp_ratio: float,
                 qkv_bias: bool, layer_scale: bool, drop: float,
                 attn_drop: float, drop_path: float, window_size: int,
                 rel_pos_size: int, norm_eps: float) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(embed_dims, eps=norm_eps)
        self.attn = Attention(embed_dims, num_heads, qkv_bias, attn_drop, drop,
                              rel_pos_size)
        self.ls1 = LayerScale(embed_dims) if layer_scale else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dims, eps=norm_eps)
        self.mlp = Mlp(embed_dims, round(embed_dims * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(embed_dims) if layer_scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.register_buffer(
            'padding_value', torch.zeros(embed_dims), persistent=False)

    def layout(self, size: Tuple[int, int]) -> WindowLayout:
        """Windows of a map of ``size`` (H, W)."""
        return window_layout(*size, self.window_size)

    def forward(self, x: Tensor, size: Tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map of ``size`` (H, W) to the same shape."""
        normed = self.norm1(x)
        if self.window_size:
            layout = self.layout(size)
            windows = layout.cut(normed, self.padding_value)
            side = self.window_size
            attended = layout.join(self.attn(windows, (side, side)))
        else:
            attended = self.attn(normed, size)
        return self.finish(x, attended)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the output of the attention, then that of the MLP; (..., C)."""
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Patch embedding: a convolution whose stride is its kernel size.

    Args:
        in_channels: of the image.
        embed_dims: of the tokens.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, in_channels: int, embed_dims: int,
                 patch_size: int) -> None:
        super().__init__()
        self.patch = (patch_size, patch_size)
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, C, rows, columns)."""
        return self.proj(pad_to_patches(x, self.patch))
