"""The COCO configs: all build and run, and train as they say."""
import copy
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmcv import imwrite
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from isvit_det.backbones.vit import ARCHS
from isvit_det.core.settings import QuantConfig
from isvit_det.inputs.configs import load_config
from tests.marks import slow

CONFIGS = Path(__file__).parents[1] / 'configs'
VIT = sorted(path.name for path in (CONFIGS / 'vit').glob('*.py'))
SWIN = sorted(path.name for path in (CONFIGS / 'swin').glob('*.py'))
FLOAT = [f'vit/{name}' for name in VIT] + [f'swin/{name}' for name in SWIN]
QUANTIZED = sorted(path.name for path in (CONFIGS / 'isvit').glob('*.py'))
FULL = [name for name in QUANTIZED if 'w4a4' in name]
# Only built, to save time: Swin-B is Swin-S with more channels.
LARGE = [name for name in FULL if '_swin-b' in name]
# The others have more channels, blocks or heads than these.
SMALLEST = re.compile('_(swin-t|deit-t)-|^mask-rcnn_vit-b-')
BITS = ('w3a3', 'w4a4', 'w6a6', 'w8a8')
ARCH_OF = {
    'deit-t': 'tiny',
    'deit-s': 'small',
    'deit-b': 'base',
    'vit-b': 'base'
}
# Channels, depth of the third stage, heads, drop path, ImageNet weights.
SWIN_OF = {
    'swin-t': (96, 6, 3, .2, 'swin_tiny_patch4_window7_224'),
    'swin-s': (96, 18, 3, .2, 'swin_small_patch4_window7_224'),
    'swin-b': (128, 18, 4, .3, 'swin_base_patch4_window7_224')
}
SIZE = (64, 64)


@functools.lru_cache(maxsize=None)
def read(path):
    """A config, not to be changed."""
    return load_config(str(path), None)


def first_base(name):
    """The float config that a quantized one inherits."""
    base = re.search(r"'(.+?)'", (CONFIGS / 'isvit' / name).read_text())[1]
    return base if '::' in base else (CONFIGS / 'isvit' / base).resolve()


def load_small(path):
    """A config with few regions, for which images are hardly padded."""
    cfg = copy.deepcopy(read(path))
    model = cfg.model
    model.backbone.init_cfg = None
    model.data_preprocessor.pad_size_divisor = 32
    model.test_cfg.rpn.max_per_img = 10
    model.test_cfg.rcnn.update(score_thr=0., max_per_img=4)
    model.train_cfg.rpn_proposal.max_per_img = 20
    stages = model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 8
    return cfg


def make_batch():
    """An image with an object, as a data loader gives it."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, *SIZE), generator=generator).byte()
    sample = DetDataSample(
        metainfo=dict(
            img_id=0, img_shape=SIZE, ori_shape=SIZE, scale_factor=(1., 1.)))
    mask = np.zeros((1, *SIZE), np.uint8)
    mask[:, 10:50, 20:60] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[20., 10., 60., 50.]]),
        labels=torch.tensor([3]),
        masks=BitmapMasks(mask, *SIZE))
    return dict(inputs=[image], data_samples=[sample])


@pytest.fixture(
    scope='module',
    params=[
        name if SMALLEST.search(name) else slow(name) for name in FULL
        if name not in LARGE
    ])
def float_one(request):
    """The float model of a w4a4 config, with both configs' names."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    cfg = load_small(first_base(request.param))
    return request.param, cfg, MODELS.build(copy.deepcopy(cfg.model))


def test_a_quantized_config_runs_as_its_float_one(float_one):
    name, _, model = float_one
    cfg = load_small(CONFIGS / 'isvit' / name)
    quantized = MODELS.build(cfg.model)
    quantized.load_state_dict(model.state_dict())
    assert quantized.quant_config.bits == 'w4a4'
    assert 'Quant' in type(quantized.backbone).__name__
    found, expected = (
        one.eval().test_step(make_batch())[0].pred_instances
        for one in (quantized, model))
    assert len(expected) == 4 and expected.masks.shape == (4, *SIZE)
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        assert torch.equal(found[key], expected[key])


def test_the_detector_of_few_images_runs_as_its_float_one():
    init_default_scope('mmdet')
    torch.manual_seed(0)
    folder, name = CONFIGS / 'coco_subset', 'mask-rcnn_deit-t-p16_sfpn'
    model = MODELS.build(load_small(folder / f'{name}_320px_coco60.py').model)
    split = {}
    for test in ('', '_learned'):
        cfg = load_small(folder / f'{name}_isvit-w4a4_320px_coco60{test}.py')
        split[test] = cfg.test_dataloader.dataset
        quantized = MODELS.build(cfg.model)
        quantized.load_state_dict(model.state_dict())
        found, expected = (
            one.eval().test_step(make_batch())[0].pred_instances
            for one in (quantized, model))
        assert torch.equal(found.scores, expected.scores)
    # One is tested on other images, one on those that were learned.
    assert 'val2017' in split[''].ann_file
    assert 'train2017' in split['_learned'].ann_file
    assert split['_learned'].indices == 60


