"""--protocol: good bits for the first layer and the predictors."""
import json

import pytest
from mmengine.config import Config

from isvit_det.commands.quantize_det import main
from isvit_det.core import mixed
from isvit_det.core.mixed import named_parts, settle_protocol
from isvit_det.core.settings import QuantConfig
from isvit_det.detector import end_layers
from tests.engine.tiny import FLOAT, make_tiny
from tests.packed.test_state import build

ENDS = [
    'backbone.patch_embed.projection', 'rpn_head.rpn_cls', 'rpn_head.rpn_reg',
    'roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg',
    'roi_head.mask_head.conv_logits'
]


@pytest.fixture(scope='module')
def cfg():
    return Config.fromfile(str(FLOAT))


def eight(model):
    return [
        name for name, part in named_parts(model)
        if hasattr(part, 'weight') and part.weight_quantizer.bits == 8
    ]


def test_the_ends_of_a_detector_are_found(cfg):
    model = build(cfg)
    assert sorted(end_layers(model)) == sorted(ENDS)
    assert eight(model) == [] and model.quant_config.overrides == ()


@pytest.mark.parametrize('share', [.01, .001])
def test_what_is_practical_is_in_8_bits_and_adds_little(
        cfg, monkeypatch, share):
    monkeypatch.setattr(mixed, 'MAX_SHARE', share)
    model = build(cfg, protocol='practical', bits='w3a3')
    kept = eight(model)
    assert kept and set(kept) <= set(ENDS)
    weights = {
        name: part.weight.numel()
        for name, part in named_parts(model) if hasattr(part, 'weight')
    }
    added = 5 * sum(weights[name] for name in kept)
    assert added <= share * 3 * sum(weights.values())
    # One more would be too much, unless all are there.
    rest = [weights[name] for name in ENDS if name not in kept]
    assert bool(rest) == (share == .001)
    if rest:
        assert added + 5 * min(rest) > share * 3 * sum(weights.values())
    assert model.quant_config.label == 'w3a3 practical'
    # Settings of a packed file have the overrides already.
    again = QuantConfig.from_dict(model.quant_config.to_dict())
    assert settle_protocol(model, again, end_layers(model)) == again


def test_overrides_of_the_user_come_last(cfg):
    own = dict(match='rpn_head', weight_bits=5)
    model = build(cfg, protocol='practical', overrides=[own])
    layer = model.rpn_head.rpn_cls
    assert layer.weight_quantizer.bits == 5
    assert layer.input_quantizer.bits == 8


def test_the_protocol_is_told_with_every_ap(tmp_path, capsys):
    tiny = make_tiny(tmp_path / 'tiny')
    work = tmp_path / 'work'
    argv = [
        tiny.config, tiny.checkpoint, '--scope', 'detector', '--method',
        'minmax', '--calib-images', '2', '--no-float-eval', '--work-dir',
        str(work)
    ]
    assert main([*argv, '--protocol', 'practical']) == 0
    said = capsys.readouterr().out
    assert 'w4a4 practical' in said
    assert 'protocol practical' in said
    result = json.loads((work / 'result.json').read_text())
    assert result['protocol'] == 'practical'
    assert all(one['weight_bits'] == 8 for one in result['overrides'])
    assert main([tiny.config, str(work / 'packed.pth'), '--work-dir',
                 str(tmp_path / 'again')]) == 0  # yapf: disable
    assert 'w4a4 practical' in capsys.readouterr().out
    assert main([*argv, '--protocol', 'best']) == 2
    assert "'best'" in capsys.readouterr().err
