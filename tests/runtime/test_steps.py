"""Limits of steps against the codes that float64 gives."""
import copy

import pytest
import torch
from torch.nn import functional as F

from isvit_det.core.quantizers import attention_quantizer
from isvit_det.core.settings import QuantConfig
from isvit_det.plans.layer import InputCodes, Unsupported
from isvit_det.runtime.steps import (attention_steps, gelu_steps, make_steps,
                                     table_steps)


def step_of(steps, x):
    """Steps that numbers lie in, down the heap."""
    index = torch.ones(x.shape, dtype=torch.long)
    for _ in range(steps.depth):
        index = 2 * index + (x >= steps.limits[index])
    return index - len(steps.values)


def neighbours(steps):
    """The limits, and the float32 numbers next to them."""
    limits = steps.limits[steps.limits.isfinite()]
    up = torch.full_like(limits, torch.inf)
    return torch.cat(
        [limits,
         torch.nextafter(limits, up),
         torch.nextafter(limits, -up)])


def fitted(softmax, bits, exponent='table'):
    config = dict(bits=f'w4a{bits}', softmax=softmax, exponent=exponent)
    quantizer = attention_quantizer(QuantConfig.from_dict(config))
    if softmax == 'uniform':
        quantizer.scale.fill_(.9 / (2**bits - 1))
    else:
        quantizer.low.fill_(.3 if softmax == 'sulq' else 1.)
        quantizer.step.fill_(7 / 2**bits if softmax == 'sulq' else 1.)
    if softmax == 'sulq':
        quantizer.shift.fill_(.01)
    quantizer.mark_fitted_()
    quantizer.enabled = True
    return quantizer


@pytest.mark.parametrize('softmax, exponent', [('sulq', 'table'),
                                               ('sulq', 'integer'),
                                               ('log2', 'table'),
                                               ('uniform', 'table')])
@pytest.mark.parametrize('bits', range(2, 9))
def test_steps_of_attention_are_its_codes_in_float64(softmax, exponent, bits):
    quantizer = fitted(softmax, bits, exponent)
    steps = attention_steps(quantizer)
    assert steps.depth == max(4, bits)
    p = torch.cat([
        torch.tensor([0., 1.]),
        torch.rand(500),
        torch.rand(500)**9,
        neighbours(steps),
    ])
    exact = copy.deepcopy(quantizer).double()
    codes = exact.encode(p.clamp(0, 1).double()).float()
    expected = quantizer.decode(codes)
    found = steps.values[step_of(steps, p.clamp(0, 1))]
    assert torch.equal(found, expected)
    assert len(codes.unique()) > 2**bits // 2


def test_attention_that_is_off_is_not_supported():
    quantizer = fitted('sulq', 4)
    quantizer.enabled = False
    with pytest.raises(Unsupported, match='attention is not quantized'):
        attention_steps(quantizer)


DENSE = (0, 1, 2, 3, 4, 5, 7, 9, 12, 16, 22, 30, 41, 58, 80, 127)


@pytest.mark.parametrize('bits, scale, zero_point, entries, is_small', [
    (4, .3, 1, None, True),
    (4, .5, 0, None, True),
    (3, .35, 0, None, True),
    (4, .25, -3, None, True),
    (4, .1, 20, None, True),
    (4, .05, 4, None, True),
    (4, .05, 4, DENSE, True),
    (4, .011, 15, DENSE, True),
    (3, .1, 2, DENSE[::2], True),
    (5, .3, 1, None, False),
    (5, .011, 30, tuple(range(0, 128, 4)), True),
    (7, .02, 30, tuple(range(128)), True),
    (5, .3, 0, None, True),
    (2, 1., 1, None, True),
])
def test_steps_of_gelu_are_its_codes_in_float64(bits, scale, zero_point,
                                                entries, is_small):
    codes = InputCodes(bits, scale, zero_point, entries)
    steps = gelu_steps(codes)
    assert (steps is not None) == is_small
    if not is_small:
        return
    x = torch.cat([
        torch.randn(2000) * 3, -torch.rand(2000),
        torch.tensor([-1e30, -100., -0., 0., 100., 1e30]),
        neighbours(steps)
    ])
    found = steps.values[step_of(steps, x)]
    expected = codes.stored(codes.encode(F.gelu(x.double())))
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize('scale', [.3, 1., .011, 1e-6])
@pytest.mark.parametrize('zero_point', [0, 15, 127, -1000, 2**20])
@pytest.mark.parametrize('entries', [DENSE, tuple(range(0, 128, 2))])
def test_steps_of_a_table_are_its_codes_in_float64(scale, zero_point, entries):
    scale = torch.tensor(scale).item()
    bits = len(entries).bit_length() - 1
    codes = InputCodes(bits, scale, zero_point, entries)
    steps = table_steps(codes)
    assert steps.depth == bits
    limits = neighbours(steps)
    middles = torch.rand(2000) * 150 - 10 - zero_point
    x = torch.cat([limits, middles * scale, torch.tensor([-1e30, 0., 1e30])])
    found = steps.values[step_of(steps, x)]
    assert torch.equal(found, codes.stored(codes.encode(x.double())).float())
    assert found.unique().tolist() == list(entries)


@pytest.mark.parametrize('count', [1, 3, 15, 16, 255])
def test_a_heap_finds_what_a_sorted_list_does(count):
    limits = torch.randn(count).sort().values
    steps = make_steps(limits, torch.arange(count + 1.))
    x = torch.cat([torch.randn(300), limits])
    found = steps.values[step_of(steps, x)]
    assert torch.equal(found, (x[:, None] >= limits).sum(1).float())
