"""Weights of tokens by what their errors change of the output."""
import pytest
import torch

from isvit_det.backbones.quant_vit import QuantVisionTransformer
from isvit_det.calibration import closed_form, moments
from isvit_det.calibration.importance import (NUM_IMAGES, prefix_importance,
                                              token_weights)
from isvit_det.calibration.sos import calibrate
from isvit_det.classifiers.vit import quantize_vit
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.core.units import State
from tests.backbones.test_vit import timm_vit

NUM_PATCHES = 64

MEAN = dict(global_pool='avg', class_token=True, fc_norm=False)


def classifier(**kwargs):
    return quantize_vit(timm_vit(False, **kwargs), QuantConfig()).eval()


def states(num=3):
    generator = torch.Generator().manual_seed(0)
    for number in range(num):
        image = torch.randn(1, 3, 64, 64, generator=generator)
        yield number, State(image, (64, 64))


def test_a_class_token_that_decides_counts_as_all_patches_at_most():
    ratios = prefix_importance(classifier().units(), states())
    assert 1 < ratios[0] <= NUM_PATCHES
    # Nothing reads the patches of the last block; the head has none.
    assert ratios[-2:] == [NUM_PATCHES, 1.]


def test_a_token_that_nothing_reads_counts_nothing():
    ratios = prefix_importance(classifier(**MEAN).units(), states())
    assert ratios[-2] == 0 < ratios[0] < NUM_PATCHES


@pytest.mark.parametrize('sos', [
    dict(iters=0),
    dict(iters=2, closed_form_start=False),
])
def test_what_a_class_token_is_worth_reaches_the_weights(tmp_path, sos):
    found = []
    for weigh in (True, False):
        model = classifier()
        quant = model.quant_config
        settings = SOSConfig.from_dict(dict(sos, weigh_tokens=weigh), quant)
        calibrate(model, [state.x for _, state in states()], quant, settings,
                  tmp_path / str(weigh), 'a')
        found.append(model.units()[-2].last_layer().weight)
    assert not torch.equal(*found)


def test_the_closed_form_looks_at_every_class_token(tmp_path, monkeypatch):
    started = set()

    class Spy(closed_form.Correction):

        def start_image(self, image, num_prefix=0):
            started.add(num_prefix)
            super().start_image(image, num_prefix)

    monkeypatch.setattr(closed_form, 'Correction', Spy)
    # Of 65 tokens in each image.
    monkeypatch.setattr(moments, 'ROWS_PER_CALL', 16)
    model = classifier()
    calibrate(model, [state.x for _, state in states(4)], model.quant_config,
              SOSConfig.from_dict(dict(iters=0), model.quant_config), tmp_path,
              'a')
    assert started == {0, 1}


def test_a_detectors_last_block_does_not_care_for_its_class_token():
    model = QuantVisionTransformer(
        arch=dict(embed_dims=32, depth=3, num_heads=2),
        patch_size=8,
        pretrain_img_size=64,
        num_prefix_tokens=1).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=.2)
    ratios = prefix_importance(model.units(), states())
    assert ratios[-1] == 0 < min(ratios[:-1])


def test_ratios_are_those_of_one_graph_of_the_whole_model():
    units = classifier(**MEAN).units()
    (_, state), = states(1)
    outputs = [units[0].forward(state)]
    outputs[0].x.retain_grad()
    for unit in units[1:]:
        outputs.append(unit.forward(outputs[-1]))
        outputs[-1].x.retain_grad()
    last = outputs[-1].x
    signs = torch.randint(
        2, last.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (last * signs).sum().backward()
    expected = []
    for output in outputs[:-1]:
        energy = output.x.grad[0].square().mean(1)
        expected.append((energy[0] / energy[1:].mean()).item())
    found = prefix_importance(units, states(1))
    assert found[:-1] == pytest.approx(expected, rel=1e-4)


def test_only_the_first_images_are_looked_at():
    units = classifier(**MEAN).units()
    few = prefix_importance(units, states(NUM_IMAGES))
    assert few == prefix_importance(units, states(NUM_IMAGES + 5))
    assert few != prefix_importance(units, states(1))


def test_weights_have_mean_one_and_the_ratio():
    state = State(torch.zeros(1, 2 + 6, 4), (2, 3))
    weights = token_weights(state, 3.)
    assert weights.shape == (8, 1)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[:2] / weights[2:4]).flatten().tolist() == [3., 3.]


def test_prefix_tokens_count_less_beside_some_of_the_patches():
    state = State(torch.zeros(1, 2 + 6, 4), (2, 3))
    weights = token_weights(state, 3., .5)
    assert (weights[:2] / weights[2:4]).flatten().tolist() == [1.5, 1.5]
    # Equal ones stay so, however few patches there are.
    assert token_weights(state, 1., .5) is None


@pytest.mark.parametrize('num, ratio', [(6, 3.), (8, 1.)])
def test_without_prefix_or_difference_there_are_none(num, ratio):
    state = State(torch.zeros(1, num, 4), (2, 3))
    assert token_weights(state, ratio) is None
