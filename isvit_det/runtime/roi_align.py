"""RoIAlign over all levels of a feature pyramid by one native kernel."""
import ctypes
from typing import Any, List, Optional, Sequence

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import roi_extractors
from torch import Tensor

from isvit_det.runtime.calls import is_hooked, native_isa
from isvit_det.runtime.native import INT, POINTER, Isa, kernel
from isvit_det.runtime.packing import BLOCK

# Larger boxes, in pixels, run by mmcv: the number of sampling points grows
# with their size.
MAX_SIZE = 1e6


class _Level(ctypes.Structure):
    _fields_ = [('values', POINTER), ('height', INT), ('width', INT),
                ('scale', ctypes.c_float)]


class _Pooling(ctypes.Structure):
    _fields_ = [('levels', POINTER), ('boxes', POINTER), ('level', POINTER)]
    _fields_ += [(name, INT) for name in ('num_boxes', 'channels', 'height',
                                          'width', 'samples', 'is_aligned')]
    _fields_ += [('values', POINTER)]


def align_boxes(isa: Isa, feats: Sequence[Tensor], boxes: Tensor,
                levels: Tensor, layers: Sequence[RoIAlign]) -> Tensor:
    """RoIAlign with average pooling, each box on its own level.

    Args:
        isa: kernels to use.
        feats: the map of each level, float32, shape (images, channels, height,
            width), channels a multiple of 16. Maps that are not in channels
            last memory format are copied.
        boxes: float32, shape (boxes, 5): index of the image, then left, top,
            right and bottom in pixels of the image, with left <= right and
            top <= bottom.
        levels: level of each box, int64, shape (boxes,).
        layers: RoIAlign of each level, which differ only in scale.

    Returns:
        float32, shape (boxes, channels, bins down, bins across), channels
        last in memory.
    """
    layer = layers[0]
    height, width = layer.output_size
    channels = feats[0].shape[1]
    maps = [f.contiguous(memory_format=torch.channels_last) for f in feats]
    boxes, levels = boxes.contiguous(), levels.contiguous()
    out = torch.empty((len(boxes), channels, height, width),
                      memory_format=torch.channels_last)
    pyramid = (_Level * len(maps))(
        *(_Level(x.data_ptr(), *x.shape[2:], layer.spatial_scale)
          for x, layer in zip(maps, layers)))
    pooling = _Pooling(
        ctypes.addressof(pyramid), boxes.data_ptr(), levels.data_ptr(),
        len(boxes), channels, height, width, max(0, layer.sampling_ratio),
        layer.aligned, out.data_ptr())
    kernel(isa, 'pool')(ctypes.byref(pooling))
    return out


class SingleRoIExtractor(roi_extractors.SingleRoIExtractor):
    """MMDetection's extractor, on the native kernel where that can run it.

    Attributes:
        native: the ``PartSwitch`` of the model, or None.
    """
    native: Any = None

    def forward(self,
                feats: Sequence[Tensor],
                rois: Tensor,
                roi_scale_factor: Optional[float] = None) -> Tensor:
        """Features of boxes; see ``SingleRoIExtractor.forward``."""
        isa = native_isa(self, *feats)
        if isa is None or not self._can_align(feats, rois):
            # mmcv's operator assumes contiguous maps.
            return super().forward([x.contiguous() for x in feats], rois,
                                   roi_scale_factor)
        levels = rois.new_zeros(len(rois), dtype=torch.int64)
        if len(feats) > 1:
            levels = self.map_roi_levels(rois, len(feats))
            if roi_scale_factor is not None:
                rois = self.roi_rescale(rois, roi_scale_factor)
        return align_boxes(isa, feats, rois, levels,
                           self.roi_layers[:len(feats)])

    def _can_align(self, feats: Sequence[Tensor], rois: Tensor) -> bool:
        layers: List[RoIAlign] = list(self.roi_layers)
        sizes = rois[:, 3:] - rois[:, 1:3]
        return (rois.dtype is torch.float32 and feats[0].shape[1] % BLOCK == 0
                and feats[0].shape[1] == self.out_channels and all(
                    type(layer) is RoIAlign and layer.pool_mode == 'avg'
                    and not layer.use_torchvision and not is_hooked(layer)
                    for layer in layers) and bool(
                        ((sizes >= 0) & (sizes < MAX_SIZE)).all()))
