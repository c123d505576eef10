"""Layers of random shapes: every kernel's sums against 64-bit integers."""
import contextlib
import random
from typing import Any, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isvit_det.core.layers import (QuantConv2d, QuantLinear, fit_weights_,
                                   set_precision_)
from isvit_det.core.settings import QuantConfig
from isvit_det.plans.layer import (InputCodes, LayerPlan, Unsupported,
                                   plan_layer)
from isvit_det.runtime import native
from isvit_det.runtime.layers import NativeConv, NativeLinear
from isvit_det.runtime.native import Isa, Rows
from isvit_det.runtime.packing import GROUP, pack_layer

# Half a step that GELU's approximation (1.5e-7) and float32 may be off, in
# steps and relative to the output.
NEAR_TIE = (1e-4, 1e-6)


class Mismatch(Exception):
    """A kernel gave something else than it should; the message says what."""


def check_equal(what: str, found: Tensor, expected: Tensor) -> None:
    """Compare to the bit.

    Raises:
        Mismatch: names the first place that differs, and how many do.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise Mismatch(f'{what}: {found.dtype} {tuple(found.shape)}, expected '
                       f'{expected.dtype} {tuple(expected.shape)}')
    if not torch.equal(found, expected):
        wrong = (found != expected).nonzero()
        at = tuple(wrong[0].tolist())
        raise Mismatch(f'{what}: {found[at].item()!r} at {at}, expected '
                       f'{expected[at].item()!r}; {len(wrong)} of '
                       f'{found.numel()} differ')


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Use a number of threads in this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def real_outputs(plan: LayerPlan, codes: Tensor) -> Tensor:
    """A layer's outputs, float32, rounded where the kernels round.

    Args:
        plan: of a layer with weights (outputs, inputs).
        codes: entries, shape (..., inputs).
    """
    sums = (codes.long() - plan.input.zero_point) @ plan.weight.long().t()
    # The kernels round scale and bias to float32, and their outputs once.
    scale, bias = plan.scale.float().double(), plan.bias.float().double()
    return (sums.float().double() * scale + bias).float()


def codes_of(y: Tensor, target: InputCodes) -> Tensor:
    """Codes of a layer's float32 outputs, as entries, uint8."""
    if target.entries is not None:
        # Compared with limits, which are exact.
        return target.stored(target.encode(y.double()))
    codes = (y * (1 / torch.tensor(target.scale))).clamp(
        -target.zero_point, target.top - target.zero_point)
    return (codes.round().long() + target.zero_point).to(torch.uint8)


def check_gelu_codes(what: str, found: Tensor, y: Tensor,
                     target: InputCodes) -> None:
    """Compare codes of GELU's outputs with float64's, but for near ties."""
    exact = F.gelu(y.double())
    expected = target.stored(target.encode(exact))
    exact = exact / target.scale
    near, relative = NEAR_TIE
    to_tie = ((exact - .5).round() + .5 - exact).abs()
    if target.entries is not None:
        # Ties are in the middle between entries, some of which are whole.
        to_tie = torch.minimum(to_tie, (exact.round() - exact).abs())
    is_clear = to_tie > near + relative * exact.abs()
    check_equal(what, found[is_clear], expected[is_clear])


def draw_zero_point(draw: random.Random, top: int) -> int:
    """Of the codes, or beyond them at either side."""
    return draw.choice([
        draw.randint(0, top),
        draw.randint(-900, -1),
        draw.randint(top + 1, 5000), 0, top
    ])


def draw_plan(draw: random.Random) -> LayerPlan:
    """A layer of any size and widths, sometimes of the worst weights."""
    outputs = draw.choice([1, 15, 16, 17, draw.randint(1, 100)])
    inputs = draw.choice([1, 3, 4, 64, 1027, draw.randint(1, 700)])
    bits = draw.randint(2, 8)
    low, high = -2**(bits - 1), 2**(bits - 1) - 1
    weight = torch.randint(low, high + 1, (outputs, inputs))
    if draw.random() < .3:
        weight = torch.tensor([low, high])[torch.randint(2, (outputs, 1))]
        weight = weight.expand(outputs, inputs)
    weight = weight + draw.choice([0, 0, 0, -low, -high, 700])
    act_bits = draw.randint(2, 8)
    entries: Optional[Tuple[int, ...]] = None
    if draw.random() < .3 and act_bits < 8:
        entries = tuple(sorted(draw.sample(range(128), k=2**act_bits)))
    zero_point = draw_zero_point(draw, 2**act_bits - 1)
    # Layers whose sums leave 30 bits are refused before they are packed.
    most = int(weight.abs().sum(1).max())
    if (255 + abs(zero_point)) * most >= 2**30:
        zero_point = 0
    source = InputCodes(act_bits, 1., zero_point, entries)
    return LayerPlan(source,
                     weight.int().contiguous(),
                     torch.rand(outputs).double() * .01 + 1e-4,
                     torch.randn(outputs).double())


def check_refusal(what: str, plan: LayerPlan) -> None:
    """Weights that fit eight bits are never refused."""
    if int(plan.weight.min()) >= -128 and int(plan.weight.max()) <= 127:
        raise Mismatch(f'{what} refuses weights of eight bits')


