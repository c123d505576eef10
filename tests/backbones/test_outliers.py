"""Outlier channels made by exact rescaling, on which iterations must pay."""
import mmcv
import pytest
import torch
from mmengine.config import Config

from benchmarks.outliers import add_outliers_
from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.calibration.sos import calibrate
from isvit_det.core.layers import observe, quantizers
from isvit_det.core.settings import SOSConfig
from isvit_det.datasets.drawn import generate
from tests.backbones.laws import Beginning, units_forward
from tests.backbones.test_swin import swins
from tests.backbones.test_vit import RELATIVE, vits
from tests.engine.tiny import FLOAT

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


def drawn_swin():
    """The demo's backbone with its trained weights."""
    cfg = Config.fromfile(str(FLOAT))
    settings = {k: v for k, v in cfg.model.backbone.items() if k != 'type'}
    settings.update(init_cfg=None)
    model = QuantSwinTransformer(**settings, quant=dict(bits='w4a4'))
    model.eval()
    weights = torch.load(FLOAT.with_suffix('.pth'), weights_only=True)
    prefix = 'backbone.'
    model.load_state_dict(
        {
            key[len(prefix):]: value
            for key, value in weights['state_dict'].items()
            if key.startswith(prefix)
        },
        strict=False)
    return model


def pictures(folder, num):
    """Drawn pictures, normalised as the config does."""
    generate(folder, dict(train=num, val=1))
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    for path in sorted((folder / 'train').glob('*.png')):
        image = torch.from_numpy(mmcv.imread(path, channel_order='rgb'))
        yield ((image - mean) / std).permute(2, 0, 1)[None, :, :128, :128]


@pytest.mark.slow
def test_iterations_pay_where_channels_stand_out(tmp_path):
    images = list(pictures(tmp_path / 'data', 20))
    errors = []
    for iters in (0, 60):
        model = drawn_swin()
        add_outliers_(model, 16)
        with torch.no_grad():
            targets = [units_forward(model, image)[2].x for image in images]
        config = SOSConfig.from_dict(dict(iters=iters), model.quant_config)
        calibrate(
            Beginning(model), images[:16], model.quant_config, config,
            tmp_path / str(iters), 'x')
        lost = energy = 0.
        with torch.no_grad():
            for image, target in zip(images[16:], targets[16:]):
                output = units_forward(model, image)[2].x
                lost += (output - target).square().sum().item()
                energy += target.square().sum().item()
        errors.append(lost / energy)
    without, after = errors
    print(f'{without:.4g} -> {after:.4g}')
    assert after < .95 * without
