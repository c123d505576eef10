"""Float parts of a detector in their faster form."""
import copy
import pickle

import pytest
import torch
from mmdet.models.roi_heads import roi_extractors
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import nn

from isvit_det.core.layers import (fit_weights_, observe, precision,
                                   set_precision_, simulation)
from isvit_det.inputs.configs import load_config, quantize_config_
from isvit_det.registry import MODELS
from isvit_det.runtime import mask_pasting, roi_align
from isvit_det.runtime.engine import VARIABLE, _Forward, attach_runtime_
from isvit_det.runtime.float_parts import entrances
from isvit_det.runtime.mask_pasting import paste_masks
from tests.engine.tiny import FLOAT
from tests.runtime.calibrated import draw_linear

CFG = ConfigDict(mask_thr_binary=.5)


class Parts(nn.Module):
    """One part of every kind, and a quantized layer."""

    def __init__(self):
        super().__init__()
        self.fc, _ = draw_linear()
        self.extractor = roi_extractors.SingleRoIExtractor(
            dict(type='RoIAlign', output_size=7), 16, [4, 8])
        self.mask = FCNMaskHead(
            num_convs=0, in_channels=16, conv_out_channels=16, num_classes=3)


def run(parts):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 10, 12)
    rois = torch.tensor([[0, 3., 4, 30, 25], [1, -5., 2, 44, 90]])
    boxes = rois[:, 1:].clone()
    meta = dict(scale_factor=(1., 1.), ori_shape=(40, 48))
    with torch.no_grad():
        return [
            parts.extractor([x, x[..., ::2, ::2]], rois),
            parts.extractor([x], rois),
            parts.mask._predict_by_feat_single(
                torch.randn(2, 3, 28, 28), boxes, torch.tensor([2, 0]), meta,
                CFG, True).float(),
        ]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    torch.manual_seed(1)
    return Parts().eval()


@pytest.fixture
def calls(monkeypatch):
    """How often what is faster ran."""
    ran = []
    for module, name in ((roi_align, 'align_boxes'), (mask_pasting,
                                                      'paste_masks')):

        def count(*args, call=getattr(module, name), name=name, **kwargs):
            ran.append(name)
            return call(*args, **kwargs)

        monkeypatch.setattr(module, name, count)
    return ran


def test_parts_compute_what_they_did(parts, calls):
    expected = run(parts)
    attach_runtime_(parts, 'native')
    found = run(parts)
    assert calls == ['align_boxes', 'align_boxes', 'paste_masks']
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-6
    for twin in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        assert all(torch.equal(*pair) for pair in zip(run(twin), found))
    assert len(calls) == 9


def test_what_is_off_is_mmdetections_to_the_bit(parts, calls, monkeypatch):
    expected = run(parts)
    attach_runtime_(parts, 'native')

    def check():
        found = run(parts)
        assert calls == []
        assert all(torch.equal(*pair) for pair in zip(found, expected))

    with precision(parts, weights=False, acts=False):
        check()
    with simulation(parts):
        check()
    parts.runtime.engine = 'simulation'
    check()
    monkeypatch.setenv(VARIABLE, 'native')
    run(parts)
    assert len(calls) == 3


def test_parts_in_training_are_mmdetections(parts, calls):
    attach_runtime_(parts, 'native')
    run(parts.train())
    assert calls == []


def test_mmcv_pools_boxes_that_the_kernels_do_not(parts, calls):
    """It is given maps whose channels lie first, which it does not check."""
    attach_runtime_(parts, 'native')
    feats = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
    rois = torch.tensor([[0, 2., 2, 20, 9]])
    for layer in parts.extractor.roi_layers:
        layer.pool_mode = 'max'
    with torch.no_grad():
        expected = parts.extractor(feats, rois)
        last = [x.contiguous(memory_format=torch.channels_last) for x in feats]
        assert torch.equal(parts.extractor(last, rois), expected)
    assert calls == [] and expected.abs().max() > 0


def paste_by_mmdet(masks, boxes, size):
    meta = dict(scale_factor=(1., 1.), ori_shape=size)
    head = FCNMaskHead(num_convs=0, num_classes=1, class_agnostic=True)
    return head._predict_by_feat_single(masks[:, None].logit(), boxes.clone(),
                                        torch.zeros(len(masks)).long(), meta,
                                        CFG, True)


@pytest.mark.parametrize('size', [(60, 90), (1, 33), (300, 200)])
def test_masks_are_pasted_as_mmdetection_does(size):
    torch.manual_seed(0)
    masks = torch.rand(60, 28, 28)
    inside = torch.rand(60, 2) * torch.tensor([size[1], size[0]])
    half = torch.rand(60, 2)**3 * 150
    boxes = torch.cat([inside - half, inside + half], 1)
    boxes[0] = inside[0].repeat(2)
    boxes[1, 0::2] = inside[1, 0]
    boxes[2] = torch.tensor([10., .5, 10., .5])
    expected = paste_by_mmdet(masks, boxes, size)
    found = paste_masks(masks, boxes, size, .5)
    assert found.shape == expected.shape and found.dtype is torch.bool
    # Only what lies within rounding of the threshold may differ.
    assert (found != expected).sum() <= 1e-5 * expected.numel()
    assert expected.any()


def test_a_box_outside_of_the_image_has_no_mask():
    """MMDetection's pasting fails on one."""
    boxes = torch.tensor([[-50., -50., -20., -20.], [70., 2., 90., 9.]])
    assert not paste_masks(torch.ones(2, 28, 28), boxes, (30, 40), .5).any()


def test_a_mask_of_equal_numbers_fills_its_box():
    boxes = torch.tensor([[2., 1., 6., 4.]])
    found = paste_masks(torch.full((1, 4, 4), .9), boxes, (6, 8), .5)
    expected = torch.zeros(1, 6, 8, dtype=torch.bool)
    expected[:, 1:4, 2:6] = True
    assert torch.equal(found, expected)


@pytest.fixture(scope='module')
def detector():
    """A detector whose layers are quantized and calibrated in some way."""
    init_default_scope('mmdet')
    cfg = load_config(str(FLOAT), None)
    quantize_config_(cfg, dict(scope='detector'))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    fit_weights_(model)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1., 1.)))
    model.roi_head.test_cfg.score_thr = 0.
    model.x = torch.randn(1, 3, 96, 128)
    with observe(model):
        model.predict(model.x, [sample])
    set_precision_(model, True, True)
    model.runtime.engine = 'native'
    return model


def test_channels_lie_last_behind_the_neck_and_change_nothing(
        detector, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    layers = entrances(detector)
    assert len(layers) == 4
    with torch.no_grad():
        found = detector.extract_feat(detector.x)
        for layer in layers:
            monkeypatch.setattr(layer, 'native',
                                _Forward(detector.runtime, False))
        expected = detector.extract_feat(detector.x)
    for one, other in zip(found, expected):
        assert other.is_contiguous() and torch.equal(one, other)
        assert one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('change', [
    lambda model: setattr(model, 'neck', nn.Identity()),
    lambda model: setattr(model.roi_head, 'mask_roi_extractor',
                          nn.Sequential(GenericRoIExtractor(
                              roi_layer=dict(type='RoIAlign', output_size=7),
                              out_channels=16, featmap_strides=[4]))),
    lambda model: setattr(model, 'roi_head', nn.Identity()),
])  # yapf: disable
def test_channels_lie_first_where_more_is_not_known(detector, change):
    other = copy.deepcopy(detector)
    change(other)
    assert entrances(other) == []
