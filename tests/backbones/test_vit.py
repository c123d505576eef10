"""VisionTransformer against timm, and the quantized one against it."""
import pytest
import timm
import torch
from mmengine.runner.checkpoint import load_state_dict as mmengine_load
from timm.models.vision_transformer_sam import VisionTransformerSAM

from isvit_det.backbones.quant_vit import (GlobalBlockUnit, QuantDeiT,
                                           QuantVisionTransformer)
from isvit_det.backbones.vit import DeiT, VisionTransformer
from isvit_det.backbones.vit_layers import Attention
from isvit_det.backbones.vit_weights import fit_weights
from isvit_det.calibration import moments
from isvit_det.calibration.sos import calibrate
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import list_sites
from isvit_det.core.settings import SOSConfig
from isvit_det.detector import float_modules
from tests.backbones.laws import (check_calibrates, check_equal_bit_for_bit,
                                  check_every_item_covered_once,
                                  check_items_run_alone, check_keys,
                                  check_last_layers, check_padding,
                                  check_padding_rows, check_rotation,
                                  check_stage_two, pair_up, units_forward)

ARCH = dict(embed_dims=32, depth=3, num_heads=2)
SMALL = dict(arch=ARCH, patch_size=8, pretrain_img_size=64, drop_path_rate=.3)
# 4-token windows that stand out of most maps, and one global block.
WINDOWED = dict(window_size=4, global_blocks=(1, ))
RELATIVE = dict(WINDOWED, rel_pos_size=8, final_norm=False)
FORMS = [{}, WINDOWED, RELATIVE, dict(num_prefix_tokens=1, layer_scale=True)]
# The last two are below a window, and below a patch.
SIZES = [(64, 64), (96, 64), (61, 83), (20, 12), (5, 7)]


def vits(quant=None, **kwargs):
    """A float ViT with lively weights and the quantized one with the same."""
    torch.manual_seed(0)
    settings = {**SMALL, **kwargs}
    return pair_up(
        VisionTransformer(**settings),
        QuantVisionTransformer(**settings, quant=quant))


def timm_vit(fused, distilled=False, **kwargs):
    """A small timm ViT or distilled DeiT with lively weights."""
    torch.manual_seed(0)
    name = f'deit_tiny{"_distilled" if distilled else ""}_patch16_224'
    source = timm.create_model(
        name,
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        dynamic_img_size=True,
        **kwargs).eval()
    for param in source.parameters():
        param.data += torch.randn_like(param) * .1
    for block in source.blocks:
        block.attn.fused_attn = fused
    return source


@pytest.mark.parametrize('kwargs', FORMS)
def test_rotated_heads_compute_the_same(kwargs):
    check_rotation(vits(**kwargs)[1], torch.randn(1, 3, 61, 83))


@pytest.mark.parametrize('kwargs', FORMS[:3])
def test_last_layers_add_to_what_units_give(kwargs):
    check_last_layers(vits(**kwargs)[1], torch.randn(1, 3, 61, 83))


@pytest.mark.parametrize('kwargs', [WINDOWED, RELATIVE])
@pytest.mark.parametrize('size', SIZES[2:4])
def test_what_padding_computes_for_itself_is_not_observed(kwargs, size):
    check_padding(vits(**kwargs)[1], torch.randn(1, 3, *size))


def test_a_calibration_leaves_padding_out(tmp_path, monkeypatch):
    images = [torch.randn(1, 3, 52, 60 + 8 * i) for i in range(4)]
    check_padding_rows(lambda: vits(**WINDOWED)[1], images, tmp_path,
                       monkeypatch)


def test_prefix_tokens_are_among_the_rows_of_every_layer(
        tmp_path, monkeypatch):
    """Of more rows than are drawn, too."""
    found = []
    take_rows = moments.take_rows

    def watched(view, rows):
        if len(view) > moments.ROWS_PER_CALL:
            found.append(rows.tolist())
        return take_rows(view, rows)

    monkeypatch.setattr(moments, 'take_rows', watched)
    model = vits(num_prefix_tokens=2)[1]
    sos = SOSConfig.from_dict(dict(iters=0), model.quant_config)
    calibrate(model,
              torch.randn(2, 3, 136, 136).split(1), model.quant_config, sos,
              tmp_path, 'x')
    # Of four layers of three blocks, inputs as they are and quantized.
    assert len(found) == 2 * 3 * 4 * 2
    assert all(rows[:2] == [0, 1] and min(rows[2:]) > 1 for rows in found)


