"""Two processes calibrate as one does, up to the order of float sums."""
import datetime

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

from isvit_det.calibration.closed_form import correct_
from isvit_det.calibration.sos import calibrate
from isvit_det.core.distributed import own_indices, rank
from isvit_det.core.layers import QuantConv2d, observe, precision, quantizers
from isvit_det.core.observers import AttentionObserver, RangeObserver
from isvit_det.core.quantizers import ShiftUniformLog2Quantizer
from isvit_det.core.settings import QuantConfig, SOSConfig
from tests.toy import toy, toy_images

SHORT = dict(iters=15, lr=1e-3)


def own(things):
    return [things[index] for index in own_indices(len(things))]


def calibrated_toy(folder, dtype):
    model = toy('isvit').to(dtype)
    quant = QuantConfig.from_dict({})
    sos = SOSConfig.from_dict(SHORT, quant)
    images = [image.to(dtype) for image in toy_images(9)]
    records = calibrate(model, own(images), quant, sos, folder / 'toy', 'x')
    return model.state_dict(), records


def resumed_toy(folder, dtype):
    """The same after a stop within the second unit."""

    def stop(event):
        if event.index == 1:
            raise KeyboardInterrupt

    model = toy('isvit').to(dtype)
    quant = QuantConfig.from_dict({})
    sos = SOSConfig.from_dict(SHORT, quant)
    images = own([image.to(dtype) for image in toy_images(9)])
    with pytest.raises(KeyboardInterrupt):
        calibrate(
            model, images, quant, sos, folder / 'resumed', 'x', on_event=stop)
    model = toy('isvit').to(dtype)
    records = calibrate(model, images, quant, sos, folder / 'resumed', 'x')
    assert [record.resumed for record in records] == [True, False, False]
    return model.state_dict()


def weight_codes(state):
    model = toy('isvit')
    model.load_state_dict(state)
    return {
        name: q.encode(state[name.replace('weight_quantizer', 'weight')])
        for name, q in quantizers(model).items() if q.role == 'weight'
    }


def histograms(folder, dtype):
    """Of values that the processes see in other orders and amounts."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(4, 3, generator=generator) * 10**i for i in range(5)
    ]
    observer = RangeObserver(3)
    for batch in own(batches):
        observer.update(batch)
    observer.merge_(torch.zeros(()))
    nothing = RangeObserver()
    nothing.merge_(torch.zeros(()))
    alone = RangeObserver()
    if rank() == 0:
        alone.update(batches[0])
    alone.merge_(torch.zeros(()))
    assert nothing.counts is None
    return dict(
        counts=observer.counts,
        centres=observer.samples().values,
        alone=alone.counts)


def attention(folder, dtype):
    """The pairs kept, in order, when not all of them fit."""
    generator = torch.Generator().manual_seed(0)
    observer = AttentionObserver(keep_values=True)
    for x in own([
            torch.rand(2, side, side, generator=generator).softmax(-1)
            for side in range(100, 180)
    ]):
        observer.update(x)
        observer.keep_(x, torch.ones(2, x.shape[-1], 80))
    observer.merge_(torch.zeros(()))
    quantizer = ShiftUniformLog2Quantizer(
        4, QuantConfig(shift_error='output', percentiles=(1., )))
    quantizer.fit_(observer)
    kept = [(len(rows), rows.sum().item()) for rows, *_ in observer.pairs]
    return dict(kept=kept, state=quantizer.state_dict())


def corrected_layer(folder, dtype):
    """A layer that is corrected on an uneven number of images."""
    torch.manual_seed(0)
    layer = nn.Sequential(
        QuantConv2d(nn.Conv2d(4, 6, 3), QuantConfig(act_bits=3))).to(dtype)
    images = torch.randn(9, 4, 8, 8).to(dtype).split(1)
    with precision(layer, weights=False, acts=False):
        with observe(layer):
            for image in own(images):
                layer(image)
        with correct_([*layer]) as correction, torch.no_grad():
            for index in own_indices(len(images)):
                correction.start_image(index)
                layer(images[index])
    return layer.state_dict()


def everything(folder):
    """What a process returns, by function and dtype."""
    return {
        (work.__name__, dtype): work(folder / str(dtype), dtype)
        for work in (histograms, attention, corrected_layer, calibrated_toy,
                     resumed_toy)
        for dtype in (torch.double, torch.float)
    }


def _join(number, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/meet',
        rank=number,
        world_size=2,
        timeout=datetime.timedelta(seconds=60))
    torch.save(everything(folder), folder / f'{number}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    return everything(tmp_path_factory.mktemp('one'))


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    mp.spawn(_join, (folder, ), 2)
    return [
        torch.load(folder / f'{number}.pth', weights_only=False)
        for number in range(2)
    ]


def test_a_histogram_does_not_know_who_saw_what(one, two):
    expected = one['histograms', torch.float]
    for other in two:
        found = other['histograms', torch.float]
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_same_attention_is_kept(one, two):
    expected = one['attention', torch.float]
    first, second = (other['attention', torch.float] for other in two)
    assert 0 < len(expected['kept']) < 80
    assert first['kept'] == expected['kept'][::2]
    assert second['kept'] == expected['kept'][1::2]
    for found in (first, second):
        for key, value in expected['state'].items():
            assert torch.equal(found['state'][key], value)


@pytest.mark.parametrize('dtype', [torch.double, torch.float])
def test_a_corrected_layer_is_the_same(one, two, dtype):
    for other in two:
        found = other['corrected_layer', dtype]
        for key, value in one['corrected_layer', dtype].items():
            # Codes are equal, and so is what they decode to.
            assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.double, torch.float])
def test_calibration_differs_by_the_order_of_sums_only(one, two, dtype):
    """In float64 no code differs; in float32 some on a rounding edge do."""
    state, records = one['calibrated_toy', dtype]
    expected = weight_codes(state)
    for other in two:
        other_state, other_records = other['calibrated_toy', dtype]
        found = weight_codes(other_state)
        moved = total = 0
        for name, codes in expected.items():
            distance = (codes - found[name]).abs()
            assert distance.max() <= (0 if dtype == torch.double else 1)
            moved += (distance > 0).sum().item()
            total += codes.numel()
        print(f'{dtype}: {moved} of {total} codes differ')
        assert moved <= (0 if dtype == torch.double else .01 * total)
        for record, alone in zip(other_records, records):
            assert record.errors == pytest.approx(alone.errors, rel=1e-3)


def test_both_processes_end_with_exactly_the_same_also_when_resumed(two):
    first, second = (other['calibrated_toy', torch.float][0] for other in two)
    for other in (second, *(each['resumed_toy', torch.float] for each in two)):
        assert all(torch.equal(first[key], other[key]) for key in first)
