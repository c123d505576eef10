"""convert_swin_od against a plain reading of the original layout."""
import math

import pytest
import torch
from mmdet.datasets import CocoDataset
from torch.nn import functional as F

from isvit_det.commands.convert_swin_od import main
from isvit_det.inputs.configs import load_config
from tests.engine.tiny import REPO
from tests.tools.original import (assert_close, build, check_input,
                                  check_refused, check_rpn, conv, deconv,
                                  layer_norm, linear)

WINDOW, SHIFT, HEADS = 7, 3, (1, 2, 2, 4)
EMBED, DEPTH, STAGES = 8, 2, 4
CHANNELS, HIDDEN, CLASSES = 16, 24, 80
# By number of cascade stages; 0 is Mask R-CNN.
NAMES = {
    0:
    'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    3:
    str(REPO / 'configs/swin'
        '/cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc_ms-crop-3x_coco.py')
}
BIAS = 'backbone.layers.1.blocks.0.mlp.fc2.bias'
MERGING = 'backbone.layers.0.downsample.reduction.weight'
TABLE = 'backbone.layers.2.blocks.1.attn.relative_position_bias_table'
MEAN = 'roi_head.bbox_head.1.shared_convs.2.bn.running_mean'
INDEX = 'backbone.layers.0.blocks.1.attn.relative_position_index'
MASK = 'backbone.layers.0.blocks.1.attn_mask'


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    """Small copies of the configs, by number of stages."""
    folder = tmp_path_factory.mktemp('configs')
    for stages, name in NAMES.items():
        cfg = load_config(name, None)
        shrink_(cfg.model)
        cfg.dump(folder / f'{stages}.py')
    return {stages: str(folder / f'{stages}.py') for stages in NAMES}


def shrink_(model):
    model.backbone.update(
        embed_dims=EMBED, depths=[DEPTH] * STAGES, num_heads=HEADS)
    model.neck.update(
        in_channels=[EMBED << i for i in range(STAGES)], out_channels=CHANNELS)
    model.rpn_head.update(in_channels=CHANNELS, feat_channels=CHANNELS)
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.update(in_channels=CHANNELS, fc_out_channels=HIDDEN)
        if 'num_shared_convs' in head:
            head.conv_out_channels = CHANNELS
    model.roi_head.mask_head.update(
        in_channels=CHANNELS, conv_out_channels=CHANNELS)


def original(stages):
    """Lively random weights in the original's names."""
    torch.manual_seed(0)
    state = {}

    def add(name, *shape, bias=True):
        fan_in = math.prod(shape[1:])
        state[f'{name}.weight'] = torch.randn(shape) / math.sqrt(fan_in)
        if bias:
            state[f'{name}.bias'] = .3 * torch.randn(shape[0])

    def add_norm(name, channels):
        state[f'{name}.weight'] = 1 + .3 * torch.randn(channels)
        state[f'{name}.bias'] = .3 * torch.randn(channels)

    def add_conv(name, channels, kernel):
        add(f'{name}.conv', CHANNELS, channels, kernel, kernel)

    add('backbone.patch_embed.proj', EMBED, 3, 4, 4)
    add_norm('backbone.patch_embed.norm', EMBED)
    for i, heads in enumerate(HEADS):
        dims = EMBED << i
        for j in range(DEPTH):
            block = f'backbone.layers.{i}.blocks.{j}'
            add_norm(f'{block}.norm1', dims)
            state[f'{block}.attn.relative_position_bias_table'] = torch.randn(
                (2 * WINDOW - 1)**2, heads)
            add(f'{block}.attn.qkv', 3 * dims, dims)
            add(f'{block}.attn.proj', dims, dims)
            add_norm(f'{block}.norm2', dims)
            add(f'{block}.mlp.fc1', 4 * dims, dims)
            add(f'{block}.mlp.fc2', dims, 4 * dims)
        if i < STAGES - 1:
            merging = f'backbone.layers.{i}.downsample'
            add(f'{merging}.reduction', 2 * dims, 4 * dims, bias=False)
            add_norm(f'{merging}.norm', 4 * dims)
        add_norm(f'backbone.norm{i}', dims)
        add_conv(f'neck.lateral_convs.{i}', dims, 1)
        add_conv(f'neck.fpn_convs.{i}', CHANNELS, 3)
    add('rpn_head.rpn_conv', CHANNELS, CHANNELS, 3, 3)
    add('rpn_head.rpn_cls', 3, CHANNELS, 1, 1)
    add('rpn_head.rpn_reg', 12, CHANNELS, 1, 1)
    for stage in stages_of(stages):
        box = f'roi_head.bbox_head{stage}'
        for i in range(4 if stages else 0):
            conv = f'{box}.shared_convs.{i}'
            add(f'{conv}.conv', CHANNELS, CHANNELS, 3, 3, bias=False)
            add_norm(f'{conv}.bn', CHANNELS)
            state[f'{conv}.bn.running_mean'] = .3 * torch.randn(CHANNELS)
            state[f'{conv}.bn.running_var'] = .5 + torch.rand(CHANNELS)
            state[f'{conv}.bn.num_batches_tracked'] = torch.tensor(7)
        add(f'{box}.shared_fcs.0', HIDDEN, CHANNELS * 49)
        if not stages:
            add(f'{box}.shared_fcs.1', HIDDEN, HIDDEN)
        add(f'{box}.fc_cls', CLASSES + 1, HIDDEN)
        add(f'{box}.fc_reg', 4 * CLASSES, HIDDEN)
        mask = f'roi_head.mask_head{stage}'
        for i in range(4):
            add_conv(f'{mask}.convs.{i}', CHANNELS, 3)
        state[f'{mask}.upsample.weight'] = torch.randn(CHANNELS, CHANNELS, 2,
                                                       2) / 4
        state[f'{mask}.upsample.bias'] = .3 * torch.randn(CHANNELS)
        add(f'{mask}.conv_logits', CLASSES, CHANNELS, 1, 1)
    return state