def test_a_scaled_branch_has_no_last_layer():
    model = vits(layer_scale=True)[1]
    assert all(unit.last_layer() is None for unit in model.units())


@pytest.mark.parametrize('size', [(64, 64), (96, 64), (32, 160)])
@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize('fused', [False, True])
def test_it_computes_what_timm_computes(size, distilled, fused):
    source = timm_vit(fused, distilled)
    model = VisionTransformer(**SMALL, num_prefix_tokens=1 + distilled).eval()
    model.load_state_dict(fit_weights(source.state_dict(), model))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = source.forward_features(x)
        found = model.norm(model.tokens(x).x)
        grid = model(x)[0]
    if fused:
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    else:
        assert torch.equal(found, expected)
    patches = found[:, 1 + distilled:].transpose(1, 2)
    assert torch.equal(grid.flatten(2), patches)
    assert grid.shape[2:] == (size[0] // 8, size[1] // 8)


@pytest.mark.parametrize('size', [(64, 64), (96, 64), (40, 72)])
@pytest.mark.parametrize('fused', [False, True])
def test_relative_positions_and_windows_are_those_of_timms_sam(size, fused):
    torch.manual_seed(0)
    source = VisionTransformerSAM(
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1, ),
        neck_chans=16).eval()
    for param in source.parameters():
        param.data += torch.randn_like(param) * .1
    for block in source.blocks:
        block.attn.fused_attn = fused
    model = VisionTransformer(**SMALL, **RELATIVE, norm_eps=1e-5).eval()
    model.load_state_dict(fit_weights(source.state_dict(), model))
    taken = []
    source.neck.register_forward_pre_hook(
        lambda module, args: taken.append(args[0]))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        source.forward_features(x)
        found = model(x)[0]
    assert found.shape == taken[0].shape
    if fused:
        assert (found - taken[0]).norm() <= 1e-5 * found.norm()
    else:
        assert torch.equal(found, taken[0])


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('kwargs', FORMS + [dict(qkv_bias=False)])
def test_uncalibrated_equals_the_float_class_bit_for_bit(size, kwargs):
    check_equal_bit_for_bit(*vits(**kwargs), torch.randn(2, 3, *size))


def test_a_large_vit_of_patches_of_16_has_timms_keys_and_shapes():
    with torch.device('meta'):
        model = VisionTransformer('large', num_prefix_tokens=1)
        try:
            source = timm.create_model('vit_large_patch16_224', num_classes=0)
        except NotImplementedError:
            pytest.skip('this torch makes no model of timm without memory')
    shapes = [{
        key: value.shape
        for key, value in part.state_dict().items()
    } for part in (model, source)]
    assert shapes[0] == shapes[1]


def test_global_blocks_draw_64_rows_of_each_image():
    _, model = vits()
    assert {unit.items_per_image for unit in model.units()[1:]} == {64}


def test_deit_is_a_vit_with_presets():
    model = QuantDeiT(arch='small', quant=dict(bits='w3a3'))
    assert isinstance(model, DeiT) and model.embed_dims == 384
    assert len(model.blocks) == 12 and model.quant_config.bits == 'w3a3'
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(.1)
    assert model.patch_embed.proj.kernel_size == (16, 16)
    with pytest.raises(QuantError, match='large.*not a DeiT'):
        DeiT(arch='large')


@pytest.mark.parametrize('kwargs', FORMS + [dict(qkv_bias=False)])
def test_float_keys_are_unchanged_and_the_rest_is_ours(kwargs):
    check_keys(*vits(**kwargs))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('kwargs', FORMS)
def test_units_in_order_are_the_forward_pass(size, kwargs):
    _, model = vits(**kwargs)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        last = units_forward(model, x)[-1]
        out = model.norm(last.x)[:, model.num_prefix_tokens:]
        out = out.view(1, *last.size, -1).permute(0, 3, 1, 2)
        assert torch.equal(out, model(x)[0])


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('quantized', [False, True])
@pytest.mark.parametrize('kwargs', FORMS)
def test_items_run_alone_as_they_do_in_the_map(size, quantized, kwargs):
    check_items_run_alone(
        vits(**kwargs)[1], torch.randn(1, 3, *size), quantized)


