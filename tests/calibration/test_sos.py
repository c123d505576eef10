"""The three stages on a toy network: what they learn, keep and resume."""
from collections import Counter

import pytest
import torch

from isvit_det.calibration import closed_form, stages
from isvit_det.calibration.sos import calibrate
from isvit_det.calibration.store import ActivationStore
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import list_sites, precision, quantizers
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.core.table_quantizer import TableQuantizer
from isvit_det.core.units import State
from tests.toy import MlpUnit, toy, toy_images

SHORT = dict(iters=30, lr=1e-3)


class Killed(BaseException):
    """Stands in for a signal: no handler of ours may swallow it."""


def calibrated(tmp_path,
               method='isvit',
               images=None,
               fingerprint='a',
               store_gb=None,
               on_event=None,
               **settings):
    model = toy(method)
    quant = QuantConfig.from_dict(dict(method=method))
    records = calibrate(model,
                        toy_images() if images is None else images, quant,
                        SOSConfig.from_dict({
                            **SHORT,
                            **settings
                        }, quant), tmp_path, fingerprint, store_gb, on_event)
    return model, records


def forward(model, x):
    state = State(x, tuple(x.shape[-2:]))
    for unit in model.units():
        state = unit.forward(state)
    return state.x


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize('method', ['isvit', 'isvit_paper'])
@pytest.mark.parametrize('items', ['unit', 'image'])
def test_every_unit_ends_closer_to_its_float_output(tmp_path, method, items):
    _, records = calibrated(tmp_path, method, items=items, iters=100)
    _, rounded = calibrated(
        tmp_path / 'rounded', method, iters=0, closed_form_start=False)
    assert len(records) == 3
    for record, start in zip(records, rounded):
        errors = record.errors
        assert errors['after_stage_1'] < errors['before_stage_1']
        assert errors['after_stage_3'] < .9 * start.errors['before_stage_3']
        assert errors['after_stage_2'] == pytest.approx(
            errors['after_stage_1'], rel=1e-3)


def test_calibrated_backbone_runs_quantized_at_every_site(tmp_path):
    model, _ = calibrated(tmp_path)
    before = {site.name: site.num_calls for site in list_sites(model)}
    x = toy_images(1)[0]
    quantized = forward(model, x)
    assert all(site.num_calls == before[site.name] + 1
               for site in list_sites(model))
    with precision(model, weights=False, acts=False):
        assert not torch.equal(quantized, forward(model, x))


def test_every_activation_has_one_scale_per_tensor_in_the_end(tmp_path):
    model, _ = calibrated(tmp_path)
    for name, quantizer in quantizers(model).items():
        assert quantizer.is_fitted, name
        if quantizer.role == 'act':
            assert quantizer.scale.shape == ()
            assert quantizer.zero_point.dtype == torch.int32


def test_tables_behind_norms_are_fitted_when_their_scales_are_folded(tmp_path):
    errors = {}
    for places in ((), ('fc2', ), ('norm', 'fc2')):
        model = toy(bits='w8a3', activation_tables=places)
        quant = QuantConfig.from_dict(
            dict(bits='w8a3', activation_tables=places))
        sos = SOSConfig.from_dict(dict(iters=0), quant)
        records = calibrate(model, toy_images(), quant, sos,
                            tmp_path / str(len(places)), 'a')
        errors[len(places)] = records[0].errors['before_stage_3']
        for block in model.blocks:
            for layer, place in ((block.fc1, 'norm'), (block.fc2, 'fc2')):
                quantizer = layer.input_quantizer
                is_table = isinstance(quantizer, TableQuantizer)
                assert is_table == (place in places)
                assert quantizer.is_fitted and quantizer.enabled
    # The first unit has the same inputs each time.
    assert errors[1] < errors[0]
    # Fitted to what the norm gives in the end, not to channels of any scale.
    x = torch.cat([image[0].flatten(1).T for image in toy_images()])
    block = model.blocks[0]
    with torch.no_grad():
        x = block.norm(x)
    table = block.fc1.input_quantizer
    observer = table.new_observer()
    observer.update(x)
    again = TableQuantizer(3, 7, table.percentiles)
    again.fit_(observer)
    assert torch.equal(again.entries, table.entries)
    assert torch.allclose(again.scale, table.scale, rtol=1e-3)


