"""QuantSwinTransformer: MMDetection's Swin with quantized layers."""
from typing import Any, List, Mapping, NamedTuple, Optional, Tuple, Union

import torch
from mmdet.models.backbones.swin import (ShiftWindowMSA, SwinBlock,
                                         SwinTransformer, WindowMSA)
from mmdet.models.layers import PatchMerging
from mmengine.model import BaseModule
from torch import Tensor
from torch.nn import functional as F

from isvit_det.backbones.layout import (WindowItems, WindowLayout, WindowUnit,
                                        cut_patches, grid_size, window_layout)
from isvit_det.core.layers import QuantConv2d, QuantLinear, QuantMatMul
from isvit_det.core.reparam import NormLinear
from isvit_det.core.rotation import Heads
from isvit_det.core.settings import QuantConfig
from isvit_det.core.units import State, Unit
from isvit_det.packed.loading import refuse_packed
from isvit_det.registry import MODELS

# Size of a minibatch of the reconstruction: windows for a block by its stage,
# tokens for a patch merging, patches for the embedding. Shallow stages have
# the most windows, and the cheapest.
WINDOWS_PER_STEP = (128, 64, 32, 24)
TOKENS_PER_STEP = 1024
PATCHES_PER_STEP = 4096


def region_mask(regions: Optional[Tensor]) -> Optional[Tensor]:
    """Additive attention mask (windows, N, N): -100 between regions."""
    if regions is None:
        return None
    apart = regions[:, None] != regions[:, :, None]
    return torch.zeros(
        apart.shape, device=apart.device).masked_fill_(apart, -100.)


