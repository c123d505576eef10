"""quantized_detector: what is swapped, what stays, and what is refused."""
import copy

import pytest
import torch
from mmcv.cnn import ConvAWS2d, ConvWS2d
from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.ops import DeformConv2d
from mmdet.models.layers import NormedConv2d, NormedLinear
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from isvit_det.core.errors import QuantError
from isvit_det.core.layers import QuantConv2d, QuantLinear, precision
from isvit_det.core.spec import QuantConfig
from isvit_det.detector import (float_modules, quantize_layers_,
                                quantized_detector)
from isvit_det.engine.configs import load_config
from isvit_det.registry import MODELS
from tests.engine.tiny import FLOAT

SIZE = (128, 160)


@pytest.fixture(scope='module')
def float_config():
    init_default_scope('mmdet')
    return Config.fromfile(str(FLOAT)).model


def quantized(float_config, scope='detector', **kwargs):
    cfg = copy.deepcopy(float_config)
    cfg['backbone']['type'] = 'isvit_det.QuantSwinTransformer'
    base = cfg.pop('type')
    cfg = dict(
        cfg,
        type='isvit_det.quantized_detector',
        base=base,
        quant=dict(scope=scope))
    return MODELS.build(dict(cfg, **kwargs))


@pytest.mark.parametrize('scope', ['backbone', 'detector'])
def test_uncalibrated_it_is_the_float_detector(float_config, scope):
    from mmdet.registry import MODELS as MMDET_MODELS
    torch.manual_seed(0)
    source = MMDET_MODELS.build(copy.deepcopy(float_config)).eval()
    model = quantized(float_config, scope).eval()
    assert type(model) is type(source)
    model.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 75, 110)
    maps, wanted = model.extract_feat(x), source.extract_feat(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted))
    for one, other in zip(model.rpn_head(maps), source.rpn_head(wanted)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_scope_detector_swaps_all_but_the_transposed_convolution(float_config):
    model = quantized(float_config)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert isinstance(module, (QuantLinear, QuantConv2d)), name
    kept = [name for name, _ in float_modules(model)]
    assert kept == ['roi_head.mask_head.upsample']
    assert isinstance(model.roi_head.bbox_head.fc_cls, QuantLinear)
    assert isinstance(model.roi_head.mask_head.conv_logits, QuantConv2d)


def test_scope_backbone_leaves_neck_and_heads_alone(float_config):
    model = quantized(float_config, 'backbone')
    for name, module in model.named_modules():
        inside = name.startswith('backbone.')
        assert inside or not isinstance(module, (QuantLinear, QuantConv2d))
    assert any(isinstance(m, QuantLinear) for m in model.backbone.modules())


class Shared(nn.Module):
    """A layer that occurs twice, and modules that must be left alone."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4))
        layer = nn.Conv2d(4, 4, 1)
        self.levels = nn.ModuleList([layer, layer])
        self.attention = nn.MultiheadAttention(4, 2)
        self.deformable = DeformConv2d(4, 4, 3)


def test_a_shared_layer_keeps_being_one_with_one_quantizer():
    model = Shared()
    assert quantize_layers_(model, model.backbone, QuantConfig()) == 1
    assert model.levels[0] is model.levels[1]
    assert isinstance(model.levels[0], QuantConv2d)


def test_layers_whose_forward_does_not_run_stay_float_and_are_listed():
    model = Shared()
    quantize_layers_(model, model.backbone, QuantConfig())
    assert type(model.backbone[0]) is nn.Linear
    assert not isinstance(model.attention.out_proj, QuantLinear)
    assert isinstance(model.deformable, DeformConv2d)
    assert {name
            for name, _ in float_modules(model)} == {
                'backbone.0', 'attention', 'attention.out_proj', 'deformable'
            }


@pytest.mark.parametrize('layer', [
    NormedLinear(4, 4),
    NormedConv2d(4, 4, 1),
    ConvWS2d(4, 4, 1),
    ConvAWS2d(4, 4, 1),
    Conv2dAdaptivePadding(4, 4, 1),
])
def test_layers_that_compute_something_else_stay_float(layer):
    model = nn.Sequential(layer)
    assert quantize_layers_(model, nn.Identity(), QuantConfig()) == 0
    assert [name for name, _ in float_modules(model)] == ['0']


@pytest.mark.parametrize('name, unrun', [
    ('tood/tood_r50_fpn_1x_coco.py', 'cls_decomp.reduction_conv.conv'),
    ('ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', 'aux_reg_branches.5.4'),
    ('yolact/yolact_r50_1xb8-55e_coco.py', 'segm_branch.segm_conv'),
    ('queryinst/queryinst_r50_fpn_1x_coco.py', 'mask_head.4.conv_logits'),
])
def test_all_that_is_quantized_runs_in_a_prediction(name, unrun):
    """And what does not run, in training only or read by others, is kept."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    cfg = load_config(f'mmdet::{name}', None).model
    cfg.backbone.init_cfg = None
    model = MODELS.build(cfg).eval()
    model.init_weights()
    # Random boxes would leave the image.
    for param in model.parameters():
        param.data *= .1
    model.test_cfg.update(score_thr=0.)
    quantize_layers_(model, model.backbone, QuantConfig())
    ran = set()
    twins = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, QuantConv2d))
    }
    for twin in twins:
        twin.register_forward_hook(lambda module, *_: ran.add(module))
    sample = DetDataSample(
        metainfo=dict(
            ori_shape=SIZE,
            img_shape=SIZE,
            scale_factor=(1., 1.),
            batch_input_shape=SIZE))
    with torch.no_grad():
        model.test_step(
            dict(inputs=[torch.rand(3, *SIZE)], data_samples=[sample]))
    assert [name for twin, name in twins.items() if twin not in ran] == []
    assert any(name.endswith(unrun) for name, _ in float_modules(model))


