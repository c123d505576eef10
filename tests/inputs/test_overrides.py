"""--cfg-options: every form that is not read is one line, for every tool."""
import pytest
from mmengine.config import Config

from benchmarks import calibration, scaling
from isvit_det.commands import quantize_cls, quantize_det, reproduce_table
from isvit_det.commands.console import settings
from isvit_det.commands.parser import Parser
from isvit_det.core.errors import QuantError
from isvit_det.inputs.configs import load_config
from isvit_det.inputs.overrides import check_overrides

UNREADABLE = [
    "custom_hooks=[dict(type='EMAHook')]",
    "custom_hooks=[dict(type='EMAHook',update_buffers=True)]",
    "model.neck=dict(type='FPN',num_outs=5)",
    "model.neck={'type':'FPN'}",
    "a=[1,[{'b':2}]]",
    'a=f(1,2)',
    'a=[1,2',
    'a=(1,[2)]',
    'a',
    '=3',
    'a..b=3',
    'a.=3',
    '.a=3',
]


def parsed(pair):
    parser = Parser()
    parser.add_overrides('')
    return parser.parse_args(['--cfg-options', pair]).cfg_options


@pytest.mark.parametrize('pair', UNREADABLE)
def test_what_cannot_be_read_is_one_line_that_says_what_can(pair, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(pair)
    assert caught.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: --cfg-options: ') and 'KEY=VALUE' in line
    assert repr(pair) in line and '[1,2]' in line and 'key by key' in line


@pytest.mark.parametrize('pair, value', [
    ('a=3', 3),
    ('a=1e-4', 1e-4),
    ('a=None', None),
    ('a=true', True),
    ('a=[1,2]', [1, 2]),
    ('a=1,2', [1, 2]),
    ('a=[(1,2),[b,c]]', [(1, 2), ['b', 'c']]),
    ('a=x=y', 'x=y'),
    ('a=/data/set(1)/x.json', '/data/set(1)/x.json'),
    ('a=dictionary', 'dictionary'),
    ('a=', ''),
])
def test_what_mmengine_reads_is_read_as_it_does(pair, value):
    assert parsed(pair) == {'a': value}


@pytest.mark.parametrize('parse', [
    lambda pair: quantize_det.parse_args(['c.py', '--cfg-options', pair]),
    lambda pair: quantize_cls.parse_args(
        ['m', '--weights', 'w', '--cfg-options', pair]),
    lambda pair: reproduce_table.parse_args(['--cfg-options', pair]),
    lambda pair: scaling.parse_args(['--cfg-options', pair]),
    lambda pair: calibration.parse_args(['--cfg-options', pair]),
])  # yapf: disable
def test_every_tool_reads_alike(parse, capsys):
    for pair in UNREADABLE[:1] + ['a=[1,2', 'a']:
        with pytest.raises(SystemExit) as caught:
            parse(pair)
        assert caught.value.code == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith('error: --cfg-options: ') and pair[:9] in line
    assert parse('a.b=3').cfg_options in ({'a.b': 3}, ['a.b=3'])


@pytest.mark.parametrize('key, words', [('quant', 'quant.bits=w4a4'),
                                        ('sos', 'sos.lr=1e-4')])
def test_settings_as_a_whole_are_refused(key, words):
    with pytest.raises(QuantError, match=f'{key}=w3a3 names no .*{words}'):
        settings({key: 'w3a3'})


CFG = dict(model=dict(depth=3, name=None), pipe=[dict(type='A'), 4], t=(1, ))


@pytest.mark.parametrize('overrides, words', [
    ({'pipe.2.type': 'B'}, ['pipe.2.type', 'list of 2', "'2'"]),
    ({'pipe.x.type': 'B'}, ['list of 2', "'x'"]),
    ({'pipe.x': 'B'}, ['list of 2', "'x'"]),
    ({'pipe.0': 5}, ['pipe=[...]']),
    ({'pipe.1.a': 5}, ['pipe.1 is 4', "no 'a'"]),
    ({'model.depth.x': 5}, ['model.depth is 3', "no 'x'"]),
    ({'model.name.x': 5}, ['model.name is None']),
    ({'t.0': 5}, ['t is (1,)']),
    ({'custom_hooks.0.type': 'B'}, ['custom_hooks.0.type', 'no list']),
    ({'bits': 'w3a3'}, ["'bits'", "'quant.bits'?"]),
    ({'qaunt.bits': 'w3a3'}, ['qaunt.bits', "'quant.bits'?"]),
    ({'sso.lr': 1}, ["'sso'", "'sos.lr'?"]),
    ({'iters': 3}, ["'iters'", "'sos.iters'?"]),
    ({'modle.depth': 4}, ["'modle'", "'model'?"]),
    ({'test_dataloder.batch_size': 4}, ["'test_dataloader'?"]),
    ({'unlike': 4}, ["'unlike'; give a key of the config"]),
    ({'model.0.type': 'B'}, ['model.0.type', 'no list']),
    ({'model.new.0': 'B'}, ['model.new.0', 'no list']),
    ({'model': 3, 'model.depth': 4}, ['model and model.depth', 'both']),
    ({'model.depth': 3, 'model': 4}, ['model and model.depth', 'both']),
])  # yapf: disable
def test_a_key_without_a_place_is_named(overrides, words, tmp_path):
    path = tmp_path / 'config.py'
    Config(CFG).dump(str(path))
    with pytest.raises(QuantError) as caught:
        load_config(str(path), overrides)
    for word in ['--cfg-options: ', *words]:
        assert word in str(caught.value)


def test_a_key_with_a_place_is_none_of_them():
    overrides = {
        'model.depth': 4,
        'model.new.deep': 1,
        'pipe.0.type': 'B',
        'pipe.0.new': 3,
        'custom_hooks': [1],
        'find_unused_parameters': True
    }
    check_overrides(CFG, overrides)
    cfg = Config(CFG)
    cfg.merge_from_dict(overrides)
    assert cfg.model.new.deep == 1 and cfg.pipe[0].type == 'B'