def test_methods_without_optimisation_keep_float_weights(tmp_path):
    model, records = calibrated(tmp_path, 'minmax', iters=0)
    assert torch.equal(model.blocks[0].fc2.weight,
                       toy('minmax').blocks[0].fc2.weight)
    assert records[0].errors['before_stage_3'] == records[0].errors[
        'after_stage_3']


def test_weights_rounded_in_closed_form_start_closer(tmp_path):
    plain, solved = ([
        record.errors['before_stage_3'] for record in calibrated(
            tmp_path / str(start),
            images=toy_images(24),
            iters=0,
            closed_form_start=start)[1]
    ] for start in (False, True))
    assert all(one < .8 * other for one, other in zip(solved, plain))


@pytest.mark.parametrize('num_images', [4, 9])
def test_iterations_that_raise_the_error_are_undone(tmp_path, num_images):
    images = toy_images(num_images)
    never, _ = calibrated(tmp_path / 'never', images=images, iters=0)
    wild = dict(images=images, lr=.5)
    undone, records = calibrated(tmp_path / 'undone', **wild)
    assert same_state(never, undone)
    for record in records:
        for stage in (1, 3):
            before = record.errors[f'before_stage_{stage}']
            assert record.errors[f'after_stage_{stage}'] == before
            assert record.undone[f'stage_{stage}'] > before
    # Units after the first one have other inputs.
    _, (kept, *_) = calibrated(tmp_path / 'kept', roll_back=False, **wild)
    assert not kept.undone
    for stage in (1, 3):
        assert kept.errors[f'after_stage_{stage}'] > kept.errors[
            f'before_stage_{stage}']


def test_iterations_that_lower_the_error_stay(tmp_path):
    _, records = calibrated(tmp_path, 'isvit_paper', roll_back=True)
    assert not records[0].undone
    for stage in (1, 3):
        assert records[0].errors[f'after_stage_{stage}'] < records[0].errors[
            f'before_stage_{stage}']


@pytest.mark.parametrize('settings, seen', [
    (dict(), {
        0: [7, 16],
        1: [*range(7), 8, *range(9, 16), 17]
    }),
    (dict(roll_back=False), {}),
    (dict(method='isvit_paper'), {}),
])
def test_errors_are_measured_on_images_that_no_minibatch_has(
        tmp_path, monkeypatch, settings, seen):
    """In all views of them."""
    pools = []
    init = stages.ItemSampler.__init__

    def spy(sampler, *args):
        init(sampler, *args)
        pools.append(sampler.images.tolist())

    monkeypatch.setattr(stages.ItemSampler, '__init__', spy)
    calibrated(
        tmp_path,
        images=toy_images(18),
        iters=1,
        mirror_images=True,
        **settings)
    meter, *minibatches = pools[:3]
    assert meter == seen.get(0, list(range(18)))
    assert all(pool == seen.get(1, list(range(18))) for pool in minibatches)


def test_images_that_do_not_come_in_every_round_are_refused(tmp_path):
    with pytest.raises(ValueError, match='7 images.* 2 times'):
        calibrated(tmp_path, images=toy_images(7), mirror_images=True)


def test_the_ridge_is_judged_by_an_image_in_all_of_its_forms(
        tmp_path, monkeypatch):
    started = []

    class Spy(closed_form.Correction):

        def start_image(self, image, num_prefix=0):
            started.append(image)
            super().start_image(image, num_prefix)

    monkeypatch.setattr(closed_form, 'Correction', Spy)
    calibrated(tmp_path, images=toy_images(10), iters=0, mirror_images=True)
    assert started[:10] == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize('stage', [1, 2, 3])
@pytest.mark.parametrize('index', [0, 1])
def test_run_killed_in_a_stage_ends_with_the_same_codes(
        tmp_path, stage, index):
    whole, _ = calibrated(tmp_path / 'whole')

    def kill(event):
        if (event.kind, event.index, event.stage) == ('step', index, stage):
            raise Killed

    with pytest.raises(Killed):
        calibrated(tmp_path / 'killed', on_event=kill)
    resumed, records = calibrated(tmp_path / 'killed')
    assert same_state(whole, resumed)
    assert [record.resumed for record in records].count(True) == index


