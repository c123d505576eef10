"""QuantSwinTransformer against mmdet's SwinTransformer, and its units."""
import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer, WindowMSA
from mmengine.runner.checkpoint import load_state_dict as mmengine_load

from isvit_det.backbones.swin import QuantSwinTransformer, QuantWindowMSA
from isvit_det.calibration.sos import calibrate
from isvit_det.calibration.stages import UnitCalibration
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import list_sites, quantized_layers
from isvit_det.core.settings import QuantConfig, SOSConfig
from tests.backbones import laws
from tests.backbones.laws import (check_calibrates, check_equal_bit_for_bit,
                                  check_every_item_covered_once,
                                  check_items_run_alone, check_keys,
                                  check_last_layers, check_padding,
                                  check_padding_rows, check_rotation,
                                  check_stage_two, pair_up, units_forward)
from tests.marks import slow

SMALL = dict(
    embed_dims=16,
    depths=[2, 2, 2, 2],
    num_heads=[1, 2, 4, 8],
    drop_path_rate=.2)
# With window 7 and patch 4: the first needs no padding, the others do, the
# last on maps smaller than a window.
SIZES = [(224, 224), (100, 130), (64, 200), (33, 50)]


def swins(quant=None, **kwargs):
    """A float Swin with lively weights and the quantized one that has them."""
    torch.manual_seed(0)
    settings = {**SMALL, **kwargs}
    source = SwinTransformer(**settings)
    return pair_up(source, QuantSwinTransformer(**settings, quant=quant))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('kwargs',
                         [{},
                          dict(qkv_bias=False),
                          dict(window_size=5, qk_scale=.3),
                          dict(strides=(4, 2, 1, 2)),
                          dict(patch_norm=False, out_indices=(1, 3))])
def test_uncalibrated_equals_the_float_class_bit_for_bit(size, kwargs):
    check_equal_bit_for_bit(*swins(**kwargs), torch.randn(2, 3, *size))


@pytest.mark.parametrize('kwargs', [{}, dict(qkv_bias=False)])
def test_rotated_heads_compute_the_same(kwargs):
    check_rotation(swins(**kwargs)[1], torch.randn(1, 3, 100, 130))


def test_last_layers_add_to_what_units_give():
    check_last_layers(swins()[1], torch.randn(1, 3, 100, 130))


def test_absolute_position_embedding_is_kept():
    source, model = swins(use_abs_pos_embed=True, pretrain_img_size=64)
    for swin in (source, model):
        torch.manual_seed(1)
        torch.nn.init.normal_(swin.absolute_pos_embed)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(source(x)[3], model(x)[3])
        last = units_forward(model, x)[-1]
        assert torch.equal(
            model.norm3(last.x).view(1, 2, 2, -1).permute(0, 3, 1, 2),
            model(x)[3])


def test_training_mode_checkpointing_and_frozen_stages_work_as_before():
    source, model = swins(with_cp=True, frozen_stages=1)
    x = torch.randn(1, 3, 70, 70)
    for swin in (source, model):
        swin.train()
        torch.manual_seed(2)
        sum(out.sum() for out in swin(x)).backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    assert grads['patch_embed.projection.weight'] is None
    for name, param in source.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(grads[name], param.grad)


def test_float_keys_are_unchanged_and_the_rest_is_ours():
    check_keys(*swins(qkv_bias=False))


@pytest.mark.parametrize('size', SIZES)
def test_units_in_order_are_the_forward_pass(size):
    _, model = swins()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        last = units_forward(model, x)[-1]
        out = model.norm3(last.x).view(1, *last.size, -1)
        assert torch.equal(out.permute(0, 3, 1, 2), model(x)[-1])


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('quantized', [False, True])
@pytest.mark.parametrize('kwargs', [{}, dict(strides=(4, 2, 1, 2))])
def test_items_run_alone_as_they_do_in_the_map(size, quantized, kwargs):
    check_items_run_alone(
        swins(**kwargs)[1], torch.randn(1, 3, *size), quantized)


@pytest.mark.parametrize('size', SIZES[1:])
def test_what_padding_computes_for_itself_is_not_observed(size):
    check_padding(swins()[1], torch.randn(1, 3, *size))


def test_a_calibration_leaves_padding_out(tmp_path, monkeypatch):
    images = [torch.randn(1, 3, 33, 40 + 4 * i) for i in range(4)]
    check_padding_rows(lambda: swins()[1], images, tmp_path, monkeypatch)


@pytest.mark.parametrize('freeze', [False, True])
@pytest.mark.parametrize('stage', [1, 3])
def test_every_parameter_has_a_learning_rate_or_is_frozen(stage, freeze):
    _, model = swins()
    sos = SOSConfig(
        lr=1e-3,
        other_lr_ratio=3.,
        closed_form_start=True,
        freeze_single_layers=freeze)
    for unit in model.units():
        (weights,
         lr), (others, other_lr) = UnitCalibration(unit, 0, None,
                                                   model.quant_config, sos, 1.,
                                                   1, None)._rates(stage)
        assert (lr, other_lr) == (1e-3, pytest.approx(3e-3))
        layers = quantized_layers(unit.module)
        left = {id(param) for param in unit.module.parameters()}
        left -= {id(param) for param in weights + others}
        assert not {id(layer.weight)
                    for layer in layers} & set(map(id, others))
        single = unit.name == 'patch_embed' or 'downsample' in unit.name
        if single and freeze and stage == 3:
            assert not weights and left == {id(layers[0].weight)}
        else:
            assert not left


