"""SimpleFPN: a feature pyramid from one map, for plain backbones."""
from typing import Any, List, Mapping, Optional, Sequence, Tuple

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from isvit_det.core.errors import QuantError
from isvit_det.registry import MODELS

STRIDES = (4, 8, 16, 32)
NORM = dict(type='isvit_det.LayerNorm2d', eps=1e-6)


@MODELS.register_module()
class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W).

    In a ``norm_cfg`` its name is ``isvit_det.LayerNorm2d``.

    Args:
        num_channels: C.
        eps: added to the variance.
    """
    _abbr_ = 'ln'

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias,
                         self.eps)
        # mmcv's RoIAlign reads memory as if it were contiguous.
        return x.permute(0, 3, 1, 2).contiguous()


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """Maps of strides 4 to 32 from the last map of a plain backbone.

    Transposed convolutions increase its resolution and pooling decreases it;
    two convolutions follow at every level (ViTDet, arXiv 2203.16527, section
    3).

    Args:
        in_channels: of the backbone's map.
        out_channels: of every level.
        in_stride: of the backbone's map, its patch size: 8 or 16.
        num_outs: number of levels, at least 4; further levels are pooled
            from the last.
        init_cfg: as in MMEngine.

    Raises:
        QuantError: if ``in_stride`` or ``num_outs`` is not allowed.
    """

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 in_stride: int = 16,
                 num_outs: int = 5,
                 init_cfg: Optional[Mapping[str, Any]] = None) -> None:
        super().__init__(init_cfg=init_cfg)
        if in_stride not in (8, 16):
            raise QuantError(f'neck.in_stride: {in_stride!r} is not allowed; '
                             "expected the backbone's patch size, 8 or 16.")
        if num_outs < len(STRIDES):
            raise QuantError(f'neck.num_outs: {num_outs!r} is not allowed; '
                             f'expected {len(STRIDES)} or more.')
        self.num_outs = num_outs
        self.resize = nn.ModuleList()
        self.lateral_convs = nn.ModuleList()
        self.fpn_convs = nn.ModuleList()
        for stride in STRIDES:
            layers, channels = _resize(in_channels, in_stride, stride)
            self.resize.append(layers)
            self.lateral_convs.append(
                ConvModule(
                    channels, out_channels, 1, norm_cfg=NORM, act_cfg=None))
            self.fpn_convs.append(
                ConvModule(
                    out_channels,
                    out_channels,
                    3,
                    padding=1,
                    norm_cfg=NORM,
                    act_cfg=None))

    def forward(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """The last map (B, C, H, W) of ``inputs`` to ``num_outs`` maps."""
        outs: List[Tensor] = []
        for resize, lateral, conv in zip(self.resize, self.lateral_convs,
                                         self.fpn_convs):
            outs.append(conv(lateral(resize(inputs[-1]))))
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


def _resize(channels: int, in_stride: int,
            out_stride: int) -> Tuple[nn.Sequential, int]:
    """Layers from one stride to another, and their output channels."""
    layers: List[nn.Module] = []
    while in_stride > out_stride:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
        channels //= 2
        in_stride //= 2
    if out_stride > in_stride:
        factor = out_stride // in_stride
        layers.append(nn.MaxPool2d(factor, factor))
    return nn.Sequential(*layers), channels
