"""Native blocks and mergings against the simulation in float64."""
import pytest
import torch
from torch import nn

from isvit_det.core.settings import TABLE_PLACES
from isvit_det.plans.layer import Unsupported
from isvit_det.plans.swin import plan_merging
from isvit_det.runtime.blocks import TRACED, NativeMerging
from isvit_det.runtime.native import Isa
from tests.runtime.blocks import (TWO_STAGES, WINDOWED, draw_backbone,
                                  draw_vit, native_block, simulate_block)
from tests.runtime.products import ISAS

every_isa = pytest.mark.parametrize('isa', ISAS, ids=lambda isa: isa.name)
# Padded, of one window, smaller than a window, and long.
SIZES = [(13, 17), (7, 7), (3, 5), (1, 30)]


def blocks_of(model):
    return [block for stage in model.stages for block in stage.blocks]


def draw_map(block, size, images=1, prefix=0):
    channels = len(block.norm1.weight)
    return torch.randn(images, prefix + size[0] * size[1], channels)


def count_wrong(codes, expected):
    """Codes that differ from those of float64, and all of them."""
    wrong = total = 0
    for name in TRACED:
        found, exact = codes[name].double(), expected[name]
        apart = (found.view(exact.shape) - exact).abs()
        wrong += int((apart > (1e-6 if name == 'attention' else .5)).sum())
        total += apart.numel()
    return wrong, total


def check_block(block, size, images=1, prefix=0):
    """A block's codes are those of float64, up to what float32 itself gets
    wrong, and so is its output; CPU paths agree to the bit."""
    x = draw_map(block, size, images, prefix)
    out, expected = simulate_block(block, x, size, torch.float64)
    _, single = simulate_block(block, x, size, torch.float32)
    allowed, total = count_wrong(single, expected)
    results = []
    for isa in ISAS:
        codes = {}
        found = native_block(block, isa)(x, size, trace=codes)
        wrong, _ = count_wrong(codes, expected)
        assert wrong <= 2 * allowed + 1e-5 * total
        if not wrong:
            assert (found - out).abs().max() <= 1e-6 * out.abs().max()
        results.append((found, codes))
    for found, codes in results[1:]:
        assert torch.equal(found, results[0][0])
        for name in TRACED:
            assert torch.equal(codes[name], results[0][1][name]), name
    # What is compared is alive.
    assert all(len(expected[name].unique()) > 2 for name in TRACED)


@pytest.mark.parametrize('size', SIZES)
def test_maps_of_every_size(size):
    for block in blocks_of(draw_backbone()):
        check_block(block, size, images=2)


@pytest.mark.parametrize(
    'bits',
    ['w2a2', 'w3a3', 'w5a5', 'w6a6', 'w7a7', 'w8a8', 'w4a8', 'w8a4', 'w6a8'])
def test_every_width(bits):
    for block in blocks_of(draw_backbone(dict(bits=bits))):
        check_block(block, (9, 10))


# Every layer and product of a block in bits of its own, in two ways.
MIXED = [
    dict(qkv=(2, 8), query_key=(8, 3), attention_value=(8, 5), proj=(6, 2),
         fc1=(3, 6), fc2=(8, 3)),
    dict(qkv=(8, 3), query_key=(8, 8), attention_value=(8, 2), proj=(3, 8),
         fc1=(8, 4), fc2=(2, 8)),
]  # yapf: disable
SWIN_NAMES = {'fc1': 'ffn.layers.0.0', 'fc2': 'ffn.layers.1'}


@pytest.mark.parametrize('widths', MIXED)
def test_mixed_widths_in_a_block(widths):
    quant = dict(overrides=[
        dict(
            match=f'*.{SWIN_NAMES.get(name, name)}',
            weight_bits=bits[0],
            act_bits=bits[1]) for name, bits in widths.items()
    ])
    for block in blocks_of(draw_backbone(quant)):
        fc2 = block.ffn.layers[1]
        assert (fc2.weight_quantizer.bits,
                fc2.input_quantizer.bits) == widths['fc2']
        check_block(block, (9, 10))
    quant = dict(overrides=[
        dict(match=f'*.{name}', weight_bits=bits[0], act_bits=bits[1])
        for name, bits in widths.items()
    ])
    for block in draw_vit(quant, **WINDOWED).blocks:
        assert block.attn.proj.input_quantizer.bits == widths['proj'][1]
        check_block(block, (6, 7))


