"""Stage 2: fold per-channel scales into LayerNorm and the next layer."""
from typing import Any, NamedTuple, Optional, Protocol

import torch
from torch import Tensor, nn

from isvit_det.core.layers import QuantLinear
from isvit_det.core.quantizers import Quantizer, UniformQuantizer

# Channels with a range below this share of the median range are widened to it,
# because the zero point of a constant channel would be out of bounds.
NARROWEST = 1e-3


class PaddingOwner(Protocol):
    """A module that pads normalised maps with ``padding_value``, (C,)."""
    padding_value: Tensor


class NormLinear(NamedTuple):
    """A LayerNorm whose output is the input of exactly one linear layer.

    Attributes:
        norm: the LayerNorm.
        linear: the linear layer.
        padding: the module whose ``padding_value`` replaces the output of the
            norm outside of a map; None without padding.
    """
    norm: nn.LayerNorm
    linear: QuantLinear
    padding: Optional[PaddingOwner] = None


def use_channel_scales_(pair: NormLinear) -> Quantizer:
    """Make the linear layer's input quantizer per channel, for stage 1.

    Returns:
        The quantizer that it had, which is not fitted.
    """
    before = pair.linear.input_quantizer
    pair.linear.input_quantizer = _successor(before, pair.linear.in_features)
    return before


def widen_narrow_channels_(quantizer: UniformQuantizer) -> None:
    """Widen channels whose range is below 1e-3 of the median range.

    The centre of each range stays.
    """
    scale, zero_point = quantizer.scale, quantizer.zero_point
    wide = torch.clamp(scale, min=NARROWEST * scale.median().item())
    middle = (2**quantizer.bits - 1) / 2
    centre = (middle - zero_point) * scale
    moved = torch.round(middle - centre / wide)
    zero_point.copy_(torch.where(wide > scale, moved, zero_point))
    scale.copy_(wide)


@torch.no_grad()
def fold_channel_scales_(pair: NormLinear) -> None:
    """Reparameterize a pair: one scale per tensor, the same codes.

    With the channel scales s and zero points z, ``s~ = mean(s)``,
    ``z~ = median(z)``, ``r1 = s / s~`` and ``r2 = z - z~``, LayerNorm
    becomes ``gamma / r1`` and ``(beta + s r2) / r1`` and the layer
    ``W[:, j] r1[j]`` and ``b - W (s r2)`` (I&S-ViT, Eq. 11 to 14). The
    padding p becomes ``(p + s r2) / r1``, so that it still stands for the
    same value.

    Departure from the paper: its ``z~ = mean(z)`` is no integer, so the codes
    would be none either. With any integer the codes stay; the median keeps
    sums in float32 small if one narrow channel has a large zero point. The
    choice of s~ matters little: another one, such as AdaLog's clipped mean,
    multiplies all of W by one number, which the weights' scales absorb. Stage
    3 then starts from the same codes, and continues as with another learning
    rate for this layer.

    Args:
        pair: the input quantizer of its linear layer is per channel and
            fitted; a quantizer per tensor replaces it.
    """
    norm, linear, padding = pair
    channel = linear.input_quantizer
    widen = channel.scale.double()
    zero_point = channel.zero_point.double()
    mean_scale = widen.mean()
    common_zero = zero_point.median()
    ratio = widen / mean_scale
    shift = widen * (zero_point - common_zero)

    def store(target: Tensor, value: Tensor) -> None:
        target.copy_(value.to(target.dtype))

    weight = linear.weight.double()
    moved = weight @ shift
    store(norm.bias, (norm.bias.double() + shift) / ratio)
    store(norm.weight, norm.weight.double() / ratio)
    store(linear.weight, weight * ratio)
    constant = linear.offset if linear.bias is None else linear.bias
    assert constant is not None
    store(constant, constant.double() - moved)
    if padding is not None:
        value = padding.padding_value
        store(value, (value.double() + shift) / ratio)
    tensor = _successor(channel, None)
    store(tensor.scale, mean_scale)
    store(tensor.zero_point, common_zero)
    tensor.mark_fitted_()
    linear.input_quantizer = tensor


def _successor(old: Any, num_channels: Optional[int]) -> UniformQuantizer:
    """An unfitted quantizer of another granularity in the same mode."""
    new = UniformQuantizer(old.bits, old.role, old.percentiles, num_channels)
    new.to(old.scale).train(old.training)
    new.enabled = old.enabled
    return new
