"""Blocks of Swin and ViT and patch mergings of random shapes: every kernel
against the portable one to the bit, and their products against 64-bit
integers."""
import copy
import random
from typing import Any, Dict, Iterable, List, Tuple

import torch
from torch import Tensor

from benchmarks.fuzz_layers import (Mismatch, check_equal, check_gelu_codes,
                                    codes_of, real_outputs, threads)
from isvit_det.backbones.quant_vit import QuantVisionTransformer
from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.core.layers import fit_weights_, observe, set_precision_
from isvit_det.plans.block import BlockPlan
from isvit_det.plans.swin import plan_merging, plan_swin_block
from isvit_det.plans.vit import plan_vit_block
from isvit_det.runtime.blocks import NativeBlock, NativeMerging
from isvit_det.runtime.native import Isa
from isvit_det.runtime.windows import find_windows

# The default is the most frequent.
ATTENTIONS: List[Dict[str, Any]] = [
    dict(),
    dict(),
    dict(exponent='integer'),
    dict(softmax='log2'),
    dict(softmax='uniform'),
]


def draw_shape(draw: random.Random) -> Tuple[int, int]:
    """Channels and heads of a block that the kernels run."""
    heads = draw.choice([1, 2, 3, 4])
    widths = [w for w in range(4, 68, 4) if w * heads % 16 == 0]
    return draw.choice(widths) * heads, heads


def draw_quant(draw: random.Random) -> Dict[str, Any]:
    return dict(
        bits=f'w{draw.randint(2, 8)}a{draw.randint(2, 8)}',
        **draw.choice(ATTENTIONS))


def draw_swin(draw: random.Random, **kwargs: Any) -> QuantSwinTransformer:
    """A calibrated Swin, whose norms and therefore zero points are moved."""
    channels, heads = draw_shape(draw)
    model = QuantSwinTransformer(
        embed_dims=channels,
        window_size=draw.randint(2, 8),
        mlp_ratio=draw.choice([1, 2, 3, 4]),
        qkv_bias=draw.random() < .8,
        quant=draw_quant(draw),
        num_heads=[heads] * len(kwargs['depths']),
        **kwargs)
    blocks = list(model.stages[0].blocks)
    calibrate_(draw, model, blocks, [block.attn for block in blocks])
    return model


def draw_vit(draw: random.Random) -> QuantVisionTransformer:
    """A calibrated ViT of a windowed and a global block, likewise."""
    channels, heads = draw_shape(draw)
    window = draw.randint(2, 8)
    model = QuantVisionTransformer(
        arch=dict(embed_dims=channels, depth=2, num_heads=heads),
        pretrain_img_size=64,
        window_size=window,
        global_blocks=[1],
        rel_pos_size=draw.choice([0, window, draw.randint(2, 20)]),
        layer_scale=draw.random() < .3,
        mlp_ratio=draw.choice([1., 2., 3., 4.]),
        qkv_bias=draw.random() < .8,
        quant=draw_quant(draw))
    calibrate_(draw, model, model.blocks, model.blocks)
    return model


def calibrate_(draw: random.Random, model: Any, blocks: Iterable[Any],
               padded: Iterable[Any]) -> None:
    """Random weights, moved norms and paddings, and the ranges of an image."""
    # mmdet's returns nothing from eval().
    model.eval()
    shift = draw.choice([0., 0., 3., -9.])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * .1
        for block in blocks:
            block.norm1.bias += shift
            block.norm2.bias += shift
        for part in padded:
            part.padding_value += torch.randn_like(part.padding_value) + shift
        fit_weights_(model)
        with observe(model):
            model(torch.randn(1, 3, 48, 72))
    set_precision_(model, weights=True, acts=True)


def draw_size(draw: random.Random, window: int) -> Tuple[int, int]:
    """Of a map: smaller than a window, one window, or padded."""
    height, width = (
        draw.choice([1, window, draw.randint(1, 3 * window)])
        for _ in range(2))
    return height, width