def stages_of(stages):
    """What follows the name of a head, for each of them."""
    return [f'.{k}' for k in range(stages)] or ['']


def attend(state, name, x, apart):
    """Attention within a window.

    Args:
        x: tokens (49, C), row by row.
        apart: pairs of tokens (49, 49) that must not see each other.
    """
    table = state[f'{name}.relative_position_bias_table']
    length, channels = x.shape
    heads = table.shape[1]
    qkv = linear(state, f'{name}.qkv', x)
    query, key, value = qkv.reshape(length, 3, heads, -1).permute(1, 2, 0, 3)
    place = torch.arange(length)
    down = (place // WINDOW)[:, None] - place // WINDOW
    right = (place % WINDOW)[:, None] - place % WINDOW
    index = (down + WINDOW - 1) * (2 * WINDOW - 1) + right + WINDOW - 1
    scores = query @ key.transpose(1, 2) / math.sqrt(channels // heads)
    scores = scores + table[index].permute(2, 0, 1) - 100. * apart
    out = (scores.softmax(-1) @ value).permute(1, 0, 2).reshape(length, -1)
    return linear(state, f'{name}.proj', out)


def region(place, length):
    """Which part of a shifted axis places lie in: the bulk, the last window's
    own, or what came around from the other end."""
    return (place >= length - WINDOW).int() + (place >= length - SHIFT).int()


def run_block(state, name, x, shift):
    """A block on a map (H, W, C), its windows moved by ``shift``."""
    height, width, _ = x.shape
    y = layer_norm(state, f'{name}.norm1', x, 1e-5)
    y = F.pad(y, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    out = torch.zeros_like(y)
    tall, wide, _ = y.shape
    for top in range(0, tall, WINDOW):
        for left in range(0, wide, WINDOW):
            row, column = (
                start + torch.arange(WINDOW) for start in (top, left))
            part = 3 * region(row, tall)[:, None] + region(column, wide)
            part = part.flatten()
            apart = (part[:, None] != part) & (shift > 0)
            where = ((row + shift) % tall)[:, None], (column + shift) % wide
            tokens = y[where].flatten(0, 1)
            tokens = attend(state, f'{name}.attn', tokens, apart)
            out[where] = tokens.reshape(WINDOW, WINDOW, -1)
    x = x + out[:height, :width]
    y = layer_norm(state, f'{name}.norm2', x, 1e-5)
    y = F.gelu(linear(state, f'{name}.mlp.fc1', y))
    return x + linear(state, f'{name}.mlp.fc2', y)


def merge(state, name, x):
    """Patch merging of a map (H, W, C)."""
    x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
    parts = x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]
    y = layer_norm(state, f'{name}.norm', torch.cat(parts, -1), 1e-5)
    return y @ state[f'{name}.reduction.weight'].T


def read_backbone(state, image):
    """The maps (C, H, W) of an image (3, h, w)."""
    proj = 'backbone.patch_embed.proj'
    image = F.pad(image, (0, -image.shape[2] % 4, 0, -image.shape[1] % 4))
    x = F.conv2d(
        image, state[f'{proj}.weight'], state[f'{proj}.bias'], stride=4)
    x = layer_norm(state, 'backbone.patch_embed.norm', x.permute(1, 2, 0),
                   1e-5)
    maps = []
    for i in range(STAGES):
        for j in range(DEPTH):
            name = f'backbone.layers.{i}.blocks.{j}'
            x = run_block(state, name, x, SHIFT if j % 2 else 0)
        maps.append(
            layer_norm(state, f'backbone.norm{i}', x, 1e-5).permute(2, 0, 1))
        if i < STAGES - 1:
            x = merge(state, f'backbone.layers.{i}.downsample', x)
    return maps


def read_neck(state, maps):
    levels = []
    x = None
    for i in reversed(range(STAGES)):
        lateral = conv(state, f'neck.lateral_convs.{i}.conv', maps[i])
        if x is not None:
            row, column = (
                torch.arange(size) * old // size
                for size, old in zip(lateral.shape[1:], x.shape[1:]))
            lateral = lateral + x[:, row[:, None], column]
        x = lateral
        levels.append(conv(state, f'neck.fpn_convs.{i}.conv', x))
    return [*reversed(levels), levels[0][:, ::2, ::2]]


def read_rpn(state, x):
    x = conv(state, 'rpn_head.rpn_conv', x).relu()
    return [
        conv(state, f'rpn_head.{part}', x) for part in ('rpn_cls', 'rpn_reg')
    ]


def batch_norm(state, name, x):
    """BatchNorm in evaluation."""
    weight, bias, mean, var = (
        state[f'{name}.{part}'][:, None, None]
        for part in ('weight', 'bias', 'running_mean', 'running_var'))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def read_box_head(state, name, x, cascade):
    """Class logits and deltas of RoI features (n, C, 7, 7)."""
    for i in range(4 if cascade else 0):
        x = conv(state, f'{name}.shared_convs.{i}.conv', x)
        x = batch_norm(state, f'{name}.shared_convs.{i}.bn', x).relu()
    x = x.flatten(1)
    for i in range(1 if cascade else 2):
        x = linear(state, f'{name}.shared_fcs.{i}', x).relu()
    return [
        linear(state, f'{name}.{part}', x) for part in ('fc_cls', 'fc_reg')
    ]


def read_mask_head(state, name, x):
    for i in range(4):
        x = conv(state, f'{name}.convs.{i}.conv', x).relu()
    x = deconv(state, f'{name}.upsample', x)
    return conv(state, f'{name}.conv_logits', x.relu())


def save(state, path, **meta):
    """A file as MMDetection 2 writes it."""
    torch.save(
        dict(
            meta=dict(mmdet_version='2.11.0', epoch=36, **meta),
            state_dict=state,
            optimizer=dict(state={}, param_groups=[])), path)


@pytest.mark.parametrize('stages', NAMES)
def test_the_model_computes_what_the_original_did(stages, paths, tmp_path,
                                                  capsys):
    state = original(stages)
    source, out = tmp_path / 'source.pth', tmp_path / 'out.pth'
    extras = {INDEX: torch.zeros(49, 49).long(), MASK: torch.zeros(4, 49, 49)}
    save({**state, **extras}, source)
    assert main([str(source), str(out), '--config', paths[stages]]) == 0
    printed = capsys.readouterr().out
    assert INDEX in printed and MASK in printed
    content = torch.load(out, weights_only=True)
    classes = content['meta']['dataset_meta']['classes']
    assert len(classes) == 80 and classes[:2] == ['person', 'bicycle']
    model = build(paths[stages])
    model.load_state_dict(content['state_dict'])

    # Maps of 19x26, 10x13, 5x7 and 3x4 tokens: all need padding somewhere,
    # and the last two are single windows, which are shifted too.
    images = torch.randn(2, 3, 75, 102)
    small, large = (torch.randn(5, CHANNELS, side, side) for side in (7, 14))
    with torch.no_grad():
        maps = [read_backbone(state, image) for image in images]
        for one, other in zip(model.backbone(images), zip(*maps)):
            assert_close(one, torch.stack(other))
        levels = list(zip(*(read_neck(state, one) for one in maps)))
        expected = [torch.stack(level) for level in levels]
        found = model.extract_feat(images)
        assert len(found) == len(expected) == 5
        for one, other in zip(found, expected):
            assert_close(one, other)
        for scores, deltas, x in zip(*model.rpn_head(found), expected):
            for one, other in zip((scores, deltas), read_rpn(state, x)):
                assert_close(one, other)
        heads = model.roi_head
        for k, stage in enumerate(stages_of(stages)):
            box, mask = ((heads.bbox_head[k],
                          heads.mask_head[k]) if stages else
                         (heads.bbox_head, heads.mask_head))
            name = f'roi_head.bbox_head{stage}'
            for one, other in zip(
                    box(small), read_box_head(state, name, small, stages)):
                assert_close(one, other)
            name = f'roi_head.mask_head{stage}'
            assert_close(mask(large), read_mask_head(state, name, large))


@pytest.mark.parametrize('stages', NAMES)
def test_what_the_weights_mean_is_the_same(stages, paths):
    """Anchors, box regression and input, which the file does not hold."""
    model = build(paths[stages])
    check_rpn(model.rpn_head)
    heads = model.roi_head.bbox_head
    for head, stds in zip(heads if stages else [heads],
                          ((.1, .2), (.05, .1), (.033, .067))):
        assert tuple(head.bbox_coder.stds) == (stds[0], ) * 2 + (stds[1], ) * 2
        assert not head.reg_class_agnostic
        assert head.reg_decoded_bbox == bool(stages)
    check_input(model.data_preprocessor, (90, 100), (96, 128))


def refuse(state, path, tmp_path, capsys, **meta):
    """The line that refuses a file, which is not written."""
    save(state, tmp_path / 'source.pth', **meta)
    return check_refused(main, tmp_path / 'source.pth', path, capsys)


@pytest.mark.parametrize('name, shape, message', [
    ('backbone.layers.0.blocks.0.attn.tau',
     (3, ), "1 weights unknown: ['backbone.layers.0.blocks.0.attn.tau']"),
    (BIAS, None, f"1 weights missing: ['{BIAS}']"),
    (MEAN, None, f"1 weights missing: ['{MEAN}']"),
    (BIAS, (3, ), f'{BIAS} is (3,) instead of (16,)'),
    (MERGING, (16, 16), f'{MERGING} is (16, 16) instead of (16, 32)'),
    (TABLE, (529, 2), f'{TABLE} is (529, 2) instead of (169, 2)'),
])
def test_extra_missing_and_misshapen_weights_are_named(name, shape, message,
                                                       paths, tmp_path,
                                                       capsys):
    state = original(3)
    state.pop(name, None)
    if shape:
        state[name] = torch.ones(shape)
    assert message in refuse(state, paths[3], tmp_path, capsys)


def test_weights_that_are_no_numbers_are_named(paths, tmp_path, capsys):
    state = original(3)
    for value, words in ((state[BIAS].to(torch.int8), 'is of torch.int8'),
                         (state[BIAS] * float('nan'), 'holds NaN')):
        error = refuse({**state, BIAS: value}, paths[3], tmp_path, capsys)
        assert f'{BIAS!r} {words}' in error


@pytest.mark.parametrize('stages', NAMES)
def test_the_other_kind_of_detector_is_refused(stages, paths, tmp_path,
                                               capsys):
    error = refuse(original(3 - stages), paths[stages], tmp_path, capsys)
    assert 'weights missing' in error and 'weights unknown' in error


def test_a_file_of_other_classes_is_refused(paths, tmp_path, capsys):
    error = refuse(
        original(0),
        paths[0],
        tmp_path,
        capsys,
        CLASSES=tuple(f'class {i}' for i in range(80)))
    assert "80 classes, ['class 0'," in error


def test_a_file_that_names_the_same_classes_is_taken(paths, tmp_path):
    classes = CocoDataset.METAINFO['classes']
    save(original(0), tmp_path / 'source.pth', CLASSES=classes)
    args = [str(tmp_path / name) for name in ('source.pth', 'out.pth')]
    assert main([*args, '--config', paths[0]]) == 0


def test_a_config_of_another_model_is_refused(tmp_path, capsys):
    path = REPO / 'configs/drawn/mask-rcnn_deit-mini_sfpn_drawn.py'
    error = refuse(original(0), str(path), tmp_path, capsys)
    assert 'weights that the release lacks' in error
    assert 'backbone.pos_embed' in error
