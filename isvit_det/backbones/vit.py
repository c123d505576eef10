"""ViT and DeiT as detector backbones, in float.

Unlike timm's, the float class computes attention in the open: product of
query and key, softmax, product with the values. Windowed blocks and relative
positions are those of ViTDet (arXiv 2203.16527).
"""
from typing import Any, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from timm.layers import DropPath, LayerScale, Mlp, resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isvit_det.backbones.layout import (WindowLayout, pad_to_patches,
                                        window_layout)
from isvit_det.backbones.vit_weights import (fit_weights, read_weights,
                                             resize_relative)
from isvit_det.core.errors import QuantError
from isvit_det.core.units import State
from isvit_det.registry import MODELS

# embed_dims, depth, num_heads.
ARCHS = {
    'tiny': (192, 12, 3),
    'small': (384, 12, 6),
    'base': (768, 12, 12),
    'large': (1024, 24, 16),
}
DEIT_ARCHS = ('tiny', 'small', 'base')
MAX_PREFIX_TOKENS = 2


class MatMul(nn.Module):
    """``left @ right``, which a quantized backbone replaces."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


class Attention(nn.Module):
    """Multi-head attention of all tokens, or of some rows to all tokens.

    Args:
        embed_dims: C.
        num_heads: heads of C / num_heads channels.
        qkv_bias: whether query, key and value have a bias.
        attn_drop: dropout of the attention.
        proj_drop: dropout of the output.
        rel_pos_size: side of the maps that relative positions are stored
            for, in tokens; 0 for none.
    """

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
        """Attend to all of ``x``.

        Args:
            x: shape (B, N, C).
            size: (H, W); N = H * W where there are relative positions.
            rows: tokens that ask, (B, n), or None for all.

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
            rows: tokens that ask, (B, n), or None for all.

        Returns:
            Shape (B, heads, n, H * W).
        """
        height, width = size
        down = _relative_table(self.rel_pos_h, height)
        across = _relative_table(self.rel_pos_w, width)
        if rows is None:
            grid = query.unflatten(2, size)
            by_row = torch.einsum('bnhwd,hkd->bnhwk', grid, down)
            by_column = torch.einsum('bnhwd,wkd->bnhwk', grid, across)
            by_row, by_column = by_row.flatten(2, 3), by_column.flatten(2, 3)
        else:
            by_row = torch.einsum('bnqd,bqkd->bnqk', query,
                                  down[rows // width])
            by_column = torch.einsum('bnqd,bqkd->bnqk', query,
                                     across[rows % width])
        return (by_row[..., None] + by_column[..., None, :]).flatten(-2)


def _relative_table(table: Tensor, length: int) -> Tensor:
    """Embedding of every pair of positions: (L, D) to (length, length, D)."""
    table = resize_relative(table, 2 * length - 1)
    position = torch.arange(length, device=table.device)
    # Indexing sums gradients in any order; an embedding does not.
    return nn.functional.embedding(position[:, None] - position + length - 1,
                                   table)


class Block(nn.Module):
    """A transformer block, global or within windows.

    Windows that stand out of the map are padded after the norm with
    ``padding_value``, (C,), zero in a float model.

    Args:
        embed_dims: C.
        num_heads: of the attention.
        mlp_ratio: hidden channels by C.
        qkv_bias: whether query, key and value have a bias.
        layer_scale: whether branches are scaled by channel.
        drop: dropout of projection and MLP.
        attn_drop: dropout of the attention.
        drop_path: stochastic depth.
        window_size: side of windows, 0 for global attention.
        rel_pos_size: see ``Attention``.
    """
    padding_value: Tensor

    def __init__(self, embed_dims: int, num_heads: int, mlp_ratio: float,
                 qkv_bias: bool, layer_scale: bool, drop: float,
                 attn_drop: float, drop_path: float, window_size: int,
                 rel_pos_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = Attention(embed_dims, num_heads, qkv_bias, attn_drop, drop,
                              rel_pos_size)
        self.ls1 = LayerScale(embed_dims) if layer_scale else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = Mlp(embed_dims, int(embed_dims * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(embed_dims) if layer_scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.register_buffer(
            'padding_value', torch.zeros(embed_dims), persistent=False)

    def layout(self, size: Tuple[int, int]) -> WindowLayout:
        """Windows of a map of ``size`` (H, W)."""
        return window_layout(*size, self.window_size)

    def forward(self, x: Tensor, size: Tuple[int, int]) -> Tensor:
        """Shape (B, tokens, C) to the same, of a map of ``size`` (H, W)."""
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
        """Add what attention gave, then the MLP; all (..., C)."""
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Convolution of whole patches.

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


@MODELS.register_module()
class VisionTransformer(BaseModule):
    """A timm ViT, DeiT or SAM encoder as a detector backbone, in float.

    Keys of its parameters are timm's. It gives one map, of the last block.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'`` or ``'large'``, or a dict
            of embed_dims, depth and num_heads.
        patch_size: side of a patch in pixels.
        in_channels: of the image.
        pretrain_img_size: of the stored position embedding, in pixels; it is
            interpolated to the size of every image.
        antialias: interpolate as timm does; False as Detectron2 does.
        window_size: side of the windows that blocks attend in, in tokens; 0
            for global attention throughout.
        global_blocks: blocks with global attention beside windowed ones.
        rel_pos_size: side of the maps that relative positions of global
            blocks are stored for, in tokens; 0 for none.
        num_prefix_tokens: 1 keeps the class token, 2 the distillation token
            as well; global attention only. 0 drops them with their positions.
        mlp_ratio: hidden channels of the MLP by embed_dims.
        qkv_bias: whether query, key and value have a bias.
        layer_scale: whether branches are scaled by channel.
        final_norm: whether a LayerNorm follows the last block.
        drop_rate: dropout.
        attn_drop_rate: dropout of the attention.
        drop_path_rate: stochastic depth of the last block, 0 in the first.
        with_cp: trade time for memory in training.
        frozen_stages: 0 freezes the embeddings, n the first n blocks as
            well, -1 nothing.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` reads weights
            of a timm, DeiT, MAE or SAM file or address, strictly;
            ``checkpoint='timm://NAME'`` has timm download them.

    Raises:
        QuantError: if an argument is not allowed.
    """

    def __init__(self,
                 arch: Union[str, Mapping[str, int]] = 'base',
                 patch_size: int = 16,
                 in_channels: int = 3,
                 pretrain_img_size: int = 224,
                 antialias: bool = True,
                 window_size: int = 0,
                 global_blocks: Sequence[int] = (),
                 rel_pos_size: int = 0,
                 num_prefix_tokens: int = 0,
                 mlp_ratio: float = 4.,
                 qkv_bias: bool = True,
                 layer_scale: bool = False,
                 final_norm: bool = True,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0.,
                 with_cp: bool = False,
                 frozen_stages: int = -1,
                 init_cfg: Optional[Mapping[str, Any]] = None) -> None:
        super().__init__(init_cfg=init_cfg)
        embed_dims, depth, num_heads = _sizes(arch)
        if not 0 <= num_prefix_tokens <= MAX_PREFIX_TOKENS:
            raise QuantError(f'num_prefix_tokens: {num_prefix_tokens} is not '
                             f'allowed; expected 0..{MAX_PREFIX_TOKENS}.')
        if num_prefix_tokens and (window_size or rel_pos_size):
            raise QuantError('num_prefix_tokens: a class token has no place '
                             'in windows or relative positions; set it to 0.')
        outside = [i for i in global_blocks if not 0 <= i < depth]
        if outside:
            raise QuantError(f'global_blocks: {outside} is not allowed; '
                             f'expected blocks 0..{depth - 1}.')
        self.embed_dims = embed_dims
        self.num_prefix_tokens = num_prefix_tokens
        self.antialias = antialias
        self.has_final_norm = final_norm
        self.with_cp = with_cp
        self.frozen_stages = frozen_stages
        side = pretrain_img_size // patch_size
        self.grid = (side, side)
        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size)
        if num_prefix_tokens > 0:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        if num_prefix_tokens > 1:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(
            torch.zeros(1, num_prefix_tokens + side * side, embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList()
        for index in range(depth):
            is_global = window_size == 0 or index in global_blocks
            self.blocks.append(
                Block(
                    embed_dims,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    layer_scale,
                    drop_rate,
                    attn_drop_rate,
                    drop_path=drop_path_rate * index / max(1, depth - 1),
                    window_size=0 if is_global else window_size,
                    rel_pos_size=rel_pos_size
                    and (rel_pos_size if is_global else window_size)))
        self.norm: nn.Module = nn.Identity()
        if final_norm:
            self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self._freeze_()

    def init_weights(self) -> None:
        """Read the weights that ``init_cfg`` names, or draw random ones.

        Raises:
            QuantError: if they cannot be read or do not fit.
        """
        if self.init_cfg is None:
            MMLogger.get_current_instance().warning(
                f'no pre-trained weights for {type(self).__name__}: training '
                'starts from scratch')
            self._init_random_()
            return
        if self.init_cfg.get('type') != 'Pretrained':
            raise QuantError(
                f'init_cfg.type: {self.init_cfg.get("type")!r} is not '
                "allowed; expected 'Pretrained' or init_cfg=None.")
        prefix = self.init_cfg.get('prefix', '')
        weights = {
            key[len(prefix):]: value
            for key, value in read_weights(
                self.init_cfg['checkpoint']).items() if key.startswith(prefix)
        }
        self.load_state_dict(fit_weights(weights, self), strict=False)

    def _init_random_(self) -> None:
        for name, param in self.named_parameters():
            if name.endswith(('pos_embed', '_token')):
                trunc_normal_(param, std=.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _freeze_(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [
            p for name, p in self.named_parameters()
            if name.endswith(('pos_embed', '_token'))
        ]
        for module in self._frozen_modules():
            module.eval()
            frozen += module.parameters()
        for param in frozen:
            param.requires_grad_(False)

    def _frozen_modules(self) -> List[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, *self.blocks[:self.frozen_stages]]

    def train(self, mode: bool = True) -> 'VisionTransformer':
        """Set the mode of all but frozen parts."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def positions(self, size: Tuple[int, int]) -> Tensor:
        """Position embedding (1, prefix + H * W, C) of a map (H, W)."""
        return resample_abs_pos_embed(
            self.pos_embed,
            list(size),
            list(self.grid),
            num_prefix_tokens=self.num_prefix_tokens,
            antialias=self.antialias)

    def embed(self, images: Tensor) -> State:
        """Tokens (B, prefix + H * W, C) of images (B, 3, h, w)."""
        x = self.patch_embed(images)
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        prefix = [
            getattr(self, name).expand(len(x), -1, -1)
            for name in ('cls_token', 'dist_token')[:self.num_prefix_tokens]
        ]
        x = torch.cat([*prefix, x], 1) + self.positions(size)
        return State(self.drop_after_pos(x), size)

    def tokens(self, images: Tensor) -> State:
        """Tokens after the last block, before the final norm."""
        x, size = self.embed(images)
        for block in self.blocks:
            if self.with_cp and x.requires_grad:
                x = checkpoint(block, x, size, use_reentrant=False)
            else:
                x = block(x, size)
        return State(x, size)

    def forward(self, images: Tensor) -> Tuple[Tensor]:
        """Images (B, 3, h, w) to one map (B, C, H, W)."""
        x, size = self.tokens(images)
        x = self.norm(x)[:, self.num_prefix_tokens:]
        return (x.transpose(1, 2).unflatten(2, size).contiguous(), )


def _sizes(arch: Union[str, Mapping[str, int]]) -> Tuple[int, int, int]:
    keys = ('embed_dims', 'depth', 'num_heads')
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise QuantError(f'arch: {arch!r} is not allowed; expected one of '
                             f'{list(ARCHS)} or a dict of {list(keys)}.')
        return ARCHS[arch]
    if set(arch) != set(keys):
        raise QuantError(f'arch: keys {sorted(arch)} are not allowed; '
                         f'expected {list(keys)}.')
    embed_dims, depth, num_heads = (arch[key] for key in keys)
    if embed_dims % num_heads:
        raise QuantError(f'arch: embed_dims {embed_dims} is not a multiple of '
                         f'num_heads {num_heads}.')
    return embed_dims, depth, num_heads


@MODELS.register_module()
class DeiT(VisionTransformer):
    """A ``VisionTransformer`` with DeiT's presets (arXiv 2012.12877).

    Args:
        arch: ``'tiny'``, ``'small'`` or ``'base'``, or a dict of sizes.
        drop_path_rate: of DeiT's training.
        **kwargs: of ``VisionTransformer``.
    """

    def __init__(self,
                 arch: Union[str, Mapping[str, int]] = 'tiny',
                 drop_path_rate: float = .1,
                 **kwargs: Any) -> None:
        if isinstance(arch, str) and arch not in DEIT_ARCHS:
            raise QuantError(f'arch: {arch!r} is not a DeiT; expected one of '
                             f'{list(DEIT_ARCHS)}.')
        super().__init__(arch=arch, drop_path_rate=drop_path_rate, **kwargs)
