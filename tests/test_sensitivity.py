"""Sensitivities: what is exchanged, and that the rest is not run again."""
import json

import pytest
import torch

from isvit_det.commands import analyze_det
from isvit_det.commands.analyze_det import main
from isvit_det.core.mixed import named_parts
from isvit_det.evaluation.difference import difference
from isvit_det.sensitivity import analysis as analysis_module
from isvit_det.sensitivity.measures import Figure, rank_correlation
from isvit_det.sensitivity.page import render
from isvit_det.sensitivity.partial import (Recorded, exchange, features,
                                           forwards, predict)
from isvit_det.sensitivity.parts import list_parts


def command(tiny, folder, *words):
    return [
        tiny.config, tiny.checkpoint, '--scope', 'detector', '--method',
        'minmax', '--calib-images', '2', '--images', '2', '--work-dir',
        str(folder), *words
    ]


@pytest.fixture(scope='module')
def done(tiny, tmp_path_factory):
    """The folder of an analysis, and the analysis itself."""
    folder = tmp_path_factory.mktemp('analysis')
    seen = []
    show = analyze_det.show

    def keep(analysis, result):
        seen.append(analysis)
        show(analysis, result)

    analyze_det.show = keep
    try:
        assert main(command(tiny, folder, '--bits', 'w3a3')) == 0
    finally:
        analyze_det.show = show
    return folder, seen[0]


def test_every_quantized_layer_is_in_one_part(done):
    model = done[1].model
    every = sorted(name for name, _ in named_parts(model))
    for by in ('unit', 'layer'):
        inside = [
            name for part in list_parts(model, by) for name in part.layers
        ]
        assert sorted(inside) == every
    assert len(list_parts(model, 'layer')) == len(every)
    names = [part.name for part in list_parts(model)]
    assert names[0] == 'backbone.patch_embed'
    assert names[-2:] == ['roi_head.bbox_head', 'roi_head.mask_head']


def test_an_exchange_is_what_a_whole_run_gives(done):
    """With and without memory, and against a model that is built so."""
    analysis = done[1]
    model, twin = analysis.model, analysis.twin('alone', (3, 3))
    batch = analysis.drawn.read(analysis.places[0])
    recorded = Recorded(model, batch)
    before = predict(model, batch).pred_instances
    for part in analysis.parts:
        with exchange(model, twin, part):
            expected = predict(model, batch).pred_instances
            maps = features(model, batch)
        with forwards(recorded.before(part)), exchange(model, twin, part):
            found = predict(model, batch).pred_instances
            again = features(model, batch)
        assert torch.equal(found.scores, expected.scores), part.name
        assert torch.equal(found.bboxes, expected.bboxes), part.name
        assert all(map(torch.equal, maps, again))
        # What is compared with stays.
        assert torch.equal(recorded.sample.pred_instances.scores,
                           before.scores), part.name
        assert len(found) != len(before) or not torch.equal(
            found.scores, before.scores) or not torch.equal(
                found.masks, before.masks), part.name
    # Everything is as it was.
    after = predict(model, batch).pred_instances
    assert torch.equal(before.scores, after.scores)
    assert torch.equal(recorded.sample.pred_instances.scores, after.scores)
    assert not any('forward' in vars(module) for module in model.modules())


def test_what_runs_before_a_part_is_not_run_again(done):
    analysis = done[1]
    model = analysis.model
    batch = analysis.drawn.read(analysis.places[0])
    recorded = Recorded(model, batch)
    part = next(one for one in analysis.parts
                if one.name == 'backbone.stages.2.blocks.0')
    ran = []
    handles = [
        module.register_forward_hook(lambda *args, name=name: ran.append(name))
        for name, module in named_parts(model)
    ]
    with forwards(recorded.before(part)):
        predict(model, batch)
    for handle in handles:
        handle.remove()
    assert ran and not any(
        name.startswith(('backbone.patch', 'backbone.stages.0',
                         'backbone.stages.1')) for name in ran)
    assert 'backbone.stages.2.blocks.0.ffn.layers.1' in ran


def test_one_layer_is_quantized_and_no_other(done):
    analysis = done[1]
    twin = analysis.twin('alone', (3, 3))
    batch = analysis.drawn.read(analysis.places[0])
    part = next(
        one for one in list_parts(analysis.model, 'layer')
        if one.name.endswith('1.blocks.0.attn.w_msa.proj'))
    calls = {
        name: [q.num_calls for q in one.children()]
        for name, one in named_parts(twin)
    }
    with exchange(analysis.model, twin, part, True):
        predict(analysis.model, batch)
    changed = {
        name
        for name, one in named_parts(twin)
        if [q.num_calls for q in one.children()] != calls[name]
    }
    assert changed == {part.name}


