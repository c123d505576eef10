"""Transformer blocks and patch mergings, of their plans."""
from typing import Dict, Optional, Tuple

import numpy as np
import torch

from isvit_det.backbones.vit_layers import relative_table
from isvit_det.export.attention import centered, represent_probabilities
from isvit_det.export.graph import Graph
from isvit_det.export.layers import Target, linear, quantize
from isvit_det.export.windows import Layouts, Sizes
from isvit_det.plans.block import BlockPlan, NormPlan
from isvit_det.plans.layer import InputCodes
from isvit_det.plans.swin import MergingPlan

# Names of activations within a block, as the runtime's traces have them.
Trace = Dict[str, str]


class Writer:
    """Adds the parts of a backbone to a graph.

    Args:
        graph: gets the nodes.
        target: how products are written.
        trace: receives the names of the bytes within the last block, for
            tests.

    Attributes:
        layouts: of the maps of the graph.
    """

    def __init__(self,
                 graph: Graph,
                 target: Target,
                 trace: Optional[Trace] = None) -> None:
        self.graph = graph
        self.target = target
        self.layouts = Layouts(graph)
        self._trace: Trace = {} if trace is None else trace

    def norm(self, x: str, plan: NormPlan) -> str:
        """A LayerNorm over the last axis."""
        return self.graph.add(
            'LayerNormalization',
            x,
            self.graph.constant(plan.weight),
            self.graph.constant(plan.bias),
            epsilon=plan.eps)

    def block(self, x: str, plan: BlockPlan, size: Sizes) -> str:
        """A block.

        Args:
            x: tokens (1, N, C) in float.
            plan: describes the block.
            size: of the map.

        Returns:
            Tokens of the same shape.
        """
        graph = self.graph
        codes = self._kept(
            'qkv_input',
            quantize(graph, self.norm(x, plan.norm1), plan.query.input))
        windows = None
        if plan.window:
            windows = self.layouts.windows(size, plan.window, plan.shift)
            padding = graph.constant(plan.padding[None, None], np.uint8)
            codes = graph.add('Concat', codes, padding, axis=1)
            codes = graph.add('Gather', codes, windows.tokens, axis=1)
        attended = self._attention(codes, plan, size, windows and windows.mask)
        if windows is not None:
            attended = graph.add('Gather', attended, windows.inverse, axis=1)
        attended = self._kept('proj_input', attended)
        x = graph.add('Add', x, self._linear('proj', attended, plan))
        codes = quantize(graph, self.norm(x, plan.norm2), plan.fc1.input)
        hidden = self._linear('fc1', self._kept('fc1_input', codes), plan)
        codes = quantize(graph, graph.add('Gelu', hidden), plan.fc2.input)
        return graph.add(
            'Add', x, self._linear('fc2', self._kept('fc2_input', codes),
                                   plan))

    def _kept(self, name: str, codes: str) -> str:
        self._trace[name] = codes
        return codes

    def _linear(self, name: str, codes: str, plan: BlockPlan) -> str:
        return linear(self.graph, plan.names[name], codes, getattr(plan, name),
                      self.target)

    def _attention(self, codes: str, plan: BlockPlan, size: Sizes,
                   mask: Optional[str]) -> str:
        """Inputs of query, key and value to the projection's, in bytes, of
        the same shape (1, windows * N, C)."""
        graph = self.graph
        positions = plan.window**2 or -1
        channels = len(plan.query.weight)
        split = (positions and -1 if plan.window else 1, positions, plan.heads,
                 channels // plan.heads)

        def product(layer: str, codes_of: InputCodes) -> Tuple[str, str]:
            y = linear(graph, plan.names['qkv'], codes, getattr(plan, layer),
                       self.target)
            made = self._kept(layer, quantize(graph, y, codes_of))
            made = graph.reshape(made, split)
            return y, graph.add('Transpose', made, perm=(0, 2, 1, 3))

        y, query = product('query', plan.query_codes)
        _, key = product('key', plan.key_codes)
        _, value = product('value', plan.value_codes)
        key = graph.add('Transpose', key, perm=(0, 1, 3, 2))
        logits = graph.add('MatMul',
                           centered(graph, query, plan.query_codes.zero_point),
                           centered(graph, key, plan.key_center))
        logits = graph.add('Mul', logits, graph.constant(plan.logit_scale))
        if plan.position_bias is not None:
            logits = graph.add('Add', logits,
                               graph.constant(plan.position_bias[None]))
        if plan.relative_positions is not None:
            y = graph.add('Transpose', graph.reshape(y, split),
                          perm=(0, 2, 1, 3))  # yapf: disable
            logits = graph.add('Add', logits,
                               self._relative_bias(y, plan, size))
        if mask is not None:
            logits = graph.add('Add', logits, mask)
        weights = represent_probabilities(
            graph, graph.add('Softmax', logits, axis=-1), plan.attention)
        out = graph.add('MatMul', self._kept('attention', weights),
                        centered(graph, value, plan.value_codes.zero_point))
        out = graph.add('Mul', out, graph.constant(plan.value_codes.scale))
        codes = quantize(graph, out, plan.proj.input)
        codes = graph.add('Transpose', codes, perm=(0, 2, 1, 3))
        return graph.reshape(codes, (1, -1, channels))

    def _relative_bias(self, query: str, plan: BlockPlan, size: Sizes) -> str:
        """Decomposed relative positions (1 or windows, heads, N, N).

        Args:
            query: in float, shape (1 or windows, heads, N, C / heads).
            plan: describes the block.
            size: of the map, which is known.
        """
        graph = self.graph
        height, width = (plan.window, ) * 2 if plan.window else size
        assert isinstance(height, int) and isinstance(width, int)
        assert plan.relative_positions is not None
        depth = len(plan.query.weight) // plan.heads
        first = -1 if plan.window else 1
        down, across = (relative_table(table, length).transpose(
            1, 2) for table, length in zip(plan.relative_positions, (height,
                                                                     width)))
        by_row = graph.reshape(query, (-1, height, width, depth))
        by_column = graph.add('Transpose', by_row, perm=(0, 2, 1, 3))
        by_row = graph.add('MatMul', by_row, graph.constant(down[None]))
        by_column = graph.add('MatMul', by_column,
                              graph.constant(across[None]))
        by_column = graph.add('Transpose', by_column, perm=(0, 2, 1, 3))
        by_row = graph.reshape(by_row, (-1, height * width, height, 1))
        by_column = graph.reshape(by_column, (-1, height * width, 1, width))
        tokens = height * width
        return graph.reshape(
            graph.add('Add', by_row, by_column),
            (first, plan.heads, tokens, tokens))

    def merging(self, x: str, plan: MergingPlan,
                size: Sizes) -> Tuple[str, Sizes]:
        """A patch merging named ``reduction``: tokens (1, N, C), and the size
        of the map, to those of the merged map."""
        graph = self.graph
        outputs, inputs = plan.reduction.weight.shape
        parts = plan.kernel[0] * plan.kernel[1]
        index, merged = self.layouts.merging(size, plan)
        nothing = graph.constant(torch.zeros(1, 1, inputs // parts))
        x = graph.add('Concat', x, nothing, axis=1)
        x = graph.add('Gather', x, index, axis=1)
        x = self.norm(graph.reshape(x, (1, -1, inputs)), plan.norm)
        codes = quantize(graph, x, plan.reduction.input)
        return linear(graph, 'reduction', codes, plan.reduction,
                      self.target), merged

    def map_of(self, tokens: str, size: Sizes, channels: int) -> str:
        """Tokens (1, H * W, C) as a map (1, C, H, W)."""
        graph = self.graph
        height, width = size
        if isinstance(height, int) and isinstance(width, int):
            shape = graph.constant([1, height, width, channels], np.int64)
        else:
            shape = graph.add(
                'Concat',
                graph.constant([1], np.int64),
                graph.reshape(str(height), [1]),
                graph.reshape(str(width), [1]),
                graph.constant([channels], np.int64),
                axis=0)
        x = graph.add('Reshape', tokens, shape)
        return graph.add('Transpose', x, perm=(0, 3, 1, 2))
