"""Bits under a budget: the solver, and runs of the command."""
import itertools
import json

import pytest
import torch

from isvit_det.commands.quantize_det import main
from isvit_det.core.errors import QuantError
from isvit_det.sensitivity.budget import (Budget, Limit, choose, fall,
                                          parse_budget, parse_choices)
from isvit_det.sensitivity.choice import Chooser

PAIRS = [(3, 3), (4, 4), (8, 8)]


def draw(seed, parts=5):
    generator = torch.Generator().manual_seed(seed)

    def numbers(descending):
        found = torch.rand(
            3, generator=generator).sort(descending=descending).values
        return dict(zip(PAIRS, found.tolist()))

    names = [f'part{index}' for index in range(parts)]
    return ({
        name: numbers(True)
        for name in names
    }, {
        name: numbers(False)
        for name in names
    })


def brute(harm, limits):
    """The least harm of all choices within the limits."""
    best = None
    for bits in itertools.product(PAIRS, repeat=len(harm)):
        chosen = dict(zip(harm, bits))
        if all(limit.of(chosen) <= limit.budget.limit for limit in limits):
            total = sum(harm[part][one] for part, one in chosen.items())
            best = total if best is None else min(best, total)
    return best


@pytest.mark.parametrize('seed', range(6))
def test_the_choice_does_the_least_harm(seed):
    harm, costs = draw(seed)
    other = draw(seed + 100)[1]
    limits = []
    for kind, own in (('s', costs), ('bits', other)):
        free = Limit(Budget(kind, 1.), own, .5)
        least, most = free.extremes()
        limits.append(
            free._replace(
                budget=Budget(kind, least + (most - least) *
                              (.3 + .1 * seed))))
    for some in ([limits[0]], limits):
        expected = brute(harm, some)
        if expected is None:
            with pytest.raises(QuantError, match='together'):
                choose(harm, some)
            continue
        chosen = choose(harm, some)
        assert all(one.of(chosen) <= one.budget.limit + 1e-9 for one in some)
        assert sum(harm[part][bits]
                   for part, bits in chosen.items()) == pytest.approx(
                       expected, abs=1e-6)


def test_a_roomy_budget_takes_the_most_bits_and_equal_harm_the_fewest():
    harm, costs = draw(0)
    limit = Limit(Budget('s', 100.), costs)
    assert set(choose(harm, [limit]).values()) == {(8, 8)}
    none = {part: dict.fromkeys(own, 0.) for part, own in harm.items()}
    assert set(choose(none, [limit]).values()) == {(3, 3)}


def test_what_cannot_be_kept_is_said_with_the_least_and_the_most():
    harm, costs = draw(0)
    least, most = Limit(Budget('MB', 1.), costs, 2e6).extremes()
    with pytest.raises(QuantError) as error:
        choose(harm, [Limit(Budget('MB', 1.), costs, 2e6)])
    text = str(error.value)
    assert '1MB cannot be kept' in text and '\n' not in text
    assert f'least is {least / 1e6:.4g}MB' in text
    assert f'most {most / 1e6:.4g}MB' in text


def test_harm_never_rises_with_bits():
    found = fall({(3, 3): .1, (3, 8): .2, (8, 3): .05, (8, 8): .12})
    assert found == {(3, 3): .2, (3, 8): .2, (8, 3): .12, (8, 8): .12}


@pytest.mark.parametrize('text', [
    '', '4', 'bits', '0MB', '-1MB', '20mb', '20 MB', 'ap', 'ap0.5', 'ap--1',
    '1e3MB', '4.5.2bits', 'ap-'
])
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(QuantError, match='cannot be read; give one such as'):
        parse_budget(text)


@pytest.mark.parametrize('text, words', [('3,9', "'9'"), ('3,,4', "''"),
                                         ('w4', "'w4'"), ('3,3', 'twice'),
                                         ('4,w4a4', 'twice')])
