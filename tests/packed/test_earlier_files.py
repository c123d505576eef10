"""Packed files that an earlier version wrote load, and compute the same.

``python -m tests.packed.test_earlier_files tests/data`` wrote the files in
``tests/data`` with version 0.1.0, before the package was divided anew. They
are drawn weights of a seed, not trained ones. Writing them again with later
code would make these tests say nothing.
"""
import copy
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from isvit_det.apis import quantize_detector, save_detector
from isvit_det.checkpoint import read_checkpoint
from isvit_det.core.layers import is_calibrated, quantized_layers, quantizers
from isvit_det.core.quantizers import UniformQuantizer
from isvit_det.core.table_quantizer import TableQuantizer
from isvit_det.packed.header import read_header
from isvit_det.packed.state import pack_state
from tests.engine.tiny import FLOAT, FLOAT_DEIT, shrink_

FOLDER = Path(__file__).parents[1] / 'data'
# SHA-256 over the integer codes of all weights.
CODES = {
    'swin_w4a4_isvit':
    'bc9265f0b7a38d9c5d4edb304247ec38118a3ed9e74fd67362c0a4253acb0b42',
    'deit_w3a6_isvit_paper':
    'b4f222bf9516b9b10387f183b0157d0c30cd39cba80886e3257cfa01ae747903',
}
SETTINGS = {
    'swin_w4a4_isvit':
    dict(bits='w4a4', method='isvit', scope='detector'),
    'deit_w3a6_isvit_paper':
    dict(bits='w3a6', method='isvit_paper', sos=dict(lr=1e-3)),
}
# Relative, in norm. In float64, what machines round differently moves no code.
TOLERANCE = 1e-6


def drawn_image():
    """An image (1, 3, H, W) that is the same on every machine."""
    rows = torch.arange(72, dtype=torch.double)[:, None]
    columns = torch.arange(88, dtype=torch.double)
    return torch.stack([
        torch.sin(rows * (.11 + .07 * i) + .3 * i) *
        torch.cos(columns * (.05 + .13 * i)) for i in range(3)
    ])[None]


def load(name):
    """A model with a packed file's state, by the config beside it."""
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(str(FOLDER / f'{name}.json')).model)
    state = read_checkpoint(FOLDER / f'{name}.pth')['state_dict']
    model.load_state_dict(state)
    return model.eval()


def codes_digest(model):
    """SHA-256 over the codes of all quantized weights, in order."""
    digest = hashlib.sha256()
    for layer in quantized_layers(model):
        codes = layer.weight_quantizer.encode(layer.weight.detach())
        digest.update(codes.to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def outputs(model):
    """What a detector's parts compute of the image, in float64."""
    model = copy.deepcopy(model).double()
    features = model.extract_feat(drawn_image())
    scores, boxes = model.rpn_head(features)
    regions = torch.tensor([[0, 4, 6, 60, 50], [0, 20, 10, 44, 70]])
    regions = regions.double()
    head = model.roi_head
    found = head._bbox_forward(features, regions)
    masks = head._mask_forward(features, regions)['mask_preds']
    tensors = [
        *features[2:], *scores, *boxes[1:], found['cls_score'],
        found['bbox_pred'], masks[:, :1, ::4, ::4]
    ]
    return [tensor.contiguous() for tensor in tensors]


@pytest.fixture(scope='module', params=SETTINGS)
def earlier(request):
    return request.param, load(request.param)


def test_an_earlier_file_gives_exactly_its_codes(earlier):
    name, model = earlier
    assert is_calibrated(model)
    assert codes_digest(model) == CODES[name]


def test_an_earlier_file_has_no_tables(earlier):
    _, model = earlier
    kinds = {type(q) for q in quantizers(model).values() if q.role == 'act'}
    assert TableQuantizer not in kinds and UniformQuantizer in kinds
    assert model.quant_config.activation_tables == ()
    # What is packed of it says so, and loads as well.
    again = pack_state(model, model.quant_config)
    assert read_header(again)['quant']['activation_tables'] == []
    assert not any(key.endswith('.entries') for key in again)
    model.load_state_dict(again)


def test_an_earlier_file_gives_its_output(earlier):
    name, model = earlier
    expected = torch.load(FOLDER / f'{name}_outputs.pth', weights_only=True)
    found = outputs(model)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        assert (one - other).norm() <= TOLERANCE * other.norm()


def test_an_earlier_file_keeps_its_provenance_and_classes():
    content = read_checkpoint(FOLDER / 'swin_w4a4_isvit.pth')
    assert content['provenance']['versions']['isvit_det'] == '0.1.0'
    assert content['meta']['dataset_meta']['classes'] == ['a', 'b']


def write(folder):
    """Write the packed files, their configs and outputs; prints digests."""
    for name, settings in SETTINGS.items():
        is_swin = name.startswith('swin')
        cfg = Config.fromfile(str(FLOAT if is_swin else FLOAT_DEIT))
        shrink_(cfg, Path('data'))
        model = cfg.model
        if is_swin:
            model.backbone.update(embed_dims=8, num_heads=[1, 1, 2, 2])
            model.neck.in_channels = [8, 16, 32, 64]
        else:
            model.backbone.pretrain_img_size = 64
        heads = model.roi_head
        model.neck.out_channels = 8
        model.rpn_head.update(in_channels=8, feat_channels=8)
        for part in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
            part.out_channels = 8
        heads.bbox_head.update(in_channels=8, fc_out_channels=8, num_classes=2)
        heads.mask_head.update(
            in_channels=8, conv_out_channels=8, num_classes=2)
        # Else annotations of a data set would be needed.
        cfg.test_dataloader.dataset.pipeline.pop(2)
        torch.manual_seed(0)
        detector = init_detector(cfg, device='cpu')
        for value in detector.parameters():
            value.data += .05 * torch.randn_like(value)
        detector.dataset_meta = dict(classes=('a', 'b'))
        draw = np.random.RandomState(0)
        images = [
            draw.randint(0, 256, (80, 96, 3), np.uint8) for _ in range(3)
        ]
        quantized = quantize_detector(detector, images, iters=4, **settings)
        config, packed = save_detector(quantized, folder / 'made')
        Path(packed).rename(folder / f'{name}.pth')
        only_model = Config(dict(model=Config.fromfile(config).model))
        only_model.dump(folder / f'{name}.json')
        Path(config).unlink()
        expected = [tensor.float() for tensor in outputs(quantized.eval())]
        torch.save(expected, folder / f'{name}_outputs.pth')
        print(name, codes_digest(quantized))
    (folder / 'made').rmdir()


if __name__ == '__main__':
    write(Path(sys.argv[1]))
