"""tools/quantize_det.py: a whole run, what it leaves, and who can read it."""
import contextlib
import importlib.util
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import mmdet
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.fileio import load
from mmengine.runner import Runner

from isvit_det.commands import quantize_det
from isvit_det.commands.quantize_det import LOG, configure, main, parse_args
from isvit_det.core.layers import list_sites
from isvit_det.core.quantizers import Quantizer
from isvit_det.core.settings import QuantConfig
from isvit_det.datasets import drawn
from isvit_det.datasets.drawing import CLASSES
from isvit_det.inputs.configs import (configure_hook_, load_config,
                                      quantize_config_)
from isvit_det.page.breakdown import break_down
from isvit_det.page.work_dir import read_run
from isvit_det.runtime.engine import engine_line
from isvit_det.version import __version__
from tests.engine.tiny import NUM_PICTURES, REPO, same_file_state
from tests.marks import slow

TOOL = REPO / 'tools/quantize_det.py'
TEST_TOOL = Path(mmdet.__path__[0]) / '.mim/tools/test.py'
SHORT = ['--iters', '3', '--calib-images', '5']


@pytest.fixture(scope='module', params=['backbone', 'detector'])
def scope(request):
    return request.param


@pytest.fixture(scope='module')
def done(tiny, scope, tmp_path_factory):
    """Work directory of a whole run, with its standard output in a file."""
    work_dir = tmp_path_factory.mktemp(scope)
    argv = [
        tiny.config, tiny.checkpoint, '--scope', scope, '--bits', 'w4a5',
        '--work-dir',
        str(work_dir), *SHORT
    ]
    if scope == 'detector':
        out, errors = run_elsewhere(argv, tmp_path_factory.mktemp('elsewhere'))
        (work_dir / 'stderr').write_text(errors)
    else:
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            assert main(argv) == 0
        out = stream.getvalue()
    (work_dir / 'stdout').write_text(out)
    return work_dir


