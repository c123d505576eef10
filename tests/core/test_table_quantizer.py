"""Table quantizers: their codes, state and gradients, and where they are."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from isvit_det.core.layers import QuantConv2d, QuantLinear, QuantMatMul
from isvit_det.core.quantizers import UniformQuantizer
from isvit_det.core.settings import TABLE_PLACES, QuantConfig
from isvit_det.core.table_quantizer import TableQuantizer, activation_quantizer
from tests.core.test_quantizers import fitted

BITS = range(2, 7)
PERCENTILES = QuantConfig().percentiles


def values_of(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20_000, generator=generator)
    return dict(
        gelu=F.gelu(1.5 * x - 1),
        relu=F.relu(x - .5),
        normal=3 * x + 1,
        heavy=x.pow(5),
        far=x + 50,
        sparse=torch.where(x.abs() < .3, torch.zeros(()), x - .1),
        even=torch.linspace(-2, 6, 20_000),
        constant=torch.full((99, ), 3.5),
        zero=torch.zeros(99))[kind]


KINDS = ('gelu', 'relu', 'normal', 'heavy', 'far', 'sparse', 'even',
         'constant', 'zero')


def table(bits, x, entry_bits=7):
    return fitted(TableQuantizer(bits, entry_bits, PERCENTILES), x)


def squared_error(quantizer, x):
    return (quantizer(x) - x).double().square().sum().item()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bits', BITS)
def test_codes_are_ordered_and_exactly_two_to_the_bits(bits, kind):
    x = values_of(kind)
    quantizer = table(bits, x)
    entries = quantizer.entries.int()
    assert entries.shape == (2**bits, ) and (entries.diff() > 0).all()
    assert entries.min() >= 0 and entries.max() < 2**quantizer.entry_bits
    reach = 200 * quantizer.scale
    everything = torch.linspace(-1, 1, 9999) * reach - (
        quantizer.zero_point * quantizer.scale)
    everything = torch.cat([everything, 20 * reach + everything])
    codes = quantizer.encode(everything.sort().values)
    assert (codes.diff() >= 0).all()
    assert codes.unique().tolist() == list(range(2**bits))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bits', BITS)
def test_forward_is_decode_of_encode_and_repeats_itself(bits, kind):
    x = values_of(kind)
    quantizer = table(bits, x)
    once = quantizer(x)
    assert torch.equal(once, quantizer.decode(quantizer.encode(x)))
    assert torch.equal(quantizer(once), once)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bits', BITS)
def test_a_table_is_never_worse_than_even_codes(bits, kind):
    x = values_of(kind)
    quantizer = table(bits, x)
    even = fitted(UniformQuantizer(bits, 'act', PERCENTILES), x)
    # Errors are compared on the bins of a histogram.
    errors = squared_error(quantizer, x), squared_error(even, x)
    assert errors[0] <= errors[1] * 1.01 + 1e-12
    if quantizer.is_even:
        assert torch.equal(quantizer(x), even(x))


def test_tables_fit_what_even_codes_do_not():
    ratios = {}
    for kind in ('gelu', 'heavy'):
        x = values_of(kind)
        even = fitted(UniformQuantizer(3, 'act', PERCENTILES), x)
        ratios[kind] = squared_error(table(3, x), x) / squared_error(even, x)
    assert ratios['gelu'] < .75 and ratios['heavy'] < .75


@pytest.mark.parametrize('bits', BITS)
def test_even_codes_win_a_tie(bits):
    x = torch.arange(2**bits).repeat(9) - 1.
    quantizer = fitted(TableQuantizer(bits, 7, (1., )), x)
    assert quantizer.is_even and quantizer.zero_point.item() == 1
    assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize('kind', ['relu', 'sparse', 'zero'])
@pytest.mark.parametrize('bits', BITS)
def test_zero_is_exact_where_many_values_are_zero(bits, kind):
    quantizer = table(bits, values_of(kind))
    assert quantizer(torch.zeros(1)).item() == 0


def test_narrower_entries_stay_below_their_bound():
    x = values_of('gelu')
    errors = []
    for entry_bits in (4, 5, 7):
        quantizer = table(3, x, entry_bits)
        assert int(quantizer.entries.max()) < 2**entry_bits
        errors.append(squared_error(quantizer, x))
    assert errors[0] > errors[1] > errors[2]


def test_the_state_has_known_shapes_and_restores_everything():
    x = values_of('gelu')
    quantizer = TableQuantizer(4, 7, PERCENTILES)
    before = {k: (v.shape, v.dtype) for k, v in quantizer.state_dict().items()}
    fitted(quantizer, x)
    state = quantizer.state_dict()
    assert before == {k: (v.shape, v.dtype) for k, v in state.items()}
    loaded = TableQuantizer(4, 7, (1., ))
    loaded.load_state_dict(state)
    assert loaded.is_fitted and loaded.enabled
    assert torch.equal(loaded(x), quantizer(x))


def test_gradients_pass_up_to_half_a_gap_beyond_the_ends():
    quantizer = TableQuantizer(2, 7, PERCENTILES)
    quantizer.entries.copy_(torch.tensor([2, 4, 10, 20]))
    quantizer.zero_point.fill_(4)
    quantizer.mark_fitted_()
    quantizer.enabled = True
    x = torch.tensor([-3.1, -2.9, 0., 20.9, 21.1], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0., 1., 1., 1., 0.]


def test_dtype_is_that_of_the_input():
    x = values_of('gelu').double()
    quantizer = table(4, x.float()).double()
    assert quantizer(x).dtype == torch.double
    assert torch.equal(quantizer(x).float(), quantizer.float()(x.float()))


def test_places_that_are_not_named_have_even_codes():
    config = QuantConfig(activation_tables=('fc2', 'qkv'), act_bits=3)
    for place in TABLE_PLACES:
        is_table = isinstance(
            activation_quantizer(config, place), TableQuantizer)
        assert is_table == (place in ('fc2', 'qkv'))
    linear = QuantLinear(nn.Linear(4, 4), config, 'fc2')
    assert isinstance(linear.input_quantizer, TableQuantizer)
    assert isinstance(
        QuantLinear(nn.Linear(4, 4), config).input_quantizer, UniformQuantizer)
    product = QuantMatMul.of_query_key(config)
    assert isinstance(product.right_quantizer, TableQuantizer)
    product = QuantMatMul.of_attention_value(config)
    assert isinstance(product.right_quantizer, TableQuantizer)
    assert not isinstance(product.left_quantizer, TableQuantizer)
    everywhere = QuantConfig(activation_tables=TABLE_PLACES, act_bits=3)
    conv = QuantConv2d(nn.Conv2d(3, 4, 3), everywhere, 8, 'neck')
    assert isinstance(conv.input_quantizer, UniformQuantizer)
    assert conv.input_quantizer.bits == 8


def test_codes_as_wide_as_the_entries_are_even():
    for act_bits in (7, 8):
        config = QuantConfig(activation_tables=TABLE_PLACES, act_bits=act_bits)
        assert isinstance(
            activation_quantizer(config, 'fc2'), UniformQuantizer)
