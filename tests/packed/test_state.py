"""Packed states: exact, small, strict, and loaded by anyone's loader."""
import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict as mmengine_load

from isvit_det.core.errors import QuantError
from isvit_det.core.layers import fit_weights_, is_calibrated, quantizers
from isvit_det.core.settings import QuantConfig
from isvit_det.core.swap import make_float_
from isvit_det.inputs.configs import quantize_config_
from isvit_det.packed.header import HEADER, _checksum_of, read_header
from isvit_det.packed.state import pack_state, packed_config
from isvit_det.registry import MODELS
from tests.engine.tiny import FLOAT


def build(cfg, **quant):
    init_default_scope('mmdet')
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.init_cfg = None
    quantize_config_(cfg, dict(dict(scope='detector'), **quant))
    torch.manual_seed(0)
    return MODELS.build(cfg.model).eval()


def fit_(model):
    """Give every quantizer a range without running the detector."""
    for quantizer in quantizers(model).values():
        if quantizer.role == 'act':
            observer = quantizer.new_observer()
            observer.update(torch.rand(64))
            quantizer.fit_(observer)
    fit_weights_(model)
    for quantizer in quantizers(model).values():
        quantizer.enabled = True
    return model


@pytest.fixture(scope='module')
def config():
    return Config.fromfile(str(FLOAT))


@pytest.fixture(scope='module')
def model(config):
    return fit_(build(config))


@pytest.fixture(scope='module')
def packed(model):
    return pack_state(model, model.quant_config)


def num_bytes(state):
    return sum(v.numel() * v.element_size() for v in state.values())


@pytest.mark.parametrize('load', [
    lambda model, state: model.load_state_dict(state),
    lambda model, state: model.load_state_dict(state, strict=False),
    lambda model, state: mmengine_load(model, state, strict=False)
])
def test_a_packed_state_restores_every_output_bit_for_bit(
        config, model, packed, load):
    loaded = build(config)
    with torch.no_grad():
        for value in loaded.parameters():
            value.add_(1.)
    load(loaded, dict(packed))
    assert is_calibrated(loaded)
    x = torch.randn(1, 3, 64, 90)
    for module, other in ((model, loaded), (loaded, model)):
        maps = module.extract_feat(x)
        assert all(
            torch.equal(a, b) for a, b in zip(maps, other.extract_feat(x)))
        for one, two in zip(module.rpn_head(maps), other.rpn_head(maps)):
            assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_packing_again_gives_the_same_bytes(config, model, packed):
    loaded = build(config)
    loaded.load_state_dict(dict(packed))
    again = pack_state(loaded, loaded.quant_config)
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[k], packed[k]) for k in packed)


def test_no_float_weight_of_a_quantized_layer_is_stored(model, packed):
    codes = [key for key in packed if key.endswith('.weight_codes')]
    for key in codes:
        assert packed[key].dtype == torch.uint8
        assert key.replace('_codes', '') not in packed
    assert len(codes) > 30
    assert not any('relative_position_index' in key for key in packed)


def test_the_embedded_model_takes_at_most_a_fifth(config, packed, tmp_path):
    torch.save(packed, tmp_path / 'packed.pth')
    init_default_scope('mmdet')
    torch.save(MODELS.build(config.model).state_dict(), tmp_path / 'float.pth')
    sizes = [(tmp_path / f'{name}.pth').stat().st_size
             for name in ('packed', 'float')]
    assert 5 * sizes[0] <= sizes[1]


@pytest.mark.slow
def test_swin_t_mask_rcnn_takes_at_most_one_7_2th(tmp_path):
    cfg = get_config(
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py')
    model = fit_(build(cfg, bits='w4a4'))
    content = dict(
        state_dict=pack_state(model, model.quant_config),
        quant=model.quant_config.to_dict(),
        provenance=dict(image_ids=list(range(1024))))
    torch.save(content, tmp_path / 'packed.pth')
    own = {
        k
        for k in model.state_dict()
        if 'quantizer' in k or 'offset' in k or 'padding_value' in k
    }
    floats = {k: v for k, v in model.state_dict().items() if k not in own}
    torch.save(floats, tmp_path / 'float.pth')
    sizes = [(tmp_path / f'{name}.pth').stat().st_size
             for name in ('packed', 'float')]
    assert sizes[1] > 150e6
    assert 7.2 * sizes[0] <= sizes[1]


@pytest.mark.parametrize('bits', ['w2a8', 'w3a3', 'w5a4', 'w8a8'])
def test_every_width_survives(config, bits):
    model = fit_(build(config, bits=bits))
    loaded = build(config, bits=bits)
    loaded.load_state_dict(pack_state(model, model.quant_config))
    x = torch.randn(1, 3, 40, 56)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.extract_feat(x), loaded.extract_feat(x)))