@pytest.mark.parametrize('name', LARGE)
def test_a_large_quantized_config_takes_the_weights_of_its_float_one(name):
    init_default_scope('mmdet')
    model = MODELS.build(load_small(first_base(name)).model)
    quantized = MODELS.build(load_small(CONFIGS / 'isvit' / name).model)
    quantized.load_state_dict(model.state_dict())
    assert 'Quant' in type(quantized.backbone).__name__


def test_training_reaches_every_parameter(float_one):
    """Without that, distributed training stops."""
    _, _, model = float_one
    batch = model.data_preprocessor(make_batch(), True)
    losses = model.train().loss(batch['inputs'], batch['data_samples'])
    total, logged = model.parse_losses(losses)
    assert torch.isfinite(total) and 'loss_rpn_cls' in logged
    total.backward()
    assert [
        name for name, param in model.named_parameters()
        if param.requires_grad and param.grad is None
    ] == []
    model.zero_grad()


def layer_mult(name):
    """Detectron2's layer-wise decay for a ViT of 12 blocks, in our names."""
    if name.startswith(('backbone.pos_embed', 'backbone.patch_embed')):
        return .7**13
    if name.startswith('backbone.blocks.'):
        return .7**(12 - int(name.split('.')[2]))
    return 1.


def test_the_optimizer_is_what_the_config_says(float_one):
    name, cfg, model = float_one
    if '::' in str(first_base(name)):
        pytest.skip('of mmdet')
    is_vit = '_vit-b' in name
    exempt = ['bias', 'pos_embed']
    if 'swin' in name:
        exempt = ['relative_position_bias_table']
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    assert type(wrapper.optimizer) is torch.optim.AdamW
    names = {param: name for name, param in model.named_parameters()}
    undecayed = {
        f'{name}.{key}'
        for name, module in model.named_modules()
        for key, _ in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or key in exempt
    }
    seen = set()
    for group in wrapper.optimizer.param_groups:
        for param in group['params']:
            key = names[param]
            seen.add(key)
            decay = 0. if key in undecayed else .1 if is_vit else .05
            assert group['weight_decay'] == pytest.approx(decay), key
            mult = layer_mult(key) if is_vit else 1.
            assert group['lr'] == pytest.approx(1e-4 * mult), key
    assert seen == set(names.values()) and len(undecayed) < len(names)


def test_there_are_thirteen_detectors_at_four_bit_widths():
    vits = [
        f'{detector}_{model}-p16_sfpn'
        for detector in ('mask-rcnn', 'cascade-mask-rcnn') for model in ARCH_OF
    ]
    swins = [
        f'cascade-mask-rcnn_{model}-p4-w7_fpn_4conv1fc' for model in SWIN_OF
    ]
    for names, stems in ((VIT, vits), (SWIN, swins)):
        assert [name.rsplit('_', 2)[0] for name in names] == sorted(stems)
    stems = vits + swins
    stems += [f'mask-rcnn_swin-{size}-p4-w7_fpn' for size in 'ts']
    assert QUANTIZED == sorted(f'{stem}_isvit-{bits}_coco.py' for stem in stems
                               for bits in BITS)


@pytest.mark.parametrize('name', VIT)
def test_a_vit_config_is_what_its_name_says(name):
    model = read(CONFIGS / 'vit' / name).model
    arch = ARCH_OF[name.split('_')[1][:-len('-p16')]]
    source = model.backbone.init_cfg.checkpoint
    assert model.type == ('CascadeRCNN' if 'cascade' in name else 'MaskRCNN')
    assert model.backbone.arch == arch
    assert model.neck.in_channels == ARCHS[arch][0]
    if 'deit' in name:
        assert model.backbone.type == 'isvit_det.DeiT'
        assert source == f'timm://deit_{arch}_patch16_224.fb_in1k'
        assert source[len('timm://'):] in timm.list_pretrained()
    else:
        assert model.backbone.type == 'isvit_det.VisionTransformer'
        assert source.endswith(f'mae_pretrain_vit_{arch}.pth')


