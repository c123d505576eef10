"""Float parts of a detector that have a faster form, and their exchange.

On small detectors half of the time is in neither backbone, convolution nor
linear layer. What is exchanged here computes the same in float32, up to the
order of sums.
"""
from typing import Any, Dict, List

from mmdet.models.dense_heads import RPNHead
from mmdet.models.necks import FPN
from mmdet.models.roi_heads import (CascadeRoIHead, StandardRoIHead,
                                    mask_heads, roi_extractors)
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from torch import nn

from isvit_det.core.layers import QuantConv2d, quantized_layers
from isvit_det.runtime.mask_pasting import FCNMaskHead
from isvit_det.runtime.roi_align import SingleRoIExtractor

# Subclasses of these may compute something else, and are left alone.
FASTER: Dict[type, type] = {
    mask_heads.FCNMaskHead: FCNMaskHead,
    roi_extractors.SingleRoIExtractor: SingleRoIExtractor,
}


class PartSwitch:
    """Whether the parts of a model run in their faster form.

    They do so together with its quantized layers: a model whose quantizers
    are off is MMDetection's, bit for bit.

    Args:
        runtime: of the model.
        layer: a quantized layer of it that is never turned back into float.
    """

    def __init__(self, runtime: Any, layer: Any) -> None:
        self.runtime = runtime
        self.layer = layer

    def choose(self) -> Any:
        """The ``Choice`` of the runtime, as if there were no kernels where
        the model is not quantized."""
        choice = self.runtime.choose()
        if not self.layer.input_quantizer.enabled:
            return choice._replace(isa=None)
        return choice


def attach_parts_(model: nn.Module, runtime: Any) -> None:
    """Give the float parts of a quantized model their faster form.

    The classes of these modules change; parameters, names and what they
    compute do not.
    """
    layers = quantized_layers(model)
    if not layers:
        return
    switch = PartSwitch(runtime, layers[0])
    module: Any
    for module in list(model.modules()):
        faster = FASTER.get(type(module))
        if faster is not None:
            module.__class__ = faster
            module.native = switch


def entrances(model: Any) -> List[Any]:
    """The convolutions through which maps enter the neck of a detector, if
    everything behind them may meet maps whose channels lie last.

    What follows has the same layout then, and no layer in integers has to
    turn its input around. That is known of the usual two-stage detectors;
    operators of mmcv elsewhere do not look how a map lies in memory.
    """
    if not (type(getattr(model, 'neck', None)) is FPN
            and type(getattr(model, 'rpn_head', None)) is RPNHead
            and type(getattr(model, 'roi_head',
                             None)) in (StandardRoIHead, CascadeRoIHead)):
        return []
    extractors = [
        module for module in model.roi_head.modules()
        if isinstance(module, BaseRoIExtractor)
    ]
    if any(type(module) is not SingleRoIExtractor for module in extractors):
        return []
    convs = [module.conv for module in model.neck.lateral_convs]
    return [conv for conv in convs if isinstance(conv, QuantConv2d)]
