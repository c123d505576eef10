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
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import nn

from isvit_det.core.errors import QuantError
from isvit_det.core.layers import (QuantConv2d, QuantLinear, precision,
                                   quantized_layers)
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.detector import (float_modules, quantize_layers_,
                                quantized_detector)
from isvit_det.engine.heads import calibrate_heads_, find_products
from isvit_det.engine.images import Images
from isvit_det.inputs.configs import load_config
from isvit_det.registry import MODELS
from tests.engine.tiny import FLOAT
from tests.marks import slow

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
    maps, expected = model.extract_feat(x), source.extract_feat(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected))
    for one, other in zip(model.rpn_head(maps), source.rpn_head(expected)):
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
    # The attention's last layer is one more.
    assert quantize_layers_(model, model.backbone, QuantConfig()) == 2
    assert model.levels[0] is model.levels[1]
    assert isinstance(model.levels[0], QuantConv2d)


def test_what_is_no_plain_layer_stays_float_and_is_listed():
    model = Shared()
    quantize_layers_(model, model.backbone, QuantConfig())
    assert type(model.backbone[0]) is nn.Linear
    assert isinstance(model.deformable, DeformConv2d)
    assert {name
            for name, _ in float_modules(model)
            } == {'backbone.0', 'attention', 'deformable'}


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


class OneImage(Images):
    """An image of noise."""

    def __len__(self):
        return 1

    def read(self, index):
        sample = DetDataSample(
            metainfo=dict(
                ori_shape=SIZE,
                img_shape=SIZE,
                scale_factor=(1., 1.),
                batch_input_shape=SIZE))
        torch.manual_seed(index)
        return dict(inputs=[torch.rand(3, *SIZE)], data_samples=[sample])


def shallow(name):
    """A detector of MMDetection on a shallow backbone, random weights."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    cfg = load_config(f'mmdet::{name}', None).model
    cfg.backbone.init_cfg = None
    if cfg.backbone.type == 'ResNet':
        cfg.backbone.depth = 18
        channels = [64 * 2**i for i in cfg.backbone.out_indices]
        for part in (cfg.get('neck'), cfg.get('panoptic_head')):
            if part is not None:
                part.in_channels = channels
    if cfg.get('mask_head', {}).get('num_grids'):
        cfg.mask_head.num_grids = [8, 6, 4, 3, 2]
        cfg.mask_head.feat_channels = 64
    if 'num_proposals' in cfg.get('rpn_head', {}):
        cfg.rpn_head.num_proposals = 10
        cfg.test_cfg.rcnn.max_per_img = 10
    model = MODELS.build(cfg).eval()
    model.init_weights()
    # Random boxes would leave the image, or be of no size.
    for name, param in model.named_parameters():
        param.data *= .1
        if name.endswith('conv_reg.bias'):
            param.data += 1
    model.test_cfg.update(score_thr=0.)
    return model


# What does not run in a prediction, or is read by others, and what multiplies
# activations by activations, by a part of its name.
@pytest.mark.parametrize('name, unrun, product', [
    ('tood/tood_r50_fpn_1x_coco.py', 'cls_decomp.reduction_conv.conv',
     'cls_decomp'),
    slow('ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', 'aux_reg_branches.5.4',
         'cross_attn'),
    ('yolact/yolact_r50_1xb8-55e_coco.py', 'segm_branch.segm_conv',
     'mask_head'),
    slow('queryinst/queryinst_r50_fpn_1x_coco.py', 'mask_head.4.conv_logits',
         'instance_interactive_conv'),
    ('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', None,
     'mask_head'),
    ('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', None, 'bbox_head'),
    ('solov2/solov2-light_r50_fpn_ms-3x_coco.py', None, 'mask_head'),
    ('maskformer/maskformer_r50_ms-16xb1-75e_coco.py', 'attn.out_proj',
     'panoptic_head'),
])
def test_what_no_prediction_runs_is_turned_back_and_products_are_found(
        name, unrun, product):
    model, images = shallow(name), OneImage()
    quantize_layers_(model, model.backbone, QuantConfig())
    model.float_layers = {}
    model.products = find_products(model, images)
    assert any(found.endswith(product) for found in model.products)
    calibrate_heads_(model, images, SOSConfig(correct_heads=False),
                     MMLogger.get_current_instance())
    if unrun is not None:
        assert any(found.endswith(unrun) for found in model.float_layers)
    listed = {found for found, _ in float_modules(model)}
    assert listed >= {*model.float_layers, *model.products}
    for module in model.float_layers:
        assert type(model.get_submodule(module)) in (nn.Linear, nn.Conv2d)
    # What is left has run.
    assert all(
        layer.input_quantizer.is_fitted for layer in quantized_layers(model))


def test_the_config_may_name_layers_that_stay_float(float_config):
    layers = {'roi_head.bbox_head.fc_cls': 'a choice'}
    model = quantized(float_config, float_layers=layers)
    assert type(model.roi_head.bbox_head.fc_cls) is nn.Linear
    assert isinstance(model.roi_head.bbox_head.fc_reg, QuantLinear)
    assert model.float_layers == layers
    # The config of one scope serves the other.
    quantized(float_config, 'backbone', float_layers=layers)
    for wrong in ({
            'roi_head': ''
    }, {
            'nowhere': ''
    }, {
            'backbone.patch_embed.projection': ''
    }):
        with pytest.raises(QuantError, match='model.float_layers: .*are no'):
            quantized(float_config, float_layers=wrong)
    with pytest.raises(QuantError, match='model.float_layers: .* no dict'):
        quantized(float_config, float_layers=['neck'])


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

    with pytest.raises(QuantError, match='there is no Conv2d'):
        quantized_detector('isvit_det.NothingElse', backbone,
                           dict(scope='detector'))


def test_the_engine_is_no_part_of_a_packed_state(float_config):
    made = [
        quantized(float_config, engine=engine)
        for engine in ('native', 'simulation')
    ]
    assert [model.runtime.engine for model in made] == ['native', 'simulation']
    for model in made:
        assert model.state_dict().keys() == made[0].state_dict().keys()
        assert model.quant_config == made[0].quant_config
    with pytest.raises(QuantError, match="model.engine: 'fast'"):
        quantized(float_config, engine='fast')