def test_bits_that_cannot_be_read(text, words):
    with pytest.raises(QuantError) as error:
        parse_choices(text)
    assert words in str(error.value)


def command(tiny, folder, *words):
    return [
        tiny.config, tiny.checkpoint, '--scope', 'detector', '--method',
        'minmax', '--calib-images', '2', '--no-float-eval', '--budget-images',
        '2', '--bits-from', '3,8', '--engine', 'native', '--work-dir',
        str(folder), *words
    ]


@pytest.fixture(scope='module')
def done(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp('budget')
    words = ['--budget', '0.4MB', '6bits', '9GBOPs', '60s']
    assert main(command(tiny, folder, *words)) == 0
    return folder, words


def test_a_budget_is_kept_and_its_choice_reported(done):
    folder, _ = done
    result = json.loads((folder / 'result.json').read_text())
    choice = result['choice']
    assert choice['planned'].keys() == {'MB', 'bits', 'GBOPs', 's'}
    packed = (folder / 'packed.pth').stat().st_size
    # To the byte.
    assert choice['planned']['MB'] == choice['actual']['MB'] == packed <= 4e5
    assert choice['planned']['bits'] == pytest.approx(choice['actual']['bits'])
    assert choice['actual']['bits'] <= 6
    # min-max has no tables, whose width a calibration may change.
    planned, actual = (choice[key]['GBOPs'] for key in ('planned', 'actual'))
    assert planned <= 9e9 and abs(actual - planned) < .2 * planned
    assert 0 < choice['actual']['s'] < 60
    chosen = {name: one['bits'] for name, one in choice['parts'].items()}
    assert set(chosen.values()) == {'w3a3', 'w8a8'}
    for site in result['sites']:
        part, = [
            name for name in chosen if site['name'].startswith(f'{name}.')
        ]
        if site['name'] != 'backbone.patch_embed.projection.input_quantizer':
            assert site['bits'] == int(chosen[part][1]), site['name']
    assert not list((folder / 'sensitivity').glob('alone*.pth'))
    log = (folder / 'quantize_det.log').read_text()
    assert 'bits chosen for 0.4MB and 6bits and 9GBOPs and 60s' in log


@pytest.mark.slow
def test_the_same_command_takes_the_same_choice(tiny, done, monkeypatch):
    folder, words = done
    before = json.loads((folder / 'result.json').read_text())
    monkeypatch.setattr(Chooser, '_choose', None)
    assert main(command(tiny, folder, *words)) == 0
    after = json.loads((folder / 'result.json').read_text())
    assert after['overrides'] == before['overrides']


@pytest.mark.parametrize('words, text', [
    (['--budget', '20'], "'20' cannot be read"),
    (['--budget', 'ap-1', '5bits'], 'ap finds the smallest'),
    (['--budget', '5bits', '6bits'], 'limit the same thing twice'),
    (['--budget', '5bits', '--layer-bits', 'neck=w8'], '--layer-bits'),
    (['--budget', '5bits', '--protocol', 'practical'], '--protocol'),
    (['--budget', '5bits', '--cfg-options', 'quant.protocol=practical'
      ], 'protocol'),
    (['--budget', '5bits', '--launcher', 'pytorch'], '--launcher'),
    ([], '--bits-from: there is no --budget'),
])
def test_wrong_budgets_are_one_line(tiny, tmp_path, capsys, words, text):
    assert main(command(tiny, tmp_path, *words)) == 2
    error = capsys.readouterr().err
    assert text in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_smallest_model_that_loses_few_points(tiny, tmp_path):
    words = ['--budget', 'ap-100']
    assert main(command(tiny, tmp_path, *words)) == 0
    choice = json.loads((tmp_path / 'result.json').read_text())['choice']
    sizes = [one['MB'] for one in choice['tried']]
    assert len(sizes) > 2 and choice['planned']['MB'] / 1e6 == min(sizes)
    assert all(one['lost'] <= 100 for one in choice['tried'])
