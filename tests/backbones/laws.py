"""Laws that every quantized backbone obeys, as checks on one of them."""
import torch

from isvit_det.calibration import closed_form
from isvit_det.calibration.sos import calibrate
from isvit_det.core.layers import (observe, precision, quantizers,
                                   set_precision_)
from isvit_det.core.padding import leave_out
from isvit_det.core.quantizers import UniformQuantizer
from isvit_det.core.reparam import (fold_channel_scales_, use_channel_scales_,
                                    widen_narrow_channels_)
from isvit_det.core.rotation import rotate_heads_
from isvit_det.core.settings import SOSConfig
from isvit_det.core.units import State

# Ends of the names of the layers that read a LayerNorm's output.
READERS = ('.qkv', '.fc1', '.ffn.layers.0.0', '.reduction')


def pair_up(source, model):
    """Give a float backbone lively weights and a quantized one the same."""
    for param in source.parameters():
        param.data += torch.randn_like(param) * .1
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys
    # mmdet's returns nothing from eval().
    source.eval()
    model.eval()
    return source, model


def units_forward(model, x):
    """State after every unit, for one image."""
    states = [State(x, tuple(x.shape[-2:]))]
    for unit in model.units():
        states.append(unit.forward(states[-1]))
    return states


@torch.no_grad()
def check_equal_bit_for_bit(source, model, x):
    for one, other in zip(source(x), model(x), strict=True):
        assert torch.equal(one, other)


def check_keys(source, model):
    """Float keys are unchanged and the rest is ours."""
    keys, float_keys = set(model.state_dict()), set(source.state_dict())
    assert float_keys <= keys
    for key in keys - float_keys:
        assert ('_quantizer.' in key
                or key.rsplit('.', 1)[1] in ('offset', 'padding_value')), key
    assert [k for k, _ in model.named_parameters()
            ] == [k for k, _ in source.named_parameters()]


