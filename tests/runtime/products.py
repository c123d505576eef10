"""Plans, codes and plain references for the tests of the runtime."""
import torch

from isvit_det.plans.layer import InputCodes, LayerPlan
from isvit_det.runtime import native

ISAS = native.supported_isas()


def draw_plan(outputs=20,
              inputs=50,
              weight_bits=4,
              act_bits=4,
              kernel=(),
              zero_point=5,
              seed=0,
              extreme=False):
    """A plan whose scale is 1 and bias 0, so that outputs are the sums.

    With ``extreme`` all weights of an output lie at one end of their range.
    """
    draw = torch.Generator().manual_seed(seed)
    low, high = -2**(weight_bits - 1), 2**(weight_bits - 1) - 1
    shape = (outputs, *kernel, inputs)
    weight = torch.randint(low, high + 1, shape, generator=draw)
    if extreme:
        ends = torch.tensor([low, high]).repeat(outputs)[:outputs]
        weight = ends.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    ones = torch.ones(outputs, dtype=torch.float64)
    return LayerPlan(
        InputCodes(act_bits, 1., zero_point),
        weight.int().contiguous(), ones, 0 * ones,
        min(max(zero_point, 0), 255))


def draw_codes(plan, rows, seed=1, extreme=False):
    """Codes of ``rows`` inputs; with ``extreme`` all of them are the largest.

    Inputs are filled up to whole groups of four.
    """
    inputs = plan.weight.shape[-1]
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        plan.input.top + 1, (rows, inputs), generator=draw, dtype=torch.uint8)
    if extreme:
        codes.fill_(plan.input.top)
    return torch.nn.functional.pad(codes, (0, -inputs % 4))


def exact_sums(plan, codes):
    """``sum_k (a[k] - z) * w[n][k]`` in 64 bits, (rows, outputs)."""
    codes = codes[:, :plan.weight.shape[-1]].long()
    return (codes - plan.input.zero_point) @ plan.weight.long().T


def as_rows(codes):
    """The rows of a matrix of codes."""
    return native.Rows(codes, (1, 1, len(codes)), (0, 0, codes.shape[1]))
