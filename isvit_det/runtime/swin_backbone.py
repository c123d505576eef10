"""Forward pass of a Swin backbone with native blocks and patch mergings."""
from typing import Any, Iterator, List, Optional

from mmdet.models.backbones.swin import SwinBlock, SwinBlockSequence
from mmdet.models.layers import PatchMerging
from torch import Tensor

from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.core.units import State
from isvit_det.plans.swin import plan_merging, plan_swin_block
from isvit_det.runtime.blocks import NativeBlock, NativeMerging
from isvit_det.runtime.calls import is_hooked, is_plain_input
from isvit_det.runtime.native import Isa
from isvit_det.runtime.parts import NativeParts, Part


class SwinForward(NativeParts):
    """Runs the blocks and patch mergings of a calibrated backbone natively.

    All other modules, and blocks that the kernels cannot run, run by their own
    forward in between.
    """

    def __call__(self, backbone: QuantSwinTransformer,
                 x: Tensor) -> Optional[List[Tensor]]:
        """The backbone's outputs; None if it has to run by its own forward."""
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
        """The tokens after the last block; None if the backbone has to run
        by its own forward."""
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
        """Yield the map after the blocks of each stage.

        A map is valid only until the next one is requested, which may
        overwrite it.
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
                    # Nothing else refers to the map, so it may be overwritten.
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
