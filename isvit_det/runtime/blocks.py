"""Transformer blocks and patch mergings on the native kernels.

The structures mirror those of csrc/blocks.h.
"""
import ctypes
import functools
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from isvit_det.plans.block import BlockPlan, NormPlan
from isvit_det.plans.layer import InputCodes, LayerPlan, Unsupported
from isvit_det.plans.swin import MergingPlan, merged_tokens
from isvit_det.runtime.native import (INT, LONG, POINTER, Isa, Product,
                                      Quantizer, StepTree, kernel,
                                      product_structure, quantizer_structure,
                                      steps_structure)
from isvit_det.runtime.packing import BLOCK, operand_runs, pack_layer
from isvit_det.runtime.steps import Steps, attention_steps
from isvit_det.runtime.windows import Windows, find_windows, make_bias

FLOAT = ctypes.c_float
# Most channels of a head that the kernels have memory for.
MAX_HEAD = 256


class _Norm(ctypes.Structure):
    _fields_ = [('weight', POINTER), ('bias', POINTER), ('eps', FLOAT),
                ('channels', INT)]


class _Block(ctypes.Structure):
    _fields_ = [(name, INT) for name in ('channels', 'heads', 'hidden')]
    _fields_ += [(name, _Norm) for name in ('norm1', 'norm2')]
    _fields_ += [
        (name, Quantizer)
        for name in ('qkv_input', 'query_codes', 'key_codes', 'value_codes',
                     'proj_input', 'fc1_input', 'fc2_input')
    ]
    _fields_ += [(name, Product)
                 for name in ('query', 'key', 'value', 'proj', 'fc1', 'fc2')]
    _fields_ += [('padding', POINTER), ('key_center', INT), ('key_bytes', INT),
                 ('key_runs', POINTER), ('num_key_runs', INT),
                 ('logit_scale', FLOAT), ('value_scale', FLOAT),
                 ('attention', StepTree)]


class _Windows(ctypes.Structure):
    _fields_ = [('images', INT), ('tokens', INT), ('windows', INT),
                ('positions', INT), ('token', POINTER), ('region', POINTER),
                ('position_bias', POINTER), ('bias_head', LONG),
                ('bias_query', LONG), ('relative_rows', POINTER),
                ('relative_columns', POINTER), ('height', INT), ('width', INT)]


# Activations within a block that a trace records, for tests.
TRACED = ('qkv_input', 'query', 'key', 'value', 'proj_input', 'fc1_input',
          'fc2_input', 'attention')


class _Trace(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in TRACED]


class _Merging(ctypes.Structure):
    _fields_ = [('norm', _Norm), ('input', Quantizer), ('reduction', Product)]


class _Merged(ctypes.Structure):
    _fields_ = [('images', INT), ('tokens', INT), ('rows', INT),
                ('parts', INT), ('token', POINTER)]


class _Builder:
    """Creates structures, and keeps alive the tensors they point to."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.kept: List[Any] = []

    def keep(self, tensor: Tensor) -> int:
        """Address of a contiguous tensor, which is kept alive."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def norm(self, norm: NormPlan) -> _Norm:
        return _Norm(
            self.keep(norm.weight), self.keep(norm.bias), norm.eps,
            len(norm.weight))

    def quantizer(self, codes: InputCodes, is_gelu: bool = False) -> Quantizer:
        structure, kept = quantizer_structure(codes, is_gelu)
        self.kept.append(kept)
        return structure

    def product(self, layer: LayerPlan) -> Product:
        weights = pack_layer(layer, wide_lanes=self.isa.wide_lanes)
        self.kept.append(weights)
        return product_structure(weights)

    def steps(self, steps: Steps) -> StepTree:
        self.kept.append(steps)
        return steps_structure(steps)