@pytest.mark.parametrize('kwargs', FORMS)
def test_every_item_is_covered_once(kwargs):
    check_every_item_covered_once(vits(**kwargs)[1], torch.randn(1, 3, 61, 83))


def test_relative_positions_are_listed_as_float():
    kept = [name for name, _ in float_modules(vits(**RELATIVE)[1])]
    assert kept == [f'blocks.{i}.attn' for i in range(3)]
    assert float_modules(vits()[1]) == []


def test_query_rows_of_several_images_keep_their_order():
    _, model = vits(num_prefix_tokens=1)
    images = [(64, 64), (64, 64), (40, 64), (64, 64)]
    unit = model.units()[2]
    assert isinstance(unit, GlobalBlockUnit)
    inputs, targets = [], []
    with torch.no_grad():
        for size in images:
            states = units_forward(model, torch.randn(1, 3, *size))
            items = torch.randperm(unit.num_items(states[2].size))[:9]
            inputs.append(unit.gather(states[2], items))
            targets.append(
                unit.gather_target(states[3], states[2].size, items))
        batch = unit.collate(inputs)
        assert [len(group.tokens) for group in batch] == [2, 1, 1]
        torch.testing.assert_close(unit.run(batch), torch.cat(targets))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('kwargs', FORMS + [dict(WINDOWED, qkv_bias=False)])
def test_stage_two_moves_no_code_even_on_maps_that_need_padding(
        size, dtype, kwargs):
    check_stage_two(
        vits(**kwargs)[1].to(dtype), torch.randn(1, 3, *size, dtype=dtype),
        'blocks.0.')


def test_all_but_norms_and_softmax_is_quantized_and_the_image_at_8_bits():
    _, model = vits(quant=dict(bits='w3a4'), **WINDOWED)
    sites = {site.name: site for site in list_sites(model)}
    assert sites['patch_embed.proj.input_quantizer'].bits == 8
    kinds = {site.kind for name, site in sites.items() if 'value.left' in name}
    assert kinds == {'ShiftUniformLog2Quantizer'}
    # qkv, proj, fc1, fc2: input and weight; two products of two operands.
    assert len(sites) == ARCH['depth'] * (4 * 2 + 4) + 2
    for name, site in sites.items():
        if site.role == 'weight':
            assert (site.bits, site.granularity) == (3, 'channel')
        elif 'patch_embed' not in name:
            assert (site.bits, site.granularity) == (4, 'tensor')


@pytest.mark.parametrize('method', ['minmax', 'repq', 'isvit_paper', 'isvit'])
@pytest.mark.parametrize('kwargs', FORMS)
def test_calibration_quantizes_a_vit_that_stays_close_at_8_bits(
        tmp_path, method, kwargs):
    source, model = vits(quant=dict(method=method, bits='w8a8'), **kwargs)
    images = [torch.randn(1, 3, 64, 64 + 4 * i) for i in range(3)]
    sos = {} if method in ('minmax', 'repq') else dict(iters=3)
    limit = .25 if method == 'repq' else .1
    check_calibrates(source, model, images, tmp_path, limit, **sos)


@pytest.mark.parametrize('sos', [
    dict(items='image'),
    dict(items='image', batch=2),
    dict(items_per_image=5, batch=15),
])
def test_whole_images_and_other_numbers_of_rows_calibrate_too(tmp_path, sos):
    source, model = vits(quant=dict(bits='w8a8'), **WINDOWED)
    images = [torch.randn(1, 3, 64, 64 + 4 * i) for i in range(3)]
    check_calibrates(source, model, images, tmp_path, limit=.1, iters=3, **sos)


def test_frozen_parameters_are_frozen_again_after_calibration(tmp_path):
    source, model = vits(quant=dict(bits='w8a8'), frozen_stages=2)
    images = [torch.randn(1, 3, 64, 64 + 4 * i) for i in range(3)]
    check_calibrates(source, model, images, tmp_path, limit=.1, iters=3)


