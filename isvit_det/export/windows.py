"""Windows and merged patches as indices of tokens.

For a fixed size of images the indices are constants; otherwise the graph
computes them from the size.
"""
from typing import Dict, NamedTuple, Optional, Tuple

import numpy as np

from isvit_det.backbones.layout import window_layout
from isvit_det.export.graph import Graph, Size
from isvit_det.plans.swin import MergingPlan, merged_tokens

# (height, width) of a map in tokens.
Sizes = Tuple[Size, Size]
# In the names of nodes that compute indices.
INDICES = 'indices'
# Added to the logits of tokens that do not attend to each other.
APART = -100.


class WindowIndex(NamedTuple):
    """The windows of a map with N positions each, as values of the graph.

    Attributes:
        tokens: index of the token at each position, the number of tokens for
            padding, shape (windows * N,).
        inverse: position of each token, shape (tokens,).
        mask: added to logits, shape (windows, 1, N, N); None without shift.
    """
    tokens: str
    inverse: str
    mask: Optional[str]


class Layouts:
    """Indices of the maps of a graph, each of which is there once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._windows: Dict[Tuple[Sizes, int, int], WindowIndex] = {}

    def windows(self, size: Sizes, window: int, shift: int) -> WindowIndex:
        """The windows of a map.

        Args:
            size: of the map.
            window: side of a window.
            shift: of the windows.
        """
        key = (size, window, shift)
        if key not in self._windows:
            with self._graph.scope(INDICES):
                self._windows[key] = self._find_windows(*key)
        return self._windows[key]

    def _find_windows(self, size: Sizes, window: int,
                      shift: int) -> WindowIndex:
        graph, (height, width) = self._graph, size
        if isinstance(height, int) and isinstance(width, int):
            layout = window_layout(height, width, window, shift)
            tokens = graph.constant(layout.tokens.flatten(), np.int64)
            inverse = graph.constant(layout.inverse, np.int64)
            regions = None
            if layout.regions is not None:
                regions = graph.constant(layout.regions, np.int64)
        else:
            tokens, inverse, regions = _computed_windows(
                Integers(graph), str(height), str(width), window, shift)
        if regions is None:
            return WindowIndex(tokens, inverse, None)
        one, other = (
            graph.add('Unsqueeze', regions, graph.constant(axes, np.int64))
            for axes in ([1, 2], [1, 3]))
        mask = graph.add('Where', graph.add('Equal', one, other),
                         graph.constant(0), graph.constant(APART))
        return WindowIndex(tokens, inverse, mask)

    def merging(self, size: Sizes, plan: MergingPlan) -> Tuple[str, Sizes]:
        """Index of the token at each place of each merged patch, in order,
        the number of tokens for padding; and the map of patches."""
        graph, (height, width) = self._graph, size
        if isinstance(height, int) and isinstance(width, int):
            tokens, merged = merged_tokens((height, width), plan.kernel,
                                           plan.stride)
            return graph.constant(tokens.flatten(), np.int64), merged
        with graph.scope(INDICES):
            return _computed_merging(
                Integers(graph), str(height), str(width), plan)


class Integers:
    """Arithmetic of integers in a graph, of values and numbers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def _value(self, x: Size) -> str:
        return x if isinstance(x, str) else self.graph.constant(x, np.int64)

    def __call__(self, kind: str, *inputs: Size) -> str:
        """A node of a kind, such as ``'Add'``."""
        return self.graph.add(kind, *map(self._value, inputs))

    def ceil(self, x: Size, divisor: int) -> str:
        """Divide and round up."""
        return self('Div', self('Add', x, divisor - 1), divisor)

    def count(self, stop: Size, axis: int, axes: int) -> str:
        """0, 1, ... along one of several axes."""
        shape = [1] * axes
        shape[axis] = -1
        return self.graph.reshape(self('Range', 0, stop, 1), shape)


def _grid(ints: Integers, number: Size, step: int, length: int,
          first: int) -> str:
    """Positions ``step * i + j`` of ``length`` places each, along the axes
    ``first`` and ``first + 2`` of four."""
    return ints('Add', ints('Mul', ints.count(number, first, 4), step),
                ints.count(length, first + 2, 4))


def _tokens(ints: Integers, row: str, column: str, height: str,
            width: str) -> str:
    """Indices of tokens, the number of tokens outside of the map; flat."""
    inside = ints('And', ints('Less', row, height),
                  ints('Less', column, width))
    token = ints('Add', ints('Mul', row, width), column)
    token = ints('Where', inside, token, ints('Mul', height, width))
    return ints.graph.reshape(token, [-1])


def _computed_windows(ints: Integers, height: str, width: str, window: int,
                      shift: int) -> Tuple[str, str, Optional[str]]:
    """Tokens, inverse and regions of ``WindowLayout``, the first one flat."""
    numbers = [ints.ceil(length, window) for length in (height, width)]
    padded = [ints('Mul', number, window) for number in numbers]
    # Positions in the shifted map, and what they show of the map itself.
    row, column = (_grid(ints, number, window, window, axis)
                   for axis, number in enumerate(numbers))
    shown = [
        ints('Mod', ints('Add', position, shift), whole)
        for position, whole in zip((row, column), padded)
    ]
    tokens = _tokens(ints, shown[0], shown[1], height, width)
    # Where each token is.
    across, down = (ints(
        'Mod',
        ints('Sub', ints('Add', ints.count(length, axis, 2), whole), shift),
        whole) for axis, (length,
                          whole) in enumerate(zip((height, width), padded)))
    place = ints('Add', ints('Mul', ints('Div', across, window), numbers[1]),
                 ints('Div', down, window))
    place = ints('Add', ints('Mul', place, window),
                 ints('Mod', across, window))
    place = ints('Add', ints('Mul', place, window), ints('Mod', down, window))
    inverse = ints.graph.reshape(place, [-1])
    if not shift:
        return tokens, inverse, None

    def region(position: str, whole: str) -> str:
        parts = [
            ints.graph.cast(
                ints('GreaterOrEqual', position, ints('Sub', whole, end)),
                np.int64) for end in (window, shift)
        ]
        return ints('Add', *parts)

    regions = ints('Add', ints('Mul', region(row, padded[0]), 3),
                   region(column, padded[1]))
    return tokens, inverse, ints.graph.reshape(regions, [-1, window * window])


def _computed_merging(ints: Integers, height: str, width: str,
                      plan: MergingPlan) -> Tuple[str, Sizes]:
    """``Layouts.merging`` for a size that is not known."""
    merged = [
        ints.ceil(length, step)
        for length, step in zip((height, width), plan.stride)
    ]
    row, column = (_grid(ints, number, plan.stride[axis], plan.kernel[axis],
                         axis) for axis, number in enumerate(merged))
    return _tokens(ints, row, column, height, width), (merged[0], merged[1])
