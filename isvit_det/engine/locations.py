"""Locations at which the dense heads of a detector find objects.

Most of a map is background, where the errors of a dense head change no
detection. So its layers are calibrated mostly where its scores are high.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor, nn

from isvit_det.calibration.layer_inputs import (Layer, input_rows,
                                                is_matrix_product)
from isvit_det.calibration.moments import ROWS_PER_CALL
from isvit_det.core.layers import QuantConv2d
from isvit_det.core.observers import RangeObserver

Size = Tuple[int, int]
# Share of the locations that are drawn by score; the others are uniform.
SHARE_BY_SCORE = .8


class Locations:
    """Draws locations of the maps of each image by the scores of dense heads.

    In its context, the model predicts one image at a time. The scores of the
    heads decide the locations, which are kept for ``of_layer``, and the input
    values of the heads' convolutions at these locations are observed for
    their ranges. Heads without sigmoid scores on maps are ignored.

    Args:
        model: a detector, or a part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.heads = [
            module for module in model.modules()
            if isinstance(module, BaseDenseHead)
            and getattr(module, 'use_sigmoid_cls', False)
        ]
        self.layers: List[QuantConv2d] = [
            layer for head in self.heads for layer in head.modules()
            if isinstance(layer, QuantConv2d) and is_matrix_product(layer)
        ]
        self.observers: Dict[QuantConv2d, RangeObserver] = {
            layer: layer.input_quantizer.new_observer()
            for layer in self.layers
        }
        self._drawn: Dict[int, Dict[Size, Tensor]] = {}
        self._calls: List[Tuple[QuantConv2d, Tensor, Size]] = []
        self._image = 0

    def __enter__(self) -> 'Locations':
        self._handles = [
            layer.register_forward_hook(self._keep) for layer in self.layers
        ]
        self._handles += [
            head.register_forward_hook(self._draw) for head in self.heads
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        self._calls.clear()
        for handle in self._handles:
            handle.remove()

    def start_image(self, image: int) -> None:
        """Announce the image that the model predicts next."""
        self._image = image
        self._drawn[image] = {}
        self._calls.clear()

    def _keep(self, layer: nn.Module, args: Tuple[Tensor],
              output: Tensor) -> None:
        assert isinstance(layer, QuantConv2d)
        self._calls.append((layer, args[0], _size(output)))

    def _draw(self, head: nn.Module, args: Any, outputs: Any) -> None:
        """Draw locations by a head's scores, and observe its layers there."""
        generator = torch.Generator().manual_seed(self._image)
        drawn = self._drawn[self._image]
        for scores in _score_maps(outputs):
            best = scores[0].detach().float().sigmoid().amax(0).flatten()
            odds = SHARE_BY_SCORE * best / best.mean().clamp(min=1e-12)
            odds += 1 - SHARE_BY_SCORE
            drawn[_size(scores)] = torch.multinomial(
                odds.cpu(),
                min(ROWS_PER_CALL, len(odds)),
                replacement=True,
                generator=generator)
        for layer, x, size in self._calls:
            if size in drawn:
                rows = input_rows(layer, x, drawn[size])
                self.observers[layer].update(rows)
        self._calls.clear()

    def of_layer(self, layer: Layer, image: int,
                 size: Size) -> Optional[Tensor]:
        """Locations in the map of an image, None if none were drawn.

        Args:
            layer: the layer that runs.
            image: number of the image.
            size: (H, W) of the layer's output.

        Returns:
            Flat positions y * W + x, on the CPU.
        """
        if layer not in self.observers:
            return None
        return self._drawn.get(image, {}).get(size)

    def fit_(self) -> None:
        """Fit the input quantizers of the layers that were observed."""
        for layer, observer in self.observers.items():
            observer.merge_(layer.weight)
            if observer.counts is not None:
                layer.input_quantizer.fit_(observer)


def _size(x: Tensor) -> Size:
    return x.shape[-2], x.shape[-1]


def _score_maps(outputs: Any) -> List[Tensor]:
    """The maps of logits (1, C, H, W), the first output of dense heads."""
    first = outputs[0] if isinstance(outputs, tuple) and outputs else ()
    return [
        scores
        for scores in (first if isinstance(first, (list, tuple)) else ())
        if isinstance(scores, Tensor) and scores.ndim == 4 and len(scores) == 1
    ]