@pytest.mark.parametrize('rel_pos_size', [8, 11])
def test_gradients_are_the_same_again_on_several_threads(rel_pos_size):
    """Sums over the rows of a table may be split among threads."""
    torch.manual_seed(0)
    attention = Attention(64, 4, True, 0., 0., rel_pos_size)
    x = torch.randn(4, 64, 64)
    rows = torch.randint(64, (4, 40))
    found = []
    for _ in range(8):
        attention.zero_grad()
        attention(x, (8, 8), rows).square().sum().backward()
        found.append([p.grad.clone() for p in attention.parameters()])
    assert all(
        torch.equal(one, other) for grads in found
        for one, other in zip(found[0], grads))


def test_a_backbone_alone_refuses_a_packed_state():
    _, model = vits()
    state = model.state_dict()
    key = 'blocks.0.attn.qkv.weight'
    state[f'{key}_codes'] = state.pop(key)
    with pytest.raises(QuantError, match='isvit_det.quantized_detector'):
        mmengine_load(model, state, strict=False)


@pytest.mark.parametrize('kwargs', FORMS)
def test_training_with_checkpointing_gives_the_same_gradients(kwargs):
    grads = []
    for with_cp in (False, True):
        model, _ = vits(**dict(kwargs, with_cp=with_cp))
        model.train()
        torch.manual_seed(2)
        model(torch.randn(2, 3, 61, 83))[0].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('frozen', [-1, 1])
def test_checkpointing_runs_blocks_that_learn_again(frozen):
    runs = []
    model, _ = vits(with_cp=True, frozen_stages=frozen)
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda *args: runs.append(args[0]))
    model.train()
    out = model(torch.randn(1, 3, 64, 64))[0].square().sum()
    assert len(runs) == len(model.blocks)
    out.backward()
    again = runs[len(model.blocks):]
    learning = model.blocks[max(0, frozen):]
    assert {id(block.norm1) for block in learning} <= {*map(id, again)}
    runs.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(runs) == len(model.blocks)


def test_frozen_stages_learn_nothing_and_stay_in_eval_mode():
    for model in vits(frozen_stages=2):
        model.train()
        model(torch.randn(1, 3, 64, 64))[0].sum().backward()
        assert not model.blocks[1].training and model.blocks[2].training
        learnt = {k for k, p in model.named_parameters() if p.grad is not None}
        assert learnt
        assert all(k.startswith(('blocks.2.', 'norm.')) for k in learnt)


def test_drop_path_only_acts_in_training():
    model, _ = vits()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x)[0], model(x)[0])
        model.train()
        outs = [model(x)[0] for _ in range(8)]
    assert any(not torch.equal(outs[0], out) for out in outs[1:])


