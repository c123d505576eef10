"""Pasting the masks of objects into the image by matrix products."""
from typing import Any, Tuple

import torch
from mmdet.models.roi_heads import mask_heads as heads
from torch import Tensor

from isvit_det.runtime.calls import native_isa


def paste_masks(masks: Tensor, boxes: Tensor, size: Tuple[int, int],
                threshold: float) -> Tensor:
    """Resize masks to their boxes bilinearly, and apply a threshold.

    Bilinear interpolation is separable: the resized mask is
    ``down @ mask @ across``, with at most two weights in each row of ``down``
    and in each column of ``across``. MMDetection's own pasting samples every
    pixel separately, with the same result up to the rounding of float32.

    Args:
        masks: probabilities, float32, shape (n, lines, columns).
        boxes: left, top, right and bottom in pixels, float32, shape (n, 4).
        size: height and width of the image.
        threshold: pixels with at least this probability belong to the mask.

    Returns:
        bool, shape (n, height, width).
    """
    out = masks.new_zeros((len(masks), *size), dtype=torch.bool)
    height, width = size
    down = _weights(boxes[:, 1], boxes[:, 3], height, masks.shape[1])
    across = _weights(boxes[:, 0], boxes[:, 2], width, masks.shape[2])
    across = across.transpose(1, 2).contiguous()
    # Like MMDetection, paste one pixel more than the box on each side.
    first = (boxes[:, :2].floor() - 1).clamp(min=0).int().tolist()
    last = (boxes[:, 2:].ceil() + 1).clamp(min=0).int().tolist()
    for i, ((left, top), (right, bottom)) in enumerate(zip(first, last)):
        part = down[i, top:bottom] @ (masks[i] @ across[i, :, left:right])
        torch.ge(part, threshold, out=out[i, top:bottom, left:right])
    return out


def _weights(start: Tensor, stop: Tensor, pixels: int, steps: int) -> Tensor:
    """Interpolation weights of the mask's samples along one axis.

    Args:
        start: first coordinate of each box in pixels, shape (n,).
        stop: last coordinate of each box, shape (n,).
        pixels: size of the image along this axis.
        steps: size of the mask along this axis.

    Returns:
        float32, shape (n, pixels, steps): the weight of each sample for each
        pixel; all 0 for pixels outside of the box.
    """
    start, stop = start[:, None], stop[:, None]
    centers = torch.arange(pixels, device=start.device) + .5
    at = (centers - start) / (stop - start) * 2 - 1
    # For a box of no extent, MMDetection samples the middle of the mask.
    at[at.isinf()] = 0
    at = ((at + 1) * steps - 1) / 2
    away = at[..., None] - torch.arange(steps, device=start.device)
    return (1 - away.abs()).clamp_(min=0)


class FCNMaskHead(heads.FCNMaskHead):
    """MMDetection's mask head with ``paste_masks`` for pasting.

    Attributes:
        native: the ``PartSwitch`` of the model, or None.
    """
    native: Any = None

    def _predict_by_feat_single(self,
                                mask_preds: Tensor,
                                bboxes: Tensor,
                                labels: Tensor,
                                img_meta: Any,
                                rcnn_test_cfg: Any,
                                rescale: bool = False,
                                activate_map: bool = False) -> Tensor:
        threshold = rcnn_test_cfg.mask_thr_binary
        if (native_isa(self, mask_preds) is None or threshold < 0
                or activate_map or not rescale):
            return super()._predict_by_feat_single(mask_preds, bboxes, labels,
                                                   img_meta, rcnn_test_cfg,
                                                   rescale, activate_map)
        # In place, as MMDetection does it: these boxes are part of the result.
        bboxes /= bboxes.new_tensor(img_meta['scale_factor']).repeat((1, 2))
        chosen = labels.new_zeros(()) if self.class_agnostic else labels
        masks = mask_preds[torch.arange(len(bboxes)), chosen].sigmoid()
        return paste_masks(masks, bboxes, img_meta['ori_shape'][:2], threshold)