@torch.no_grad()
def check_items_run_alone(model, x, quantized):
    """A draw of items gives what the whole map has at their places."""
    with observe(model):
        model(x)
    for unit in model.units():
        for pair in unit.pairs():
            if pair.padding is not None:
                torch.nn.init.normal_(pair.padding.padding_value)
    set_precision_(model, weights=False, acts=quantized)
    states = units_forward(model, x)
    for unit, before, after in zip(model.units(), states, states[1:]):
        num_items = unit.num_items(before.size)
        items = torch.randperm(num_items)[:-(-num_items // 2)]
        batch = unit.collate([unit.gather(before, items)])
        output = unit.run(batch)
        target = unit.gather_target(after, before.size, items)
        assert output.shape == target.shape
        error = (output - target).square().mean().sqrt()
        assert error <= 1e-3 * target.square().mean().sqrt(), unit.name


@torch.no_grad()
def check_every_item_covered_once(model, x):
    states = units_forward(model, x)
    for unit, before, after in zip(model.units(), states, states[1:]):
        tokens = torch.arange(after.x.shape[1])
        rows = unit.gather_target(
            State(tokens[None, :, None], after.size), before.size,
            torch.arange(unit.num_items(before.size))).flatten()
        prefix = len(tokens) - after.size[0] * after.size[1]
        # A patch embedding makes the patches only.
        missing = set(tokens.tolist()) - set(rows.tolist())
        assert missing <= set(range(prefix)), unit.name
        assert rows.unique().numel() == rows.numel(), unit.name


def record_codes(model, x):
    """Codes of every activation site, and the output maps."""
    codes = {}
    handles = []

    def record(name, quantizer):

        def hook(module, args):
            codes[name] = quantizer.encode(args[0])

        return hook

    for name, quantizer in quantizers(model).items():
        if quantizer.role == 'act':
            handles.append(
                quantizer.register_forward_pre_hook(record(name, quantizer)))
    with torch.no_grad():
        outs = model(x)
    for handle in handles:
        handle.remove()
    return codes, outs


def check_stage_two(model, x, first):
    """Stage 2 moves no code in float64, and next to none in float32.

    It is for every layer that reads a norm.

    Args:
        model: of the dtype of ``x``.
        x: an image.
        first: start of the names of the first block's sites.
    """
    pairs = [pair for unit in model.units() for pair in unit.pairs()]
    linears = {pair.linear for pair in pairs}
    readers = [(name, layer) for name, layer in model.named_modules()
               if name.endswith(READERS)]
    assert readers
    assert not [name for name, layer in readers if layer not in linears]
    for pair in pairs:
        use_channel_scales_(pair)
    with observe(model):
        model(x)
    for pair in pairs:
        widen_narrow_channels_(pair.linear.input_quantizer)
    set_precision_(model, weights=False, acts=True)
    codes, outs = record_codes(model, x)
    for pair in pairs:
        fold_channel_scales_(pair)
    new_codes, new_outs = record_codes(model, x)
    moved = {name: (codes[name] - new_codes[name]).abs() for name in codes}
    if x.dtype == torch.float64:
        assert sum(int(m.sum()) for m in moved.values()) == 0
        tolerance = 1e-9
    else:
        # One flipped code flips others after it: count the first sites' only.
        firsts = [m for name, m in moved.items() if name.startswith(first)]
        assert firsts
        assert max(float(m.max()) for m in firsts) <= 1
        total = sum(m.numel() for m in firsts)
        assert sum(int(m.sum()) for m in firsts) <= max(1, 1e-5 * total)
        if any(m.any() for m in moved.values()):
            return
        tolerance = 1e-5
    for one, other in zip(outs, new_outs):
        assert (one - other).norm() <= tolerance * one.norm()


def check_calibrates(source, model, images, workspace, limit, **sos):
    """A calibrated backbone stays near the float one, and is not it."""
    config = SOSConfig.from_dict(sos, model.quant_config)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    calibrate(model, images, model.quant_config, config, workspace, 'x')
    assert trained == {
        k
        for k, p in model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        quantized = model(images[0])
        for one, other in zip(source(images[0]), quantized, strict=True):
            assert 0 < (one - other).norm() < limit * one.norm()
        with precision(model, weights=False, acts=False):
            for one, other in zip(model(images[0]), quantized, strict=True):
                assert not torch.equal(one, other)


@torch.no_grad()
def check_padding(model, x):
    """What does not reach the output is not observed, and all else is."""
    states = units_forward(model, x)
    found = 0
    for unit, before, after in zip(model.units(), states, states[1:]):
        padding = unit.padding(before.size)
        if padding is None:
            continue
        found += 1
        num_tokens, channels = before.x.shape[1:]
        num_places = padding.inside.numel()
        assert num_tokens == padding.inside.sum() < num_places
        attention = unit.attention()
        with torch.enable_grad():
            check_gradients(unit, before, padding)
        sites = {
            name: quantizer
            for name, quantizer in quantizers(attention).items()
            if quantizer.role == 'act'
        }
        for quantizer in sites.values():
            quantizer.observer = quantizer.new_observer()
        with leave_out(padding):
            assert torch.equal(unit.forward(before).x, after.x)
        for name, quantizer in sites.items():
            width = channels
            if name == 'attention_value.left_quantizer':
                width = attention.num_heads * padding.inside.shape[1]
            left_out = any(quantizer is other for other in padding.quantizers)
            count = num_tokens if left_out else num_places
            assert quantizer.observer.counts.sum() == count * width, name
            assert quantizer.inside_map is None
            quantizer.observer = None
    assert found


def check_gradients(unit, before, padding):
    """The output depends on padding at other sites than those named alone."""
    seen = {}

    def keep(quantizer, args):
        seen[quantizer] = args[0]
        args[0].retain_grad()

    attention = unit.attention()
    sites = [q for q in quantizers(attention).values() if q.role == 'act']
    handles = [site.register_forward_pre_hook(keep) for site in sites]
    x = before.x.clone().requires_grad_()
    unit.forward(State(x, before.size)).x.square().sum().backward()
    for handle in handles:
        handle.remove()
    for site, value in seen.items():
        grad = value.grad
        if site is attention.query_key.right_quantizer:
            grad = grad.transpose(-1, -2)
        of_padding = grad.movedim(-2, 1)[~padding.inside]
        named = any(site is other for other in padding.quantizers)
        assert bool((of_padding == 0).all()) == named


class Beginning(torch.nn.Module):
    """The first units of a backbone, up to the first block by default."""

    def __init__(self, model, num=2):
        super().__init__()
        self.model = model
        self.num = num
        self.eval()

    def units(self):
        return self.model.units()[:self.num]


def count_rows_calibrated(model, images, folder, monkeypatch, **sos):
    """Rows of windows that decide the range of a projection, and its weights.

    Args:
        model: its first block has windows, whose projection it is.
        images: with fewer rows than are drawn of one.
        folder: to work in.
        monkeypatch: of pytest.
        **sos: settings.

    Returns:
        The number of rows that were observed, that which weights were
        corrected by, that of tokens, and that with padding.
    """
    unit = model.units()[1]
    proj = unit.attention().proj
    found = {}
    correct = closed_form._correct_layer_
    fit = UniformQuantizer.fit_

    def watched_fit(quantizer, observer):
        if quantizer is proj.input_quantizer:
            found['observed'] = int(observer.counts.sum()) / proj.in_features
        fit(quantizer, observer)

    def watched_correct(layer, collector, as_codes):
        if layer is proj:
            moments = collector.used + collector.held_out
            found['corrected'] = sum(part.count for part in moments)
        correct(layer, collector, as_codes)

    monkeypatch.setattr(UniformQuantizer, 'fit_', watched_fit)
    monkeypatch.setattr(closed_form, '_correct_layer_', watched_correct)
    config = SOSConfig.from_dict(dict(iters=0, **sos), model.quant_config)
    calibrate(
        Beginning(model), images, model.quant_config, config, folder, 'x')
    states = [units_forward(model, image)[1] for image in images]
    return (found['observed'], found['corrected'],
            sum(state.x.shape[1] for state in states),
            sum(unit.layout(state.size).tokens.numel() for state in states))


def check_padding_rows(make, images, folder, monkeypatch):
    """With the default method, and where it is not asked for it counts."""
    for name, sos, left_out in (('default', {}, True),
                                ('all', dict(leave_out_padding=False), False)):
        observed, corrected, tokens, places = count_rows_calibrated(
            make(), images, folder / name, monkeypatch, **sos)
        assert tokens < places
        assert observed == corrected == (tokens if left_out else places)


@torch.no_grad()
def check_rotation(model, x):
    """Rotated heads change weights, and what they compute does not."""
    model = model.double()
    before = units_forward(model, x.double())
    num_heads = 0
    for unit in model.units():
        for heads in unit.heads():
            weight = heads.qkv.weight.clone()
            rotate_heads_(heads)
            assert (heads.qkv.weight - weight).norm() > .1 * weight.norm()
            num_heads += 1
    assert num_heads
    for one, other in zip(before, units_forward(model, x.double())):
        assert (one.x - other.x).norm() <= 1e-10 * one.x.norm()


@torch.no_grad()
def check_last_layers(model, x):
    """What is added to a last layer's output is added to the unit's."""
    states = units_forward(model, x)
    found = 0
    for unit, before, after in zip(model.units(), states, states[1:]):
        layer = unit.last_layer()
        if layer is None:
            continue
        found += 1
        tokens = []
        handle = layer.register_forward_pre_hook(
            lambda module, args: tokens.append(args[0].flatten(0, -2)))
        change = torch.randn_like(layer.weight) * .1
        layer.weight += change
        moved = unit.forward(before).x
        handle.remove()
        layer.weight -= change
        expected = after.x[0] + tokens[0] @ change.T
        assert moved[0].shape == expected.shape
        assert (moved[0] -
                expected).norm() <= 1e-4 * expected.norm(), unit.name
    assert found
