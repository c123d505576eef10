"""RoI features of the kernels against mmcv's."""
import pytest
import torch
from mmdet.models.roi_heads import roi_extractors

from isvit_det.runtime.roi_align import align_boxes
from tests.runtime.products import ISAS

STRIDES = (4, 8, 16, 32)


def make_extractor(**layer):
    layer = dict(dict(type='RoIAlign', output_size=7), **layer)
    return roi_extractors.SingleRoIExtractor(layer, 32, list(STRIDES))


def draw_feats(images=2, size=(160, 224)):
    return [
        torch.randn(images, 32, size[0] // s, size[1] // s) for s in STRIDES
    ]


def draw_boxes(number, images=2):
    """Boxes of all sizes: on all levels, within the maps, partly and wholly
    outside, and without extent."""
    center = torch.rand(number, 2) * 320 - 40
    half = torch.rand(number, 2) * 2**(torch.rand(number, 1) * 9)
    boxes = torch.cat([center - half, center + half], 1)
    boxes[:3, 2:] = boxes[:3, :2]
    boxes[3] = torch.tensor([-900., -900., -800., -800.])
    boxes[4] = torch.tensor([0., 0., 224., 160.])
    return torch.cat([torch.randint(images, (number, 1)).float(), boxes], 1)


@pytest.fixture(params=ISAS, ids=lambda isa: isa.name)
def isa(request):
    torch.manual_seed(0)
    return request.param


def align(isa, extractor, feats, rois):
    levels = extractor.map_roi_levels(rois, len(feats))
    return align_boxes(isa, feats, rois, levels, extractor.roi_layers)


@pytest.mark.parametrize(
    'layer', [
        dict(sampling_ratio=0),
        dict(sampling_ratio=1, output_size=14),
        dict(sampling_ratio=2, output_size=(3, 5)),
        dict(sampling_ratio=0, aligned=False),
        dict(sampling_ratio=2, aligned=False),
    ],
    ids=str)
@pytest.mark.parametrize('memory',
                         [torch.contiguous_format, torch.channels_last])
def test_features_are_those_of_mmcv(isa, layer, memory):
    extractor, feats = make_extractor(**layer), draw_feats()
    rois = draw_boxes(120)
    assert len(extractor.map_roi_levels(rois, 4).unique()) == 4
    expected = extractor(feats, rois)
    feats = [x.contiguous(memory_format=memory) for x in feats]
    found = align(isa, extractor, feats, rois)
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    # The sums have mmcv's order; its compiler may contract them.
    assert (found - expected).abs().max() <= 1e-6


def test_threads_do_not_change_a_bit(isa):
    extractor, feats, rois = make_extractor(), draw_feats(), draw_boxes(77)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(align(isa, extractor, feats, rois))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nothing_comes_of_no_boxes(isa):
    found = align(isa, make_extractor(), draw_feats(), torch.zeros(0, 5))
    assert found.shape == (0, 32, 7, 7)