def test_a_frozen_weight_keeps_its_codes_and_its_norm_learns(tmp_path):
    found = []
    for iters in (0, 2):
        _, model = swins()
        model.patch_embed.projection.weight.requires_grad_(False)
        config = SOSConfig.from_dict(
            dict(
                iters=iters,
                stage_one_share=0.,
                roll_back=False,
                freeze_single_layers=True), model.quant_config)
        images = torch.randn(2, 3, 60, 72).split(1)
        calibrate(
            laws.Beginning(model, 1), images, model.quant_config, config,
            tmp_path / str(iters), 'x')
        embed = model.patch_embed
        assert not embed.projection.weight.requires_grad
        assert embed.norm.weight.requires_grad
        found.append(embed)
    before, after = found
    assert torch.equal(before.projection.weight, after.projection.weight)
    assert not torch.equal(before.norm.weight, after.norm.weight)
    assert not torch.equal(before.projection.bias, after.projection.bias)


def test_every_item_is_covered_once():
    check_every_item_covered_once(swins()[1], torch.randn(1, 3, 100, 130))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('kwargs', [{}, dict(qkv_bias=False)])
def test_stage_two_moves_no_code_even_on_maps_that_need_padding(
        size, dtype, kwargs):
    check_stage_two(
        swins(**kwargs)[1].to(dtype), torch.randn(1, 3, *size, dtype=dtype),
        'stages.0.blocks.0.')


def test_all_but_norms_and_softmax_is_quantized_and_the_image_at_8_bits():
    _, model = swins(quant=dict(bits='w3a4'))
    sites = {site.name: site for site in list_sites(model)}
    assert sites['patch_embed.projection.input_quantizer'].bits == 8
    assert sites['patch_embed.projection.weight_quantizer'].bits == 3
    blocks, merges = 8, 3
    # qkv, proj, fc1, fc2: input and weight; two products of two operands.
    assert len(sites) == blocks * (4 * 2 + 4) + (merges + 1) * 2
    for name, site in sites.items():
        if site.role == 'weight':
            assert (site.bits, site.granularity) == (3, 'channel')
        elif 'patch_embed' not in name:
            assert (site.bits, site.granularity) == (4, 'tensor')
    plain = [
        name for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and not hasattr(module, 'weight_quantizer')
    ]
    assert not plain


def test_gradients_are_the_same_again_on_several_threads():
    """With as many heads as a real one, sums may be split among threads."""
    config = QuantConfig()
    source = WindowMSA(embed_dims=96, num_heads=24, window_size=(7, 7))
    attention = QuantWindowMSA(source, config)
    table = attention.relative_position_bias_table
    x = torch.randn(16, 49, 96)
    found = []
    for _ in range(5):
        table.grad = None
        attention(x).square().sum().backward()
        found.append(table.grad.clone())
    assert all(torch.equal(found[0], other) for other in found)


def test_a_backbone_alone_refuses_a_packed_state():
    _, model = swins()
    state = model.state_dict()
    key = 'stages.0.blocks.0.attn.w_msa.qkv.weight'
    state[f'{key}_codes'] = state.pop(key)
    with pytest.raises(QuantError, match='isvit_det.quantized_detector'):
        mmengine_load(model, state, strict=False)


@pytest.mark.parametrize('kwargs', [
    slow(dict(qkv_bias=False)),
    slow(dict(patch_norm=False, out_indices=(1, 3))),
    slow(dict(with_cp=True, frozen_stages=2)),
    dict(strides=(4, 2, 1, 2), qkv_bias=False, patch_norm=False),
])
def test_every_form_of_swin_can_be_calibrated(tmp_path, kwargs):
    source, model = swins(quant=dict(bits='w6a6'), **kwargs)
    images = [torch.randn(1, 3, 60, 72 + 4 * i) for i in range(2)]
    check_calibrates(source, model, images, tmp_path, limit=.3, iters=1)


@pytest.mark.parametrize(
    'method',
    ['minmax', 'repq', slow('isvit_paper'),
     slow('isvit')])
def test_calibration_quantizes_a_swin_that_stays_close_at_8_bits(
        tmp_path, method):
    source, model = swins(quant=dict(method=method, bits='w8a8'))
    images = [torch.randn(1, 3, 60, 72 + 4 * i) for i in range(3)]
    sos = {} if method in ('minmax', 'repq') else dict(iters=3)
    limit = .25 if method == 'repq' else .1
    check_calibrates(source, model, images, tmp_path, limit, **sos)