def test_mmcvs_plain_layers_are_quantized():
    model = nn.Sequential(wrappers.Linear(4, 4), wrappers.Conv2d(4, 4, 1))
    assert quantize_layers_(model, nn.Identity(), QuantConfig()) == 2


def test_one_quantizer_takes_its_range_over_all_levels():
    from isvit_det.core.layers import observe
    model = Shared()
    quantize_layers_(model, model.backbone, QuantConfig(percentiles=(1., )))
    with observe(model.levels):
        model.levels[0](torch.full((1, 4, 2, 2), -1.))
        model.levels[1](torch.full((1, 4, 3, 3), 14.))
    quantizer = model.levels[1].input_quantizer
    assert quantizer.scale.item() == pytest.approx(1.)
    with precision(quantizer, weights=False, acts=True):
        assert quantizer(torch.tensor([-1., 14.])).tolist() == [-1., 14.]


@pytest.mark.parametrize('change, words', [
    (dict(base='MaskRCNNN'), ['model.base', 'MaskRCNNN']),
    (dict(backbone=dict(type='ResNet', depth=18)), ['ResNet', 'QuantSwin']),
    (dict(backbone=dict(type='isvit_det.QuantSwinTransformer', quant={})),
     ['model.backbone.quant', 'model.quant']),
    (dict(quant=dict(scope='neck')), ['quant.scope', 'neck', 'detector']),
])
def test_what_cannot_be_built_is_named(float_config, change, words):
    with pytest.raises((QuantError, KeyError)) as caught:
        quantized(float_config, **change)
    assert all(word in str(caught.value) for word in words)


def test_scope_detector_that_finds_nothing_is_an_error(float_config):
    backbone = dict(
        float_config.backbone, type='isvit_det.QuantSwinTransformer')

    @MODELS.register_module(name='NothingElse', force=True)
    def nothing_else(backbone):
        holder = nn.Module()
        holder.backbone = MODELS.build(backbone)
        return holder

    with pytest.raises(QuantError, match='found no Conv2d'):
        quantized_detector('isvit_det.NothingElse', backbone,
                           dict(scope='detector'))