def built_from(path, **kwargs):
    model = VisionTransformer(
        **{
            **SMALL,
            **kwargs
        },
        init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize('key', [None, 'model', 'state_dict'])
@pytest.mark.parametrize('distilled', [False, True])
def test_a_timm_file_is_loaded_without_its_class_token(tmp_path, key,
                                                       distilled):
    state = timm_vit(False, distilled).state_dict()
    torch.save({key: state} if key else state, tmp_path / 'x.pth')
    model = built_from(tmp_path / 'x.pth')
    assert not hasattr(model, 'cls_token')
    assert torch.equal(model.pos_embed, state['pos_embed'][:, 1 + distilled:])
    for name, param in model.named_parameters():
        if name != 'pos_embed':
            assert torch.equal(param, state[name]), name


def test_a_safetensors_file_and_another_grid_are_loaded(tmp_path):
    from safetensors.torch import save_file
    state = timm_vit(False).state_dict()
    save_file(state, tmp_path / 'x.safetensors')
    model = built_from(tmp_path / 'x.safetensors', pretrain_img_size=96)
    assert model.pos_embed.shape == (1, 12 * 12, 32)
    # The corners and the mean stay near what they were.
    before = state['pos_embed'][0, 1:].view(8, 8, -1)
    after = model.pos_embed[0].view(12, 12, -1)
    assert (before.mean((0, 1)) - after.mean((0, 1))).abs().max() < .02


def test_plain_weights_leave_relative_positions_at_zero(tmp_path):
    torch.save(timm_vit(False).state_dict(), tmp_path / 'x.pth')
    model = built_from(tmp_path / 'x.pth', **RELATIVE)
    assert not model.blocks[0].attn.rel_pos_h.any()


def test_a_part_of_the_relative_positions_is_not_enough(tmp_path):
    state = vits(**RELATIVE)[0].state_dict()
    del state['blocks.1.attn.rel_pos_w']
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(QuantError, match='missing.*blocks.1.attn.rel_pos_w'):
        built_from(tmp_path / 'x.pth', **RELATIVE)


def test_relative_positions_of_another_size_are_interpolated(tmp_path):
    source, _ = vits(**RELATIVE)
    torch.save(source.state_dict(), tmp_path / 'x.pth')
    model = built_from(tmp_path / 'x.pth', **dict(RELATIVE, rel_pos_size=12))
    table = model.blocks[1].attn.rel_pos_h
    assert table.shape == (23, 16) and table.any()


def test_positions_without_a_class_position_are_taken(tmp_path):
    source = timm_vit(False, no_embed_class=True)
    torch.save(source.state_dict(), tmp_path / 'x.pth')
    model = built_from(tmp_path / 'x.pth', num_prefix_tokens=1)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(
            model.norm(model.tokens(x).x), source.forward_features(x))


def test_a_quantized_vit_reads_timm_files_too(tmp_path):
    torch.save(timm_vit(False).state_dict(), tmp_path / 'x.pth')
    model = QuantVisionTransformer(
        **SMALL,
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
    model.init_weights()
    check_equal_bit_for_bit(
        built_from(tmp_path / 'x.pth'), model.eval(),
        torch.randn(1, 3, 61, 83))


@pytest.mark.parametrize('change, words', [
    (lambda s: s.pop('blocks.1.norm1.weight'), ['missing', 'blocks.1.norm1']),
    (lambda s: s.update(reg_token=torch.zeros(1)), ['unknown', 'reg_token']),
    (lambda s: s.update({'norm.bias': torch.zeros(3)}),
     ['norm.bias is \\(3,\\) instead of \\(32,\\)']),
    (lambda s: s.update(pos_embed=torch.zeros(1, 63, 32)),
     ['63 positions', 'no square']),
])
def test_weights_that_do_not_fit_are_refused(tmp_path, change, words):
    state = timm_vit(False).state_dict()
    change(state)
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(QuantError, match='.*'.join(words)):
        built_from(tmp_path / 'x.pth')


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(QuantError, match='no file .*x.pth'):
        built_from(tmp_path / 'x.pth')
    (tmp_path / 'x.pth').write_text('no weights')
    with pytest.raises(QuantError, match='x.pth cannot be read'):
        built_from(tmp_path / 'x.pth')
    torch.save(timm_vit(False).state_dict(), tmp_path / 'y.pth')
    with pytest.raises(QuantError, match='num_prefix_tokens=2.*has 1'):
        built_from(tmp_path / 'y.pth', num_prefix_tokens=2)
    torch.save([1, 2], tmp_path / 'z.pth')
    with pytest.raises(QuantError, match='holds a list, expected a dict'):
        built_from(tmp_path / 'z.pth')
    for wrong in (dict(type='Constant'), dict(type='Pretrained'), []):
        with pytest.raises(QuantError, match='init_cfg: .* is not allowed'):
            VisionTransformer(**SMALL, init_cfg=wrong).init_weights()


def test_timm_is_asked_for_weights_by_name(monkeypatch):
    source = timm_vit(False)
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: source)
    model = built_from('timm://any_name')
    assert torch.equal(model.norm.weight, source.norm.weight)


@pytest.mark.parametrize('kwargs, words', [
    (dict(arch='huge'), "arch: 'huge'.*tiny"),
    (dict(arch=dict(depth=1)), 'arch: keys.*embed_dims'),
    (dict(arch=dict(ARCH, num_heads=3)), 'embed_dims 32.*num_heads 3'),
    (dict(num_prefix_tokens=3), 'num_prefix_tokens: 3'),
    (dict(num_prefix_tokens=1, window_size=4), 'num_prefix_tokens: a class'),
    (dict(window_size=4, global_blocks=(3, )), r'global_blocks: \[3\]'),
    (dict(global_blocks=(1, )), 'global_blocks: without window_size'),
])
def test_wrong_arguments_are_named(kwargs, words):
    with pytest.raises(QuantError, match=words):
        VisionTransformer(**{**SMALL, **kwargs})