def run_elsewhere(argv, folder):
    """Run the tool from another directory, without the package installed."""
    environment = {
        key: value
        for key, value in os.environ.items() if key != 'PYTHONPATH'
    }
    process = subprocess.run([sys.executable, TOOL, *argv],
                             cwd=folder,
                             env=environment,
                             capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout, process.stderr


def report(work_dir):
    return json.loads((work_dir / 'result.json').read_text())


def read_log(work_dir):
    log, = work_dir.glob('*/*.log')
    return log.read_text()


def quantized_config(work_dir):
    """The config that MMEngine kept of the run, for MMDetection's tools."""
    return str(work_dir / 'tiny.py')


def test_one_table_holds_both_models(done, scope):
    out = (done / 'stdout').read_text()
    lines = [line for line in out.splitlines() if line.startswith('|')]
    rows = [[cell.strip() for cell in line[1:-1].split('|')] for line in lines]
    assert [row[0] for row in rows
            if '-' not in row[0]] == ['model', 'float', 'quantized']
    first, second = (dict(zip(rows[0], row)) for row in rows[2:])
    result = report(done)
    for row, found in ((first, result['float']), (second,
                                                  result['quantized'])):
        assert row['box AP'] == f'{100 * found["box_ap"]:.1f}'
        assert row['mask AP'] == f'{100 * found["mask_ap"]:.1f}'
    assert first['bits'] == '32' and second['bits'] == 'w4a5'
    assert second['scope'] == scope and second['method'] == 'isvit'
    assert float(second['MB']) < float(first['MB'])
    assert float(second['backbone error']) > 0
    assert first['calibration s'] == first['backbone error'] == '-'


def test_phases_are_shown_and_the_rest_is_logged(done, scope):
    out = (done / 'stdout').read_text()
    log = (done / LOG).read_text()
    phases = [
        f'log: {done / LOG}', 'evaluating the float model on 4 images',
        'float model: box AP', 'calibrating w4a5', 'unit 1/8', 'left\n',
        'unit 8/8', 'packed checkpoint: ',
        'evaluating the quantized model on 4', '| model', 'figures: '
    ]
    places = [out.index(words) for words in phases]
    assert places == sorted(places)
    assert len(out.splitlines()) < 50 and '\r' not in out and '\x1b' not in out
    for hidden in ('System environment', 'Epoch(test)', 'pipeline=[',
                   'loading annotations', 'mmengine'):
        assert hidden in log and hidden not in out
    for line in out.splitlines():
        assert line in log
    if scope == 'detector':
        # What packages say when they are imported, in a process of its own.
        assert (done / 'stderr').read_text() == ''
        spec = importlib.util.find_spec(
            'mmdet.evaluation.metrics.faster_coco_metric')
        assert (spec is not None) == ('faster_coco_eval' in log)


def test_the_report_for_people_comes_last(done, scope):
    """In a process of its own; runs in this one leave it out."""
    out = (done / 'stdout').read_text()
    if scope == 'backbone':
        assert 'report: ' not in out and not [*done.glob('*.html')]
        return
    assert out.endswith(f'figures: {done}/result.json\n'
                        f'report: {done}/report.html\n')
    text = (done / 'report.html').read_text()
    result = report(done)
    run = read_run(done / 'result.json')
    assert run.missing == []
    for one, found in zip(run.evaluated,
                          (result['float'], result['quantized'])):
        for kind, name in (('bbox', 'box_ap'), ('segm', 'mask_ap')):
            # MMDetection rounds to three digits.
            ap = break_down(run.truth, one.predictions, kind).ap
            assert round(ap, 3) == pytest.approx(found[name], abs=1e-9)
            assert f'>{100 * ap:.1f}</span>' in text
    # Every quantizer was measured, and every layer has an error.
    sites = [s for s in result['sites'] if s['role'] == 'act']
    assert sum(len(one.sites) for one in run.layers.layers) == len(sites)
    assert all(0 < one.error < 1 for one in run.layers.layers
               if one.is_quantized)
    assert {'backbone', 'neck', 'rpn_head', 'roi_head',
            'all'} <= run.layers.seconds.keys()
    assert ' quantize_det ' in text and 'layers.npz' not in text


def test_the_engine_is_named(done):
    found = report(done)['engine']
    assert found['native_layers'] + len(found['simulated']) > 0
    line = engine_line(found)
    assert line in (done / 'stdout').read_text() and line in read_log(done)


def test_every_unit_is_logged(done):
    out = read_log(done)
    for index, unit in enumerate(report(done)['units']):
        assert f'unit {index + 1}/8 {unit["name"]}: error' in out


def test_result_holds_the_facts(done, scope, tiny):
    result = report(done)
    assert (result['bits'], result['scope']) == ('w4a5', scope)
    assert (result['method'], result['iters']) == ('isvit', 3)
    # As much more than in 1000 iterations as allowed.
    assert result['lr'] == 3.2e-4
    assert 0 < result['float']['box_ap'] < 1
    assert 0 < result['quantized']['mask_ap'] < 1
    assert set(result['seconds']) == {
        'float_evaluation', 'calibration', 'quantized_evaluation',
        'backbone_error', 'total'
    }
    assert result['peak_memory']['host'] > 1e8
    assert result['bytes']['packed'] == (done / 'packed.pth').stat().st_size
    assert 0 < result['backbone_error'] < 1
    units = result['units']
    assert len(units) == 8 and units[0]['name'] == 'patch_embed'
    for unit in units:
        assert set(unit['errors']) == {
            'before_stage_1', 'after_stage_1', 'after_stage_2',
            'before_stage_3', 'after_stage_3'
        }


def test_every_site_ran_quantized_in_the_evaluation(done, scope):
    result = report(done)
    sites = {site['name']: site for site in result['sites']}
    heads = [name for name in sites if not name.startswith('backbone.')]
    assert bool(heads) == (scope == 'detector')
    assert all(site['num_calls'] >= NUM_PICTURES['val']
               for site in sites.values())
    site = sites['backbone.stages.0.blocks.0.attn.w_msa.qkv.weight_quantizer']
    assert site == dict(
        site,
        bits=4,
        role='weight',
        granularity='channel',
        kind='UniformQuantizer',
        num_calls=4)
    bits = {site['bits'] for site in result['sites'] if site['role'] == 'act'}
    assert bits == {5, 8}
    kept = [module['name'] for module in result['float_modules']]
    assert 'roi_head.mask_head.upsample' in kept
    assert ('rpn_head.rpn_conv' in kept) == (scope == 'backbone')


def test_provenance_names_what_was_used_and_no_path(done, tiny):
    origin = torch.load(done / 'packed.pth', weights_only=True)['provenance']
    assert origin == report(done)['provenance']
    assert origin['versions']['isvit_det'] == __version__
    assert set(origin['versions']) > {'torch', 'mmdet', 'mmcv', 'mmengine'}
    assert origin['images_asked'] == origin['images_used'] == 5
    assert [f'{i:06d}.png'
            for i in origin['image_ids']] == origin['image_files']
    assert origin['float_checkpoint'] == 'float.pth'
    assert len(origin['float_checkpoint_sha256']) == 64
    assert str(tiny.data.parent) not in json.dumps(origin)


def test_nothing_but_the_results_is_left(done):
    assert not (done / 'calibration').exists()
    assert not list(done.glob('.*'))


def test_a_packed_file_gives_the_same_ap_on_the_float_config(
        done, tiny, tmp_path):
    """Bits and scope come from the file."""
    assert main(
        [tiny.config,
         str(done / 'packed.pth'), '--work-dir',
         str(tmp_path)]) == 0
    before = report(done)
    result = json.loads((tmp_path / 'result_packed.json').read_text())
    assert result['quantized']['metrics'] == before['quantized']['metrics']
    assert result['provenance'] == before['provenance']
    assert (result['bits'], result['scope']) == ('w4a5', before['scope'])
    assert result['float'] is result['units'] is None
    assert not (tmp_path / 'packed.pth').exists()


def test_testing_a_packed_file_keeps_the_report_beside_it(
        done, tiny, tmp_path):
    folder = tmp_path / 'copy'
    shutil.copytree(done, folder)
    unfinished = folder / 'calibration/units/0001.pth'
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text('')
    argv = [tiny.config, str(folder / 'packed.pth'), '--work-dir', str(folder)]
    assert main(argv) == 0
    assert report(folder) == report(done)
    again = json.loads((folder / 'result_packed.json').read_text())
    assert again['quantized'] == report(done)['quantized']
    assert unfinished.exists()


@pytest.fixture(scope='module')
def tested(done, tiny, tmp_path_factory):
    """Predictions of mmdet's own tools/test.py, and its metrics."""
    folder = tmp_path_factory.mktemp('tested')
    out = folder / 'predictions.pkl'
    argv = [
        str(TEST_TOOL),
        quantized_config(done),
        str(done / 'packed.pth'), '--work-dir',
        str(folder), '--out',
        str(out)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', argv)
        runpy.run_path(str(TEST_TOOL), run_name='__main__')
    metrics, = (
        json.loads(path.read_text()) for path in folder.glob('*/2*.json'))
    return load(str(out)), metrics


def test_mmdets_test_tool_gives_the_same_ap(done, tested):
    metrics = report(done)['quantized']['metrics']
    assert metrics and {key: tested[1][key] for key in metrics} == metrics


def test_inference_without_hooks_predicts_the_same(done, tiny, tested):
    config = quantized_config(done)
    packed = str(done / 'packed.pth')
    model = init_detector(config, packed, device='cpu')
    inferencer = DetInferencer(
        config, packed, device='cpu', show_progress=False)
    for expected in tested[0]:
        found = inference_detector(model, expected['img_path']).pred_instances
        instances = expected['pred_instances']
        assert len(found) > 0
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(found[key], instances[key])
        shown = inferencer(expected['img_path'], no_save_pred=True)
        shown = shown['predictions'][0]
        assert shown['scores'] == instances['scores'].tolist()
        assert shown['bboxes'] == instances['bboxes'].tolist()
    assert all(site.num_calls >= len(tested[0]) for site in list_sites(model))


def test_detections_can_be_drawn(done, tiny, tmp_path):
    inferencer = DetInferencer(
        quantized_config(done),
        str(done / 'packed.pth'),
        device='cpu',
        show_progress=False)
    assert tuple(inferencer.model.dataset_meta['classes']) == CLASSES
    picture = next((tiny.data / 'val').iterdir())
    inferencer(str(picture), out_dir=str(tmp_path), pred_score_thr=0.)
    drawn = cv2.imread(str(tmp_path / 'vis' / picture.name))
    assert (drawn != cv2.imread(str(picture))).any()


def test_the_hook_calibrates_under_mmdets_test_tool(done, tiny, tmp_path):
    """The config alone is enough; the codes are those of our tool."""
    cfg = load_config(tiny.config, None)
    quantize_config_(cfg, dict(bits='w4a5', scope=report(done)['scope']))
    configure_hook_(cfg, dict(iters=3, num_images=5))
    cfg.work_dir, cfg.load_from = str(tmp_path), tiny.checkpoint
    metrics = Runner.from_cfg(cfg).test()
    assert metrics == report(done)['quantized']['metrics']
    assert same_file_state(tmp_path / 'packed.pth', done / 'packed.pth')


@pytest.mark.slow
def test_same_seed_same_codes_other_seed_other_codes(tiny, tmp_path):

    def codes(folder, *more):
        assert main([
            tiny.config, tiny.checkpoint, '--work-dir',
            str(tmp_path / folder), '--no-float-eval', *SHORT, *more
        ]) == 0
        return tmp_path / folder / 'packed.pth'

    first, again = codes('first'), codes('again', '--store-gb', '0')
    assert same_file_state(first, again)
    assert not same_file_state(first, codes('other', '--seed', '1'))


def test_data_that_are_drawn_by_the_run_are_evaluated(tiny, tmp_path,
                                                      monkeypatch):
    """As in a fresh clone, where metrics have no file to count against."""
    monkeypatch.setattr(drawn, 'NUM_PICTURES', NUM_PICTURES)
    root = tmp_path / 'data'

    def change(cfg):
        for split in ('train', 'val', 'test'):
            cfg[f'{split}_dataloader'].dataset.data_root = f'{root}/'
        for split in ('val', 'test'):
            cfg[f'{split}_evaluator'].ann_file = str(
                root / 'annotations/instances_val.json')

    config = tiny.variant(tmp_path / 'tiny.py', change)
    assert not root.exists()
    assert main([
        config, tiny.checkpoint, '--method', 'minmax', '--calib-images', '2',
        '--work-dir',
        str(tmp_path / 'run')
    ]) == 0
    assert 'coco/bbox_mAP' in report(tmp_path / 'run')['float']['metrics']
    assert (root / 'annotations/instances_val.json').is_file()


def test_without_float_evaluation_its_row_is_empty(tiny, tmp_path, capsys):
    assert main([
        tiny.config, tiny.checkpoint, '--work-dir',
        str(tmp_path), '--no-float-eval', '--method', 'minmax',
        '--calib-images', '99'
    ]) == 0
    out = capsys.readouterr().out
    row, = (line for line in out.splitlines() if line.startswith('| float'))
    assert row.split('|')[2:4] == ['      - ', '       - ']
    result = report(tmp_path)
    assert result['float'] is None
    assert (result['method'], result['iters']) == ('minmax', 0)
    origin = result['provenance']
    assert (origin['images_asked'], origin['images_used']) == (99, 6)
    assert (tmp_path / 'packed.pth').exists()
    assert '99 calibration images asked for, there are 6' in read_log(tmp_path)


def test_a_site_that_does_not_run_quantized_stops_the_report(
        tiny, tmp_path, monkeypatch, capsys):
    """Such as a path that evaluates the float model."""
    forward = Quantizer.forward

    def skip_after_calibration(self, x):
        if (tmp_path / 'packed.pth').exists():
            return x
        return forward(self, x)

    monkeypatch.setattr(Quantizer, 'forward', skip_after_calibration)
    assert main([
        tiny.config, tiny.checkpoint, '--work-dir',
        str(tmp_path), '--no-float-eval', '--method', 'minmax', '--engine',
        'simulation'
    ]) == 2
    captured = capsys.readouterr()
    assert 'error: these did not run quantized' in captured.err
    assert 'backbone.patch_embed.projection.weight_quantizer' in captured.err
    assert not (tmp_path / 'result.json').exists()
    assert '| quantized' not in captured.out
    assert 'Epoch(test)' not in read_log(tmp_path)


@pytest.mark.parametrize('scope', [slow('backbone'), 'detector'])
@pytest.mark.parametrize('method', ['repq', 'isvit_paper'])
def test_other_methods_go_the_same_way(tiny, tmp_path, method, scope):
    assert main([
        tiny.config, tiny.checkpoint, '--method', method, '--scope', scope,
        '--no-float-eval', '--calib-images', '2', '--work-dir',
        str(tmp_path), *([] if method == 'repq' else ['--iters', '2'])
    ]) == 0
    result = report(tmp_path)
    assert (result['method'], result['scope']) == (method, scope)
    kinds = {site['kind'] for site in result['sites']}
    assert kinds == {
        'UniformQuantizer',
        'Log2Quantizer' if method == 'repq' else 'ShiftUniformLog2Quantizer'
    }


def test_a_float_config_takes_any_setting_from_the_command(tiny):
    """Those that have an option of their own are the option's."""
    cfg = configure(
        parse_args([
            tiny.config, tiny.checkpoint, '--iters', '7', '--cfg-options',
            'quant.exponent=integer', 'quant.percentiles=.9,.99',
            'sos.rotate_heads=True', 'sos.iters=3'
        ]))
    quant = QuantConfig.from_dict(cfg.model.quant)
    assert (quant.exponent, quant.percentiles) == ('integer', (.9, .99))
    hook, = cfg.custom_hooks
    assert dict(hook.sos) == dict(rotate_heads=True, iters=7)


def test_settings_given_are_part_of_the_default_work_directory(tiny):
    cfg = configure(
        parse_args(
            [tiny.config, tiny.checkpoint, '--bits', 'w3a5', '--seed', '7']))
    assert cfg.work_dir == 'work_dirs/tiny_w3a5'


def test_a_run_of_a_dumped_config_in_other_bits_has_its_own_folder(
        tiny, tmp_path):
    """Where that config names the folder of the first run."""
    words = [str(tiny.config), str(tiny.checkpoint)]
    cfg = configure(parse_args([*words, '--bits', 'w3a5']))
    cfg.dump(tmp_path / 'dumped.py')
    words[0] = str(tmp_path / 'dumped.py')
    again = configure(parse_args(words))
    assert again.work_dir == cfg.work_dir
    other = configure(parse_args([*words, '--bits', 'w4a4']))
    assert other.work_dir == f'{cfg.work_dir}_w4a4'


def test_without_operators_for_the_gpu_the_cpu_is_used(monkeypatch):
    monkeypatch.setattr(quantize_det, 'get_device', lambda: 'cuda')
    for version, device in (('not available', 'cpu'), ('13.0', None)):
        monkeypatch.setattr(quantize_det, 'get_compiling_cuda_version',
                            lambda: version)
        assert quantize_det.choose_device(None, 'none') == device
