"""What tests of converters share: layers by name, and checks of a model."""
import math

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch.nn import functional as F


def linear(state, name, x):
    return x @ state[f'{name}.weight'].T + state[f'{name}.bias']


def conv(state, name, x):
    """A convolution that keeps the size, with or without bias."""
    weight = state[f'{name}.weight']
    bias = state.get(f'{name}.bias')
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def deconv(state, name, x):
    return F.conv_transpose2d(
        x, state[f'{name}.weight'], state[f'{name}.bias'], stride=2)


def layer_norm(state, name, x, eps):
    """LayerNorm over the last dimension."""
    x = x - x.mean(-1, keepdim=True)
    x = x / ((x**2).mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f'{name}.weight'] + state[f'{name}.bias']


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def build(path):
    init_default_scope('mmdet')
    return MODELS.build(Config.fromfile(path).model).eval()


def check_rpn(rpn_head):
    """Anchors around the corners of cells, and deltas as they are."""
    anchors = rpn_head.prior_generator
    assert [stride for stride, _ in anchors.strides] == [4, 8, 16, 32, 64]
    for size, cell in zip((32, 64, 128, 256, 512), anchors.base_anchors):
        for ratio, anchor in zip((.5, 1, 2), cell):
            width = size / math.sqrt(ratio)
            half = torch.tensor([width, width * ratio]) / 2
            assert torch.allclose(anchor, torch.cat([-half, half]))
    assert tuple(rpn_head.bbox_coder.stds) == (1, 1, 1, 1)


def check_input(preprocess, size, padded):
    """BGR images become RGB ones in units of ImageNet's, padded with zeros.

    Args:
        preprocess: the model's.
        size: (H, W) of an image.
        padded: (H, W) that it gets.
    """
    height, width = size
    image = torch.randint(256, (3, *size)).byte()
    found = preprocess(dict(inputs=[image], data_samples=None))['inputs'][0]
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    assert found.shape == (3, *padded) and not found[:, height:].any()
    assert torch.allclose(
        found[:, :height, :width], (image.flip(0) - mean) / std, atol=1e-5)


def check_refused(main, source, path, capsys):
    """The line that refuses a file; nothing is written.

    Args:
        main: the converter.
        source: the file.
        path: of the config.
    """
    out = source.with_name('out.pth')
    assert main([str(source), str(out), '--config', path]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and not out.exists()
    return error
