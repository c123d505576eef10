"""Bytes within a block in other engines, given the simulation's input."""
import pytest
import torch
from mmdet.models.backbones.swin import SwinBlock

from isvit_det.export.blocks import Writer
from isvit_det.export.engines import load
from isvit_det.export.graph import Graph
from isvit_det.export.layers import Target
from isvit_det.plans.swin import plan_swin_block
from isvit_det.plans.vit import plan_vit_block
from tests.export.written import ENGINES, FORMS, content, need_engines
from tests.runtime.blocks import (WINDOWED, draw_backbone, draw_vit,
                                  simulate_block)

need_engines()
TABLES = dict(activation_tables=['norm', 'qkv', 'proj', 'fc2'])


def run_block(block, x, size, engine):
    """A block's output and the bytes in it, as ``simulate_block`` does."""
    make = plan_swin_block if isinstance(block, SwinBlock) else plan_vit_block
    graph, names = Graph(), {}
    writer = Writer(graph, Target(FORMS[engine]), names)
    y = writer.block(graph.add_input('x', x.shape), make(block), size)
    for name, value in names.items():
        kind = 'float32' if name == 'attention' else 'uint8'
        dims = 4 if name == 'attention' else 3
        graph.add_output(name, value, [f'{name}{i}' for i in range(dims)],
                         kind)
    graph.add_output('y', y, x.shape)
    *found, y = load(engine, content(graph), 1).run(dict(x=x.numpy()))
    return torch.from_numpy(y), {
        name: torch.from_numpy(value)
        for name, value in zip(names, found)
    }


def check_block(block, size, engine, channels=32, prefix=0):
    torch.manual_seed(2)
    x = torch.randn(1, prefix + size[0] * size[1], channels)
    y, found = run_block(block, x, size, engine)
    expected_y, expected = simulate_block(block, x, size, torch.float64)
    _, in_float32 = simulate_block(block, x, size, torch.float32)
    shares = {}
    for name, values in expected.items():
        one = found[name].double().reshape(values.shape)
        near = 1e-4 * values.abs().max() if name == 'attention' else .5
        moved = ((one - values).abs() > near).double().mean()
        usual = ((in_float32[name] - values).abs() > near).double().mean()
        shares[name] = float(moved), float(usual)
    for name, (moved, usual) in shares.items():
        assert moved <= 2 * usual + 2 / expected[name].numel(), name


@pytest.fixture(scope='module')
def swin():
    return draw_backbone()


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('shift', [0, 1])
def test_a_swin_block_has_the_codes_of_the_simulation(swin, shift, engine):
    check_block(swin.stages[0].blocks[shift], (16, 25), engine)


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize(
    'quant', [
        dict(bits='w3a3', **TABLES),
        dict(bits='w8a8', softmax='uniform'),
        dict(bits='w6a6', exponent='integer'),
        dict(bits='w4a4', softmax='log2'),
    ],
    ids=str)
def test_so_has_one_with_other_quantizers(quant, engine):
    model = draw_backbone(quant)
    check_block(model.stages[0].blocks[1], (9, 12), engine)


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('shift', [5., -30.])
def test_zero_points_within_a_block_may_be_no_code(shift, engine):
    model = draw_backbone(shift=shift)
    block = model.stages[0].blocks[1]
    zero_point = int(block.attn.w_msa.qkv.input_quantizer.zero_point)
    assert not 0 <= zero_point <= 15
    check_block(block, (9, 12), engine)


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('index', [0, 1])
def test_a_vit_block_has_the_codes_of_the_simulation(index, engine):
    model = draw_vit(**WINDOWED)
    check_block(model.blocks[index], (6, 7), engine)


@pytest.mark.parametrize('engine', ENGINES)
def test_so_has_one_with_a_class_token(engine):
    model = draw_vit(num_prefix_tokens=1, layer_scale=True)
    check_block(model.blocks[0], (6, 7), engine, prefix=1)
