"""QuantSwinTransformer against mmdet's SwinTransformer, and its units."""
import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer, WindowMSA
from mmengine.runner.checkpoint import load_state_dict as mmengine_load

from isvit_det.backbones.swin import QuantSwinTransformer, QuantWindowMSA
from isvit_det.calibration.sos import calibrate
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import (list_sites, observe, precision, quantizers,
                                   set_precision_)
from isvit_det.core.reparam import (fold_channel_scales_, use_channel_scales_,
                                    widen_narrow_channels_)
from isvit_det.core.spec import QuantConfig, SOSConfig
from isvit_det.core.units import State

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
    for param in source.parameters():
        param.data += torch.randn_like(param) * .1
    model = QuantSwinTransformer(**settings, quant=quant)
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys
    source.eval()
    model.eval()
    return source, model


def units_forward(model, x):
    """State after every unit, for one image."""
    states = [State(x, tuple(x.shape[-2:]))]
    for unit in model.units():
        states.append(unit.forward(states[-1]))
    return states


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('kwargs',
                         [{},
                          dict(qkv_bias=False),
                          dict(window_size=5, qk_scale=.3),
                          dict(strides=(4, 2, 1, 2)),
                          dict(patch_norm=False, out_indices=(1, 3))])
def test_uncalibrated_equals_the_float_class_bit_for_bit(size, kwargs):
    source, model = swins(**kwargs)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for one, other in zip(source(x), model(x)):
            assert torch.equal(one, other)


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
    source, model = swins(qkv_bias=False)
    keys, float_keys = set(model.state_dict()), set(source.state_dict())
    assert float_keys <= keys
    for key in keys - float_keys:
        assert ('_quantizer.' in key
                or key.rsplit('.', 1)[1] in ('offset', 'padding_value')), key
    assert [k for k, _ in model.named_parameters()
            ] == [k for k, _ in source.named_parameters()]


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
    _, model = swins(**kwargs)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        with observe(model):
            model(x)
        for unit in model.units():
            for pair in unit.pairs():
                if pair.padding is not None:
                    torch.nn.init.normal_(pair.padding.padding_value)
        set_precision_(model, weights=False, acts=quantized)
        states = units_forward(model, x)
        for unit, before, after in zip(model.units(), states, states[1:]):
            num_items = unit.num_items(before.size)
            items = torch.randperm(num_items)[:-(-num_items // 2)]
            output = unit.run(unit.gather(before, items))
            target = unit.gather_target(after, before.size, items)
            assert output.shape == target.shape
            error = (output - target).square().mean().sqrt()
            assert error <= 1e-3 * target.square().mean().sqrt(), unit.name


def test_every_item_is_covered_once():
    _, model = swins()
    states = units_forward(model, torch.randn(1, 3, 100, 130))
    for unit, before, after in zip(model.units(), states, states[1:]):
        rows = unit.gather_target(
            State(torch.arange(after.x.shape[1])[None, :, None], after.size),
            before.size, torch.arange(unit.num_items(before.size)))
        assert torch.equal(rows.flatten().sort().values,
                           torch.arange(after.x.shape[1])), unit.name


def record_codes(model, x):
    """Codes of every activation site, and the output maps."""
    codes = {}
    handles = []

    def record(name, quantizer):

        def hook(module, args):
            codes[name] = quantizer.encode(args[0])

        return hook

    for name, quantizer in quantizers(model).items():
        if quantizer.role == 'act':
            handles.append(
                quantizer.register_forward_pre_hook(record(name, quantizer)))
    with torch.no_grad():
        outs = model(x)
    for handle in handles:
        handle.remove()
    return codes, outs


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('kwargs', [{}, dict(qkv_bias=False)])
def test_stage_two_moves_no_code_even_on_maps_that_need_padding(
        size, dtype, kwargs):
    _, model = swins(**kwargs)
    model.to(dtype)
    x = torch.randn(1, 3, *size, dtype=dtype)
    pairs = [pair for unit in model.units() for pair in unit.pairs()]
    for pair in pairs:
        use_channel_scales_(pair)
    with observe(model):
        model(x)
    for pair in pairs:
        widen_narrow_channels_(pair.linear.input_quantizer)
    set_precision_(model, weights=False, acts=True)
    codes, outs = record_codes(model, x)
    for pair in pairs:
        fold_channel_scales_(pair)
    new_codes, new_outs = record_codes(model, x)
    total = sum(value.numel() for value in codes.values())
    moved = [(codes[name] - new_codes[name]).abs() for name in codes]
    if dtype == torch.float64:
        assert sum(int(m.sum()) for m in moved) == 0
        tolerance = 1e-9
    else:
        # One flipped code flips others after it: count the first sites' only.
        first = [(codes[name] - new_codes[name]).abs() for name in codes
                 if name.startswith('stages.0.blocks.0.')]
        assert max(float(m.max()) for m in first) <= 1
        assert sum(int(m.sum()) for m in first) <= max(1, 1e-5 * total)
        if any(m.any() for m in moved):
            return
        tolerance = 1e-5
    for one, other in zip(outs, new_outs):
        assert (one - other).norm() <= tolerance * one.norm()


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
    dict(qkv_bias=False),
    dict(patch_norm=False, out_indices=(1, 3)),
    dict(with_cp=True, frozen_stages=2),
    dict(strides=(4, 2, 1, 2)),
])
def test_every_form_of_swin_can_be_calibrated(tmp_path, kwargs):
    source, model = swins(quant=dict(bits='w6a6'), **kwargs)
    images = [torch.randn(1, 3, 60, 72 + 4 * i) for i in range(3)]
    sos = SOSConfig.from_dict(dict(iters=3), model.quant_config)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    calibrate(model, images, model.quant_config, sos, tmp_path, 'x')
    assert trained == {
        k
        for k, p in model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for one, other in zip(source(images[0]), model(images[0])):
            assert 0 < (one - other).norm() < .3 * one.norm()


@pytest.mark.parametrize('method', ['minmax', 'repq', 'isvit_paper', 'isvit'])
def test_calibration_quantizes_a_swin_that_stays_close_at_8_bits(
        tmp_path, method):
    source, model = swins(quant=dict(method=method, bits='w8a8'))
    images = [torch.randn(1, 3, 60, 72 + 4 * i) for i in range(3)]
    sos = SOSConfig.from_dict({} if method in ('minmax',
                                               'repq') else dict(iters=3),
                              model.quant_config)
    calibrate(model, images, model.quant_config, sos, tmp_path, 'x')
    with torch.no_grad():
        for one, other in zip(source(images[0]), model(images[0])):
            error = (one - other).norm() / one.norm()
            assert 0 < error < (.25 if method == 'repq' else .1)
        with precision(model, weights=False, acts=False):
            assert not torch.equal(model(images[0])[0], other)
