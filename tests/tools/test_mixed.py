"""Mixed precision from the command line to the packed file and back."""
import json

import pytest
import torch
from mmdet.apis import init_detector

from isvit_det.apis import quantize_detector
from isvit_det.commands.quantize_det import main, parse_args
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import list_sites
from isvit_det.packed.header import HEADER, read_header

OVERRIDES = [
    dict(match='backbone.stages.1', weight_bits=6, act_bits=5),
    dict(match='*.query_key', act_bits=8),
    dict(match='*.w_msa.qkv', weight_bits=2, act_bits=3),
    dict(match='neck', weight_bits=8, act_bits=8),
    dict(match='roi_head.bbox_head.fc_cls', act_bits=6),
]
WORDS = [
    'backbone.stages.1=w6a5', '*.query_key=a8', '*.w_msa.qkv=w2a3',
    'neck=w8a8', 'roi_head.bbox_head.fc_cls=a6'
]
ROOT = 'backbone.stages.1.blocks.0'


def expected_bits(name):
    """Bits of a site, by hand."""
    is_weight = name.endswith('weight_quantizer')
    if name == 'backbone.patch_embed.projection.input_quantizer':
        return 8
    if '.query_key.' in name or name.startswith('neck.'):
        return 8
    if '.w_msa.qkv.' in name:
        return 2 if is_weight else 3
    if 'fc_cls' in name:
        return 4 if is_weight else 6
    if name.startswith('backbone.stages.1.'):
        return 6 if is_weight else 5
    return 4


def command(tiny, folder, *words):
    return [
        tiny.config, tiny.checkpoint, '--scope', 'detector', '--iters', '0',
        '--calib-images', '2', '--no-float-eval', '--work-dir',
        str(folder), *words
    ]


@pytest.fixture(scope='module')
def done(tiny, tmp_path_factory):
    """The folder of a run of both engines."""
    folder = tmp_path_factory.mktemp('mixed')
    words = ['--layer-bits', *WORDS, '--engine', 'both']
    assert main(command(tiny, folder, *words)) == 0
    return folder


def test_every_site_has_its_bits(done):
    result = json.loads((done / 'result.json').read_text())
    assert result['bits'] == 'w4a4 mixed'
    assert result['overrides'] == OVERRIDES
    assert result['provenance']['quant']['overrides'] == OVERRIDES
    for site in result['sites']:
        assert site['bits'] == expected_bits(site['name']), site['name']
    assert 'w4a4 mixed' in (done / 'quantize_det.log').read_text()


def test_all_of_it_runs_natively(done):
    result = json.loads((done / 'result.json').read_text())
    assert result['engine']['engine'] == 'native'
    assert result['engine']['simulated'] == {}
    assert result['engine']['unfused'] == {}


def test_the_packed_file_loads_with_its_config_and_no_other(
        tiny, done, tmp_path, capsys):
    packed = done / 'packed.pth'
    state = torch.load(packed, weights_only=True)['state_dict']
    assert read_header(state)['quant']['overrides'] == OVERRIDES
    model = init_detector(str(done / 'tiny.py'), str(packed), device='cpu')
    for site in list_sites(model):
        assert site.bits == expected_bits(site.name)
    # The codes of each layer are dense in its own bits.
    name = f'{ROOT}.attn.w_msa.qkv'
    layer = model.get_submodule(name)
    assert len(state[f'{name}.weight_codes']) == layer.weight.numel() * 2 // 8
    assert HEADER in state
    # A float config takes the file's bits, and other bits are refused.
    argv = command(tiny, tmp_path)
    argv[1:4] = [str(packed)]
    assert main(argv) == 0
    again = json.loads((tmp_path / 'result_packed.json').read_text())
    first = json.loads((done / 'result.json').read_text())
    assert again['quantized']['metrics'] == first['quantized']['metrics']
    assert main([*argv, '--layer-bits', 'neck=w7']) == 2
    assert 'overrides' in capsys.readouterr().err


@pytest.mark.slow
def test_other_overrides_discard_the_state(tiny, tmp_path, monkeypatch,
                                           capsys):
    from isvit_det.engine import calibrate

    def fail(*args):
        raise QuantError('stop.')

    monkeypatch.setattr(calibrate, 'calibrate_heads_', fail)
    argv = command(tiny, tmp_path, '--method', 'minmax', '--layer-bits')
    log = tmp_path / 'quantize_det.log'
    for bits, expected in (('neck=w8', False), ('neck=w7', True)):
        assert main([*argv, bits]) == 2
        assert ('starting anew' in log.read_text()) == expected


def test_a_config_has_overrides_and_the_command_adds_to_them(tiny, tmp_path):

    def change(cfg):
        cfg.model = dict(
            cfg.model,
            type='isvit_det.quantized_detector',
            base='MaskRCNN',
            quant=dict(overrides=OVERRIDES[:1], scope='detector'))
        cfg.model.backbone.type = 'isvit_det.QuantSwinTransformer'

    from isvit_det.commands.quantize_det import configure
    tiny.variant(tmp_path / 'mixed.py', change)
    (tmp_path / 'heir.py').write_text("_base_ = 'mixed.py'\n")
    heir = str(tmp_path / 'heir.py')
    cfg = configure(parse_args([heir, tiny.checkpoint]))
    assert cfg.model.quant.overrides == OVERRIDES[:1]
    cfg = configure(
        parse_args([heir, tiny.checkpoint, '--layer-bits', 'neck=w8a8']))
    assert cfg.model.quant.overrides == [OVERRIDES[0], OVERRIDES[3]]
    assert cfg.work_dir.endswith('_mixed')


@pytest.mark.parametrize('words, text', [
    (['neck.lateral_convs.O=w8'], 'is it neck.lateral_convs'),
    (['stages.0.blocks.0=w8'], 'is it backbone.stages.0.blocks.0?'),
    (['neck'], "'neck' cannot be read"),
])
def test_wrong_patterns_are_one_line(tiny, tmp_path, capsys, words, text):
    assert main(command(tiny, tmp_path, '--layer-bits', *words)) == 2
    error = capsys.readouterr().err
    assert text in error and len(error.splitlines()) == 1


def test_python_takes_overrides(tiny):
    model = init_detector(tiny.config, tiny.checkpoint, device='cpu')
    images = sorted((tiny.data / 'train').iterdir())[:2]
    quantized = quantize_detector(
        model, images, iters=0, quant=dict(overrides=OVERRIDES[:3]))
    bits = {site.name: site.bits for site in list_sites(quantized)}
    assert bits[f'{ROOT}.ffn.layers.1.weight_quantizer'] == 6
    assert bits[f'{ROOT}.attn.w_msa.qkv.input_quantizer'] == 3
    with pytest.raises(QuantError, match='matches no quantized layer'):
        quantize_detector(model, images, quant=dict(overrides=OVERRIDES[3:4]))