def test_the_report_has_figures_that_say_how_sure_they_are(done):
    folder, analysis = done
    result = json.loads((folder / 'analysis.json').read_text())
    assert result['images'] == 2 and result['calibration_images'] == 2
    assert set(result['parts']) == {part.name for part in analysis.parts}
    for name, figures in result['parts'].items():
        one = figures['alone']['w3a3']
        assert 0 <= one['detections']['value'] <= 1, name
        assert one['detections']['error'] >= 0
        assert one['features']['value'] > 0
        assert 'detections' in figures['rest']['w3a3']
    assert 0 < result['whole']['w3a3']['detections']['value'] <= 1
    page = (folder / 'analysis.html').read_text()
    assert page.count('roi_head.mask_head') == 2
    assert 'http' not in page and '<script' not in page


def test_an_analysis_goes_on_where_it_stopped(tiny, done, tmp_path,
                                              monkeypatch):
    folder, analysis = done
    expected = json.loads((folder / 'analysis.json').read_text())
    (folder / 'sensitivity/image_00001.pth').write_bytes(b'damaged')

    def fail(*args):
        raise AssertionError

    # Neither is needed: the twins are kept, and one image is missing.
    monkeypatch.setattr(analysis_module, 'calibrate_alone_', fail)
    monkeypatch.setattr(analysis_module, 'calibrate_together_', fail)
    measured = []
    measure = analysis_module.Analysis._measure
    monkeypatch.setattr(
        analysis_module.Analysis, '_measure', lambda self, index:
        (measured.append(index), measure(self, index))[1])
    assert main(command(tiny, folder, '--bits', 'w3a3')) == 0
    assert measured == [1]
    assert json.loads((folder / 'analysis.json').read_text()) == expected
    assert main(command(tiny, folder, '--bits', 'w3a3')) == 0
    assert measured == [1]


@pytest.mark.parametrize('words, text', [
    (['--images', '0'], '--images: 0'),
    (['--bits', 'w9a9'], "'w9a9'"),
    (['--calib-images', '6'], 'leave none to measure on'),
])
def test_bad_input_is_one_line(tiny, tmp_path, capsys, words, text):
    assert main(command(tiny, tmp_path, *words)) == 2
    error = capsys.readouterr().err
    assert text in error and len(error.splitlines()) == 1


def test_names_are_escaped():
    row = dict(alone=dict(w4a4=dict(features=Figure(1., None))))
    page = render('<b>', ['<i>'], dict(parts={'<script>': row}), ['alone'],
                  ['w4a4'])
    assert '<script>' not in page and '&lt;script&gt;' in page
    assert '<b>' not in page and '<i>' not in page


def boxes(*rows, score=.5, label=0):
    return dict(
        bboxes=torch.tensor(rows, dtype=torch.float).view(-1, 4),
        scores=torch.full((len(rows), ), score),
        labels=torch.full((len(rows), ), label))


def test_difference_by_hand():
    one = boxes((0, 0, 10, 10), (20, 20, 30, 30))
    assert difference(one, one) == 0
    assert difference(one, boxes()) == 1
    assert difference(boxes(), boxes()) == 0
    # Half of the scores are there, with an IoU of .8.
    half = boxes((0, 0, 10, 8))
    expected = 1 - 2 * .8 * .5 / 1.5
    assert difference(one, half) == pytest.approx(expected)
    assert difference(half, one) == pytest.approx(expected)
    # Each detection is taken once.
    twice = boxes((0, 0, 10, 10), (0, 0, 10, 10))
    assert difference(one, twice) == pytest.approx(.5)


def test_difference_of_masks():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4] = True
    one = dict(boxes((0, 0, 8, 8)), masks=mask)
    other = dict(one, masks=~mask)
    assert difference(one, one) == 0
    assert difference(one, other) == pytest.approx(.5)


def test_rank_correlation_with_its_interval():
    found = rank_correlation([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5])
    assert found['value'] == pytest.approx(.942857)
    assert found['low'] < found['value'] < found['high'] < 1
    assert rank_correlation([1, 2], [1, 2])['value'] is None
