"""Quantized ViT and DeiT, and their units."""
import itertools
import math
from typing import (Any, Dict, List, Mapping, NamedTuple, Optional, Sequence,
                    Tuple, Union)

import torch
from torch import Tensor, nn

from isvit_det.backbones.layout import (WindowItems, WindowLayout, WindowUnit,
                                        cut_patches, grid_size)
from isvit_det.backbones.vit import DeiT, VisionTransformer
from isvit_det.core.layers import QuantConv2d, QuantLinear, QuantMatMul
from isvit_det.core.reparam import NormLinear
from isvit_det.core.rotation import Heads
from isvit_det.core.settings import QuantConfig
from isvit_det.core.units import State, Unit
from isvit_det.packed.loading import refuse_packed
from isvit_det.registry import MODELS

# Size of a minibatch of the reconstruction: patches for the embedding, tokens
# for a block (in whole windows, at least one), and query rows of one image.
PATCHES_PER_STEP = 4096
TOKENS_PER_STEP = 1600
ROWS_PER_IMAGE = 64


class PatchItems(NamedTuple):
    """Patches (n, 3, p, p), and the position embeddings of these (n, C)."""
    patches: Tensor
    positions: Tensor


class PatchEmbedUnit(Unit):
    """Patch embedding and position embedding; its items are patches."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__('patch_embed', backbone.patch_embed, PATCHES_PER_STEP)
        self.backbone = backbone
        # By the size of the map. No unit optimises the position embedding.
        self._positions: Dict[Tuple[int, int], Tensor] = {}

    def pairs(self) -> List[NormLinear]:
        return []

    def forward(self, state: State) -> State:
        return self.backbone.embed(state.x)

    def _grid(self, size: Tuple[int, int]) -> Tuple[int, int]:
        return grid_size(size, self.module.patch)

    def num_items(self, size: Tuple[int, int]) -> int:
        return math.prod(self._grid(size))

    def gather(self, state: State, items: Tensor) -> PatchItems:
        grid = self._grid(state.size)
        if grid not in self._positions:
            positions = self.backbone.positions(grid)[0].detach().cpu()
            self._positions[grid] = positions[self.backbone.num_prefix_tokens:]
        return PatchItems(
            cut_patches(state.x, self.module.patch, items),
            self._positions[grid][items])

    def gather_target(self, state: State, size: Tuple[int, int],
                      items: Tensor) -> Tensor:
        return state.x[0, self.backbone.num_prefix_tokens + items]

    def run(self, batch: PatchItems) -> Tensor:
        return self.module.proj.run_patches(batch.patches) + batch.positions


class BlockUnit(Unit):
    """A transformer block, the base of the two kinds of attention."""

    def pairs(self) -> List[NormLinear]:
        block = self.module
        return [
            NormLinear(block.norm1, block.attn.qkv,
                       block if block.window_size else None),
            NormLinear(block.norm2, block.mlp.fc1)
        ]

    def last_layer(self) -> Optional[QuantLinear]:
        # With layer scale, the output of fc2 is not added as it is.
        has_scale = not isinstance(self.module.ls2, nn.Identity)
        return None if has_scale else self.module.mlp.fc2

    def heads(self) -> List[Heads]:
        attn = self.module.attn
        tables = (attn.rel_pos_h, attn.rel_pos_w) if attn.has_rel_pos else ()
        return [Heads(attn.qkv, attn.proj, attn.num_heads, tables)]

    def forward(self, state: State) -> State:
        return State(self.module(state.x, state.size), state.size)


class WindowBlockUnit(BlockUnit, WindowUnit):
    """A block with windowed attention; its items are windows."""

    def __init__(self, name: str, block: Any) -> None:
        super().__init__(name, block,
                         max(1, TOKENS_PER_STEP // block.window_size**2))

    def attention(self) -> Any:
        return self.module.attn

    def layout(self, size: Tuple[int, int]) -> WindowLayout:
        return self.module.layout(size)

    def run(self, batch: WindowItems) -> Tensor:
        block, x = self.module, batch.tokens
        normed = torch.where(batch.inside[..., None], block.norm1(x),
                             block.padding_value)
        side = block.window_size
        return block.finish(x, block.attn(normed, (side, side)))[batch.inside]


class QueryItems(NamedTuple):
    """Query rows of images of equal size.

    Attributes:
        tokens: all tokens of the images, shape (B, N, C).
        rows: indices of the tokens that are queries, shape (B, n).
        size: (H, W) of the maps.
    """
    tokens: Tensor
    rows: Tensor
    size: Tuple[int, int]


class GlobalBlockUnit(BlockUnit):
    """A block with global attention; its items are the query rows of patches.

    The rows of prefix tokens are added to every minibatch. Keys and values
    are computed for the whole image, so several rows of an image are drawn at
    once.
    """

    def __init__(self, name: str, block: Any, num_prefix_tokens: int) -> None:
        super().__init__(
            name, block, TOKENS_PER_STEP, items_per_image=ROWS_PER_IMAGE)
        self.num_prefix_tokens = num_prefix_tokens

    def num_items(self, size: Tuple[int, int]) -> int:
        return math.prod(size)

    def _rows(self, items: Tensor) -> Tensor:
        prefix = torch.arange(self.num_prefix_tokens, device=items.device)
        return torch.cat([prefix, items + self.num_prefix_tokens])

    def gather(self, state: State, items: Tensor) -> Tuple[QueryItems, ...]:
        return (QueryItems(state.x, self._rows(items)[None], state.size), )

    def collate(
            self, batches: Sequence[Tuple[QueryItems,
                                          ...]]) -> Tuple[QueryItems, ...]:
        """Stack consecutive images of equal size; the order stays."""
        items = itertools.chain.from_iterable(batches)
        groups = itertools.groupby(items, lambda i: (i.size, i.rows.shape))
        joined = []
        for (size, _), group in groups:
            tokens, rows, _ = zip(*group)
            joined.append(QueryItems(torch.cat(tokens), torch.cat(rows), size))
        return tuple(joined)

    def gather_target(self, state: State, size: Tuple[int, int],
                      items: Tensor) -> Tensor:
        return state.x[0, self._rows(items)]

    def run(self, batch: Tuple[QueryItems, ...]) -> Tensor:
        return torch.cat([self._run_rows(*group) for group in batch])

    def _run_rows(self, tokens: Tensor, rows: Tensor,
                  size: Tuple[int, int]) -> Tensor:
        block = self.module
        attended = block.attn(block.norm1(tokens), size, rows)
        x = tokens.gather(1, rows[..., None].expand_as(attended))
        return block.finish(x, attended).flatten(0, 1)


def _quantize_block_(block: Any, config: QuantConfig) -> None:
    """Replace the linear layers and matrix products of a block."""
    attn = block.attn
    attn.qkv = QuantLinear(attn.qkv, config, 'norm')
    attn.query_key = QuantMatMul.of_query_key(config)
    attn.attention_value = QuantMatMul.of_attention_value(config)
    attn.proj = QuantLinear(attn.proj, config, 'proj')
    block.mlp.fc1 = QuantLinear(block.mlp.fc1, config, 'norm')
    block.mlp.fc2 = QuantLinear(block.mlp.fc2, config, 'fc2')
    if block.window_size:
        # Stage 2 changes it, so it becomes part of the state dict.
        block.register_buffer('padding_value', block.padding_value)
        block.own_buffers = ('padding_value', )


@MODELS.register_module()
class QuantVisionTransformer(VisionTransformer):
    """``VisionTransformer`` with quantized layers.

    Until it is calibrated or loads a calibrated state, it equals the float
    class bit for bit and has the same keys of weights. The patch embedding,
    the linear layers and both matrix products of the attention are quantized;
    norms, softmax and relative positions stay in float.

    Args:
        *args: of ``VisionTransformer``.
        quant: a ``QuantConfig`` or its plain values.
        **kwargs: of ``VisionTransformer``.

    Attributes:
        native: runs the blocks where it can; None or where it cannot, they
            run by their own modules.
    """
    native: Optional[Any] = None

    def __init__(self,
                 *args: Any,
                 quant: Union[Mapping[str, Any], QuantConfig, None] = None,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = QuantConfig.make(quant)
        self.quant_config = config
        self.patch_embed.proj = QuantConv2d(self.patch_embed.proj, config,
                                            config.input_bits)
        for block in self.blocks:
            _quantize_block_(block, config)
        self._freeze_()
        self._register_load_state_dict_pre_hook(refuse_packed)

    def tokens(self, images: Tensor) -> State:
        if self.native is not None:
            state = self.native.tokens(self, images)
            if state is not None:
                return state
        return super().tokens(images)

    def units(self) -> List[Unit]:
        """The parts of the forward pass in order, without the final norm."""
        units: List[Unit] = [PatchEmbedUnit(self)]
        for index, block in enumerate(self.blocks):
            name = f'blocks.{index}'
            if block.window_size:
                units.append(WindowBlockUnit(name, block))
            else:
                units.append(
                    GlobalBlockUnit(name, block, self.num_prefix_tokens))
        return units


@MODELS.register_module()
class QuantDeiT(QuantVisionTransformer, DeiT):
    """``DeiT`` with quantized layers; see ``QuantVisionTransformer``."""
