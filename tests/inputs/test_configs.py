"""Configs: the shipped ones load, and float ones become quantized."""
import copy
from pathlib import Path

import pytest
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.registry import init_default_scope

from isvit_det.checkpoint import read_checkpoint
from isvit_det.core.errors import QuantError
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.evaluation.tasks import metric_configs
from isvit_det.inputs.configs import (DETECTOR, HOOK, config_errors,
                                      configure_hook_, load_config,
                                      quantize_config_)
from isvit_det.registry import MODELS

CONFIGS = Path(__file__).parents[2] / 'configs'
COCO = sorted(path.name for path in (CONFIGS / 'isvit').glob('*.py'))
SWIN = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'


@pytest.mark.parametrize('name', COCO)
def test_a_coco_config_is_what_its_name_says(name):
    cfg = load_config(str(CONFIGS / 'isvit' / name), None)
    model = cfg.model
    quant = QuantConfig.from_dict(model.quant)
    base = 'CascadeRCNN' if 'cascade' in name else 'MaskRCNN'
    assert model.type == DETECTOR and model.base == base
    assert quant.bits == name.split('isvit-')[1][:4]
    assert quant.scope == 'detector' and quant.method == 'isvit'
    if 'swin' in name:
        assert model.backbone.depths == [
            2, 2, 6 if 'swin-t' in name else 18, 2
        ]
    # Nothing is downloaded unless somebody asks for it.
    assert model.backbone.init_cfg is None and cfg.load_from is None
    hook, = (hook for hook in cfg.custom_hooks if hook.type == HOOK)
    sos = SOSConfig.from_dict(hook.sos, quant)
    assert sos.num_images == 1024 and sos.lr == 4e-5
    assert sos.iters == (1000 if quant.weight_bits < 6 else 200)
    dataset = cfg.train_dataloader.dataset
    assert 'train2017' in dataset.get('dataset', dataset).ann_file


@pytest.mark.parametrize('model', [
    'mask-rcnn_swin-mini_fpn', 'mask-rcnn_deit-mini_sfpn',
    'cascade-mask-rcnn_swin-mini_fpn'
])
@pytest.mark.parametrize('bits', ['w3a3', 'w4a4'])
def test_a_drawn_config_takes_the_float_weights_beside_it(model, bits):
    cfg = load_config(
        str(CONFIGS / f'drawn/{model}_isvit-{bits}_drawn.py'), None)
    assert QuantConfig.from_dict(cfg.model.quant).bits == bits
    weights = Path(cfg.load_from)
    assert weights.parent == CONFIGS / 'drawn'
    assert weights.stat().st_size < 16e6
    init_default_scope('mmdet')
    MODELS.build(cfg.model).load_state_dict(
        read_checkpoint(weights)['state_dict'])


def test_a_float_config_becomes_the_quantized_one():
    cfg = load_config(SWIN, None)
    quantize_config_(cfg, dict(bits='w3a4'))
    assert cfg.model.type == DETECTOR and cfg.model.base == 'MaskRCNN'
    assert cfg.model.backbone.type == 'isvit_det.QuantSwinTransformer'
    assert cfg.model.quant == dict(bits='w3a4')


def test_settings_given_go_over_those_of_the_config():
    cfg = load_config(SWIN, {'model.quant.scope': 'detector'})
    quantize_config_(cfg, dict(weight_bits=5))
    quantize_config_(cfg, dict(bits='w3a4'))
    quant = QuantConfig.from_dict(cfg.model.quant)
    assert (quant.weight_bits, quant.act_bits) == (3, 4)
    assert quant.scope == 'detector'
    quantize_config_(cfg, dict(weight_bits=6))
    quant = QuantConfig.from_dict(cfg.model.quant)
    assert (quant.weight_bits, quant.act_bits) == (6, 4)
    # All settings of a packed file over a config with bits.
    quantize_config_(cfg, QuantConfig(weight_bits=7).to_dict())
    assert QuantConfig.from_dict(cfg.model.quant).bits == 'w7a4'


def test_the_hook_is_added_once_and_keeps_what_was_not_given():
    cfg = load_config(SWIN, None)
    quantize_config_(cfg, {})
    cfg.custom_hooks = [dict(type='EMAHook')]
    configure_hook_(cfg, dict(num_images=7), store_gb=2.)
    configure_hook_(cfg, dict(seed=3))
    assert [hook['type'] for hook in cfg.custom_hooks] == ['EMAHook', HOOK]
    assert cfg.custom_hooks[1]['sos'] == dict(num_images=7, seed=3)
    assert cfg.custom_hooks[1]['store_gb'] == 2.


@pytest.mark.parametrize('given, iters', [({}, 0), (dict(iters=5), 5)])
def test_a_method_that_does_not_optimise_takes_no_iterations(given, iters):
    cfg = Config(
        dict(
            model=dict(type=DETECTOR, quant=dict(method='repq')),
            custom_hooks=[dict(type=HOOK, sos=dict(iters=100, lr=1e-3))]))
    configure_hook_(cfg, given)
    quant = QuantConfig.from_dict(cfg.model.quant)
    assert SOSConfig.from_dict(cfg.custom_hooks[0].sos, quant).iters == iters


