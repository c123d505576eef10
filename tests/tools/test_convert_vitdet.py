"""convert_vitdet against a plain reading of Detectron2's layout."""
import math
import os
import pickle
import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch.nn import functional as F

from isvit_det.commands.convert_vitdet import main
from tests.engine.tiny import REPO
from tests.tools.original import (assert_close, build, check_input,
                                  check_refused, check_rpn, conv, deconv,
                                  layer_norm, linear)

EMBED, DEPTH, HEADS, SIDE = 32, 3, 2, 4
WINDOW, GLOBAL, REL_POS = 4, (1, ), 8
CHANNELS, HIDDEN, CLASSES = 16, 24, 80
NAMES = {
    0: 'mask-rcnn_vit-b-p16_sfpn_lsj-100e_coco.py',
    3: 'cascade-mask-rcnn_vit-b-p16_sfpn_lsj-100e_coco.py'
}
POSITIONS = 'backbone.net.pos_embed'
BIAS = 'roi_heads.mask_head.mask_fcn2.norm.bias'
EXTRAS = ['pixel_mean', 'proposal_generator.anchor_generator.cell_anchors.0']


def config(stages):
    return Config.fromfile(REPO / 'configs/vit' / NAMES[stages])


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    """Small copies of our configs, by number of stages."""
    folder = tmp_path_factory.mktemp('configs')
    for stages in NAMES:
        cfg = config(stages)
        shrink_(cfg.model)
        cfg.dump(folder / f'{stages}.py')
    return {stages: str(folder / f'{stages}.py') for stages in NAMES}


def shrink_(model):
    model.data_preprocessor.pad_size_divisor = 32
    model.backbone.update(
        arch=dict(embed_dims=EMBED, depth=DEPTH, num_heads=HEADS),
        pretrain_img_size=SIDE * 16,
        window_size=WINDOW,
        global_blocks=list(GLOBAL),
        rel_pos_size=REL_POS)
    model.neck.update(in_channels=EMBED, out_channels=CHANNELS)
    model.rpn_head.update(in_channels=CHANNELS, feat_channels=CHANNELS)
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.update(
            in_channels=CHANNELS,
            conv_out_channels=CHANNELS,
            fc_out_channels=HIDDEN)
    model.roi_head.mask_head.update(
        in_channels=CHANNELS, conv_out_channels=CHANNELS)