@pytest.mark.parametrize(
    'quant', [
        dict(exponent='integer'),
        dict(softmax='log2'),
        dict(softmax='log_sqrt2'),
        dict(softmax='uniform'),
        dict(softmax='uniform', bits='w6a6'),
    ],
    ids=str)
def test_every_quantizer_of_attention(quant):
    for block in blocks_of(draw_backbone(quant)):
        check_block(block, (9, 10))


@pytest.mark.parametrize('bits', ['w2a2', 'w3a3', 'w4a4', 'w6a6'])
def test_tables_everywhere(bits):
    quant = dict(bits=bits, activation_tables=TABLE_PLACES)
    for block in blocks_of(draw_backbone(quant)):
        plan = native_block(block, Isa.PORTABLE).plan
        tables = [
            plan.query.input, plan.query_codes, plan.key_codes,
            plan.value_codes, plan.proj.input, plan.fc1.input, plan.fc2.input
        ]
        assert all(codes.entries is not None for codes in tables)
        check_block(block, (9, 10))
    for block in draw_vit(quant, **WINDOWED).blocks:
        check_block(block, (6, 7))


@pytest.mark.parametrize('places', [(), ('fc2', ), ('qkv', ), ('norm', )])
def test_tables_at_some_places(places):
    for block in blocks_of(draw_backbone(dict(activation_tables=places))):
        check_block(block, (9, 10))


@pytest.mark.parametrize(
    'kwargs', [
        dict(qkv_bias=False),
        dict(window_size=5, qk_scale=.3),
        dict(num_heads=[1]),
        dict(num_heads=[8]),
        dict(embed_dims=48, num_heads=[1], mlp_ratio=3),
    ],
    ids=str)
def test_every_shape_of_a_block(kwargs):
    for block in blocks_of(draw_backbone(**kwargs)):
        check_block(block, (9, 10))


@pytest.mark.parametrize('shift', [-9., 9.])
def test_zero_points_outside_of_the_codes(shift):
    for block in blocks_of(draw_backbone(shift=shift)):
        msa = block.attn.w_msa
        for quantizer in (msa.qkv.input_quantizer,
                          msa.query_key.right_quantizer,
                          block.ffn.layers[0][0].input_quantizer):
            assert not 0 <= int(quantizer.zero_point) <= 15
        check_block(block, (9, 10))


@pytest.mark.parametrize(
    'quant', [
        dict(),
        dict(bits='w3a3'),
        dict(bits='w6a6'),
        dict(bits='w8a8'),
        dict(bits='w4a8', softmax='log2'),
        dict(softmax='uniform'),
    ],
    ids=str)
def test_blocks_of_a_vit(quant):
    model = draw_vit(quant, **WINDOWED)
    for block in model.blocks:
        for size in [(6, 7), (3, 2), (13, 9)]:
            check_block(block, size, images=2)


@pytest.mark.parametrize(
    'kwargs, prefix', [
        (dict(num_prefix_tokens=1), 1),
        (dict(num_prefix_tokens=2, layer_scale=True), 2),
        (dict(qkv_bias=False, mlp_ratio=3.), 0),
        (dict(window_size=7), 0),
    ],
    ids=str)
def test_every_shape_of_a_vit(kwargs, prefix):
    for block in draw_vit(**kwargs).blocks:
        check_block(block, (14, 15), prefix=prefix)


def test_two_stages():
    for block in blocks_of(draw_backbone(**TWO_STAGES)):
        check_block(block, (9, 10))


