"""Evaluators: what they measure is shown, in the units that it has."""
import copy
import json
import logging
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATA_SAMPLERS

from isvit_det.commands.quantize_det import LOG, main
from isvit_det.evaluation.loop import Evaluation
from tests.marks import slow

SHORT = ['--method', 'minmax', '--calib-images', '2']


@METRICS.register_module(name='OwnMetric', force=True)
class Own(BaseMetric):
    """Counts boxes, in a unit of its own, and fails when it is told to."""
    default_prefix = 'own'
    # Computations that are still to be made before one fails.
    fuse = 0

    def process(self, data_batch, data_samples):
        self.results += [
            len(s['pred_instances']['scores']) for s in data_samples
        ]

    def compute_metrics(self, results):
        Own.fuse -= 1
        if Own.fuse == 0:
            raise LookupError('no figures today\nnor tomorrow')
        return dict(boxes=sum(results) + .5, images=len(results))


@pytest.fixture
def quantize(tiny, tmp_path, capfd, monkeypatch):
    """Run a changed config; its table by row, what else it says, result."""
    # Loggers of earlier tests write to what pytest has closed.
    monkeypatch.setattr(logging, 'raiseExceptions', False)

    def run(change, name='work', status=0, argv=()):
        changed = tiny.variant(tmp_path / 'changed.py', change)
        folder = tmp_path / name
        assert main([
            changed, tiny.checkpoint, *SHORT, '--work-dir',
            str(folder), *argv
        ]) == status
        captured = capfd.readouterr()
        if status:
            assert 'Traceback (most recent' not in captured.err
            line, = (
                line for line in captured.err.splitlines()
                if line.startswith('error: '))
            return line
        out = captured.out
        lines = [line for line in out.splitlines() if line.startswith('|')]
        cells = [[c.strip() for c in line[1:-1].split('|')] for line in lines]
        table = {row[0]: dict(zip(cells[0], row)) for row in cells[2:]}
        result = json.loads((folder / 'result.json').read_text())
        return table, out, result

    return run


def evaluate(**settings):
    return lambda cfg: cfg.test_evaluator.update(settings)


def set_evaluator(evaluator):

    def change(cfg):
        cfg.test_evaluator = evaluator

    return change


