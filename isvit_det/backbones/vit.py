"""ViT and DeiT as detector backbones, in float.

Windowed blocks and relative positions are those of ViTDet (arXiv 2203.16527).
"""
from typing import Any, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isvit_det.backbones.vit_layers import Block, PatchEmbed
from isvit_det.backbones.vit_weights import (PREFIX_TOKENS, find_weights,
                                             fit_weights)
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


@MODELS.register_module()
class VisionTransformer(BaseModule):
    """A timm ViT, DeiT or SAM encoder as a detector backbone, in float.

    The keys of its parameters are those of timm. Its output is one map, that
    of the last block.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'`` or ``'large'``, or a dict
            with embed_dims, depth and num_heads.
        patch_size: side of a patch in pixels.
        in_channels: of the image.
        pretrain_img_size: of the stored position embedding, in pixels; it is
            interpolated to the size of every image.
        antialias: interpolate with antialiasing as timm does; Detectron2
            does not.
        window_size: side of the windows of the attention, in tokens; 0 for
            global attention in all blocks.
        global_blocks: indices of the blocks with global attention, if the
            others have windows.
        rel_pos_size: side of the map that the relative positions of global
            blocks are stored for, in tokens; 0 for no relative positions.
        num_prefix_tokens: 1 keeps the class token, 2 also the distillation
            token; only with global attention. 0 drops them and their
            positions.
        mlp_ratio: hidden channels of the MLP divided by embed_dims.
        qkv_bias: whether query, key and value have a bias.
        layer_scale: whether branches are scaled by channel.
        final_norm: whether a LayerNorm follows the last block.
        norm_eps: of every LayerNorm; 1e-5 in timm's ``samvit_*``.
        drop_rate: dropout.
        attn_drop_rate: dropout of the attention.
        drop_path_rate: stochastic depth of the last block; it grows linearly
            from 0 in the first.
        with_cp: checkpoint activations in training, to save memory.
        frozen_stages: 0 freezes the embeddings, n also the first n blocks,
            -1 nothing.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` loads weights
            of timm, DeiT, MAE or timm's SAM strictly;
            ``checkpoint='timm://NAME'`` lets timm download them.

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
                 norm_eps: float = 1e-6,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0.,
                 with_cp: bool = False,
                 frozen_stages: int = -1,
                 init_cfg: Optional[Mapping[str, Any]] = None) -> None:
        super().__init__(init_cfg=init_cfg)
        embed_dims, depth, num_heads = _sizes(arch)
        if not 0 <= num_prefix_tokens <= len(PREFIX_TOKENS):
            raise QuantError(f'num_prefix_tokens: {num_prefix_tokens} is not '
                             f'allowed; expected 0..{len(PREFIX_TOKENS)}.')
        if num_prefix_tokens and (window_size or rel_pos_size):
            raise QuantError('num_prefix_tokens: a class token has no place '
                             'in windows or relative positions; set it to 0.')
        if global_blocks and not window_size:
            raise QuantError('global_blocks: without window_size all blocks '
                             'are global; give one or leave them out.')
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
        for name in PREFIX_TOKENS[:num_prefix_tokens]:
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, embed_dims)))
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
                    and (rel_pos_size if is_global else window_size),
                    norm_eps=norm_eps))
        self.norm: nn.Module = nn.Identity()
        if final_norm:
            self.norm = nn.LayerNorm(embed_dims, eps=norm_eps)
        self._freeze_()

    def init_weights(self) -> None:
        """Load the weights of ``init_cfg``, or initialise at random.

        Raises:
            QuantError: if they cannot be read or do not fit.
        """
        if self.init_cfg is None:
            MMLogger.get_current_instance().warning(
                f'no pre-trained weights for {type(self).__name__}: training '
                'starts from scratch')
            self._init_random_()
            return
        if (not isinstance(self.init_cfg, dict)
                or self.init_cfg.get('type') != 'Pretrained'
                or 'checkpoint' not in self.init_cfg):
            raise QuantError(
                f'init_cfg: {self.init_cfg!r} is not allowed; expected '
                "dict(type='Pretrained', checkpoint=FILE) or None.")
        prefix = self.init_cfg.get('prefix', '')
        loaded = find_weights(self.init_cfg['checkpoint'])
        MMLogger.get_current_instance().info(loaded.summary)
        weights = {
            key[len(prefix):]: value
            for key, value in loaded.state_dict.items()
            if key.startswith(prefix)
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
        return [
            self.patch_embed, self.drop_after_pos,
            *self.blocks[:self.frozen_stages]
        ]

    def train(self, mode: bool = True) -> 'VisionTransformer':
        """Set the mode of all parts that are not frozen."""
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
            for name in PREFIX_TOKENS[:self.num_prefix_tokens]
        ]
        x = torch.cat([*prefix, x], 1) + self.positions(size)
        return State(self.drop_after_pos(x), size)

    def tokens(self, images: Tensor) -> State:
        """Tokens after the last block, before the final norm."""
        x, size = self.embed(images)
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
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
                 *,
                 drop_path_rate: float = .1,
                 **kwargs: Any) -> None:
        if isinstance(arch, str) and arch not in DEIT_ARCHS:
            raise QuantError(f'arch: {arch!r} is not a DeiT; expected one of '
                             f'{list(DEIT_ARCHS)}.')
        super().__init__(arch, drop_path_rate=drop_path_rate, **kwargs)
