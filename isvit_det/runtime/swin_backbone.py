"""The forward pass of a Swin backbone with its blocks on the kernels."""
from typing import Any, Iterator, List, Optional

from mmdet.models.backbones.swin import SwinBlock, SwinBlockSequence
from mmdet.models.layers import PatchMerging
from torch import Tensor

from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.core.units import State
from isvit_det.runtime.blocks import NativeBlock, NativeMerging
from isvit_det.runtime.calls import is_hooked, is_plain_input
from isvit_det.runtime.native import Isa
from isvit_det.runtime.parts import NativeParts, Part
from isvit_det.runtime.swin_plan import plan_merging, plan_swin_block


class SwinForward(NativeParts):
    """Runs a calibrated backbone natively.

    What cannot be run natively runs by its own module in between.
    """

    def __call__(self, backbone: QuantSwinTransformer,
                 x: Tensor) -> Optional[List[Tensor]]:
        """The backbone's outputs, or None where all of it is simulated."""
        isa = self._isa(backbone, x)
        if isa is None:
            return None
        outs = []
        for i, (x, size) in enumerate(self._stages(backbone, x, isa)):
            if i in backbone.out_indices:
                out = getattr(backbone, f'norm{i}')(x)
                out = out.view(-1, *size, backbone.num_features[i])
                outs.append(out.permute(0, 3, 1, 2).contiguous())
        return outs

    def tokens(self, backbone: QuantSwinTransformer,
               x: Tensor) -> Optional[State]:
        """The tokens after the last block, or None likewise."""
        isa = self._isa(backbone, x)
        if isa is None:
            return None
        *_, last = self._stages(backbone, x, isa)
        return last

    def parts(self, backbone: Any) -> List[Part]:
        parts = []
        for i, stage in enumerate(backbone.stages):
            parts += [
                Part(f'{i}.{j}', block, _block)
                for j, block in enumerate(stage.blocks)
            ]
            if stage.downsample is not None:
                parts.append(_merging_of(i, stage.downsample))
        return parts

    def obstacle(self, backbone: Any) -> str:
        for i, stage in enumerate(backbone.stages):
            if type(stage) is not SwinBlockSequence or is_hooked(stage):
                return f'stages.{i} is of another class or has forward hooks'
        return ''

    def _isa(self, backbone: QuantSwinTransformer, x: Tensor) -> Optional[Isa]:
        if (backbone.training or not is_plain_input(x)
                or self.obstacle(backbone)):
            return None
        return self.runtime.choose().isa

    def _stages(self, backbone: QuantSwinTransformer, x: Tensor,
                isa: Isa) -> Iterator[State]:
        """The map after the blocks of every stage.

        It is replaced in place once the next is asked for.
        """
        x, size = backbone.patch_embed(x)
        if backbone.use_abs_pos_embed:
            x = x + backbone.absolute_pos_embed
        x = backbone.drop_after_pos(x)
        for i, stage in enumerate(backbone.stages):
            for j, block in enumerate(stage.blocks):
                native = self.prepare(Part(f'{i}.{j}', block, _block), isa)
                if native is None:
                    x = block(x, size)
                else:
                    # Only the blocks know the map: it is replaced in place.
                    x = x.contiguous()
                    x = native(x, size, x)
            yield State(x, size)
            if stage.downsample is not None:
                native = self.prepare(_merging_of(i, stage.downsample), isa)
                if native is None:
                    x, size = stage.downsample(x, size)
                else:
                    x, size = native(x.contiguous(), size)


def _block(block: SwinBlock, isa: Isa) -> NativeBlock:
    return NativeBlock(plan_swin_block(block), isa)


def _merging_of(stage: int, merging: PatchMerging) -> Part:
    return Part(f'{stage}', merging, _merging)


def _merging(merging: PatchMerging, isa: Isa) -> NativeMerging:
    return NativeMerging(plan_merging(merging), isa)