def truth(tiny, path, change):
    """A changed copy of the annotations of the evaluation."""
    source = tiny.data / 'annotations/instances_val.json'
    content = json.loads(source.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


def use(path):
    """Point data set and evaluator at an annotation file."""

    def change(cfg):
        cfg.test_dataloader.dataset.ann_file = path
        cfg.test_evaluator.ann_file = path

    return change


def test_figures_are_shown_by_their_own_names(quantize):
    table, _, result = quantize(evaluate(metric_items=['mAP_50', 'mAP_75']))
    assert 'box AP' not in table['float']
    for kind in ('float', 'quantized'):
        assert result[kind]['box_ap'] is None
        assert len(result[kind]['metrics']) == 4
        for name, value in result[kind]['metrics'].items():
            assert table[kind][name] == f'{100 * value:.1f}'


def test_all_evaluators_are_shown(quantize):

    def change(cfg):
        cfg.test_evaluator = [
            dict(type='OwnMetric'), cfg.test_evaluator,
            dict(cfg.test_evaluator, metric='bbox', prefix='again')
        ]

    table, out, result = quantize(change)
    columns = list(table['quantized'])
    assert columns[1:3] == ['box AP', 'mask AP']
    assert columns[3:6] == ['own/boxes', 'own/images', 'again/bbox_mAP']
    assert table['quantized']['own/images'] == '4'
    boxes = result['quantized']['metrics']['own/boxes']
    assert boxes == result['quantized']['detections'] + .5
    assert table['quantized']['own/boxes'] == f'{boxes:.4g}'
    assert table['float']['again/bbox_mAP'] == table['float']['box AP']
    assert 'again/bbox_mAP_50' in out


def test_a_metric_of_ones_own_needs_no_other(quantize):
    table, _, result = quantize(set_evaluator(dict(type='OwnMetric')))
    assert list(table['float'])[1:3] == ['own/boxes', 'own/images']
    assert result['quantized']['box_ap'] is None


def crowds(content):
    for entry in content['annotations']:
        entry['iscrowd'] = 1


def other_images(content):
    content['images'].append(dict(content['images'][0], id=99))
    for entry in content['annotations']:
        entry['image_id'] = 99


@pytest.mark.parametrize('change, reason', [
    (lambda content: content.update(annotations=[]), 'has no annotations'),
    slow(lambda content: content.pop('annotations'), 'has no annotations'),
    slow(crowds, 'are crowds'),
])
def test_nothing_to_measure_is_no_number(quantize, tiny, tmp_path, change,
                                         reason):
    path = truth(tiny, tmp_path / 'truth.json', change)
    table, out, result = quantize(use(path))
    for kind in ('float', 'quantized'):
        assert table[kind]['box AP'] == table[kind]['mask AP'] == '-'
        assert result[kind]['box_ap'] is result[kind]['mask_ap'] is None
        assert result[kind]['gaps'] == list(result[kind]['metrics'])
    note, = result['notes']
    assert reason in note and path in note and f'note: {note}' in out
    # It was said before the work as well.
    assert out.index(note) < out.index('evaluating the')
    assert '-100' not in out.split('| model')[1]


def small_only(content):
    content['annotations'] = [
        entry for entry in content['annotations'] if entry['area'] < 32**2
    ]


def test_a_single_figure_may_have_nothing_to_measure(quantize, tiny, tmp_path):
    path = truth(tiny, tmp_path / 'truth.json', small_only)
    table, out, result = quantize(use(path))
    found = result['quantized']
    assert 'coco/bbox_mAP_l' in found['gaps']
    assert found['box_ap'] == found['metrics']['coco/bbox_mAP'] >= 0
    note, = result['notes']
    assert 'coco/bbox_mAP_l' in note


def test_ap_of_a_part_is_of_that_part(quantize, tiny, tmp_path):
    """And what MMDetection's own test gives stands beside it."""

    def trim(content):
        content['images'] = content['images'][:2]
        ids = {image['id'] for image in content['images']}
        content['annotations'] = [
            entry for entry in content['annotations']
            if entry['image_id'] in ids
        ]

    def part(cfg):
        cfg.test_dataloader.dataset.indices = 2

    _, _, expected = quantize(
        use(truth(tiny, tmp_path / 'two.json', trim)), 'a')
    table, out, result = quantize(part, 'b')
    for kind in ('float', 'quantized'):
        found = result[kind]
        assert found['part'] == expected[kind]['metrics']
        assert found['box_ap'] == expected[kind]['box_ap']
        assert table[kind]['box AP'] == f'{100 * found["box_ap"]:.1f}'
        assert found['metrics']['coco/bbox_mAP'] < found['box_ap']
    assert result['images'] == dict(evaluated=2, annotated=[4])
    note, = result['notes']
    assert '2 of the 4 images' in note and f'note: {note}' in out
    assert out.index(note) < out.index('evaluating the')
    assert expected['notes'] == [] and expected['quantized']['part'] is None


@DATA_SAMPLERS.register_module(name='OddSampler', force=True)
class Odd(torch.utils.data.Sampler):
    """Takes the second of two images."""

    def __init__(self, dataset, seed=None):
        self.places = range(1, len(dataset), 2)

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)

    def set_epoch(self, epoch):
        pass


def twice(cfg):
    inner = copy.deepcopy(cfg.test_dataloader.dataset)
    cfg.test_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=inner)


@pytest.mark.slow
def test_an_image_that_is_predicted_twice_counts_once(quantize):
    plain = quantize(lambda cfg: None, 'plain')[2]
    _, _, result = quantize(twice, 'twice')
    assert result['quantized']['part'] == plain['quantized']['metrics']
    assert result['quantized']['box_ap'] == plain['quantized']['box_ap']
    note, = result['notes']
    assert '8 predictions are of 4 images' in note


def test_what_a_sampler_leaves_out_is_said(quantize):

    def change(cfg):
        cfg.test_dataloader.sampler = dict(type='OddSampler')

    result = quantize(change, argv=['--no-float-eval'])[2]
    assert result['images'] == dict(evaluated=2, annotated=[4])
    assert '2 of the 4 images' in result['notes'][0]


def test_a_batch_that_is_dropped_is_said(quantize):

    def change(cfg):
        cfg.test_dataloader.update(batch_size=3, drop_last=True)

    result = quantize(change, argv=['--no-float-eval'])[2]
    assert result['images']['evaluated'] == 3
    assert '3 of the 4 images' in result['notes'][0]


@pytest.fixture
def predicted(monkeypatch):
    """Names of the models that predicted."""
    names = []
    predict = Evaluation._predict

    def note(self):
        names.append(self.file.kept.stem)
        return predict(self)

    monkeypatch.setattr(Evaluation, '_predict', note)
    return names


def with_own(cfg):
    cfg.test_evaluator = [cfg.test_evaluator, dict(type='OwnMetric')]