def check_codes(what: str, plan: BlockPlan, x: Tensor, out: Tensor,
                size: Tuple[int, int], trace: Dict[str, Tensor]) -> None:
    """Compare the products within a block, each from the codes it was given,
    with sums in 64 bits."""
    images, tokens, channels = x.shape
    token = find_windows(plan.window, plan.shift, size, tokens).token.long()
    padding = plan.padding.expand(images, 1, channels)
    padded = torch.cat([trace['qkv_input'], padding], 1)
    windows = padded[:, token].flatten(0, 1)
    for name, layer, target in (('query', plan.query, plan.query_codes),
                                ('key', plan.key, plan.key_codes),
                                ('value', plan.value, plan.value_codes)):
        check_equal(f'{what}: {name}', trace[name],
                    codes_of(real_outputs(layer, windows), target))
    check_gelu_codes(f'{what}: fc2_input', trace['fc2_input'],
                     real_outputs(plan.fc1, trace['fc1_input']),
                     plan.fc2.input)
    middle = x + real_outputs(plan.proj, trace['proj_input'])
    check_equal(f'{what}: output', out,
                middle + real_outputs(plan.fc2, trace['fc2_input']))


def check_plan(draw: random.Random, isas: List[Isa], what: str,
               plan: BlockPlan) -> None:
    """One block on one map."""
    size = draw_size(draw, plan.window or draw.randint(2, 15))
    channels = len(plan.query.weight)
    what = (f'{what}: {channels} channels, {plan.heads} heads, window '
            f'{plan.window}, shift {plan.shift}, map {size}')
    x = torch.randn(draw.randint(1, 3), size[0] * size[1], channels)
    expected: Dict[str, Tensor] = {}
    out = NativeBlock(plan, Isa.PORTABLE)(x, size, trace=expected)
    check_codes(what, plan, x, out, size, expected)
    for isa in isas:
        trace: Dict[str, Tensor] = {}
        native = NativeBlock(plan, isa)
        with threads(draw.randint(1, 5)):
            found = native(x, size, trace=trace)
            in_place = x.clone()
            native(in_place, size, in_place)
        for name, codes in expected.items():
            check_equal(f'{what}: {isa.name}: {name}', trace[name], codes)
        check_equal(f'{what}: {isa.name}', found, out)
        check_equal(f'{what}: {isa.name} in place', in_place, out)


def check_swin_blocks(draw: random.Random, isas: List[Isa]) -> str:
    """Both blocks of a stage."""
    model = draw_swin(draw, depths=[2], strides=(4, ), out_indices=(0, ))
    for block in model.stages[0].blocks:
        what = f'Swin block, {model.quant_config.bits}'
        check_plan(draw, isas, what, plan_swin_block(block))
    return 'Swin block'


def check_vit_blocks(draw: random.Random, isas: List[Isa]) -> str:
    """A windowed and a global block."""
    model: Any = draw_vit(draw)
    for block in model.blocks:
        what = f'ViT block, {model.quant_config.bits}'
        check_plan(draw, isas, what, plan_vit_block(block))
    return 'ViT block'


def check_merging(draw: random.Random, isas: List[Isa]) -> str:
    """One patch merging on one map."""
    model = draw_swin(
        draw,
        depths=[1, 1],
        strides=(4, draw.choice([1, 2, 3])),
        out_indices=(0, ))
    merging = model.stages[0].downsample
    size = draw_size(draw, 5)
    x = torch.randn(draw.randint(1, 3), size[0] * size[1], merging.in_channels)
    what = f'merging of {merging.in_channels} channels, map {size}'
    expected, grid = NativeMerging(plan_merging(merging), Isa.PORTABLE)(x,
                                                                        size)
    with torch.no_grad():
        single, _ = merging(x, size)
        simulated, expected_grid = copy.deepcopy(merging).double()(x.double(),
                                                                   size)
    if grid != tuple(expected_grid) or expected.shape != simulated.shape:
        raise Mismatch(f'{what}: grid {grid}, expected {expected_grid}')
    # One code that float32 rounds otherwise is seen in a whole row.
    wrong, allowed = (
        int(((x - simulated).abs().amax(-1)
             > 1e-5 * simulated.abs().max()).sum())
        for x in (expected, single))
    rows = expected[..., 0].numel()
    most = max(2 * allowed, rows // 2)
    if wrong > most:
        raise Mismatch(f'{what}: {wrong} of {rows} rows differ from the '
                       f'simulation, expected at most {most}')
    for isa in isas:
        with threads(draw.randint(1, 5)):
            found, _ = NativeMerging(plan_merging(merging), isa)(x, size)
        check_equal(f'{what}: {isa.name}', found, expected)
    return 'patch merging'
