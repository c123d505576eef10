"""SimpleFPN: strides, norms by name, quantization of its convolutions."""
import pytest
import torch
from mmcv.ops import RoIAlign
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import init_default_scope
from torch.nn import functional as F

from isvit_det.core.errors import QuantError
from isvit_det.core.settings import QuantConfig
from isvit_det.detector import quantize_layers_
from isvit_det.necks import LayerNorm2d, SimpleFPN


def build(**kwargs):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MMDET_MODELS.build(
        dict(
            type='isvit_det.SimpleFPN',
            in_channels=16,
            out_channels=8,
            **kwargs)).eval()


@pytest.mark.parametrize('in_stride', [8, 16])
def test_levels_have_strides_of_4_to_64(in_stride):
    height, width = 128, 192
    x = torch.randn(2, 16, height // in_stride, width // in_stride)
    outs = build(in_stride=in_stride)((x, ))
    assert [tuple(out.shape)
            for out in outs] == [(2, 8, height // stride, width // stride)
                                 for stride in (4, 8, 16, 32, 64)]


def test_regions_are_cut_from_levels_as_from_their_copies():
    """mmcv's RoIAlign takes the memory of a map for contiguous."""
    outs = build()((torch.randn(1, 16, 12, 12), ))
    rois = torch.tensor([[0., 3., 5., 90., 120.]])
    for stride, out in zip((4, 8, 16, 32, 64), outs):
        align = RoIAlign(7, 1 / stride, 2)
        # Written out by torch: the copy is contiguous for sure.
        copy = torch.empty(out.shape).copy_(out)
        assert torch.equal(align(out, rois), align(copy, rois))


def test_levels_are_what_vitdet_computes():
    """Stride 4 written out: two transposed convolutions, then two norms."""
    neck = build()
    x = torch.randn(1, 16, 4, 6)
    up, norm, gelu, up2 = neck.resize[0]
    y = F.conv_transpose2d(x, up.weight, up.bias, stride=2)
    y = F.layer_norm(
        y.permute(0, 2, 3, 1), (8, ), norm.weight, norm.bias,
        1e-6).permute(0, 3, 1, 2)
    y = F.conv_transpose2d(F.gelu(y), up2.weight, up2.bias, stride=2)
    for module, padding in ((neck.lateral_convs[0], 0), (neck.fpn_convs[0],
                                                         1)):
        assert module.conv.bias is None and module.ln.eps == 1e-6
        y = F.conv2d(y, module.conv.weight, padding=padding)
        y = F.layer_norm(
            y.permute(0, 2, 3, 1), (8, ), module.ln.weight, module.ln.bias,
            1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(neck((x, ))[0], y)


def test_it_reads_the_last_of_several_maps():
    neck = build(num_outs=4)
    maps = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)
    outs = neck(maps)
    assert len(outs) == 4
    assert torch.equal(outs[2], neck(maps[1:])[2])


def test_the_norm_works_by_channel():
    norm = LayerNorm2d(5)
    out = norm(3 + 2 * torch.randn(2, 5, 4, 4))
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 4, 4))


def test_its_convolutions_can_be_quantized_and_transposed_ones_are_kept():
    neck = build()
    assert quantize_layers_(neck, torch.nn.Identity(), QuantConfig()) == 8


@pytest.mark.parametrize('kwargs, words', [
    (dict(in_stride=4), 'neck.in_stride: 4.*8 or 16'),
    (dict(num_outs=3), 'neck.num_outs: 3.*4 or more'),
])
def test_wrong_arguments_are_named(kwargs, words):
    with pytest.raises(QuantError, match=words):
        SimpleFPN(16, 8, **kwargs)