@pytest.mark.parametrize('fuse, model', [slow(1, 'float'), (2, 'quantized')])
def test_what_an_evaluator_raises_costs_no_prediction(quantize, predicted,
                                                      tmp_path, monkeypatch,
                                                      fuse, model):
    monkeypatch.setattr(Own, 'fuse', fuse)
    line = quantize(with_own, status=2)
    assert 'test_evaluator: LookupError: no figures today (' in line
    assert f'predictions/{model}.waiting.zip' in line
    failed = list(predicted)
    assert failed[-1] == model and len(failed) == fuse
    _, _, result = quantize(with_own)
    assert predicted == ['float', 'quantized']
    predicted.clear()
    _, _, expected = quantize(with_own, 'undisturbed')
    for kind in ('float', 'quantized'):
        for found in (result[kind], expected[kind]):
            for key in ('seconds', 'seconds_per_image', 'peak_memory'):
                found.pop(key, None)
        assert result[kind] == expected[kind]
    assert result['sites'] == expected['sites']
    kept = sorted(path.name for path in (tmp_path / 'work').glob('pred*/*'))
    assert kept == ['float.zip', 'quantized.zip']


def test_an_evaluator_that_was_mended_takes_the_predictions(
        quantize, predicted, monkeypatch):
    monkeypatch.setattr(Own, 'fuse', 1)
    quantize(with_own, status=2)
    quantize(lambda cfg: None)
    assert predicted == ['float', 'quantized']


@pytest.mark.slow
def test_other_data_are_predicted_anew(quantize, predicted, monkeypatch):
    monkeypatch.setattr(Own, 'fuse', 1)
    quantize(with_own, status=2)

    def change(cfg):
        cfg.test_dataloader.dataset.indices = 3

    quantize(change)
    assert predicted == ['float', 'float', 'quantized']


def test_float_figures_of_other_truth_are_not_taken_over(
        quantize, tiny, tmp_path):
    path = Path(truth(tiny, tmp_path / 'truth.json', lambda content: None))
    first = quantize(evaluate(ann_file=str(path)))[2]
    truth(tiny, path, small_only)
    second = quantize(evaluate(ann_file=str(path)))[2]
    assert first['float']['metrics'] != second['float']['metrics']


def test_a_config_is_as_it_was_after_the_trial(tiny, tmp_path, quantize):
    """And its metrics leave no files that they would not have left."""
    prefix = tmp_path / 'out/boxes'
    prefix.parent.mkdir()

    def change(cfg):
        cfg.test_evaluator.outfile_prefix = str(prefix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, 'run', _stop)
        assert 'stopped' in quantize(change, status=2)
    assert not list(prefix.parent.iterdir())
    cfg = Config.fromfile(tmp_path / 'work/changed.py')
    assert cfg.test_evaluator.outfile_prefix == str(prefix)


def _stop(self):
    from isvit_det.core.errors import QuantError
    raise QuantError('stopped')


def test_annotations_that_count_for_nothing_are_noted(quantize, tiny,
                                                      tmp_path):

    def stray(content):
        content['annotations'][-1]['image_id'] = 77

    path = truth(tiny, tmp_path / 'truth.json', stray)
    _, out, result = quantize(use(path), argv=['--no-float-eval'])
    note, = result['notes']
    assert 'count for nothing' in note and path in note
    assert f'note: {note}' in out and out.index(note) < out.index(
        'evaluating the')
    # The trial's figures are none.
    log = (tmp_path / 'work' / LOG).read_text()
    assert log.count('bbox_mAP_copypaste') == 1


@pytest.mark.parametrize('setting', [
    pytest.param(
        'test_evaluator.iou_thrs=[0.6]',
        marks=pytest.mark.skipif(
            mmdet.__version__ < '3.4', reason='it works there')),
    'test_evaluator.proposal_nums=[1]',
    'log_processor.window_size=a',
    'test_dataloader.dataset=None',
    'train_dataloader.dataset=None',
    'train_dataloader.dataset=[1]',
    pytest.param(
        'test_cfg.fp16=True',
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason='GPUs compute in float16')),
])
def test_a_setting_that_does_not_work_is_named(quantize, setting, capfd):
    line = quantize(
        lambda cfg: None, status=2, argv=['--cfg-options', setting])
    key, value = setting.split('=')
    assert line.startswith(f'error: {key}') and value in line
    assert 'Error:' not in line or '(' in line
    assert 'evaluating the' not in capfd.readouterr().out


def test_a_calibration_loader_without_a_data_set_is_told(quantize):

    def change(cfg):
        cfg.custom_hooks = [
            dict(
                type='isvit_det.SOSCalibrationHook',
                calib_dataloader=dict(batch_size=1))
        ]

    line = quantize(change, status=2)
    assert 'calib_dataloader' in line and 'has no data set' in line