def test_keys_have_16_bits_where_lanes_of_16_hold_no_sums():
    sizes = {}
    for bits in (4, 6, 8):
        block = blocks_of(draw_backbone(dict(bits=f'w4a{bits}')))[0]
        native = native_block(block, Isa.PORTABLE)
        sizes[bits] = native._structure.key_bytes
    assert sizes == {4: 1, 6: 1, 8: 2}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('images', [1, 3])
def test_threads_that_share_a_window_do_not_change_a_bit(threads, images):
    for block in draw_vit(**WINDOWED).blocks:
        x = draw_map(block, (15, 18), images)
        native = native_block(block, ISAS[0])
        expected = native(x, (15, 18))
        for number in (2, 3, 7):
            threads(number)
            assert torch.equal(native(x, (15, 18)), expected)
        assert torch.equal(native(x, (15, 18), x), expected)
        threads(1)


def test_threads_batches_and_places_do_not_change_a_bit(threads):
    model = draw_backbone(**TWO_STAGES)
    block, size = model.stages[0].blocks[1], (20, 17)
    x = draw_map(block, size, images=3)
    native = native_block(block, ISAS[0])
    merging = NativeMerging(plan_merging(model.stages[0].downsample), ISAS[0])
    expected = native(x, size)
    merged, _ = merging(x, size)
    for number in (2, 5):
        threads(number)
        assert torch.equal(native(x, size), expected)
        assert torch.equal(merging(x, size)[0], merged)
    for one, out, small in zip(x, expected, merged):
        assert torch.equal(native(one[None], size)[0], out)
        assert torch.equal(merging(one[None], size)[0][0], small)
    assert native(x, size, x) is x
    assert torch.equal(x, expected)


@every_isa
@pytest.mark.parametrize('strides', [(4, 2), (4, 1)])
def test_merging(isa, strides):
    merging = draw_backbone(
        **dict(TWO_STAGES, strides=strides)).stages[0].downsample
    native = NativeMerging(plan_merging(merging), isa)
    for size in [(9, 13), (1, 1), (8, 6)]:
        x = torch.randn(2, size[0] * size[1], 32)
        found, grid = native(x, size)
        with torch.no_grad():
            expected, expected_grid = merging.double()(x.double(), size)
        merging.float()
        assert grid == tuple(expected_grid)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def exchange(what, do):
    return pytest.param(do, what, id=what)


@pytest.mark.parametrize('change, reason', [
    exchange('not a Swin block',
             lambda block: setattr(block.attn, 'w_msa', nn.Identity())),
    exchange('more than two layers with GELU',
             lambda block: block.ffn.layers[0].__setitem__(1, nn.ReLU())),
    exchange('more than two layers with GELU',
             lambda block: setattr(block.ffn, 'add_identity', False)),
    exchange('its norm is',
             lambda block: setattr(block, 'norm2', nn.BatchNorm1d(32))),
    exchange(
        'attn.w_msa.proj is not quantized',
        lambda block: setattr(block.attn.w_msa, 'proj', nn.Linear(32, 32))),
    exchange(
        'ffn.layers.0.0: its input is not quantized', lambda block: setattr(
            block.ffn.layers[0][0].input_quantizer, 'enabled', False)),
    exchange(
        'attention is not quantized',
        lambda block: setattr(block.attn.w_msa.attention_value.left_quantizer,
                              'enabled', False)),
    exchange(
        'of its queries is too large', lambda block: block.attn.w_msa.query_key
        .left_quantizer.zero_point.fill_(2**19)),
])
def test_what_is_not_supported_is_named(change, reason):
    block = blocks_of(draw_backbone())[0]
    change(block)
    with pytest.raises(Unsupported, match=reason):
        native_block(block, ISAS[-1])


@pytest.mark.parametrize('kwargs, reason', [
    (dict(embed_dims=24), '24 channels'),
    (dict(embed_dims=32, num_heads=[16]), '2 per head'),
])
def test_channels_that_are_not_supported_are_named(kwargs, reason):
    block = blocks_of(draw_backbone(**kwargs))[0]
    with pytest.raises(Unsupported, match=reason):
        native_block(block, ISAS[-1])
