"""Correction of weights for quantization in closed form, without SGD.

It is used for neck and heads, which have too many layers, or share them too
much, to be reconstructed unit by unit, and as the start of a unit's stage 3.
First a ridge regression makes the weights compensate for the quantization of
the layer's input, as in ERQ-ViT; then the weights are rounded column by
column, and later columns compensate for the rounding of earlier ones, as in
GPTQ. Both need only second moments of the input.
"""
import contextlib
from typing import Iterator, Optional, Sequence

import torch
from torch import Tensor

from isvit_det.calibration.layer_inputs import Layer, is_matrix_product
from isvit_det.calibration.moments import MomentCollector, RowChoice
from isvit_det.calibration.weight_fitting import (ridge_regression,
                                                  round_columns)
from isvit_det.core.layers import QuantLinear


class Correction:
    """Collects moments of the inputs of layers, to correct their weights.

    Args:
        layers: of a model; hooks stay on them until ``close``.
        residual_given: fit the weights to residuals given by
            ``add_residual``, not to what the quantization of their inputs
            changes. A layer that is corrected in parts ignores this.
        choose_rows: see ``correct_``.
    """

    def __init__(self, layers: Sequence[Layer], residual_given: bool,
                 choose_rows: Optional[RowChoice]) -> None:
        self.layers = layers
        self.collectors = {
            layer: MomentCollector(layer, residual_given, choose_rows)
            for layer in layers if is_matrix_product(layer)
        }
        self.handles = [
            layer.register_forward_pre_hook(collector)
            for layer, collector in self.collectors.items()
        ]

    def start_image(self, image: int, num_prefix: int = 0) -> None:
        """Announce the image that the model runs on next.

        Args:
            image: its number; every fourth image is held out to choose the
                strength of the ridge.
            num_prefix: number of rows at the start of each input that are
                always used, such as that of a class token; of the others a
                sample is drawn.
        """
        for collector in self.collectors.values():
            collector.start_image(image, num_prefix)

    def add_residual(self,
                     layer: Layer,
                     residual: Tensor,
                     weights: Optional[Tensor] = None) -> None:
        """Give the residual of the output of a layer's last call.

        Args:
            layer: one of those given, which has just run.
            residual: target minus output, shape (N, C), one row for each row
                of the layer's input.
            weights: weight of each row of ``residual``, (N, 1).
        """
        if layer in self.collectors:
            self.collectors[layer].add_residual(residual, weights)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def apply_(self, as_codes: bool) -> None:
        """Correct the weights and fit their quantizers."""
        for layer in self.layers:
            collector = self.collectors.get(layer)
            if collector is not None:
                for moments in collector.used + collector.held_out:
                    moments.merge_()
            if collector is None or not collector.used[0].count:
                layer.weight_quantizer.fit_tensor_(layer.weight)
            else:
                _correct_layer_(layer, collector, as_codes)


@contextlib.contextmanager
def correct_(layers: Sequence[Layer],
             as_codes: bool = True,
             residual_given: bool = False,
             choose_rows: Optional[RowChoice] = None) -> Iterator[Correction]:
    """Correct weights by the inputs that layers get in this context.

    In the context, run the model on calibration images, with fitted
    activation quantizers and with float weights in these layers, and call
    ``start_image`` of the ``Correction`` before each image. At the end the
    weights are corrected and their quantizers fitted, on all processes alike.
    A layer with more than 4096 inputs is corrected in parts of its inputs,
    each for its own quantization. Layers that do not run, and those that are
    no ``is_matrix_product``, only get their weight quantizers fitted.

    Args:
        layers: with float weights.
        as_codes: end with decoded codes; otherwise with the values that were
            rounded to these codes, from which an optimisation can go on.
        residual_given: see ``Correction``.
        choose_rows: which pixels of a layer's output map to use; None draws
            some of all.
    """
    correction = Correction(layers, residual_given, choose_rows)
    try:
        yield correction
    finally:
        correction.close()
    correction.apply_(as_codes)


@torch.no_grad()
def _correct_layer_(layer: Layer, collector: MomentCollector,
                    as_codes: bool) -> None:
    """Ridge regression, rounding by columns, then the mean of the output."""
    weight = layer.weight.flatten(1).double()
    bias: Optional[Tensor] = layer.bias
    if bias is None and isinstance(layer, QuantLinear):
        bias = layer.offset
    target = weight + torch.cat([
        ridge_regression(used, held_out, bias is not None)
        for used, held_out in zip(collector.used, collector.held_out)
    ]).T
    layer.weight.copy_(target.view_as(layer.weight))
    layer.weight_quantizer.fit_tensor_(layer.weight)
    corrected = torch.empty_like(layer.weight).flatten(1)
    for part, used, held_out in zip(collector.parts, collector.used,
                                    collector.held_out):
        total = used + held_out
        covariance = total.centred()[0] if bias is not None else (total.gram /
                                                                  total.count)
        power = total.gram.diagonal().mean() / total.count
        rounded, unrounded = round_columns(target[:, part], covariance, power,
                                           layer.weight_quantizer)
        corrected[:, part] = rounded if as_codes else unrounded
        if bias is not None:
            change = (weight[:, part] - rounded) @ total.inputs + total.outputs
            bias.add_((change / total.count).to(bias.dtype))
    layer.weight.copy_(corrected.view_as(layer.weight))
