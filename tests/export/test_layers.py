"""Single quantized layers in other engines, held against the simulation."""
import copy

import pytest
import torch

from isvit_det.core.errors import QuantError
from isvit_det.export.engines import load
from isvit_det.export.graph import Graph
from isvit_det.export.layers import Target, linear, quantize, split_weights
from isvit_det.export.proof import check, prove
from isvit_det.plans.layer import InputCodes, plan_layer
from tests.export.written import ENGINES, FORMS, content, need_engines
from tests.runtime.calibrated import draw_linear, outputs_in_double, use_table_

need_engines()


def write(layer, x, form, vnni=False):
    """A graph of one layer with its codes and its outputs."""
    graph, plan = Graph(), plan_layer(layer)
    codes = quantize(graph, graph.add_input('x', x.shape), plan.input)
    y = linear(graph, 'layer', codes, plan, Target(form, vnni))
    graph.add_output('codes', codes, x.shape, 'uint8')
    graph.add_output('y', y, (*x.shape[:-1], len(plan.weight)))
    return graph


def check_layer(layer, x, engine):
    graph = write(layer, x, FORMS[engine])
    file = content(graph)
    codes, y = load(engine, file, 1).run(dict(x=x.numpy()))
    stored = codes_in(layer, x, torch.float64)
    moved = (torch.from_numpy(codes) != stored).sum()
    in_float32 = (codes_in(layer, x, torch.float32) != stored).sum()
    assert moved <= 2 * in_float32 + 1e-5 * x.numel()
    expected = outputs_in_double(layer, x)
    error = (torch.from_numpy(y) - expected).norm() / expected.norm()
    assert error < 1e-5 if not moved else error < 1e-2
    return graph, file


def codes_in(layer, x, kind):
    """What the simulation quantizes an input to, as bytes."""
    quantizer = copy.deepcopy(layer.input_quantizer).to(kind)
    codes = InputCodes.of(quantizer)
    return codes.stored(quantizer.encode(x.to(kind)))


def one_image(x):
    return x.flatten(0, 1)[None]


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('bits', ['w2a2', 'w3a6', 'w4a4', 'w7a7', 'w8a8'])
def test_a_linear_layer_is_that_of_the_simulation(bits, engine):
    layer, x = draw_linear(bits=bits)
    # Half of the values are beyond the range.
    graph, file = check_layer(layer, 3 * one_image(x), engine)
    proof = prove(engine, file, graph.products)
    assert (proof.integer, proof.in_float) == (['layer'], [])
    check(proof, [])


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('shift', [-9., 300., 2000.])
def test_zero_points_may_be_no_code(shift, engine):
    layer, x = draw_linear(shift=shift)
    layer.input_quantizer.zero_point.clamp_(-9)
    x = one_image(x) - shift * layer.input_quantizer.scale
    check_layer(layer, x, engine)


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('bits', [3, 4, 6])
def test_a_table_is_that_of_the_simulation(bits, engine):
    layer, x = draw_linear(bits=f'w4a{bits}')
    x = torch.nn.functional.gelu(3 * one_image(x))
    use_table_(layer, x, bits)
    assert not layer.input_quantizer.is_even
    graph, file = check_layer(layer, x, engine)
    assert prove(engine, file, graph.products).integer == ['layer']


@pytest.mark.parametrize('top, width', [(255, 255), (255, 127), (15, 255),
                                        (127, 127)])
@pytest.mark.parametrize('vnni', [False, True])
def test_split_weights_add_up_and_no_pair_of_them_is_clipped(top, width, vnni):
    torch.manual_seed(0)
    weight = torch.randint(-width, width + 1, (5, 9))
    terms = split_weights(weight, top, vnni)
    assert torch.equal(sum(terms), weight)
    for term in terms:
        assert term.abs().max() <= 127
        if not vnni:
            pairs = term[:, :, None] + term[:, None]
            others = ~torch.eye(9, dtype=torch.bool)
            assert top * pairs[:, others].abs().max() <= 2**15 - 1


def test_weights_that_fit_are_left_whole():
    weight = torch.tensor([[127, -127, 1], [127, -127, 0]])
    assert len(split_weights(weight, 127, vnni=False)) == 1
    # 255 * (127 + 1) fits, 255 * (127 + 2) does not.
    assert len(split_weights(weight, 255, vnni=False)) == 1
    weight[1, 2] = 2
    assert len(split_weights(weight, 255, vnni=False)) == 2
    assert len(split_weights(weight, 255, vnni=True)) == 1


@pytest.mark.parametrize('engine', ENGINES)
def test_the_largest_codes_and_weights_are_not_clipped(engine):
    layer, x = draw_linear(bits='w8a8')
    with torch.no_grad():
        layer.weight_quantizer.zero_point.fill_(0)
        layer.weight.copy_(
            255 *
            layer.weight_quantizer.scale[:, None].expand_as(layer.weight))
    x = torch.full_like(one_image(x), 1e9)
    check_layer(layer, x, engine)


def in_float():
    """A graph with a layer in integers, and one half of which is in float."""
    layer, x = draw_linear(inputs=24)
    graph, plan = Graph(), plan_layer(layer)
    x = graph.add_input('x', (1, 9, 24))
    with graph.scope('blocks'):
        y = linear(graph, 'good', quantize(graph, x, plan.input), plan,
                   Target('matmul'))
        y = linear(graph, 'bad', quantize(graph, y, plan.input), plan,
                   Target('matmul'))
        weight = graph.constant(torch.ones(24, 24), 'int8')
        decoded = graph.add('Cast', weight, to=1)
        y = graph.multiply('bad', 'MatMul', y, decoded, weight, 0)
    graph.add_output('y', y, (1, 9, 24))
    return graph


@pytest.mark.parametrize('engine', ENGINES)
def test_a_layer_in_float_is_refused_by_name_unless_it_is_allowed(engine):
    graph = in_float()
    proof = prove(engine, content(graph), graph.products)
    assert proof.integer == ['blocks.good']
    assert proof.in_float == ['blocks.bad']
    with pytest.raises(QuantError, match='1 of 2 .* float: blocks.bad; '):
        check(proof, [])
    check(proof, ['blocks.bad'])
    with pytest.raises(QuantError, match='bad is no quantized layer'):
        check(proof, ['bad'])