def test_state_of_other_settings_is_discarded_with_a_warning(tmp_path):
    calibrated(tmp_path, fingerprint='a')
    events = []
    fresh, records = calibrated(
        tmp_path, fingerprint='b', seed=1, on_event=events.append)
    assert events[0].kind == 'warning'
    assert not any(record.resumed for record in records)
    other, _ = calibrated(tmp_path / 'other', seed=1)
    assert same_state(fresh, other)


def test_spilling_to_the_disk_changes_nothing_and_leaves_nothing(tmp_path):
    kept, _ = calibrated(tmp_path / 'kept')
    spilled, _ = calibrated(tmp_path / 'spilled', store_gb=0)
    assert same_state(kept, spilled)
    left = (tmp_path / 'spilled' / 'spilled').rglob('*')
    assert not [path for path in left if path.is_file()]


@pytest.mark.parametrize('inputs, num_stores', [('quantized', 2),
                                                ('float', 3)])
def test_streams_that_nothing_reads_again_are_freed(tmp_path, monkeypatch,
                                                    inputs, num_stores):
    """Activations are held twice, or thrice if stage 1 reads the teacher's."""
    peak, sizes = 0, {}
    append = ActivationStore.append

    def watched(store, tensor):
        nonlocal peak
        before = store.pool.used
        append(store, tensor)
        sizes[store] = sizes.get(store, 0) + store.pool.used - before
        peak = max(peak, store.pool.used)

    monkeypatch.setattr(ActivationStore, 'append', watched)
    images = toy_images()
    calibrated(tmp_path, images=images, stage_one_inputs=inputs, iters=0)
    largest = max(sizes.values())
    assert num_stores - 1 < peak / largest <= num_stores + 1 / len(images)


def test_the_seed_decides_the_codes(tmp_path):
    one, _ = calibrated(tmp_path / '1', seed=3)
    two, _ = calibrated(tmp_path / '2', seed=3)
    other, _ = calibrated(tmp_path / '3', seed=4)
    assert same_state(one, two)
    assert not same_state(one, other)


def test_images_are_read_once_and_one_by_one(tmp_path):
    pulled = []

    def images():
        for image in toy_images():
            pulled.append(image)
            yield image

    calibrated(tmp_path, images=images())
    assert len(pulled) == len(toy_images())


def test_the_work_for_a_unit_does_not_grow_with_its_depth(
        tmp_path, monkeypatch):
    """No unit is run again for those after it."""
    runs = Counter()
    forward = MlpUnit.forward

    def counted(unit, state):
        runs[unit.name] += 1
        return forward(unit, state)

    monkeypatch.setattr(MlpUnit, 'forward', counted)
    # To weigh tokens is another pass of its own.
    calibrated(tmp_path, weigh_tokens=False)
    assert len(runs) == 3
    assert len(set(runs.values())) == 1


@pytest.mark.parametrize('share, first, last', [(.5, 30, 30), (.25, 15, 45),
                                                (0., 0, 60)])
def test_events_count_up_to_the_end_of_every_stage(tmp_path, share, first,
                                                   last):
    events = []
    calibrated(tmp_path, on_event=events.append, stage_one_share=share)
    for stage, steps in ((1, first), (2, 1), (3, last)):
        seen = [e for e in events if e.kind == 'step' and e.stage == stage]
        # A stage without a step is told of as well.
        assert len(seen) == 3 * max(1, steps)
        assert seen[-1].step == seen[-1].num_steps == steps
    last = events[-1]
    assert (last.kind, last.index, last.num_units) == ('unit', 2, 3)


def test_training_mode_is_refused(tmp_path):
    quant = QuantConfig()
    settings = SOSConfig.from_dict(SHORT, quant)
    with pytest.raises(RuntimeError, match='before calibrate'):
        calibrate(toy().train(), toy_images(), quant, settings, tmp_path, 'a')
    # Part of a model may be in another mode than the whole.
    model = toy()
    model.blocks[1].norm.train()
    with pytest.raises(RuntimeError, match='blocks.1: .*before reconstruct'):
        calibrate(model, toy_images(), quant, settings, tmp_path, 'a')


def test_no_images_is_an_error_that_says_so(tmp_path):
    with pytest.raises(QuantError, match='0 images'):
        calibrated(tmp_path, images=iter(()))


def test_unwritable_workspace_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(QuantError, match='work directory'):
        calibrated(tmp_path / 'file')