@pytest.mark.parametrize('name', SWIN)
def test_a_swin_config_is_the_released_detector(name):
    cfg = read(CONFIGS / 'swin' / name)
    model, backbone = cfg.model, cfg.model.backbone
    arch = name.split('_')[1][:-len('-p4-w7')]
    channels, depth, heads, drop_path, weights = SWIN_OF[arch]
    assert (model.type, backbone.type) == ('CascadeRCNN', 'SwinTransformer')
    assert backbone.embed_dims == channels and backbone.window_size == 7
    assert model.neck.in_channels == [channels << i for i in range(4)]
    assert backbone.depths == [2, 2, depth, 2]
    assert backbone.num_heads == [heads << i for i in range(4)]
    assert backbone.drop_path_rate == drop_path
    assert backbone.convert_weights
    assert backbone.init_cfg.checkpoint.endswith(f'/{weights}.pth')
    for head in model.roi_head.bbox_head:
        assert head.type == 'ConvFCBBoxHead' and head.norm_cfg.type == 'BN'
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert not head.reg_class_agnostic and head.reg_decoded_bbox
        assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.)
    assert cfg.sync_bn == 'torch'
    for rpn, most in ((model.test_cfg.rpn, 1000),
                      (model.train_cfg.rpn_proposal, 2000)):
        assert rpn == dict(
            nms_pre=most,
            max_per_img=most,
            nms=dict(type='nms', iou_threshold=.7),
            min_bbox_size=-1)
    assert model.test_cfg.rcnn == dict(
        score_thr=.05,
        nms=dict(type='nms', iou_threshold=.5),
        max_per_img=100,
        mask_thr_binary=.5)


@pytest.mark.parametrize('name', FULL)
def test_other_bits_change_nothing_else(name):
    expected = read(CONFIGS / 'isvit' / name)
    for bits in BITS:
        path = CONFIGS / 'isvit' / name.replace('w4a4', bits)
        cfg = copy.deepcopy(read(path))
        assert QuantConfig.from_dict(cfg.model.quant).bits == bits
        assert cfg.model.quant.scope == 'detector'
        assert cfg.model.backbone.init_cfg is None
        cfg.model.quant.bits = 'w4a4'
        assert cfg.to_dict() == expected.to_dict()


@pytest.mark.parametrize('name', FLOAT)
def test_the_schedule_ends_with_the_training(name):
    cfg = read(CONFIGS / name)
    epochs = cfg.train_cfg.max_epochs
    times = cfg.train_dataloader.dataset.get('times', 1)
    assert epochs * times == (100 if 'lsj-100e' in name else 36)
    assert cfg.auto_scale_lr.base_batch_size == (64 if times > 1 else 16)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.)
    warmup, decay = (
        PARAM_SCHEDULERS.build(dict(settings, optimizer=optimizer))
        for settings in cfg.param_scheduler)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(.001)
    for _ in range(warmup.end):
        warmup.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(1.)
    assert decay.end == epochs and decay.by_epoch and not warmup.by_epoch
    for _ in range(epochs - 1):
        decay.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(.01)


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """A folder laid out as COCO, of two images per split."""
    root = tmp_path_factory.mktemp('coco')
    corners = [[100, 90, 180, 90, 180, 170, 100, 170]]
    for split in ('train2017', 'val2017'):
        images = [
            dict(id=i, file_name=f'{i}.jpg', width=300, height=240)
            for i in (1, 2)
        ]
        annotations = [
            dict(
                id=image['id'],
                image_id=image['id'],
                category_id=1,
                bbox=[100, 90, 80, 80],
                area=6400,
                iscrowd=0,
                segmentation=corners) for image in images
        ]
        content = dict(
            images=images,
            annotations=annotations,
            categories=[dict(id=1, name='person')])
        path = root / f'annotations/instances_{split}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        for image in images:
            picture = np.random.default_rng(0).integers(
                256, size=(240, 300, 3), dtype=np.uint8)
            imwrite(picture, str(root / split / image['file_name']))
    return root


@pytest.mark.parametrize('name', FLOAT)
def test_the_data_of_a_config_load(name, coco):
    init_default_scope('mmdet')
    cfg = copy.deepcopy(read(CONFIGS / name))
    largest = 1024 if 'lsj' in name else 1333
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        dataset = loader.dataset
        dataset.get('dataset', dataset).data_root = str(coco)
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    assert len(batch['inputs']) == 2
    assert max(max(image.shape) for image in batch['inputs']) <= largest
    batch = preprocess(batch, True)
    if 'lsj' in name:
        assert batch['inputs'].shape == (2, 3, 1024, 1024)
    for sample in batch['data_samples']:
        masks = sample.gt_instances.masks
        assert masks.masks.shape[1:] == batch['inputs'].shape[2:]
    for split in ('val', 'test'):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        image = dataset[0]['inputs']
        assert image.shape[1:] == ((819, 1024) if 'lsj' in name else
                                   (800, 1000))
        evaluator = cfg[f'{split}_evaluator']
        evaluator.ann_file = str(coco / 'annotations/instances_val2017.json')
        assert METRICS.build(evaluator).metrics == ['bbox', 'segm']
