"""The forward pass of a Swin backbone with its blocks on the kernels."""
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from mmdet.models.backbones.swin import SwinBlock, SwinBlockSequence
from mmdet.models.layers import PatchMerging
from torch import Tensor, nn

from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.core.quantizers import Quantizer
from isvit_det.runtime.calls import Kept, is_hooked, is_plain_input, obstacle
from isvit_det.runtime.native import Isa
from isvit_det.runtime.plan import Unsupported
from isvit_det.runtime.swin import NativeMerging, NativeSwinBlock

Part = Union[SwinBlock, PatchMerging]
Size = Tuple[int, int]


class SwinForward:
    """Runs a calibrated backbone natively; can be copied and pickled.

    What cannot be run natively runs by its own module in between.

    Args:
        runtime: asked at every forward which kernels to use.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self._parts: Dict[str, Kept] = {}

    def __getstate__(self) -> Dict[str, Any]:
        # What was prepared is made anew.
        return dict(runtime=self.runtime, _parts={})

    def __call__(self, backbone: QuantSwinTransformer,
                 x: Tensor) -> Optional[List[Tensor]]:
        """The backbone's outputs, or None where all of it is simulated."""
        if backbone.training or not is_plain_input(x):
            return None
        if any(
                type(stage) is not SwinBlockSequence or is_hooked(stage)
                for stage in backbone.stages):
            return None
        isa = self.runtime.choose().isa
        if isa is None:
            return None
        x, size = backbone.patch_embed(x)
        if backbone.use_abs_pos_embed:
            x = x + backbone.absolute_pos_embed
        x = backbone.drop_after_pos(x)
        outs = []
        for i, stage in enumerate(backbone.stages):
            for j, block in enumerate(stage.blocks):
                x = self._run_block(f'{i}.{j}', block, x, size, isa)
            if i in backbone.out_indices:
                out = getattr(backbone, f'norm{i}')(x)
                out = out.view(-1, *size, backbone.num_features[i])
                outs.append(out.permute(0, 3, 1, 2).contiguous())
            if stage.downsample is not None:
                x, size = self._merge(f'{i}', stage.downsample, x, size, isa)
        return outs

    def _run_block(self, name: str, block: SwinBlock, x: Tensor, size: Size,
                   isa: Isa) -> Tensor:
        native = self._prepare(name, block, isa)
        if not isinstance(native, NativeSwinBlock):
            return block(x, size)
        _count_calls(block)
        # Only the blocks know the map: it is replaced in place.
        x = x.contiguous()
        return native(x, size, x)

    def _merge(self, name: str, merging: PatchMerging, x: Tensor, size: Size,
               isa: Isa) -> Tuple[Tensor, Size]:
        native = self._prepare(name, merging, isa)
        if not isinstance(native, NativeMerging):
            return merging(x, size)
        _count_calls(merging)
        return native(x.contiguous(), size)

    def describe(self, backbone: QuantSwinTransformer,
                 isa: Isa) -> Dict[nn.Module, str]:
        """Why each block and merging does not run as a whole; '' if it does.

        They are prepared for it.
        """
        found: Dict[nn.Module, str] = {}
        for i, stage in enumerate(backbone.stages):
            whole = type(stage) is SwinBlockSequence and not is_hooked(stage)
            parts = {f'{i}.{j}': block for j, block in enumerate(stage.blocks)}
            if stage.downsample is not None:
                parts[f'{i}'] = stage.downsample
            for name, part in parts.items():
                made = self._prepare(name, part, isa)
                found[part] = made if isinstance(made, str) else ''
                if not whole:
                    found[part] = 'its stage is another class or has hooks'
        return found

    def _prepare(self, name: str, part: Part,
                 isa: Isa) -> Union[NativeSwinBlock, NativeMerging, str]:
        """A part as it is now, or why it cannot be run as a whole."""
        reason = obstacle(part)
        if reason:
            return reason

        def make() -> Union[NativeSwinBlock, NativeMerging, str]:
            try:
                if isinstance(part, SwinBlock):
                    return NativeSwinBlock(part, isa)
                return NativeMerging(part, isa)
            except Unsupported as error:
                return str(error)

        kept = self._parts.setdefault(name, Kept())
        return kept.get(list(_tensors_of(part)), make, isa)


def _tensors_of(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _count_calls(part: nn.Module) -> None:
    """Every quantizer of a part has run."""
    for module in part.modules():
        if isinstance(module, Quantizer):
            module.num_calls += 1
