"""Quantizers: codes, their values, their state, and gradients."""
import math

import pytest
import torch

from isvit_det.core.quantizers import (Log2Quantizer,
                                       ShiftUniformLog2Quantizer,
                                       UniformQuantizer, attention_quantizer)
from isvit_det.core.settings import QuantConfig

BITS = range(2, 9)


def attention(rows=64, columns=49, seed=0, spread=3.):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, columns, generator=generator)
    return logits.softmax(-1)


def fitted(quantizer, x):
    observer = quantizer.new_observer()
    observer.update(x)
    quantizer.fit_(observer)
    quantizer.enabled = True
    return quantizer


def every_kind(bits):
    """A fitted quantizer of each kind with values it may meet."""
    generator = torch.Generator().manual_seed(bits)
    x = 3 * torch.randn(40, 6, generator=generator) + 1
    # Channels far from zero have zero points outside of the codes.
    x = x * torch.tensor([.01, .1, 1., 2., 5., 30.]) + torch.arange(6) * 10
    yield fitted(UniformQuantizer(bits, 'act', (.9, .99, 1.)), x), x
    yield fitted(UniformQuantizer(bits, 'act', (.99, ), 6), x), x
    for softmax in ('sulq', 'log2', 'log_sqrt2', 'uniform'):
        for exponent in ('table', 'integer'):
            config = QuantConfig(
                softmax=softmax, exponent=exponent, act_bits=bits)
            yield fitted(attention_quantizer(config), attention()), attention()


@pytest.mark.parametrize('bits', BITS)
def test_codes_are_the_integers_below_two_to_the_bits(bits):
    for quantizer, x in every_kind(bits):
        wide = torch.cat([x.flatten(), x.new_tensor([0., 1e-30, 1.])])
        if getattr(quantizer, 'num_channels', None):
            wide = torch.cat([x, x * 100, x * 0])
        codes = quantizer.encode(wide)
        assert torch.equal(codes, codes.round())
        assert codes.min() >= 0 and codes.max() <= 2**bits - 1
        assert codes.unique().numel() > 1


@pytest.mark.parametrize('bits', BITS)
def test_forward_is_decode_of_encode(bits):
    for quantizer, x in every_kind(bits):
        assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))


@pytest.mark.parametrize('bits', BITS)
def test_decoded_values_encode_to_their_own_codes(bits):
    """What leaves a quantizer passes through it unchanged."""
    for quantizer, x in every_kind(bits):
        once = quantizer(x)
        assert torch.allclose(quantizer(once), once, rtol=1e-5, atol=1e-7)


def test_a_uniform_quantizer_uses_all_codes_and_none_beyond():
    x = torch.linspace(-2, 6, 1000)
    for bits in BITS:
        quantizer = fitted(UniformQuantizer(bits, 'act'), x)
        codes = quantizer.encode(x).unique()
        assert codes.tolist() == list(range(2**bits))


def test_zero_points_are_integers_and_may_leave_the_code_range():
    quantizer = fitted(
        UniformQuantizer(4, 'act', num_channels=2),
        torch.tensor([[10., -10.], [11., -11.]]))
    assert quantizer.zero_point.dtype == torch.int32
    assert quantizer.zero_point.tolist() == [-150, 165]
    x = torch.tensor([[10.5, -10.5]])
    assert (quantizer(x) - x).abs().max() <= 1 / 15 / 2 + 1e-6


