"""Neck and heads: what ranges they get, and from which detections."""
import pytest
import torch
from mmengine.logging import MMLogger

from isvit_det.core.errors import QuantError
from isvit_det.core.layers import quantized_layers, quantizers
from isvit_det.core.settings import SOSConfig
from isvit_det.core.swap import quantized_version
from isvit_det.engine import calibrate, heads
from isvit_det.engine.images import calibration_images
from isvit_det.inputs.configs import load_config, quantize_config_
from isvit_det.registry import MODELS


def calibrated_heads(tiny, score_thr, correct=False, weigh=False):
    """A detector with calibrated heads."""
    cfg = load_config(tiny.config, None)
    cfg.model.test_cfg.rcnn.score_thr = score_thr
    quantize_config_(cfg, dict(scope='detector'))
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(torch.load(tiny.checkpoint)['state_dict'])
    images = calibration_images(cfg, None, 3, 0)
    logger = MMLogger.get_current_instance()
    sos = SOSConfig(correct_heads=correct, weigh_locations=weigh)
    heads.calibrate_heads_(model, images, sos, logger)
    return model


def ranges(model, part):
    return {
        name: (q.scale.clone(), q.zero_point.clone())
        for name, q in quantizers(model).items()
        if name.startswith(part) and q.role == 'act'
    }


@pytest.mark.parametrize('correct', [False, True])
def test_layers_that_no_detection_reached_see_those_of_any_score(
        tiny, correct):
    usual = calibrated_heads(tiny, .05, correct)
    strict = calibrated_heads(tiny, 1., correct)
    assert strict.roi_head.test_cfg.score_thr == 1.
    mask = ranges(strict, 'roi_head.mask_head')
    assert mask and all(scale != 1 for scale, _ in mask.values())
    # What ran before keeps the ranges it had.
    for part in ('neck', 'rpn_head', 'roi_head.bbox_head'):
        assert ranges(strict, part) and ranges(strict, part) == ranges(
            usual, part)


def test_what_was_reached_is_not_watched_again(tiny, monkeypatch):
    """Whatever runs then, such as a changed number of detections."""
    usual = calibrated_heads(tiny, .05)
    predict = heads._predict
    passes = []

    def louder(model, images, *start):
        passes.append(1)
        if len(passes) == 2:
            model.neck.lateral_convs[0].conv.weight.data *= 100
        predict(model, images, *start)

    monkeypatch.setattr(heads, '_predict', louder)
    found = calibrated_heads(tiny, 1.)
    assert len(passes) == 2
    assert ranges(found, 'rpn_head') == ranges(usual, 'rpn_head')


def test_layers_that_never_run_are_named(tiny, monkeypatch):
    monkeypatch.setattr(heads, '_predict', lambda *args: None)
    with pytest.raises(QuantError, match='rpn_head.rpn_conv.* never ran'):
        calibrated_heads(tiny, .05)


def add_unrun_(model):
    """Layers that no prediction runs: one alone, and one at two places."""
    config = model.quant_config
    shared = quantized_version(torch.nn.Linear(4, 4), config)
    model.rpn_head.unrun = quantized_version(torch.nn.Conv2d(3, 3, 1), config)
    model.roi_head.bbox_head.unrun = shared
    model.roi_head.bbox_head.again = shared
    return shared.weight


@pytest.mark.parametrize('correct', [False, True])
def test_what_no_prediction_runs_is_turned_back_at_all_its_places(
        tiny, correct, monkeypatch):
    weights = []
    monkeypatch.setattr(MODELS, 'build', built_with(add_unrun_, weights))
    model = calibrated_heads(tiny, .05, correct)
    bbox_head = model.roi_head.bbox_head
    assert type(model.rpn_head.unrun) is torch.nn.Conv2d
    assert type(bbox_head.unrun) is torch.nn.Linear
    assert bbox_head.unrun is bbox_head.again
    assert bbox_head.unrun.weight is weights[0]
    assert model.float_layers == dict.fromkeys(
        ['rpn_head.unrun', 'roi_head.bbox_head.unrun'], heads.NOT_RUN)
    assert all(q.is_fitted for name, q in quantizers(model).items()
               if not name.startswith('backbone.'))


def built_with(change_, found):
    build = MODELS.build

    def changed(cfg):
        model = build(cfg)
        load = model.load_state_dict

        def load_first(state):
            load(state)
            found.append(change_(model))

        model.load_state_dict = load_first
        return model

    return changed


def test_a_head_of_which_nothing_ran_is_an_error(tiny, monkeypatch):
    """Though its layers could be turned back, and all others ran."""

    def add_head_(model):
        model.roi_head.shadow_head = torch.nn.Sequential(
            quantized_version(torch.nn.Linear(4, 4), model.quant_config))

    monkeypatch.setattr(MODELS, 'build', built_with(add_head_, []))
    with pytest.raises(
            QuantError, match=r"\['roi_head.shadow_head.0'\] never"):
        calibrated_heads(tiny, .05)


def test_a_detector_that_cannot_predict_is_an_error_of_one_line(
        tiny, monkeypatch):
    model = calibrated_heads(tiny, .05)

    def fail(*args, **kwargs):
        raise RuntimeError('mat1 and mat2\nand more')

    monkeypatch.setattr(model.roi_head.bbox_head, 'forward', fail)
    images = calibration_images(load_config(tiny.config, None), None, 1, 0)
    with pytest.raises(QuantError) as caught:
        heads.find_products(model, images)
    assert 'MaskRCNN cannot predict' in str(caught.value)
    assert 'mat1 and mat2' in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('correct', [False, True])
def test_only_dense_heads_are_calibrated_where_objects_are(tiny, correct):
    usual = calibrated_heads(tiny, .05, correct)
    weighed = calibrated_heads(tiny, .05, correct, weigh=True)
    assert ranges(usual, 'rpn_head') != ranges(weighed, 'rpn_head')
    for part in ('neck', 'roi_head'):
        assert ranges(usual, part) == ranges(weighed, part)
    state, other = usual.state_dict(), weighed.state_dict()
    for name in state:
        if name.endswith('weight') and not name.startswith('rpn_head'):
            assert torch.equal(state[name], other[name]), name
    same = torch.equal(state['rpn_head.rpn_conv.weight'],
                       other['rpn_head.rpn_conv.weight'])
    assert same == (not correct)


def test_calibration_simulates_every_layer(tiny, tmp_path, monkeypatch):
    cfg = load_config(tiny.config, None)
    quantize_config_(cfg, dict(scope='detector'))
    model = MODELS.build(cfg.model).eval()
    assert all(layer.native is not None for layer in quantized_layers(model))
    seen = []

    def note(*args, **kwargs):
        seen.append({layer.native for layer in quantized_layers(model)})

    monkeypatch.setattr(calibrate, 'calibrate', note)
    monkeypatch.setattr(calibrate, 'calibrate_heads_', note)
    images = calibration_images(cfg, None, 3, 0)
    with pytest.raises(QuantError, match='nothing in the model'):
        calibrate.calibrate_detector_(model, images, SOSConfig(), tmp_path, '',
                                      MMLogger.get_current_instance())
    assert seen == [{None}, {None}]
    assert all(layer.native is not None for layer in quantized_layers(model))