class QuantWindowMSA(BaseModule):
    """MMDetection's ``WindowMSA`` with quantized layers and matrix products.

    Args:
        source: float module, whose parameters are shared.
        config: bits and quantizers.
    """
    derived_buffers = ('relative_position_index', )
    relative_position_index: Tensor

    def __init__(self, source: WindowMSA, config: QuantConfig) -> None:
        super().__init__()
        self.embed_dims = source.embed_dims
        self.window_size = source.window_size
        self.num_heads = source.num_heads
        self.scale = source.scale
        self.relative_position_bias_table = source.relative_position_bias_table
        self.register_buffer('relative_position_index',
                             source.relative_position_index)
        self.qkv = QuantLinear(source.qkv, config, 'norm')
        self.query_key = QuantMatMul.of_query_key(config)
        self.softmax = source.softmax
        self.attn_drop = source.attn_drop
        self.attention_value = QuantMatMul.of_attention_value(config)
        self.proj = QuantLinear(source.proj, config, 'proj')
        self.proj_drop = source.proj_drop

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Compute the attention within windows.

        Args:
            x: shape (images * windows, N, C).
            mask: added to the attention, shape (windows, N, N).
        """
        num, length, channels = x.shape
        qkv = self.qkv(x).reshape(num, length, 3, self.num_heads,
                                  channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attn = self.query_key(query * self.scale, key.transpose(-2, -1))
        # Indexing gives the same values, but sums gradients in any order.
        bias = F.embedding(self.relative_position_index,
                           self.relative_position_bias_table)
        attn = attn + bias.permute(2, 0, 1)
        if mask is not None:
            attn = attn.view(-1, len(mask), *attn.shape[1:]) + mask[:, None]
            attn = attn.view(num, *attn.shape[2:])
        attn = self.attn_drop(self.softmax(attn))
        out = self.attention_value(attn, value)
        out = out.transpose(1, 2).reshape(num, length, channels)
        return self.proj_drop(self.proj(out))


class QuantShiftWindowMSA(BaseModule):
    """MMDetection's ``ShiftWindowMSA`` with a buffer for the padding value.

    MMDetection pads the normalised map with zeros. Stage 2 shifts and scales
    the normalised map, and with it the padding: this buffer, which is 0 until
    then.

    Args:
        source: float module, whose parameters are shared.
        config: bits and quantizers.

    Buffers:
        padding_value: shape (C,).
    """
    own_buffers = ('padding_value', )
    padding_value: Tensor

    def __init__(self, source: ShiftWindowMSA, config: QuantConfig) -> None:
        super().__init__()
        self.window_size = source.window_size
        self.shift_size = source.shift_size
        self.w_msa = QuantWindowMSA(source.w_msa, config)
        self.drop = source.drop
        self.register_buffer('padding_value',
                             torch.zeros(source.w_msa.embed_dims))

    def layout(self, size: Tuple[int, int]) -> WindowLayout:
        """Layout of a map of ``size`` (H, W)."""
        return window_layout(*size, self.window_size, self.shift_size)

    def forward(self, query: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """Compute the attention within the windows of normalised maps.

        Args:
            query: shape (images, H * W, C).
            hw_shape: (H, W).
        """
        layout = self.layout((hw_shape[0], hw_shape[1]))
        regions = layout.regions
        if regions is not None:
            regions = regions.to(query.device)
        windows = layout.cut(query, self.padding_value)
        out = self.w_msa(windows, region_mask(regions))
        return self.drop(layout.join(out))


class PatchEmbedItems(NamedTuple):
    """Patches (n, 3, p, p), and their indices in the map (n,)."""
    patches: Tensor
    positions: Tensor


class PatchEmbedUnit(Unit):
    """Patch embedding, its norm and the position embedding.

    The items are patches.
    """

    def __init__(self, backbone: SwinTransformer) -> None:
        super().__init__('patch_embed', backbone.patch_embed, PATCHES_PER_STEP)
        self.backbone = backbone

    def pairs(self) -> List[NormLinear]:
        return []

    def forward(self, state: State) -> State:
        x, size = self.module(state.x)
        if self.backbone.use_abs_pos_embed:
            x = x + self.backbone.absolute_pos_embed
        return State(x, size)

    def num_items(self, size: Tuple[int, int]) -> int:
        rows, columns = grid_size(size, self.module.projection.kernel_size)
        return rows * columns

    def gather(self, state: State, items: Tensor) -> PatchEmbedItems:
        # MMDetection's adaptive padding: zeros at the right and the bottom.
        patches = cut_patches(state.x, self.module.projection.kernel_size,
                              items)
        return PatchEmbedItems(patches, items)

    def gather_target(self, state: State, size: Tuple[int, int],
                      items: Tensor) -> Tensor:
        return state.x[0, items]

    def run(self, batch: PatchEmbedItems) -> Tensor:
        x = self.module.projection.run_patches(batch.patches)
        if self.module.norm is not None:
            x = self.module.norm(x)
        if self.backbone.use_abs_pos_embed:
            x = x + self.backbone.absolute_pos_embed[0, batch.positions]
        return x


class SwinBlockUnit(WindowUnit):
    """A Swin block; its items are windows."""

    def __init__(self, name: str, block: SwinBlock, batch: int) -> None:
        super().__init__(name, block, batch)

    def pairs(self) -> List[NormLinear]:
        block = self.module
        return [
            NormLinear(block.norm1, block.attn.w_msa.qkv, block.attn),
            NormLinear(block.norm2, block.ffn.layers[0][0])
        ]

    def last_layer(self) -> QuantLinear:
        return self.module.ffn.layers[1]

    def heads(self) -> List[Heads]:
        attn = self.module.attn.w_msa
        return [Heads(attn.qkv, attn.proj, attn.num_heads)]

    def forward(self, state: State) -> State:
        return State(self.module(state.x, state.size), state.size)

    def attention(self) -> QuantWindowMSA:
        return self.module.attn.w_msa

    def layout(self, size: Tuple[int, int]) -> WindowLayout:
        return self.module.attn.layout(size)

    def run(self, batch: WindowItems) -> Tensor:
        block, x = self.module, batch.tokens
        normed = torch.where(batch.inside[..., None], block.norm1(x),
                             block.attn.padding_value)
        x = x + block.attn.drop(
            block.attn.w_msa(normed, region_mask(batch.regions)))
        x = block.ffn(block.norm2(x), identity=x)
        return x[batch.inside]


class MergingItems(NamedTuple):
    """Concatenated tokens before the norm, shape (n, 4 * C)."""
    tokens: Tensor


class PatchMergingUnit(Unit):
    """Patch merging; its items are the merged tokens."""

    def __init__(self, name: str, merging: PatchMerging) -> None:
        super().__init__(name, merging, TOKENS_PER_STEP)

    def pairs(self) -> List[NormLinear]:
        if self.module.norm is None:
            return []
        return [NormLinear(self.module.norm, self.module.reduction)]

    def last_layer(self) -> QuantLinear:
        return self.module.reduction

    def forward(self, state: State) -> State:
        return State(*self.module(state.x, state.size))

    def num_items(self, size: Tuple[int, int]) -> int:
        rows, columns = self.module.sampler.stride
        return -(-size[0] // rows) * -(-size[1] // columns)

    def gather(self, state: State, items: Tensor) -> MergingItems:
        height, width = state.size
        down, right = self.module.sampler.stride
        rows, columns = self.module.sampler.kernel_size
        across = -(-width // right)
        row = (items // across)[:, None] * down + torch.arange(
            rows).repeat_interleave(columns)
        column = (items %
                  across)[:, None] * right + torch.arange(columns).repeat(rows)
        inside = (row < height) & (column < width)
        index = torch.where(inside, row * width + column, 0)
        tokens = state.x[0, index] * inside[..., None]
        # As in nn.Unfold, the channel is the first index.
        return MergingItems(tokens.transpose(1, 2).flatten(1))

    def gather_target(self, state: State, size: Tuple[int, int],
                      items: Tensor) -> Tensor:
        return state.x[0, items]

    def run(self, batch: MergingItems) -> Tensor:
        x = batch.tokens
        if self.module.norm is not None:
            x = self.module.norm(x)
        return self.module.reduction(x)


@MODELS.register_module()
class QuantSwinTransformer(SwinTransformer):
    """MMDetection's ``SwinTransformer`` with quantized layers.

    Until it is calibrated or loads a calibrated state, it equals the float
    class bit for bit and has the same keys of weights. The patch embedding,
    all linear layers, those of patch merging included, and both matrix
    products of the attention are quantized; norms and softmax stay in float.

    Args:
        *args: of ``SwinTransformer``.
        quant: a ``QuantConfig`` or its plain values.
        **kwargs: of ``SwinTransformer``.

    Attributes:
        native: runs the whole backbone where it can; None or where it cannot,
            its parts run one after another.
    """
    native: Optional[Any] = None

    def __init__(self,
                 *args: Any,
                 quant: Union[Mapping[str, Any], QuantConfig, None] = None,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = QuantConfig.make(quant)
        self.quant_config = config
        self.patch_embed.projection = QuantConv2d(self.patch_embed.projection,
                                                  config, config.input_bits)
        for stage in self.stages:
            for block in stage.blocks:
                block.attn = QuantShiftWindowMSA(block.attn, config)
                layers = block.ffn.layers
                layers[0][0] = QuantLinear(layers[0][0], config, 'norm')
                layers[1] = QuantLinear(layers[1], config, 'fc2')
            if stage.downsample is not None:
                stage.downsample.reduction = QuantLinear(
                    stage.downsample.reduction, config, 'norm')
        self._register_load_state_dict_pre_hook(refuse_packed)

    def forward(self, x: Tensor) -> List[Tensor]:
        """Maps of all stages in ``out_indices``, (images, C, H, W) each."""
        if self.native is not None:
            maps = self.native(self, x)
            if maps is not None:
                return maps
        return super().forward(x)

    def tokens(self, images: Tensor) -> State:
        """Tokens after the last block, before the output norms."""
        if self.native is not None:
            state = self.native.tokens(self, images)
            if state is not None:
                return state
        state = State(images, (images.shape[-2], images.shape[-1]))
        for unit in self.units():
            state = unit.forward(state)
        return state

    def units(self) -> List[Unit]:
        """The parts of the forward pass in order, without the output norms."""
        units: List[Unit] = [PatchEmbedUnit(self)]
        for i, stage in enumerate(self.stages):
            batch = WINDOWS_PER_STEP[min(i, len(WINDOWS_PER_STEP) - 1)]
            for j, block in enumerate(stage.blocks):
                units.append(
                    SwinBlockUnit(f'stages.{i}.blocks.{j}', block, batch))
            if stage.downsample is not None:
                units.append(
                    PatchMergingUnit(f'stages.{i}.downsample',
                                     stage.downsample))
        return units