@pytest.mark.parametrize('value', [0., 3.5, -1e-20, 1e30, -7e5])
def test_a_constant_tensor_is_represented(value):
    x = torch.full((5, 4), value)
    quantizer = fitted(UniformQuantizer(3, 'act', (.99, 1.)), x)
    assert torch.allclose(quantizer(x), x, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize('exponent', ['table', 'integer'])
@pytest.mark.parametrize('bits', BITS)
def test_no_attention_is_decoded_to_a_negative_value(bits, exponent):
    config = QuantConfig(exponent=exponent, act_bits=bits)
    quantizer = fitted(ShiftUniformLog2Quantizer(bits, config), attention())
    table = quantizer.table()
    assert table.shape == (2**bits, )
    assert (table >= 0).all() and (table.diff() <= 0).all()


def test_table_exponents_give_every_code_a_value_of_its_own():
    """Integer ones collapse: the reason for the table."""
    values = {}
    for exponent in ('table', 'integer'):
        config = QuantConfig(
            exponent=exponent, shifts=(1e-3, ), percentiles=(1., ), act_bits=6)
        quantizer = fitted(
            ShiftUniformLog2Quantizer(6, config), attention(spread=2.))
        values[exponent] = quantizer.table().unique().numel()
    assert values['table'] == 64
    assert values['integer'] < 32


def test_sulq_follows_equations_7_and_8():
    config = QuantConfig(act_bits=3, exponent='integer')
    quantizer = ShiftUniformLog2Quantizer(3, config)
    quantizer.shift.fill_(.01)
    quantizer.low.fill_(0.)
    quantizer.step.fill_(.9)
    x = [0., .003, .05, .3, .9]
    codes = quantizer.encode(torch.tensor(x))
    expected = [
        min(7, max(0, round(-math.log2(value + .01) / .9))) for value in x
    ]
    assert codes.tolist() == expected
    decoded = [max(0., 2.**-round(.9 * code) - .01) for code in expected]
    assert torch.allclose(quantizer.decode(codes), torch.tensor(decoded))


def test_sulq_is_better_than_its_baselines_on_attention():
    x = attention(rows=512)
    errors = {}
    for softmax in ('sulq', 'log2', 'log_sqrt2', 'uniform'):
        config = QuantConfig(softmax=softmax, act_bits=4)
        quantizer = fitted(attention_quantizer(config), x)
        errors[softmax] = (quantizer(x) - x).square().mean().item()
    assert min(errors, key=errors.get) == 'sulq'


def test_a_log_quantizer_keeps_a_code_for_zero():
    config = QuantConfig(softmax='log2', act_bits=3)
    quantizer = fitted(Log2Quantizer(3, config), attention())
    assert quantizer(torch.zeros(3)).tolist() == [0., 0., 0.]


def test_an_unfitted_quantizer_is_off_and_refuses_to_be_turned_on():
    quantizer = UniformQuantizer(4, 'act')
    x = torch.randn(3)
    assert quantizer(x) is x and not quantizer.is_fitted
    quantizer.enabled = True
    with pytest.raises(RuntimeError, match='calibrate'):
        quantizer(x)


def test_state_lies_in_buffers_whose_shapes_calibration_keeps():
    for kind in (UniformQuantizer(4, 'act',
                                  num_channels=6), UniformQuantizer(4, 'act'),
                 attention_quantizer(QuantConfig()),
                 attention_quantizer(QuantConfig(softmax='log2'))):
        before = {k: (v.shape, v.dtype) for k, v in kind.state_dict().items()}
        x = attention(columns=6)
        fitted(kind, x)
        after = {k: (v.shape, v.dtype) for k, v in kind.state_dict().items()}
        assert before == after


def test_a_loaded_quantizer_is_fitted_on_and_equal():
    for quantizer, x in every_kind(4):
        state = quantizer.state_dict()
        if isinstance(quantizer, UniformQuantizer):
            loaded = UniformQuantizer(4, 'act', (1., ), quantizer.num_channels)
        else:
            loaded = attention_quantizer(quantizer.config)
        loaded.load_state_dict(state)
        assert loaded.is_fitted and loaded.enabled
        assert torch.equal(loaded(x), quantizer(x))


def test_calls_count_what_was_quantized_only():
    quantizer = fitted(UniformQuantizer(4, 'act'), torch.randn(9))
    quantizer(torch.ones(1))
    quantizer.enabled = False
    quantizer(torch.ones(1))
    assert quantizer.num_calls == 1
    quantizer.enabled = True
    assert quantizer(torch.ones(0, 3)).shape == (0, 3)
    assert quantizer.num_calls == 1


def test_gradients_pass_inside_of_the_range_and_stop_outside():
    quantizer = fitted(UniformQuantizer(3, 'act'), torch.tensor([-1., 1.]))
    x = torch.tensor([-5., -.9, .1, .9, 5.], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0., 1., 1., 1., 0.]
    # Without gradients nothing is kept for a backward pass.
    assert quantizer(x.detach()).grad_fn is None


def test_dtype_is_that_of_the_input():
    x = torch.randn(50, dtype=torch.double)
    quantizer = fitted(UniformQuantizer(4, 'act').double(), x)
    assert quantizer(x).dtype == torch.double
    assert (quantizer(x) - x).abs().max() <= quantizer.scale / 2 + 1e-12


@pytest.mark.parametrize('exponent', ['table', 'integer'])
def test_gradients_of_attention_stop_only_where_it_is_clipped(exponent):
    config = QuantConfig(act_bits=3, exponent=exponent)
    quantizer = ShiftUniformLog2Quantizer(3, config)
    quantizer.shift.fill_(.01)
    quantizer.low.fill_(1.)
    quantizer.step.fill_(1.)
    quantizer.mark_fitted_()
    quantizer.enabled = True
    # Code 0 stands for .49 and takes what rounds to it, up to 2**-.5 - .01.
    x = torch.tensor([0., .1, .49, .69, .71, 1.], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1., 1., 1., 1., 0., 0.]


@pytest.mark.parametrize('bits', BITS)
def test_the_papers_form_has_an_integer_zero_point(bits):
    config = QuantConfig(act_bits=bits, exponent='integer')
    # No attention is near 1, so that codes start far from exponent 0.
    x = attention() / 50
    quantizer = fitted(ShiftUniformLog2Quantizer(bits, config), x)
    zero_point = (quantizer.low / quantizer.step).item()
    assert zero_point == pytest.approx(round(zero_point), abs=1e-4)
    assert zero_point >= 1


def test_codes_survive_decoding_far_from_zero():
    """A packed weight encodes to the codes it was decoded from."""
    x = 1e6 + torch.linspace(0, 200, 999)
    quantizer = fitted(UniformQuantizer(8, 'weight'), x)
    assert abs(quantizer.zero_point.item()) > 1e6
    codes = quantizer.encode(x)
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)
