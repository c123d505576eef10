"""Replacing float parts of a detector by faster implementations.

A small detector spends half of its time outside of the backbone and of
convolutions and linear layers. The replacements compute the same in float32,
up to the order of summation.
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

# Faster subclass of each class. Only modules of exactly this class are
# replaced, since the user's own subclasses may compute something else.
FASTER: Dict[type, type] = {
    mask_heads.FCNMaskHead: FCNMaskHead,
    roi_extractors.SingleRoIExtractor: SingleRoIExtractor,
}


class PartSwitch:
    """Decides whether float parts run in their faster implementation.

    They do if the quantized layers run natively. A model whose quantizers are
    disabled has to equal MMDetection's bit for bit, so there they do not.

    Args:
        runtime: the ``Runtime`` of the model.
        layer: a quantized layer of the model, which tells whether its
            quantizers are enabled.
    """

    def __init__(self, runtime: Any, layer: Any) -> None:
        self.runtime = runtime
        self.layer = layer

    def choose(self) -> Any:
        """The runtime's ``Choice``, without kernels if quantizers are off."""
        choice = self.runtime.choose()
        if not self.layer.input_quantizer.enabled:
            return choice._replace(isa=None)
        return choice


def attach_parts_(model: nn.Module, runtime: Any) -> None:
    """Give float parts of a quantized model their faster implementation.

    This changes the class of these modules, but neither their parameters nor
    their names.
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
    """The neck's first convolutions, if their outputs may be channels last.

    All later maps then have this memory format too, and native layers need
    not transpose their inputs. It is known to be safe in the usual two-stage
    detectors with an FPN. Elsewhere the list is empty, since operators of mmcv
    may ignore a map's memory format.
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
