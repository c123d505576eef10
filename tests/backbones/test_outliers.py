"""Outlier channels made by exact rescaling, on which iterations must pay."""
import pytest
import torch

from benchmarks.outliers import add_outliers_
from isvit_det.calibration.sos import calibrate
from isvit_det.core.layers import observe, quantizers
from isvit_det.core.settings import SOSConfig
from tests.backbones.laws import units_forward
from tests.backbones.test_swin import swins
from tests.backbones.test_vit import RELATIVE, vits

SUBJECTS = {
    'swin': lambda: swins(qkv_bias=False)[1],
    'vit': lambda: vits(num_prefix_tokens=1, layer_scale=True)[1],
    'vitdet': lambda: vits(**RELATIVE)[1],
}


@torch.no_grad()
@pytest.mark.parametrize('name', SUBJECTS)
def test_outlier_channels_change_no_bit_of_what_is_computed(name):
    model, x = SUBJECTS[name](), torch.randn(1, 3, 61, 83)
    before = units_forward(model, x)
    add_outliers_(model)
    for one, other in zip(before, units_forward(model, x)):
        assert torch.equal(one.x, other.x)


def test_ranges_grow_by_the_factor():
    found = []
    for factor in (1, 64):
        model = vits(quant=dict(percentiles=(1., )))[1]
        add_outliers_(model, factor)
        with observe(model):
            model(torch.randn(1, 3, 64, 64))
        found.append({
            name: quantizer.scale
            for name, quantizer in quantizers(model).items()
            if name.endswith(('qkv.input_quantizer', 'fc1.input_quantizer',
                              'query_key.left_quantizer',
                              'value.right_quantizer'))
        })
    plain, uneven = found
    assert len(plain) == 3 * 4
    assert all(uneven[name] > 16 * plain[name] for name in plain)


@pytest.mark.parametrize('factor', [0, 3, -2])
def test_a_factor_that_would_round_is_refused(factor):
    with pytest.raises(ValueError, match='power of two'):
        add_outliers_(SUBJECTS['vit'](), factor)


def test_iterations_pay_where_channels_stand_out(tmp_path):
    errors = []
    for iters in (0, 60):
        model = vits(quant=dict(bits='w4a4', percentiles=(.999, 1.)))[1]
        add_outliers_(model, 16)
        torch.manual_seed(1)
        images = torch.randn(24, 3, 48, 48).split(1)
        with torch.no_grad():
            targets = [units_forward(model, image)[-1].x for image in images]
        sos = SOSConfig.from_dict(dict(iters=iters), model.quant_config)
        calibrate(model, images[:16], model.quant_config, sos,
                  tmp_path / str(iters), 'x')
        with torch.no_grad():
            lost = [
                (units_forward(model, image)[-1].x - target).square().sum() /
                target.square().sum()
                for image, target in zip(images[16:], targets[16:])
            ]
        errors.append(sum(lost).item() / len(lost))
    print(errors)
    without, after = errors
    assert after < .7 * without