def original(stages):
    """Lively random weights in Detectron2's names."""
    torch.manual_seed(0)
    state = {}

    def add(name, *shape, bias=True):
        fan_in = math.prod(shape[1:]) or 1
        state[f'{name}.weight'] = torch.randn(shape) / math.sqrt(fan_in)
        if bias:
            state[f'{name}.bias'] = .3 * torch.randn(shape[0])

    def add_norm(name, channels):
        state[f'{name}.weight'] = 1 + .3 * torch.randn(channels)
        state[f'{name}.bias'] = .3 * torch.randn(channels)

    def add_conv(name, channels, kernel=3):
        add(name, CHANNELS, channels, kernel, kernel, bias=False)
        add_norm(f'{name}.norm', CHANNELS)

    def add_deconv(name, channels, out):
        state[f'{name}.weight'] = torch.randn(channels, out, 2, 2) / 4
        state[f'{name}.bias'] = .3 * torch.randn(out)

    state['backbone.net.pos_embed'] = torch.randn(1, 1 + SIDE**2, EMBED)
    add('backbone.net.patch_embed.proj', EMBED, 3, 16, 16)
    for index in range(DEPTH):
        name = f'backbone.net.blocks.{index}'
        add_norm(f'{name}.norm1', EMBED)
        add(f'{name}.attn.qkv', 3 * EMBED, EMBED)
        add(f'{name}.attn.proj', EMBED, EMBED)
        side = REL_POS if index in GLOBAL else WINDOW
        for axis in 'hw':
            state[f'{name}.attn.rel_pos_{axis}'] = torch.randn(
                2 * side - 1, EMBED // HEADS)
        add_norm(f'{name}.norm2', EMBED)
        add(f'{name}.mlp.fc1', 4 * EMBED, EMBED)
        add(f'{name}.mlp.fc2', EMBED, 4 * EMBED)
    add_deconv('backbone.simfp_2.0', EMBED, EMBED // 2)
    add_norm('backbone.simfp_2.1', EMBED // 2)
    add_deconv('backbone.simfp_2.3', EMBED // 2, EMBED // 4)
    add_deconv('backbone.simfp_3.0', EMBED, EMBED // 2)
    for name, channels in (('2.4', EMBED // 4), ('3.1', EMBED // 2),
                           ('4.0', EMBED), ('5.1', EMBED)):
        add_conv(f'backbone.simfp_{name}', channels, 1)
    for name in ('2.5', '3.2', '4.1', '5.2'):
        add_conv(f'backbone.simfp_{name}', CHANNELS)
    rpn = 'proposal_generator.rpn_head'
    for name in ('conv.conv0', 'conv.conv1'):
        add(f'{rpn}.{name}', CHANNELS, CHANNELS, 3, 3)
    add(f'{rpn}.objectness_logits', 3, CHANNELS, 1, 1)
    add(f'{rpn}.anchor_deltas', 12, CHANNELS, 1, 1)
    for stage in [f'{k}.' for k in range(stages)] or ['']:
        for index in range(1, 5):
            add_conv(f'roi_heads.box_head.{stage}conv{index}', CHANNELS)
        add(f'roi_heads.box_head.{stage}fc1', HIDDEN, CHANNELS * 49)
        predictor = f'roi_heads.box_predictor.{stage}'
        add(f'{predictor}cls_score', CLASSES + 1, HIDDEN)
        add(f'{predictor}bbox_pred', 4 if stages else 4 * CLASSES, HIDDEN)
    for index in range(1, 5):
        add_conv(f'roi_heads.mask_head.mask_fcn{index}', CHANNELS)
    add_deconv('roi_heads.mask_head.deconv', CHANNELS, CHANNELS)
    add('roi_heads.mask_head.predictor', CLASSES, CHANNELS, 1, 1)
    return state


def token_norm(state, name, x):
    return layer_norm(state, name, x, 1e-6)


def map_norm(state, name, x):
    """LayerNorm over the channels of maps (B, C, H, W)."""
    return token_norm(state, name, x.movedim(1, -1)).movedim(-1, 1)


def conv_norm(state, name, x):
    return map_norm(state, f'{name}.norm', conv(state, name, x))


def relative(table, length):
    """Embeddings (length, length, D) of query and key positions."""
    if len(table) != 2 * length - 1:
        table = F.interpolate(
            table.T[None], size=2 * length - 1, mode='linear')[0].T
    place = torch.arange(length)
    return table[place[:, None] - place[None] + length - 1]


def attend(state, name, x):
    """Attention within a map (H, W, C)."""
    height, width, _ = x.shape
    qkv = linear(state, f'{name}.qkv', x.reshape(-1, EMBED))
    qkv = qkv.reshape(-1, 3, HEADS, EMBED // HEADS)
    query, key, value = qkv.permute(1, 2, 0, 3)
    place = torch.arange(height * width)
    row, column = place // width, place % width
    bias = (
        relative(state[f'{name}.rel_pos_h'], height)[row][:, row] +
        relative(state[f'{name}.rel_pos_w'], width)[column][:, column])
    scores = query @ key.transpose(1, 2) / math.sqrt(EMBED // HEADS)
    scores = scores + torch.einsum('hqd,qkd->hqk', query, bias)
    out = (scores.softmax(-1) @ value).permute(1, 0, 2)
    return linear(state, f'{name}.proj', out.reshape(height, width, EMBED))


def run_block(state, index, x):
    """A block on a map (H, W, C)."""
    name = f'backbone.net.blocks.{index}'
    y = token_norm(state, f'{name}.norm1', x)
    if index in GLOBAL:
        y = attend(state, f'{name}.attn', y)
    else:
        height, width, _ = y.shape
        padded = F.pad(y, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        y = torch.zeros_like(padded)
        for top in range(0, padded.shape[0], WINDOW):
            for left in range(0, padded.shape[1], WINDOW):
                window = (slice(top, top + WINDOW), slice(left, left + WINDOW))
                y[window] = attend(state, f'{name}.attn', padded[window])
        y = y[:height, :width]
    x = x + y
    y = token_norm(state, f'{name}.norm2', x)
    y = F.gelu(linear(state, f'{name}.mlp.fc1', y))
    return x + linear(state, f'{name}.mlp.fc2', y)


def read_pyramid(state, images):
    """The five maps of images (B, 3, h, w)."""
    proj = 'backbone.net.patch_embed.proj'
    x = F.conv2d(
        images, state[f'{proj}.weight'], state[f'{proj}.bias'], stride=16)
    grid = state['backbone.net.pos_embed'][:, 1:].reshape(1, SIDE, SIDE, -1)
    x = x + F.interpolate(
        grid.permute(0, 3, 1, 2),
        size=x.shape[2:],
        mode='bicubic',
        align_corners=False)
    maps = []
    for one in x:
        one = one.permute(1, 2, 0)
        for index in range(DEPTH):
            one = run_block(state, index, one)
        maps.append(one.permute(2, 0, 1))
    x = torch.stack(maps)
    p2 = deconv(state, 'backbone.simfp_2.0', x)
    p2 = F.gelu(map_norm(state, 'backbone.simfp_2.1', p2))
    p2 = deconv(state, 'backbone.simfp_2.3', p2)
    p3 = deconv(state, 'backbone.simfp_3.0', x)
    p5 = F.max_pool2d(x, 2)
    levels = []
    for level, first, y in ((2, 4, p2), (3, 1, p3), (4, 0, x), (5, 1, p5)):
        for layer in (first, first + 1):
            y = conv_norm(state, f'backbone.simfp_{level}.{layer}', y)
        levels.append(y)
    return [*levels, levels[-1][:, :, ::2, ::2]]


def read_rpn(state, x):
    name = 'proposal_generator.rpn_head'
    for index in range(2):
        x = conv(state, f'{name}.conv.conv{index}', x).relu()
    return [
        conv(state, f'{name}.{part}', x)
        for part in ('objectness_logits', 'anchor_deltas')
    ]


def read_box_head(state, stage, x):
    for index in range(1, 5):
        name = f'roi_heads.box_head.{stage}conv{index}'
        x = conv_norm(state, name, x).relu()
    x = linear(state, f'roi_heads.box_head.{stage}fc1', x.flatten(1)).relu()
    return [
        linear(state, f'roi_heads.box_predictor.{stage}{part}', x)
        for part in ('cls_score', 'bbox_pred')
    ]


def read_mask_head(state, x):
    for index in range(1, 5):
        name = f'roi_heads.mask_head.mask_fcn{index}'
        x = conv_norm(state, name, x).relu()
    x = deconv(state, 'roi_heads.mask_head.deconv', x).relu()
    return conv(state, 'roi_heads.mask_head.predictor', x)


@pytest.mark.parametrize('stages', [0, 3])
def test_the_model_computes_what_the_original_did(stages, paths, tmp_path,
                                                  capsys):
    state = original(stages)
    source, out = tmp_path / 'source.pth', tmp_path / 'out.pth'
    extras = {name: torch.zeros(3, 4) for name in EXTRAS}
    torch.save(dict(model=dict(state, **extras), iteration=7), source)
    assert main([str(source), str(out), '--config', paths[stages]]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in EXTRAS)
    content = torch.load(out, weights_only=True)
    classes = content['meta']['dataset_meta']['classes']
    assert len(classes) == 80 and classes[:2] == ['person', 'bicycle']
    model = build(paths[stages])
    model.load_state_dict(content['state_dict'])

    # Windows stand out of 4x6 patches, and all positions are interpolated.
    images = torch.randn(2, 3, 64, 96)
    small, large = (torch.randn(5, CHANNELS, side, side) for side in (7, 14))
    with torch.no_grad():
        expected = read_pyramid(state, images)
        maps = model.extract_feat(images)
        assert len(maps) == len(expected) == 5
        for one, other in zip(maps, expected):
            assert_close(one, other)
        for scores, deltas, x in zip(*model.rpn_head(maps), expected):
            for one, other in zip((scores, deltas), read_rpn(state, x)):
                assert_close(one, other)
        heads = model.roi_head
        for k, head in enumerate(
                heads.bbox_head if stages else [heads.bbox_head]):
            stage = f'{k}.' if stages else ''
            for one, other in zip(
                    head(small), read_box_head(state, stage, small)):
                assert_close(one, other)
        for head in heads.mask_head if stages else [heads.mask_head]:
            assert_close(head(large), read_mask_head(state, large))


@pytest.mark.parametrize('stages', [0, 3])
def test_what_the_weights_mean_is_the_same(stages, paths):
    """Anchors, box regression and input, which the file does not hold."""
    model = build(paths[stages])
    check_rpn(model.rpn_head)
    heads = model.roi_head.bbox_head
    for head, weights in zip(heads if stages else [heads],
                             ((10, 5), (20, 10), (30, 15))):
        assert head.bbox_coder.stds == pytest.approx(
            [1 / weight for weight in weights for _ in range(2)])
        assert head.reg_class_agnostic == bool(stages)
    preprocess = MODELS.build(config(stages).model.data_preprocessor)
    check_input(preprocess, (700, 1024), (1024, 1024))


def refuse(state, path, tmp_path, capsys):
    """The line that refuses a file, which is not written."""
    torch.save(state, tmp_path / 'source.pth')
    return check_refused(main, tmp_path / 'source.pth', path, capsys)


@pytest.mark.parametrize('name, shape, message', [
    ('extra', (3, ), "1 weights unknown: ['extra']"),
    (BIAS, None, f"1 weights missing: ['{BIAS}']"),
    (BIAS, (3, ), f'{BIAS} is (3,) instead of (16,)'),
    (POSITIONS,
     (1, 16, 32), f'{POSITIONS} is (1, 16, 32) instead of (1, 17, 32)'),
])
def test_extra_missing_and_misshapen_weights_are_named(name, shape, message,
                                                       paths, tmp_path,
                                                       capsys):
    state = original(0)
    state.pop(name, None)
    if shape:
        state[name] = torch.ones(shape)
    assert message in refuse(state, paths[0], tmp_path, capsys)


def test_weights_that_are_no_numbers_are_named(paths, tmp_path, capsys):
    state = original(0)
    for value, words in ((state[BIAS].to(torch.int8), 'is of torch.int8'),
                         (state[BIAS] * float('nan'), 'holds NaN')):
        error = refuse({**state, BIAS: value}, paths[0], tmp_path, capsys)
        assert f'{BIAS!r} {words}' in error


def test_the_file_that_is_read_is_not_written_over(tmp_path, capsys):
    path = tmp_path / 'source.pth'
    path.write_bytes(b'custom')
    assert main([str(path), str(path), '--config', 'none.py']) == 2
    assert 'is the file that is read' in capsys.readouterr().err
    assert path.read_bytes() == b'custom'


@pytest.mark.parametrize('stages', [0, 3])
def test_the_other_kind_of_detector_is_refused(stages, paths, tmp_path,
                                               capsys):
    error = refuse(original(3 - stages), paths[stages], tmp_path, capsys)
    assert 'weights missing' in error and 'weights unknown' in error


def test_a_config_of_another_model_is_refused(tmp_path, capsys):
    torch.save(original(0), tmp_path / 'source.pth')
    path = REPO / 'configs/drawn/mask-rcnn_swin-mini_fpn_drawn.py'
    args = [str(tmp_path / name) for name in ('source.pth', 'out.pth')]
    assert main([*args, '--config', str(path)]) == 2
    assert 'weights that ViTDet lacks' in capsys.readouterr().err


def convert_pickle(content, path, tmp_path, capsys):
    source, out = tmp_path / 'model_final.pkl', tmp_path / 'out.pth'
    source.write_bytes(content)
    status = main([str(source), str(out), '--config', path])
    error = capsys.readouterr().err
    assert out.exists() == (status == 0)
    return status, error


@pytest.mark.parametrize('protocol', [2, 4])
def test_a_pickle_of_arrays_is_read(protocol, paths, tmp_path, capsys):
    state = original(0)
    arrays = {name: value.numpy() for name, value in state.items()}
    content = pickle.dumps(dict(model=arrays, __author__='me'), protocol)
    assert convert_pickle(content, paths[0], tmp_path, capsys)[0] == 0
    found = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
    name = 'patch_embed.proj.weight'
    assert torch.equal(found[f'backbone.{name}'],
                       state[f'backbone.net.{name}'])


class Malicious:

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize('function', [os.mkdir, eval])
def test_a_pickle_that_runs_code_is_refused(function, protocol, paths,
                                            tmp_path, capsys):
    victim = str(tmp_path / 'victim')
    argument = victim if function is os.mkdir else f'open({victim!r}, "w")'
    content = pickle.dumps(dict(model=Malicious(function, argument)), protocol)
    status, error = convert_pickle(content, paths[0], tmp_path, capsys)
    assert status == 2 and len(error.splitlines()) == 1
    assert function.__name__ in error and 'for safety' in error
    assert not os.path.exists(victim)


@pytest.mark.parametrize('content, message', [
    (pickle.dumps([1, 2]), 'holds a list'),
    (pickle.dumps(dict(model=dict(a='text'))), "'a' of"),
    (pickle.dumps(dict(a=torch.zeros(9).numpy()))[:-9], 'damaged'),
    (b'no pickle', 'cannot be read|damaged'),
])
def test_what_is_no_checkpoint_is_said(content, message, paths, tmp_path,
                                       capsys):
    status, error = convert_pickle(content, paths[0], tmp_path, capsys)
    assert status == 2 and re.search(message, error)
    assert len(error.splitlines()) == 1


def test_a_missing_file_is_named(paths, tmp_path, capsys):
    out = str(tmp_path / 'out.pth')
    for name in ('none.pkl', 'none.pth'):
        source = str(tmp_path / name)
        assert main([source, out, '--config', paths[0]]) == 2
        error = capsys.readouterr().err
        assert source in error and len(error.splitlines()) == 1
