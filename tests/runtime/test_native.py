"""The kernels of every CPU path against sums in 64 bits."""
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from isvit_det.plans.layer import InputCodes
from isvit_det.runtime import native
from isvit_det.runtime.native import Isa
from isvit_det.runtime.packing import pack_layer
from tests.runtime.products import (ISAS, as_rows, draw_codes, draw_plan,
                                    exact_sums)

every_isa = pytest.mark.parametrize('isa', ISAS, ids=lambda isa: isa.name)


def multiply(isa, plan, codes):
    """The layer's outputs for rows of codes, (rows, outputs)."""
    weights = pack_layer(plan, wide_lanes=isa.wide_lanes)
    out = torch.full((len(codes), weights.outputs), 77.)
    return native.multiply(isa, weights, as_rows(codes), out,
                           (0, weights.outputs, 1))


def test_portable_kernels_are_always_there():
    assert ISAS[-1] is Isa.PORTABLE


@every_isa
@pytest.mark.parametrize('extreme', [False, True])
def test_sums_are_exact_at_every_width(isa, extreme):
    for weight_bits in range(2, 9):
        for act_bits in range(2, 9):
            plan = draw_plan(18, 203, weight_bits, act_bits, extreme=extreme)
            codes = draw_codes(plan, 7, extreme=extreme)
            found = multiply(isa, plan, codes)
            assert torch.equal(found.long(),
                               exact_sums(plan,
                                          codes)), (weight_bits, act_bits)


@every_isa
@pytest.mark.parametrize('rows', [1, 2, 3, 5, 6, 13, 48, 49, 100])
@pytest.mark.parametrize('outputs, inputs', [(1, 1), (16, 4), (17, 96),
                                             (40, 2500)])
def test_sums_are_exact_at_every_size(isa, rows, outputs, inputs):
    plan = draw_plan(outputs, inputs)
    codes = draw_codes(plan, rows)
    assert torch.equal(
        multiply(isa, plan, codes).long(), exact_sums(plan, codes))


@every_isa
@pytest.mark.parametrize('zero_point', [-900, -1, 16, 300, 5000])
def test_zero_points_may_lie_outside_of_the_codes(isa, zero_point):
    plan = draw_plan(zero_point=zero_point)
    codes = draw_codes(plan, 9)
    assert torch.equal(
        multiply(isa, plan, codes).long(), exact_sums(plan, codes))


@every_isa
def test_weights_may_lie_far_from_their_zero_point(isa):
    plan = draw_plan()
    plan = dataclasses.replace(plan, weight=plan.weight + 700)
    codes = draw_codes(plan, 9)
    assert torch.equal(
        multiply(isa, plan, codes).long(), exact_sums(plan, codes))


@every_isa
@pytest.mark.parametrize('entries', [
    (0, 1, 5, 9, 20, 33, 60, 63),
    (*range(16), *range(17, 64, 3)),
    (*range(32), *range(33, 127, 3)),
])
def test_codes_may_index_a_table(isa, entries):
    bits = len(entries).bit_length() - 1
    plan = draw_plan(act_bits=bits, zero_point=2)
    plan = dataclasses.replace(plan, input=InputCodes(bits, 1., 2, entries))
    assert plan.top == entries[-1]
    # Also on the middles between entries and beyond the first and the last.
    x = torch.randn(1, 50, 1, 60) * 60
    x[0, :25] = (2 * x[0, :25]).round() / 2
    codes = native.encode_map(isa, x, plan.input)[0, 0]
    expected = plan.input.encode(x[0, :, 0].T.double())
    assert expected.unique().tolist() == list(range(2**bits))
    assert torch.equal(codes[:, :50], plan.input.stored(expected))
    assert torch.equal(
        multiply(isa, plan, codes).long(), exact_sums(plan, codes))


def real_plan(**kwargs):
    plan = draw_plan(**kwargs)
    draw = torch.Generator().manual_seed(3)
    size = (len(plan.weight), )
    return dataclasses.replace(
        plan,
        scale=torch.rand(size, generator=draw).double() * .01 + .001,
        bias=torch.randn(size, generator=draw).double())


@every_isa
@pytest.mark.parametrize('outputs', [32, 21])
def test_float_outputs_are_rounded_once(isa, outputs):
    plan = real_plan(outputs=outputs)
    codes = draw_codes(plan, 50)
    scale, bias = plan.scale.float().double(), plan.bias.float().double()
    expected = exact_sums(plan, codes).double() * scale + bias
    assert torch.equal(multiply(isa, plan, codes), expected.float())


@every_isa
@pytest.mark.parametrize(
    'layout', [torch.contiguous_format, torch.channels_last],
    ids=['planes', 'channels_last'])
@pytest.mark.parametrize('channels, width', [(3, 5), (16, 16), (20, 37)])
def test_maps_are_coded_as_by_the_simulation(isa, layout, channels, width):
    x = torch.randn(2, channels, 4, width) * 3
    x = x.contiguous(memory_format=layout)
    source = InputCodes(4, .37, 6)
    codes = native.encode_map(isa, x, source, (1, 2, 3, 4), 9)
    filled = -(-channels // 4) * 4
    assert codes.shape == (2, 4 + 4, width + 6, filled)
    expected = ((x / torch.tensor(.37)).round() + 6).clamp(0, 15)
    expected = F.pad(expected, (2, 4, 1, 3), value=9)
    assert torch.equal(codes[..., :channels].float(),
                       expected.permute(0, 2, 3, 1))
    assert not codes[:, 1:5, 2:-4, channels:].any()


@every_isa
def test_a_large_scale_and_ties_round_to_even(isa):
    x = torch.tensor([.5, 1.5, 2.5, -.5, 1e30, -1e30, 3.4999998])
    codes = native.encode_map(isa, x.view(1, 1, 1, -1), InputCodes(4, 1., 3))
    assert codes[0, 0, :, 0].tolist() == [3, 5, 5, 3, 15, 0, 6]


@pytest.mark.parametrize('rows', [3, 50, 700])
def test_threads_do_not_change_a_bit(rows):
    plan = real_plan(outputs=70)
    codes = draw_codes(plan, rows)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(multiply(ISAS[0], plan, codes))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
