"""Forward pass of a ViT backbone with native blocks."""
from typing import Any, List, Optional

from torch import Tensor

from isvit_det.backbones.quant_vit import QuantVisionTransformer
from isvit_det.backbones.vit_layers import Block
from isvit_det.core.units import State
from isvit_det.plans.vit import plan_vit_block
from isvit_det.runtime.blocks import NativeBlock
from isvit_det.runtime.calls import is_plain_input
from isvit_det.runtime.native import Isa
from isvit_det.runtime.parts import NativeParts, Part


class VitForward(NativeParts):
    """Runs the blocks of a calibrated backbone natively.

    Blocks that the kernels cannot run, run by their own forward in between.
    """

    def tokens(self, backbone: QuantVisionTransformer,
               images: Tensor) -> Optional[State]:
        """The tokens after the last block; None if the backbone has to run
        by its own forward."""
        if backbone.training or not is_plain_input(images):
            return None
        isa = self.runtime.choose().isa
        if isa is None:
            return None
        x, size = backbone.embed(images)
        for part in self.parts(backbone):
            native = self.prepare(part, isa)
            if native is None:
                x = part.module(x, size)
            else:
                # Nothing else refers to the map, so it may be overwritten.
                x = x.contiguous()
                x = native(x, size, x)
        return State(x, size)

    def parts(self, backbone: Any) -> List[Part]:
        return [
            Part(f'{index}', block, _block)
            for index, block in enumerate(backbone.blocks)
        ]

    def obstacle(self, backbone: Any) -> str:
        return ''


def _block(block: Block, isa: Isa) -> NativeBlock:
    return NativeBlock(plan_vit_block(block), isa)
