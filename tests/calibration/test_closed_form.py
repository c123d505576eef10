"""Closed-form correction: less error on unseen inputs, and never more."""
import copy

import pytest
import torch
from torch import nn

from isvit_det.calibration import moments
from isvit_det.calibration.closed_form import correct_
from isvit_det.calibration.moments import Moments
from isvit_det.calibration.weight_fitting import ridge_regression
from isvit_det.core.layers import (QuantConv2d, QuantLinear, fit_weights_,
                                   observe, precision)
from isvit_det.core.settings import QuantConfig

CONFIG = QuantConfig(weight_bits=4, act_bits=4)


def smooth_maps(num, channels=6, seed=0):
    """Maps whose neighbouring pixels are alike, as features are."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(num, channels, 5, 6, generator=generator)
    maps = nn.functional.interpolate(
        maps, size=(17, 22), mode='bicubic', align_corners=False)
    return maps + 1.


LAYERS = {
    'conv':
    lambda: QuantConv2d(nn.Conv2d(6, 9, 3, padding=1), CONFIG),
    'strided':
    lambda: QuantConv2d(
        nn.Conv2d(6, 9, (3, 2), stride=2, padding=(1, 0)), CONFIG),
    'conv without bias':
    lambda: QuantConv2d(nn.Conv2d(6, 9, 3, bias=False), CONFIG),
    'linear':
    lambda: QuantLinear(nn.Linear(22, 9), CONFIG),
    'linear without bias':
    lambda: QuantLinear(nn.Linear(22, 9, bias=False), CONFIG),
}


def grouped():
    return QuantConv2d(nn.Conv2d(6, 9, 3, groups=3), CONFIG)


def fitted(make, seed=0):
    torch.manual_seed(seed)
    layer = nn.Sequential(make())
    with observe(layer):
        layer(smooth_maps(8))
    return layer


def error(layer, source, x):
    """Squared error of a quantized layer relative to its float source."""
    expected = source(x)
    with precision(layer, weights=True, acts=True):
        found = layer(x)
    return ((found - expected).square().sum() / expected.square().sum()).item()


@pytest.mark.parametrize('most', [4096, 20])
@pytest.mark.parametrize('kind', LAYERS)
def test_a_corrected_layer_is_closer_to_float_on_unseen_maps(
        kind, most, monkeypatch):
    """A wide one too, which is corrected in parts."""
    monkeypatch.setattr(moments, 'MAX_INPUTS', most)
    plain, source = fitted(LAYERS[kind]), fitted(LAYERS[kind])
    corrected = copy.deepcopy(plain)
    fit_weights_(plain)
    with precision(corrected, weights=False, acts=False):
        with correct_([*corrected]) as correction, torch.no_grad():
            for image, x in enumerate(smooth_maps(40, seed=1).split(1)):
                correction.start_image(image)
                corrected(x)
    unseen = smooth_maps(8, seed=2)
    with torch.no_grad():
        assert (error(corrected, source, unseen)
                < .8 * error(plain, source, unseen))


@pytest.mark.parametrize('most', [4096, 8])
def test_the_mean_of_the_output_is_kept(most, monkeypatch):
    monkeypatch.setattr(moments, 'MAX_INPUTS', most)
    layer, source = fitted(LAYERS['linear']), fitted(LAYERS['linear'])
    # Every row of a map is looked at.
    maps = smooth_maps(12, seed=1)
    with precision(layer, weights=False, acts=False):
        with correct_([*layer]) as correction, torch.no_grad():
            for image, x in enumerate(maps.split(1)):
                correction.start_image(image)
                layer(x)
    with precision(layer, weights=True, acts=True), torch.no_grad():
        lost = source(maps) - layer(maps)
    assert lost.flatten(0, -2).mean(0).abs().max() < 1e-5


@pytest.mark.parametrize('kind', LAYERS)
def test_weights_end_as_their_codes_decode(kind):
    layer = fitted(LAYERS[kind])
    with precision(layer, weights=False, acts=False):
        with correct_([*layer]) as correction, torch.no_grad():
            for image, x in enumerate(smooth_maps(12).split(1)):
                correction.start_image(image)
                layer(x)
    quantizer = layer[0].weight_quantizer
    assert quantizer.is_fitted
    weight = layer[0].weight.detach()
    decoded = quantizer.decode(quantizer.encode(weight))
    assert torch.allclose(decoded, weight, rtol=1e-5, atol=1e-7)


def test_what_codes_were_rounded_from_has_the_same_codes():
    found = []
    for as_codes in (True, False):
        layer = fitted(LAYERS['conv'])
        with precision(layer, weights=False, acts=False):
            with correct_([*layer], as_codes) as correction, torch.no_grad():
                for image, x in enumerate(smooth_maps(12).split(1)):
                    correction.start_image(image)
                    layer(x)
        quantizer = layer[0].weight_quantizer
        found.append((layer[0].weight, quantizer.encode(layer[0].weight)))
    (decoded, codes), (before, same) = found
    assert torch.equal(codes, same)
    scale = quantizer.scale.view(-1, 1, 1, 1)
    assert not torch.equal(decoded, before)
    assert ((decoded - before).abs() <= .5001 * scale).all()


def fitted_to_residuals(num_images,
                        num_rows,
                        num_others=0,
                        weight=1.,
                        num_prefix=0):
    """A layer, corrected for residuals that a linear map gives.

    Some rows at the start have another target, and another weight.

    Returns:
        The layer's weight, the targets of most rows and of the others, and
        the sum of the weights.
    """
    torch.manual_seed(0)
    layer = nn.Sequential(LAYERS['linear']())
    with observe(layer):
        layer(torch.randn(200, 22))
    target, other = torch.randn(9, 22), torch.randn(9, 22)
    weights = None
    if num_others:
        weights = torch.ones(num_rows, 1)
        weights[:num_others] = weight
    with precision(layer, weights=False, acts=True), torch.no_grad():
        with correct_([*layer], residual_given=True) as correction:
            for image in range(num_images):
                correction.start_image(image, num_prefix)
                x = torch.randn(num_rows, 22)
                output = x @ target.T
                output[:num_others] = x[:num_others] @ other.T
                correction.add_residual(layer[0], output - layer(x), weights)
            collector = correction.collectors[layer[0]]
            count = sum(m.count for m in collector.used + collector.held_out)
    return layer[0].weight, target, other, count


@pytest.mark.parametrize('weighted', [False, True])
def test_a_layer_is_fitted_to_the_residuals_given(weighted):
    weight, target, other, _ = fitted_to_residuals(20, 200,
                                                   50 if weighted else 0, 1e4)
    target = other if weighted else target
    # 4 bits, of weights and of what they were learned from.
    assert (weight - target).norm() < .2 * target.norm()


def test_a_class_token_is_looked_at_on_every_image():
    errors = []
    for num_prefix in (0, 1):
        weight, _, other, count = fitted_to_residuals(60, 1000, 1, 1e6,
                                                      num_prefix)
        errors.append((weight - other).norm() / other.norm())
    missed, seen = errors
    assert seen < .25 < missed
    # As much as in a sum over all thousand rows.
    assert count == pytest.approx(60 * 256 * (1 + 1e6 / 999))


def test_pixels_that_are_not_looked_at_change_nothing():
    """Locations are of the output; a kernel reads the pixels around."""
    found = []
    for elsewhere in (0., 1.):
        layer = fitted(LAYERS['strided'])

        def two(asked, image, size):
            assert asked is layer[0] and size == (9, 11)
            return torch.tensor([2 * 11 + 3, 3 * 11 + 4])

        with precision(layer, weights=False, acts=False), torch.no_grad():
            with correct_([*layer], choose_rows=two) as correction:
                for image, x in enumerate(smooth_maps(12).split(1)):
                    # Rows 3 to 7 and columns 6 to 9 are read.
                    for outside in (x[..., :3, :], x[..., 8:, :], x[..., :6],
                                    x[..., 10:]):
                        outside += elsewhere
                    correction.start_image(image)
                    layer(x)
        found.append(layer[0].weight)
    assert torch.equal(*found)
    everywhere = fitted(LAYERS['strided'])
    with correct_([*everywhere]) as correction, torch.no_grad():
        for image, x in enumerate(smooth_maps(12).split(1)):
            correction.start_image(image)
            everywhere(x)
    assert not torch.equal(found[0], everywhere[0].weight)


@pytest.mark.parametrize('kind', ['never run', 'grouped'])
def test_layers_that_cannot_be_corrected_are_fitted_only(kind):
    layer = fitted(grouped if kind == 'grouped' else LAYERS['conv'])
    before = copy.deepcopy(layer.state_dict())
    with correct_([*layer]), torch.no_grad():
        if kind != 'never run':
            layer(smooth_maps(4))
    assert torch.equal(layer[0].weight, before['0.weight'])
    assert torch.equal(layer[0].bias, before['0.bias'])
    assert layer[0].weight_quantizer.is_fitted


def test_parts_make_up_for_their_rounding_alone(monkeypatch):
    """What the whole output lacks, they cannot share out."""
    monkeypatch.setattr(moments, 'MAX_INPUTS', 8)
    found = []
    for residual_given in (False, True):
        layer = fitted(LAYERS['linear'])
        with precision(layer, weights=False, acts=False), torch.no_grad():
            with correct_([*layer],
                          residual_given=residual_given) as correction:
                for image, x in enumerate(smooth_maps(12).split(1)):
                    correction.start_image(image)
                    output = layer(x).flatten(0, -2)
                    correction.add_residual(layer[0], torch.ones_like(output))
        found.append(layer[0].weight)
    assert torch.equal(*found)


def test_noise_that_cannot_be_predicted_changes_nothing():
    """Held-out rows reject a fit of the rows it was made from."""
    torch.manual_seed(0)
    used, held = (Moments(40, 5, torch.device('cpu')) for _ in range(2))
    for sums in (used, held):
        sums.add(torch.randn(60, 40), torch.randn(60, 5))
    delta = ridge_regression(used, held, True)
    wild = torch.linalg.solve(*used.centred())
    zero = torch.zeros_like(delta)
    mean = used.outputs / used.count
    assert held.error(delta, mean) <= held.error(zero, mean)
    assert held.error(wild, mean) > held.error(zero, mean)


@pytest.mark.parametrize('value', [0., 7.3, 1000.])
def test_constant_inputs_are_rounded_without_a_covariance(value):
    layer = nn.Sequential(QuantLinear(nn.Linear(192, 9), CONFIG))
    x = torch.full((50, 192), value)
    with observe(layer):
        layer(x)
    with precision(layer, weights=False, acts=True), torch.no_grad():
        with correct_([*layer]) as correction:
            for image in range(8):
                correction.start_image(image)
                layer(x)
    assert layer[0].weight.isfinite().all()
    assert layer[0].weight_quantizer.is_fitted


def test_a_layer_that_did_not_run_has_no_residual():
    layer = fitted(LAYERS['linear'])
    with correct_([*layer], residual_given=True) as correction:
        correction.start_image(0)
        correction.add_residual(layer[0], torch.zeros(3, 9))
    assert layer[0].weight_quantizer.is_fitted


def test_inputs_far_from_zero_keep_their_small_covariance():
    torch.manual_seed(0)
    used, held = (Moments(90, 5, torch.device('cpu')) for _ in range(2))
    mix = torch.randn(90, 5) / 10
    for sums in (used, held):
        for _ in range(4):
            q = .01 * torch.randn(30, 90)
            sums.add(50 + q, q @ mix)
    delta = ridge_regression(used, held, True)
    # Most of the residual that depends on the inputs is fitted.
    assert (delta - mix).norm() < .5 * mix.norm()


def test_the_error_of_moments_is_that_of_their_rows():
    torch.manual_seed(0)
    q, y = torch.randn(30, 4).double(), torch.randn(30, 3).double()
    delta, offset = torch.randn(4, 3).double(), torch.randn(3).double()
    sums = Moments(4, 3, q.device)
    sums.add(q[:10], y[:10])
    sums.add(q[10:], y[10:])
    expected = (y - q @ delta - offset).square().sum(1).mean().item()
    assert sums.error(delta, offset) == pytest.approx(expected)


def test_an_error_while_watching_leaves_layers_alone():
    layer = fitted(LAYERS['conv'])
    with pytest.raises(ZeroDivisionError):
        with correct_([*layer]):
            raise ZeroDivisionError
    assert not layer[0]._forward_pre_hooks
    assert not layer[0].weight_quantizer.is_fitted