def check_product(draw: random.Random, isas: List[Isa]) -> str:
    """One product of rows and a layer."""
    plan = draw_plan(draw)
    outputs, inputs = plan.weight.shape
    num_rows = draw.choice([1, 5, 6, 12, 47, 48, 49, draw.randint(1, 300)])
    codes = torch.randint(2**plan.input.bits, (num_rows, inputs))
    if draw.random() < .3:
        codes.fill_(2**plan.input.bits - 1)
    entries = plan.input.stored(codes)
    y = real_outputs(plan, entries)
    what = f'product {num_rows}x{inputs}x{outputs}, {plan.input}'
    # Inputs beyond the layer's have weights of zero, whatever they hold.
    padded = F.pad(entries, (0, -inputs % GROUP), value=255)
    rows = Rows(padded, (1, 1, num_rows), (0, 0, padded.shape[1]))
    results = {}
    for isa in isas:
        try:
            weights = pack_layer(plan, wide_lanes=isa.wide_lanes)
        except Unsupported:
            check_refusal(f'{what}: {isa.name}', plan)
            continue
        out = torch.zeros(num_rows, outputs)
        with threads(draw.randint(1, 5)):
            results[isa] = native.multiply(isa, weights, rows, out,
                                           (0, outputs, 1))
    for isa, found in results.items():
        check_equal(f'{what}: {isa.name}', found, y)
    return 'product' if results else 'refused'


def draw_pair(draw: random.Random, low: int, high: int) -> Tuple[int, int]:
    return draw.randint(low, high), draw.randint(low, high)


def draw_layer(
        draw: random.Random) -> Tuple[Union[QuantLinear, QuantConv2d], Tensor]:
    """A calibrated layer, and inputs for it."""
    bits = f'w{draw.randint(2, 8)}a{draw.randint(2, 8)}'
    config = QuantConfig.from_dict(dict(bits=bits))
    inputs = draw.choice([3, 16, draw.randint(1, 70)])
    outputs = draw.randint(1, 70)
    has_bias = draw.random() < .7
    layer: Any
    if draw.random() < .3:
        layer = QuantLinear(nn.Linear(inputs, outputs, has_bias), config)
        x = torch.randn(draw.randint(1, 3), draw.randint(1, 80), inputs)
    else:
        kernel, stride = draw_pair(draw, 1, 5), draw_pair(draw, 1, 4)
        dilation, padding = draw_pair(draw, 1, 3), draw_pair(draw, 0, 4)
        size = []
        for k, d, p in zip(kernel, dilation, padding):
            least = max(d * (k - 1) + 1 - 2 * p, 1)
            size.append(least + draw.choice([0, draw.randint(0, 40)]))
        layer = QuantConv2d(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, 1,
                      has_bias), config)
        x = torch.randn(draw.randint(1, 3), inputs, *size)
        if draw.random() < .5:
            x = x.contiguous(memory_format=torch.channels_last)
    layer.eval()
    fit_weights_(layer)
    if hasattr(layer, 'offset') and layer.offset is not None:
        layer.offset.copy_(torch.randn(outputs))
    quantizer = layer.input_quantizer
    top = 2**quantizer.bits - 1
    quantizer.scale.fill_(draw.uniform(1, 6) / top)
    zero_point = draw_zero_point(draw, top)
    if isinstance(layer, QuantConv2d) and any(layer.padding):
        zero_point = draw.choice([min(max(zero_point, 0), 255), top // 2])
    quantizer.zero_point.fill_(zero_point)
    quantizer.mark_fitted_()
    set_precision_(layer, weights=True, acts=True)
    return layer, x + (top / 2 - zero_point) * quantizer.scale


def layer_outputs(layer: Any, plan: LayerPlan, x: Tensor) -> Tensor:
    """What the layer gives: its input's codes by the simulation, sums in 64
    bits."""
    codes = layer.input_quantizer.encode(x).long()
    if isinstance(layer, QuantLinear):
        return real_outputs(plan, codes)
    down, right = layer.padding
    codes = F.pad(codes, (right, right, down, down), value=plan.padding_code)
    (reach_y, reach_x), (step_y, step_x) = layer.kernel_size, layer.dilation
    patches = codes.unfold(2, step_y * (reach_y - 1) + 1, layer.stride[0])
    patches = patches.unfold(3, step_x * (reach_x - 1) + 1, layer.stride[1])
    patches = patches[..., ::step_y, ::step_x].permute(0, 2, 3, 4, 5, 1)
    weight = plan.weight.flatten(1)
    flat = LayerPlan(plan.input, weight, plan.scale, plan.bias)
    return real_outputs(flat, patches.flatten(3)).permute(0, 3, 1, 2)


def check_layer(draw: random.Random, isas: List[Isa]) -> str:
    """One linear layer or convolution on one input."""
    layer, x = draw_layer(draw)
    what = f'{layer} {tuple(x.shape)}'
    kind = NativeConv if isinstance(layer, QuantConv2d) else NativeLinear
    try:
        plan = plan_layer(layer)
    except Unsupported:
        # Sums of large maps and far zero points may leave 32 bits.
        return 'refused'
    expected = layer_outputs(layer, plan, x)
    for isa in isas:
        try:
            run = kind(layer, isa)  # type: ignore
        except Unsupported:
            check_refusal(f'{what}: {isa.name}', plan)
            continue
        with threads(draw.randint(1, 5)):
            found = run(x)
        check_equal(f'{what}: {isa.name}', found, expected)
    return 'linear' if isinstance(layer, QuantLinear) else 'convolution'
