"""Quantized models go through pickle, torch.save and copies as float ones."""
import copy
import io
import pickle

import pytest
import timm
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import init_default_scope

from isvit_det.apis import quantize_detector, save_detector
from isvit_det.classifiers.swin import quantize_swin
from isvit_det.classifiers.vit import quantize_vit
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import (fit_weights_, is_calibrated, observe,
                                   set_precision_)
from isvit_det.core.settings import QuantConfig
from isvit_det.inputs.configs import load_config, quantize_config_
from isvit_det.packed.state import pack_state
from tests.engine.tiny import FLOAT, FLOAT_DEIT, make_tiny


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = dict(
    pickle=lambda model: pickle.loads(pickle.dumps(model)),
    torch=through_torch,
    copy=copy.deepcopy)


def check_loading(model):
    """Loading is checked against the model itself, whoever has a copy."""
    state = model.state_dict()
    key = next(key for key in state if key.endswith('norm1.weight'))
    for strict in (True, False):
        lacking = {k: v for k, v in state.items() if k != key}
        with pytest.raises(QuantError, match=key):
            model.load_state_dict(lacking, strict=strict)
    model.load_state_dict(state)


@pytest.mark.parametrize('config', [FLOAT, FLOAT_DEIT], ids=['swin', 'deit'])
def test_a_calibrated_detector_is_the_same_after_each_way(config, tmp_path):
    tiny = make_tiny(tmp_path, float_config=config)
    model = init_detector(tiny.config, tiny.checkpoint, device='cpu')
    paths = sorted((tiny.data / 'train').iterdir())
    image = str(paths[0])
    quantized = quantize_detector(
        model, paths[:1], scope='detector', method='minmax')
    expected = inference_detector(quantized, image).pred_instances
    for make in COPIES.values():
        again = make(quantized)
        found = inference_detector(again, image).pred_instances
        assert len(found) > 0 and torch.equal(found.bboxes, expected.bboxes)
        assert torch.equal(found.scores, expected.scores)
        check_loading(again)
        packed = save_detector(again, tmp_path / 'packed')[1]
        state = torch.load(packed, weights_only=True)['state_dict']
        again.load_state_dict(state)


@pytest.mark.parametrize('scope', ['backbone', 'detector'])
def test_an_uncalibrated_detector_can_be_pickled(scope):
    init_default_scope('mmdet')
    cfg = load_config(str(FLOAT), None)
    quantize_config_(cfg, dict(scope=scope))
    model = MMDET_MODELS.build(cfg.model)
    again = pickle.loads(pickle.dumps(model))
    assert not is_calibrated(again)
    check_loading(again)


@pytest.mark.parametrize('name, build', [
    ('vit_tiny_patch16_224', quantize_vit),
    ('swin_tiny_patch4_window7_224', quantize_swin),
])
@torch.no_grad()
def test_a_classifier_is_the_same_after_each_way(name, build):
    sizes = dict(depth=1, embed_dim=24, num_heads=3)
    if 'swin' in name:
        sizes = dict(depths=(1, 1), embed_dim=12, num_heads=(1, 2))
    source = timm.create_model(
        name, num_classes=3, img_size=56, **sizes).eval()
    model = build(source, QuantConfig()).eval()
    image = torch.randn(1, 3, 56, 56)
    set_precision_(model, weights=False, acts=False)
    with observe(model):
        model(image)
    fit_weights_(model)
    set_precision_(model, weights=True, acts=True)
    assert is_calibrated(model)
    for make in COPIES.values():
        again = make(model)
        assert torch.equal(again(image), model(image))
        check_loading(again)
        again.load_state_dict(pack_state(model, QuantConfig()))
        assert torch.equal(again(image), model(image))
