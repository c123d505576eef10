"""Which weights of a file are taken, and what is said of that."""
import argparse

import numpy as np
import pytest
import torch
from torch import nn

from isvit_det.core.errors import QuantError
from isvit_det.core.weights import check_values, read_weights


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.fixture
def taken(tmp_path):
    """Reads what was saved: weights and the line about them."""

    def read(content):
        torch.save(content, tmp_path / 'x.pth')
        return read_weights(tmp_path / 'x.pth')

    return read


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) for key in one)


RAW, AVERAGED = make_model(1).state_dict(), make_model(2).state_dict()


@pytest.mark.parametrize(
    'content, expected, words',
    [
        # timm evaluates the average and keeps the best checkpoint by it.
        (dict(
            state_dict=RAW,
            state_dict_ema=AVERAGED,
            metric=np.float64(1.),
            args=argparse.Namespace(lr=1)), AVERAGED,
         "entry 'state_dict_ema', not 'state_dict'"),
        (dict(state_dict=AVERAGED,
              state_dict_ema=None), AVERAGED, "entry 'state_dict'"),
        (dict(state_dict_ema=AVERAGED), AVERAGED, "entry 'state_dict_ema'"),
        # DeiT evaluates the model that it trains.
        (dict(model=AVERAGED, model_ema=RAW,
              optimizer={}), AVERAGED, "entry 'model', not 'model_ema'"),
        (dict(model_ema=AVERAGED, epoch=3), AVERAGED, "entry 'model_ema'"),
        # MMEngine puts the average where the model's weights are.
        (dict(
            state_dict=AVERAGED,
            meta={},
            ema_state_dict={
                f'module.{k}': v
                for k, v in RAW.items()
            }), AVERAGED, "entry 'state_dict', not 'ema_state_dict'"),
        (dict(
            meta={},
            ema_state_dict=dict({
                f'module.{k}': v
                for k, v in AVERAGED.items()
            },
                                steps=torch.tensor(3))), AVERAGED,
         "entry 'ema_state_dict', without the prefix 'module.'"),
        (dict(state_dict=AVERAGED, state_dict_ema=RAW,
              meta={}), AVERAGED, "entry 'state_dict', not 'state_dict_ema'"),
        (dict(model_state_dict=AVERAGED), AVERAGED,
         "entry 'model_state_dict'"),
        (dict(model=dict(state_dict=AVERAGED)), AVERAGED,
         "entry 'state_dict' of 'model'"),
        (AVERAGED, AVERAGED, 'all of it'),
    ])
def test_the_weights_are_those_that_the_trainer_evaluates(
        taken, content, expected, words):
    found = taken(content)
    assert same(found.state_dict, expected)
    assert found.summary == f'weights of x.pth: {words}'


@pytest.mark.parametrize('prefix', [
    'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.',
    'module.module.', 'model.', 'module.model.'
])
@pytest.mark.parametrize('entry', [None, 'state_dict_ema', 'model'])
def test_prefixes_of_wrappers_are_taken_off(taken, prefix, entry):
    state = {prefix + key: value for key, value in RAW.items()}
    found = taken({entry: state} if entry else state)
    assert same(found.state_dict, RAW)
    assert f"without the prefix '{prefix}'" in found.summary


def test_real_wrappers_are_undone(taken):
    model = make_model()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert 'n_averaged' in averaged.state_dict()
    compiled = torch.compile(model)
    parts = nn.Sequential(torch.compile(model[0]), model[1])
    for wrapped in (nn.DataParallel(model), averaged, compiled,
                    nn.DataParallel(compiled), parts):
        state = wrapped.state_dict()
        assert state.keys() != model.state_dict().keys()
        found = taken(dict(state_dict=state)).state_dict
        assert same(found, model.state_dict())
        make_model(5).load_state_dict(found)
        # Versions of modules, by which torch and mmdet rename old weights.
        assert found._metadata['1']['version'] == 2


def test_a_prefix_of_some_names_is_a_name(taken):
    state = {'module.a': torch.ones(1), 'b': torch.ones(1)}
    found = taken(state)
    assert same(found.state_dict, state) and 'prefix' not in found.summary


def test_copies_of_mmdetection_2_are_left(taken):
    copies = {f'ema_{k.replace(".", "_")}': v for k, v in RAW.items()}
    found = taken(dict(state_dict={**AVERAGED, **copies}, meta={}))
    assert same(found.state_dict, AVERAGED)
    assert f"without {len(RAW)} copies 'ema_*'" in found.summary
    # Others of that name are weights.
    more = {'ema_gate': torch.ones(1), **AVERAGED}
    assert same(taken(more).state_dict, more)


@pytest.mark.parametrize('content, words', [
    ({}, 'an empty dict'),
    (dict(state_dict={}), "an empty dict under 'state_dict'"),
    ([1], 'holds a list, expected a dict'),
    (dict(epoch=3), "'epoch' of .* is no tensor"),
    (dict(model=[1]), "holds a list under 'model', expected a dict"),
    (dict(model=argparse.Namespace()), 'an object of a class'),
    (dict(state_dict=dict(a=torch.ones(1), b=3)), "'b' of .* is no tensor"),
    ({
        3: torch.ones(1)
    }, '3 of .* is no tensor'),
])
def test_what_has_no_weights_is_said(taken, content, words):
    with pytest.raises(QuantError, match=words) as error:
        taken(content)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('value, words', [
    (torch.ones(3, dtype=torch.int8), 'is of torch.int8'),
    (torch.ones(3, dtype=torch.bool), 'is of torch.bool'),
    (torch.ones(3, dtype=torch.complex64), 'is of torch.complex64'),
    (torch.ones(3).to(torch.float8_e4m3fn), 'is of torch.float8_e4m3fn'),
    (torch.tensor([1, float('nan'), 1]), 'NaN or infinite'),
    (torch.tensor([1, -float('inf'), 1]), 'NaN or infinite'),
    (torch.full((3, ), 1e300, dtype=torch.float64), 'NaN or infinite'),
])
def test_values_that_no_model_computes_with_are_named(value, words):
    state = {**RAW, '0.bias': value}
    with pytest.raises(QuantError, match=words) as error:
        check_values(state, make_model().state_dict())
    assert "'0.bias'" in str(error.value)
    # What the model lacks, and what it has as an integer, is not asked about.
    check_values({**RAW, 'more': value}, make_model().state_dict())
    check_values({'1.num_batches_tracked': value}, make_model().state_dict())


def test_other_floats_and_what_the_model_has_itself_are_values():
    model = make_model().state_dict()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_values({
            key: value.to(dtype)
            for key, value in RAW.items()
        }, model)
    masked = {'mask': torch.tensor([0, -float('inf')])}
    check_values(masked, masked)