@pytest.mark.parametrize('name, message', [
    ('nowhere.py', 'there is no file nowhere.py'),
    ('mmdet::swin/nowhere.py', "mmdet has no config 'swin/nowhere.py'; give "
     'mmdet::FOLDER/NAME.py'),
    ('isvit_det::drawn/nowhere.py',
     "isvit_det has no config 'drawn/nowhere.py'"),
    ('mmdet::swin', "mmdet has no config 'swin'"),
    ('mmdet::', "mmdet has no config ''"),
    ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
     "'ResNet' is not supported; expected one of .'SwinTransformer'"),
])
def test_what_cannot_be_quantized_is_named(name, message):
    with pytest.raises(QuantError, match=message):
        quantize_config_(load_config(name, None), {})


@pytest.mark.parametrize('name, words', [
    ('mmpretrain.SwinTransformer', "MMDetection's 'SwinTransformer'"),
    ('mmcls.SwinTransformer', "MMDetection's 'SwinTransformer'"),
    ('mmpretrain.SwinTransformerV2', 'version 2 is another network'),
    ('mmpretrain.VisionTransformer', "use 'isvit_det.VisionTransformer'"),
    ('mmpretrain.DistilledVisionTransformer', "use 'isvit_det.DeiT'"),
    ('mmpretrain.TIMMBackbone', "the last two take timm's weights"),
    ('TIMMBackbone', "the last two take timm's weights"),
])
def test_backbones_of_other_packages_name_what_to_use(name, words):
    """Whether they are installed or not."""
    cfg = load_config(SWIN, {'model.backbone.type': name})
    with pytest.raises(QuantError, match=words) as caught:
        quantize_config_(cfg, {})
    assert name in str(caught.value) and '\n' not in str(caught.value)
    init_default_scope('mmdet')
    model = dict(
        type=DETECTOR, base='RetinaNet', backbone=dict(type=name), quant={})
    with pytest.raises(QuantError, match=words):
        MODELS.build(model)


def test_custom_imports_that_fail_are_named(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("custom_imports = dict(imports=['mmpretrain.nowhere'])\n"
                    "model = dict(type='RetinaNet')\n")
    with pytest.raises(QuantError, match="'SwinTransformer'") as caught:
        load_config(str(path), None)
    assert "custom_imports: ['mmpretrain.nowhere']" in str(caught.value)


def test_a_config_that_a_detr_was_built_from_can_be_quantized():
    """MMDetection writes into it what it refuses to find there."""
    cfg = load_config('mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py', None)
    cfg.model.bbox_head.update(
        share_pred_layer=False, num_pred_layer=7, as_two_stage=True)
    cfg.model.dn_cfg.update(
        num_classes=80, embed_dims=256, num_matching_queries=900)
    quantize_config_(cfg, {})
    again = load_config('mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
                        None)
    for part in ('bbox_head', 'dn_cfg'):
        assert cfg.model[part] == again.model[part]


def test_a_package_that_a_config_needs_is_named():
    for missing in ('transformers is not installed, please install it.',
                    'Failed to import `cityscapesscripts`.'):
        with pytest.raises(QuantError, match=missing), config_errors():
            raise RuntimeError(missing)
    # Of anything else the place is named.
    with pytest.raises(
            QuantError,
            match=r'RuntimeError: a mistake \(test_configs.py, line \d+\)'):
        with config_errors():
            raise RuntimeError('a mistake')


def test_wrong_settings_are_refused_and_change_nothing():
    cfg = load_config(SWIN, None)
    quantize_config_(cfg, {})
    before = copy.deepcopy(cfg.model)
    for quant in (dict(bits='w9a9'), dict(bit=4), dict(scope='head')):
        with pytest.raises(QuantError):
            quantize_config_(cfg, quant)
    assert cfg.model == before


COCO_METRIC = dict(type='CocoMetric', ann_file='a.json')


@pytest.mark.parametrize('evaluator, names', [
    (COCO_METRIC, ['CocoMetric']),
    (dict(type=CocoMetric, metric='segm'), [CocoMetric]),
    ([dict(type='DumpProposals'), COCO_METRIC
      ], ['DumpProposals', 'CocoMetric']),
    (dict(metrics=[COCO_METRIC]), ['CocoMetric']),
    (dict(type='MultiDatasetsEvaluator',
          metrics=2 * [COCO_METRIC]), ['CocoMetric', 'CocoMetric']),
])
def test_an_evaluator_may_have_any_metrics(evaluator, names):
    found = metric_configs(Config(dict(test_evaluator=evaluator)))
    assert [config['type'] for config in found] == names


@pytest.mark.parametrize('evaluator', [[], {}, None])
def test_a_config_without_an_evaluator_is_refused(evaluator):
    with pytest.raises(QuantError, match='test_evaluator: the config has'):
        metric_configs(Config(dict(test_evaluator=evaluator)))