def _address(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


class NativeBlock:
    """Native form of a calibrated transformer block in eval mode.

    Args:
        plan: describes the block.
        isa: kernels to use.

    Raises:
        Unsupported: if the kernels cannot run the block, with the reason.
    """

    def __init__(self, plan: BlockPlan, isa: Isa) -> None:
        channels = len(plan.query.weight)
        width = channels // plan.heads
        if channels % BLOCK or width % 4 or width > MAX_HEAD:
            raise Unsupported(
                f'it has {channels} channels and {width} per head; supported '
                f'are multiples of {BLOCK}, and heads of multiples of 4 up to '
                f'{MAX_HEAD}')
        self.isa = isa
        self.plan = plan
        self.hidden = len(plan.fc1.weight)
        self._bias_of = functools.lru_cache(maxsize=64)(
            functools.partial(make_bias, plan))
        center = plan.key_center
        runs, key_bytes = operand_runs(width, plan.query_codes.top, -center,
                                       plan.key_codes.top - center,
                                       isa.wide_lanes)
        self._builder = make = _Builder(isa)
        self._structure = _Block(channels, plan.heads, self.hidden,
                                 make.norm(plan.norm1), make.norm(plan.norm2),
                                 make.quantizer(plan.query.input),
                                 make.quantizer(plan.query_codes),
                                 make.quantizer(plan.key_codes),
                                 make.quantizer(plan.value_codes),
                                 make.quantizer(plan.proj.input),
                                 make.quantizer(plan.fc1.input),
                                 make.quantizer(plan.fc2.input, is_gelu=True),
                                 make.product(plan.query),
                                 make.product(plan.key),
                                 make.product(plan.value),
                                 make.product(plan.proj),
                                 make.product(plan.fc1),
                                 make.product(plan.fc2),
                                 make.keep(plan.padding), center, key_bytes,
                                 make.keep(runs), len(runs), plan.logit_scale,
                                 plan.value_codes.scale,
                                 make.steps(attention_steps(plan.attention)))

    def __call__(self,
                 x: Tensor,
                 size: Tuple[int, int],
                 out: Optional[Tensor] = None,
                 trace: Optional[Dict[str, Tensor]] = None) -> Tensor:
        """Run the block.

        Args:
            x: float32, shape (images, tokens, C), contiguous. The tokens of
                the map may follow prefix tokens if attention is global.
            size: (H, W) of the map.
            out: receives the output; may be ``x``.
            trace: receives the codes within the block, and the decoded
                attention, by their names in ``TRACED``.

        Returns:
            The output, of the shape of ``x``.
        """
        images, tokens, _ = x.shape
        windows = find_windows(self.plan.window, self.plan.shift, size, tokens)
        bias = self._bias_of(windows.token.shape[1], windows.size)
        heads, queries, _ = bias.added.shape
        structure = _Windows(images, tokens, *windows.token.shape,
                             windows.token.data_ptr(),
                             _address(windows.region), bias.added.data_ptr(),
                             bias.added.stride(0) if heads > 1 else 0,
                             bias.added.stride(1) if queries > 1 else 0,
                             _address(bias.rows), _address(bias.columns),
                             *windows.size)
        if out is None:
            out = torch.empty_like(x)
        kept: Dict[str, Tensor] = {}
        if trace is not None:
            kept = self._new_trace(x, windows)
        kernel(self.isa, 'run_block')(
            ctypes.byref(self._structure), ctypes.byref(structure),
            POINTER(x.data_ptr()), POINTER(out.data_ptr()),
            ctypes.byref(_Trace(*(_address(kept.get(n)) for n in TRACED))))
        if trace is not None:
            trace.update(self._by_token(kept, windows, x.shape))
        return out

    def _new_trace(self, x: Tensor, windows: Windows) -> Dict[str, Tensor]:
        number, positions = windows.token.shape
        rows = (len(x) * number, positions)
        size = len(x) * number * positions * x.shape[2]
        # Kernels read whole vectors: beyond the end where heads are narrow.
        kept = {
            name:
            x.new_zeros(size + BLOCK,
                        dtype=torch.uint8)[:size].view(*rows, x.shape[2])
            for name in TRACED
        }
        filled = -(-self.hidden // BLOCK) * BLOCK
        kept['fc2_input'] = x.new_zeros((*rows, filled), dtype=torch.uint8)
        columns = -(-positions // BLOCK) * BLOCK
        kept['attention'] = x.new_zeros(rows[0], self.plan.heads, positions,
                                        columns)
        return kept

    def _by_token(self, kept: Dict[str, Tensor], windows: Windows,
                  shape: Tuple[int, ...]) -> Dict[str, Tensor]:
        """A trace whose layer inputs are in the order of the map's tokens."""
        images, tokens, _ = shape
        place = windows.token.flatten().argsort(stable=True)[:tokens]
        for name in ('qkv_input', 'proj_input', 'fc1_input', 'fc2_input'):
            rows = kept[name].view(images, -1, kept[name].shape[-1])
            kept[name] = rows[:, place]
        kept['fc2_input'] = kept['fc2_input'][..., :self.hidden]
        kept['attention'] = kept['attention'][..., :windows.token.shape[1]]
        return kept


class NativeMerging:
    """Native form of a calibrated ``PatchMerging`` in eval mode.

    Args:
        plan: describes the patch merging.
        isa: kernels to use.

    Raises:
        Unsupported: if the kernels cannot run it, with the reason.
    """

    def __init__(self, plan: MergingPlan, isa: Isa) -> None:
        outputs, inputs = plan.reduction.weight.shape
        if inputs % BLOCK or outputs % BLOCK:
            raise Unsupported(f'it has {inputs} inputs and {outputs} outputs; '
                              f'supported are multiples of {BLOCK}')
        self.isa = isa
        self.plan = plan
        self._builder = make = _Builder(isa)
        self._structure = _Merging(
            make.norm(plan.norm), make.quantizer(plan.reduction.input),
            make.product(plan.reduction))

    def __call__(self, x: Tensor,
                 size: Tuple[int, int]) -> Tuple[Tensor, Tuple[int, int]]:
        """Merge the patches of a map.

        Args:
            x: float32, shape (images, H * W, C), contiguous.
            size: (H, W) of the map.

        Returns:
            The merged map, shape (images, H' * W', outputs), and (H', W').
        """
        plan = self.plan
        token, merged_size = merged_tokens(size, plan.kernel, plan.stride)
        images, tokens, _ = x.shape
        merged = _Merged(images, tokens, *token.shape, token.data_ptr())
        out = x.new_empty(images, len(token), len(plan.reduction.weight))
        kernel(self.isa, 'run_merging')(ctypes.byref(self._structure),
                                        ctypes.byref(merged),
                                        POINTER(x.data_ptr()),
                                        POINTER(out.data_ptr()))
        return out, merged_size
