"""Masks of objects, pasted into the image by products of matrices."""
from typing import Any, Tuple

import torch
from mmdet.models.roi_heads import mask_heads as heads
from torch import Tensor

from isvit_det.runtime.calls import native_isa


def paste_masks(masks: Tensor, boxes: Tensor, size: Tuple[int, int],
                threshold: float) -> Tensor:
    """Stretch masks over their boxes, bilinearly, and cut at a threshold.

    A line of the image is a mean of two lines of the mask, and a column of
    two columns, so the whole is ``down @ mask @ across`` with two weights in
    each row of ``down`` and each column of ``across``. MMDetection's own
    pasting samples each pixel for itself: the same numbers, but for the
    rounding of float32.

    Args:
        masks: probabilities, float32, shape (n, lines, columns).
        boxes: left, top, right and bottom in pixels, float32, shape (n, 4).
        size: height and width of the image.
        threshold: the least probability inside a mask.

    Returns:
        bool, shape (n, height, width).
    """
    out = masks.new_zeros((len(masks), *size), dtype=torch.bool)
    height, width = size
    down = _weights(boxes[:, 1], boxes[:, 3], height, masks.shape[1])
    across = _weights(boxes[:, 0], boxes[:, 2], width, masks.shape[2])
    across = across.transpose(1, 2).contiguous()
    # One pixel more than a box has, as MMDetection does.
    first = (boxes[:, :2].floor() - 1).clamp(min=0).int().tolist()
    last = (boxes[:, 2:].ceil() + 1).clamp(min=0).int().tolist()
    for i, ((left, top), (right, bottom)) in enumerate(zip(first, last)):
        part = down[i, top:bottom] @ (masks[i] @ across[i, :, left:right])
        torch.ge(part, threshold, out=out[i, top:bottom, left:right])
    return out


def _weights(start: Tensor, stop: Tensor, pixels: int, steps: int) -> Tensor:
    """How much of each step of a mask each pixel along one axis has.

    Args:
        start: of the boxes, shape (n,).
        stop: likewise.
        pixels: of the image.
        steps: of the mask.

    Returns:
        float32, shape (n, pixels, steps); a pixel between two steps has part
        of both, one outside of all has none.
    """
    start, stop = start[:, None], stop[:, None]
    centers = torch.arange(pixels, device=start.device) + .5
    at = (centers - start) / (stop - start) * 2 - 1
    # Of a box without extent, MMDetection takes the middle.
    at[at.isinf()] = 0
    at = ((at + 1) * steps - 1) / 2
    away = at[..., None] - torch.arange(steps, device=start.device)
    return (1 - away.abs()).clamp_(min=0)


class FCNMaskHead(heads.FCNMaskHead):
    """MMDetection's mask head, whose masks ``paste_masks`` pastes.

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
        # The boxes of the result, which are rescaled here and nowhere else.
        bboxes /= bboxes.new_tensor(img_meta['scale_factor']).repeat((1, 2))
        chosen = labels.new_zeros(()) if self.class_agnostic else labels
        masks = mask_preds[torch.arange(len(bboxes)), chosen].sigmoid()
        return paste_masks(masks, bboxes, img_meta['ori_shape'][:2], threshold)