def changed(packed, change):
    state = dict(packed)
    change(state)
    return state


def drop(state, part):
    del state[next(k for k in state if part in k)]


def flip(state):
    key = next(k for k in state if k.endswith('weight_codes'))
    state[key] = state[key] ^ 1


def edit_header(state, **values):
    header = json.loads(bytes(state[HEADER].tolist()))
    text = json.dumps(dict(header, **values)).encode()
    state[HEADER] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize('change, words', [
    (lambda s: drop(s, 'weight_codes'), 'checksum'),
    (lambda s: drop(s, 'zero_point'), 'checksum'),
    (flip, 'checksum'),
    (lambda s: s.update(more=torch.ones(1)), 'checksum'),
    (lambda s: edit_header(s, version=99), 'version 99'),
    (lambda s: edit_header(s, quant=dict(bits='w4a8')), 'checksum'),
    (lambda s: s.update({HEADER: s[HEADER][:-9]}), 'header'),
])
def test_a_changed_state_is_refused(config, packed, change, words):
    with pytest.raises(QuantError, match=words):
        build(config).load_state_dict(changed(packed, change))


def test_a_state_of_another_isvit_det_is_refused(config, model, monkeypatch):
    settings = dict(model.quant_config.to_dict(), query_power=2.)
    with monkeypatch.context() as context:
        context.setattr(QuantConfig, 'to_dict', lambda config: settings)
        state = pack_state(model, model.quant_config)
    words = 'packed file: .*query_power.*use the isvit_det that wrote it'
    with pytest.raises(QuantError, match=words):
        build(config).load_state_dict(dict(state))
    with pytest.raises(QuantError, match=words):
        packed_config(state, {})


def test_a_state_of_other_settings_is_refused_by_name(config, packed):
    with pytest.raises(QuantError, match=r"weight_bits 4 .* says 3"):
        build(config, bits='w3a4').load_state_dict(dict(packed))
    with pytest.raises(QuantError, match="scope 'detector'"):
        build(config, scope='backbone').load_state_dict(dict(packed))


def test_keys_that_do_not_fit_are_named_even_without_strictness(
        config, model, packed):
    float_state = {
        k: v
        for k, v in build(config).state_dict().items() if not any(
            part in k for part in ('quantizer', 'offset', 'padding_va'))
    }
    build(config).load_state_dict(float_state)
    cases = [
        ({
            k: v
            for k, v in float_state.items() if 'fc_cls' not in k
        }, '2 keys missing: roi_head.bbox_head.fc_cls'),
        (dict(float_state, extra=torch.ones(1)), '1 keys unknown: extra'),
        (dict(float_state,
              **{'neck.lateral_convs.0.conv.bias':
                 torch.ones(3)}), r'bias \(3,\) instead of \(64,\)'),
    ]
    for state, words in cases:
        for strict in (True, False):
            with pytest.raises(QuantError, match=words):
                build(config).load_state_dict(state, strict=strict)
        with pytest.raises(QuantError, match=words):
            mmengine_load(build(config), state, strict=False)


def test_half_a_calibration_is_refused(config, model):
    partial = {
        k: v
        for k, v in model.state_dict().items()
        if 'rpn_head.rpn_conv.input' not in k
    }
    with pytest.raises(QuantError, match='rpn_head.rpn_conv.input_quantizer'):
        build(config).load_state_dict(partial)


def test_a_plain_state_of_a_calibrated_model_loads_too(config, model):
    """Such as MMEngine's CheckpointHook writes."""
    loaded = build(config)
    loaded.load_state_dict(model.state_dict())
    assert is_calibrated(loaded)
    x = torch.randn(1, 3, 40, 56)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.extract_feat(x), loaded.extract_feat(x)))


def test_a_plain_state_of_other_bits_is_refused(config, model):
    with pytest.raises(QuantError, match='quantizers of other bits: .*3 bits'):
        build(config, bits='w3a4').load_state_dict(model.state_dict())


def test_float_weights_make_a_calibrated_model_a_float_one(config, model):
    loaded = copy.deepcopy(model)
    floats = build(config)
    own = set(floats.state_dict()) - set(
        MODELS.build(copy.deepcopy(config.model)).state_dict())
    for value in loaded.state_dict().values():
        if value.is_floating_point():
            value += .5
    loaded.load_state_dict({
        k: v
        for k, v in floats.state_dict().items() if k not in own
    })
    assert not is_calibrated(loaded)
    x = torch.randn(1, 3, 40, 56)
    assert all(
        torch.equal(a, b)
        for a, b in zip(floats.extract_feat(x), loaded.extract_feat(x)))


def test_the_header_holds_the_settings(packed, model):
    header = read_header(packed)
    assert QuantConfig.from_dict(header['quant']) == model.quant_config


FLOAT_LAYERS = {
    'rpn_head.rpn_cls': 'never ran',
    'roi_head.mask_head.convs.0.conv': 'never ran'
}


@pytest.fixture(scope='module')
def partly(config):
    """A calibrated model some of whose layers were turned back."""
    model = build(config)
    make_float_(model, FLOAT_LAYERS)
    model.float_layers = dict(FLOAT_LAYERS)
    model.products = ['neck']
    return fit_(model)


def without_header_field(state, *fields):
    """The state as it was packed before there were these fields."""
    header = json.loads(bytes(state[HEADER].tolist()))
    header = {key: header[key] for key in header if key not in fields}
    rest = {key: state[key] for key in state if key != HEADER}
    del header['checksum']
    header['checksum'] = _checksum_of(header, rest)
    text = json.dumps(header, sort_keys=True).encode()
    return dict(
        rest, **{HEADER: torch.frombuffer(bytearray(text), dtype=torch.uint8)})


@pytest.mark.parametrize('kind', ['packed', 'before', 'plain'])
@pytest.mark.parametrize('load', [
    lambda model, state: model.load_state_dict(state),
    lambda model, state: mmengine_load(model, state, strict=False)
])
def test_layers_in_float_in_a_state_are_in_float_in_what_loads_it(
        config, partly, kind, load):
    """Though no config names them, and by the keys where no header does."""
    state = partly.state_dict()
    if kind != 'plain':
        state = pack_state(partly, partly.quant_config)
        assert read_header(state)['float_layers'] == FLOAT_LAYERS
    if kind == 'before':
        state = without_header_field(state, 'float_layers', 'products')
    loaded = build(config)
    load(loaded, dict(state))
    assert is_calibrated(loaded)
    for name in FLOAT_LAYERS:
        layer = loaded.get_submodule(name)
        assert type(layer) is torch.nn.Conv2d
        assert torch.equal(layer.weight, partly.get_submodule(name).weight)
    assert loaded.float_layers.keys() == FLOAT_LAYERS.keys()
    assert loaded.products == (['neck'] if kind == 'packed' else None)
    x = torch.randn(1, 3, 40, 56)
    one, two = (m.rpn_head(m.extract_feat(x)) for m in (partly, loaded))
    assert all(torch.equal(a, b) for a, b in zip(one[0], two[0]))
    if kind == 'packed':
        again = pack_state(loaded, loaded.quant_config)
        assert all(torch.equal(again[key], state[key]) for key in state)


def test_a_config_that_names_them_loads_the_file_too(config, partly):
    cfg = copy.deepcopy(config)
    cfg.model.float_layers = FLOAT_LAYERS
    loaded = build(cfg)
    loaded.load_state_dict(pack_state(partly, partly.quant_config))
    assert loaded.float_layers == FLOAT_LAYERS


def test_a_layer_that_only_the_config_has_in_float_is_named(
        config, model, packed):
    cfg = copy.deepcopy(config)
    cfg.model.float_layers = {'rpn_head.rpn_cls': 'a choice'}
    with pytest.raises(QuantError, match='rpn_head.rpn_cls'):
        build(cfg).load_state_dict(dict(packed))


def test_float_weights_turn_no_layer_back(config):
    model = build(config)
    plain = MODELS.build(dict(copy.deepcopy(config.model),
                              train_cfg=None)).state_dict()
    model.load_state_dict(plain)
    assert model.float_layers == {}
    assert len(list(quantizers(model))) == len(list(quantizers(build(config))))


def test_a_state_with_no_quantized_layer_outside_of_the_backbone_is_refused(
        config, model):
    state = {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith('backbone.') or 'quantizer' not in key
    }
    with pytest.raises(QuantError, match='keys missing'):
        build(config).load_state_dict(state)
