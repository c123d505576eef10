"""tools/quantize_cls.py on a small ViT and drawn pictures."""
import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import register_model

from isvit_det.classifiers import run as classifier_run
from isvit_det.classifiers.head import HeadUnit
from isvit_det.classifiers.images import (FolderSample, class_labels,
                                          find_images)
from isvit_det.commands.quantize_cls import main
from isvit_det.core.rotation import rotate_heads_
from isvit_det.datasets.drawn import generate
from isvit_det.engine import layer_statistics
from isvit_det.page import plots, write
from tests.engine.classifiers import swin_drawn_32, vit_small_drawn_32
from tests.engine.tiny import REPO, same_file_state

MODEL = 'vit_small_drawn_32'
CLASSES = 3


@register_model
def swin_drawn_patch1_window4_32(pretrained=False, **kwargs):
    """A Swin with two stages of two blocks."""
    return swin_drawn_32(pretrained, depths=(2, 2, 1, 1), **kwargs)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folders: weights w.pth; train and val flat; classes with labels."""
    folder = tmp_path_factory.mktemp('classifier') / 'data'
    generate(folder, dict(train=10, val=6))
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=CLASSES)
    for param in model.parameters():
        param.data += torch.randn_like(param) * .2
    torch.save(dict(model=model.state_dict()), folder / 'w.pth')
    for index, path in enumerate(sorted((folder / 'val').iterdir())):
        place = folder / f'classes/class{index % CLASSES}'
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


def run(data, work_dir, *args, status=0, weights='w.pth', model=MODEL):
    """The report of a run that ends with ``status``."""
    words = [model, '--weights', data / weights, '--work-dir', work_dir, *args]
    try:
        found = main([str(word) for word in words])
    except SystemExit as error:
        # Of the argument parser.
        found = error.code
    assert found == status
    report = work_dir / 'result.json'
    return json.loads(report.read_text()) if report.exists() else None


def short(data, *more):
    return ('--calib', data / 'train', '--calib-images', 6, '--iters', 2,
            '--bits', 'w6a6', *more)


def test_a_report_for_people(data, tmp_path, monkeypatch, capsys):
    """Which other runs in this process leave out."""
    monkeypatch.setattr(classifier_run, 'keep_statistics',
                        layer_statistics.keep_statistics)
    monkeypatch.setattr(classifier_run, 'write_page_or_warn',
                        write.write_page_or_warn)
    monkeypatch.setattr(plots, 'layer', lambda record: '(a plot)')
    for folder, weights, more in (('one', 'w.pth', short(data)),
                                  ('two', tmp_path / 'one/packed.pth', ())):
        work_dir = tmp_path / folder
        run(data, work_dir, '--val', data / 'val', *more, weights=weights)
        page, = work_dir.glob('report*.html')
        out = capsys.readouterr().out
        assert out.endswith(f'report: {page}\n')
        text = page.read_text()
        assert 'attn.attention_value' in text and 'Layers' in text
        assert 'cannot be read' not in text
        assert ('Calibration, unit by unit' in text) == (folder == 'one')


def test_a_flat_folder_gives_agreement_and_divergence(data, tmp_path, capsys):
    result = run(data, tmp_path, *short(data, '--val', data / 'val'))
    scores = result['scores']
    assert scores.keys() == {'images', 'agreement', 'kl'}
    assert scores['images'] == 6 and 0 <= scores['agreement'] <= 1
    assert scores['kl'] > 0
    assert result['provenance']['images_used'] == 6
    assert all(site['num_calls'] for site in result['sites'])
    out = capsys.readouterr().out
    assert '| quantized | w6a6 |' in out and 'packed checkpoint:' in out
    # More bits are nearer to the float model.
    finer = run(data, tmp_path / '8',
                *short(data, '--val', data / 'val', '--bits', 'w8a8'))
    coarse = run(data, tmp_path / '2',
                 *short(data, '--val', data / 'val', '--bits', 'w2a2'))
    assert finer['scores']['kl'] < coarse['scores']['kl']


def test_scores_are_those_counted_by_hand():
    expected = torch.tensor([[3., 2., 1., 0., 0., 0., -1.]] * 4)
    found = torch.tensor([
        [9., 8., 7., 6., 5., 4., 3.],
        [8., 9., 7., 6., 5., 4., 3.],
        [3., 4., 5., 6., 7., 8., 9.],
        [9., 3., 4., 5., 6., 7., 8.],
    ])
    scores = classifier_run.Scores()
    # First, second and last in low bits; then last but one, second in float.
    scores.add(expected[:3], found[:3], torch.tensor([0, 0, 0]))
    scores.add(expected[3:], found[3:], torch.tensor([1]))
    means = scores.means(True)
    p = expected.double().softmax(1)
    kl = (p * (p.log() - found.double().log_softmax(1))).sum(1).mean().item()
    assert means['kl'] == pytest.approx(kl)
    assert means['agreement'] == 2 / 4
    assert (means['float_top1'], means['float_top5']) == (3 / 4, 1.)
    assert (means['quantized_top1'], means['quantized_top5']) == (1 / 4, 2 / 4)


def test_a_swin_goes_the_same_way(data, tmp_path):
    name = 'swin_drawn_patch1_window4_32'
    model = timm.create_model(name, num_classes=CLASSES)
    for param in model.parameters():
        param.data += torch.randn_like(param) * .1
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    result = run(
        tmp_path,
        tmp_path,
        *short(data, '--val', data / 'classes', '--layer-bits', 'head=w8a7'),
        model=name)
    assert result['scores']['kl'] > 0
    assert result['bits'] == 'w6a6 mixed'
    bits = {
        site['bits']
        for site in result['sites'] if site['name'].startswith('head.')
    }
    assert bits == {8, 7}
    names = [unit['name'] for unit in result['units']]
    assert names[0] == 'patch_embed' and names[-1] == 'head'
    assert len(names) == 1 + 6 + 3 + 1
    run(tmp_path,
        tmp_path,
        '--val',
        data / 'classes',
        weights='packed.pth',
        model=name)
    again = json.loads((tmp_path / 'result_packed.json').read_text())
    assert (again['scores']['quantized_top1'] == result['scores']
            ['quantized_top1'])


def test_class_folders_give_accuracy_too(data, tmp_path):
    result = run(data, tmp_path, *short(data, '--val', data / 'classes'))
    scores = result['scores']
    assert {'float_top1', 'float_top5', 'quantized_top1',
            'agreement'} <= scores.keys()
    assert scores['float_top5'] == 1
    # The labels of a float run, counted apart.
    source = timm.create_model(MODEL, num_classes=CLASSES).eval()
    source.load_state_dict(torch.load(data / 'w.pth')['model'])
    from timm.data import ImageDataset, create_transform
    dataset = ImageDataset(
        str(data / 'classes'),
        transform=create_transform((3, 32, 32),
                                   mean=(.5, ) * 3,
                                   std=(.5, ) * 3,
                                   interpolation='bicubic',
                                   crop_pct=.9))
    with torch.no_grad():
        hits = [
            source(x[None]).argmax().item() == label for x, label in dataset
        ]
    assert scores['float_top1'] == pytest.approx(sum(hits) / len(hits))


def test_without_val_the_images_not_drawn_are_evaluated(data, tmp_path):
    result = run(data, tmp_path, *short(data))
    assert result['scores']['images'] == 4


def test_a_packed_file_gives_the_same_and_keeps_the_report(data, tmp_path):
    val = ('--val', data / 'classes')
    first = run(data, tmp_path, *short(data, *val))
    report = (tmp_path / 'result.json').read_text()
    assert main([
        MODEL, '--weights',
        str(tmp_path / 'packed.pth'), '--work-dir',
        str(tmp_path), *map(str, val)
    ]) == 0
    again = json.loads((tmp_path / 'result_packed.json').read_text())
    for key in ('quantized_top1', 'quantized_top5'):
        assert again['scores'][key] == first['scores'][key]
    assert 'agreement' not in again['scores'] and again['units'] is None
    assert (tmp_path / 'result.json').read_text() == report


def test_an_interrupted_run_goes_on_and_ends_the_same(data, tmp_path,
                                                      monkeypatch):
    run(data, tmp_path / 'whole', *short(data))
    assert not (tmp_path / 'whole/calibration').exists()

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HeadUnit, 'pairs', interrupt)
        run(data, tmp_path / 'parts', *short(data), status=130)
    result = run(data, tmp_path / 'parts', *short(data))
    assert [unit['resumed']
            for unit in result['units']] == [True, True, True, False]
    assert same_file_state(tmp_path / 'whole/packed.pth',
                           tmp_path / 'parts/packed.pth')


def test_a_packed_file_takes_its_own_settings_and_no_others(
        data, tmp_path, capsys):
    run(data, tmp_path, *short(data, '--method', 'repq'))
    packed = ('--weights', str(tmp_path / 'packed.pth'), '--val',
              str(data / 'val'), '--work-dir', str(tmp_path))
    assert main([MODEL, *packed, '--bits', 'w6a6']) == 0
    assert main([MODEL, *packed, '--method', 'repq']) == 0
    for wrong in (('--bits', 'w4a4'), ('--method', 'isvit')):
        assert main([MODEL, *packed, *wrong]) == 2
        assert 'packed file: made with' in capsys.readouterr().err


def test_images_that_were_not_drawn_come_in_random_order(data, tmp_path):
    """Folders are sorted by class: the first would be of one class."""
    sample = FolderSample(data / 'classes', None, 1, seed=3)
    assert len(sample.rest) == 5 and sample.rest != sorted(sample.rest)
    # Other numbers of calibration images are compared on the same ones.
    more = FolderSample(data / 'classes', None, 3, seed=3)
    assert len(more.rest) == 3 and sample.rest[:3] == more.rest


def test_a_file_that_was_drawn_is_not_evaluated_under_another_name(
        data, tmp_path):
    shutil.copytree(data / 'train', tmp_path / 'train')
    for path in sorted((tmp_path / 'train').iterdir()):
        shutil.copy(path, path.with_name(f'copy_{path.name}'))
    result = run(data, tmp_path, '--calib', tmp_path / 'train',
                 '--calib-images', 6, '--iters', 1)
    drawn = set(result['provenance']['image_files'])
    copies = sum(f'copy_{name}' in drawn for name in drawn)
    assert result['scores']['images'] == 14 - (6 - 2 * copies)


def test_classes_named_by_numbers_and_linked_folders(data, tmp_path):
    for number in (10, 9, 1):
        (tmp_path / 'classes').mkdir(exist_ok=True)
        (tmp_path / f'classes/{number}').symlink_to(data / 'classes/class0')
    paths = find_images(tmp_path / 'classes', '--val')
    classes, labels = class_labels(tmp_path / 'classes', paths)
    assert classes == ['1', '9', '10'] and len(labels) == 6
    assert all(classes[label] == path.parent.name
               for path, label in zip(paths, labels))


def test_any_setting_may_be_given(data, tmp_path):
    options = [
        'quant.exponent=integer', 'sos.mirror_images=False', 'sos.iters=9'
    ]
    result = run(data, tmp_path, *short(data, '--cfg-options', *options))
    sos = result['provenance']['sos']
    assert not sos['mirror_images']
    # What has an option of its own is taken from there.
    assert sos['iters'] == 2
    packed = torch.load(tmp_path / 'packed.pth', weights_only=True)
    assert packed['quant']['exponent'] == 'integer'


@pytest.mark.parametrize('method, options, rotated', [
    ('isvit', (), True),
    ('isvit', ('--cfg-options', 'sos.rotate_heads=False'), False),
    ('isvit_paper', (), False),
])
def test_isvit_rotates_heads(data, tmp_path, monkeypatch, method, options,
                             rotated):
    seen = []

    def rotate_(heads):
        seen.append(heads)
        rotate_heads_(heads)

    monkeypatch.setattr('isvit_det.calibration.stages.rotate_heads_', rotate_)
    result = run(data, tmp_path, *short(data, '--method', method, *options))
    assert result['provenance']['sos']['rotate_heads'] == rotated
    # One for each of the blocks.
    assert len(seen) == 2 * rotated


@pytest.mark.parametrize('method, options, mirrored', [
    ('isvit', (), True),
    ('isvit', ('--cfg-options', 'sos.mirror_images=False'), False),
    ('isvit_paper', (), False),
])
def test_isvit_calibrates_on_mirror_images_too(data, tmp_path, monkeypatch,
                                               method, options, mirrored):
    seen = []

    def calibrate(student, images, quant, sos, *args, **kwargs):
        images = list(images)
        seen.append((images, sos.num_views))
        return original(student, images, quant, sos, *args, **kwargs)

    original = classifier_run.calibrate
    monkeypatch.setattr(classifier_run, 'calibrate', calibrate)
    result = run(data, tmp_path, *short(data, '--method', method, *options))
    assert result['provenance']['sos']['mirror_images'] == mirrored
    (images, views), = seen
    assert views == 1 + mirrored and len(images) == 6 * views
    for image, other in zip(images, images[6:]):
        assert torch.equal(image.flip(-1), other)


def test_whole_images_may_be_drawn(data, tmp_path):
    result = run(data, tmp_path, *short(data, '--items', 'image', '--batch',
                                        3))
    assert result['provenance']['sos']['batch'] == 3


def test_fewer_images_than_asked_for_are_all_used(data, tmp_path, caplog):
    result = run(data, tmp_path, '--calib', data / 'train', '--iters', 1)
    assert result['provenance']['images_used'] == 10
    assert result['provenance']['images_asked'] == 1024
    assert result['scores'] == dict(images=0)


@pytest.mark.parametrize('change, words', [
    (dict(model='resnet50'), ['resnet50', 'vit_', 'swin_']),
    (dict(model='vit_nothing'), ['vit_nothing', 'list_models']),
    (dict(model='swin_s3_tiny_224'), ['do not fit']),
    (dict(model='vit_relpos_small_patch16_224'), ['do not fit']),
    (dict(weights='none.pth'), ['no file', 'none.pth']),
    (dict(args=['--calib', 'nowhere']), ['--calib: nowhere is not there']),
    (dict(args=[]), ['--calib: give a folder']),
    (dict(bits='w9a4'), ["'w9a4'", '2..8']),
    (dict(device='cuda:77'), ['cuda:77', 'not available']),
    (dict(device='meta'), ['meta', 'not available']),
    (dict(eval_batch=0), ['--eval-batch: 0', 'between 1 and']),
    (dict(eval_batch=10**20), ['--eval-batch: 1000', 'between 1 and']),
    (dict(workers=-1), ['--workers: -1', 'between 0 and']),
    (dict(workers=10**5), ['--workers: 100000', 'between 0 and']),
    (dict(store_gb=-1), ['store_gb: -1', '0 or more']),
    (dict(store_gb='inf'), ['store_gb: inf', 'finite']),
    (dict(cfg_options='quant=w3a3'), ['quant=w3a3', 'quant.bits']),
    (dict(val='train'), ['is the evaluation image']),
    (dict(cfg_options='lr'), ['--cfg-options', 'KEY=VALUE']),
    (dict(cfg_options='lr=1'), ["'lr'", 'quant.KEY or sos.KEY']),
    (dict(cfg_options='sos.rate=1'), ["['rate']", 'lr']),
    (dict(cfg_options='quant.exponent=half'), ['half', 'table']),
    (dict(layer_bits='backbone.blocks.9=w8'), ["'backbone.blocks.9'"]),
])
def test_bad_input_is_one_line(data, tmp_path, capsys, change, words):
    args = change.get('args', ['--calib', data / 'train'])
    for key in ('bits', 'device', 'eval_batch', 'workers', 'store_gb',
                'cfg_options', 'layer_bits'):
        if key in change:
            args += [f'--{key.replace("_", "-")}', change[key]]
    if 'val' in change:
        args += ['--val', data / change['val']]
    run(data,
        tmp_path,
        *args,
        status=2,
        weights=change.get('weights', 'w.pth'),
        model=change.get('model', MODEL))
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith('error: ')
    assert all(word in lines[-1] for word in words), lines[-1]


def test_damaged_images_and_weights_are_named(data, tmp_path, capsys):
    shutil.copytree(data / 'train', tmp_path / 'train')
    victim = sorted((tmp_path / 'train').iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:100])
    run(data, tmp_path, '--calib', tmp_path / 'train', status=2)
    assert victim.name in capsys.readouterr().err.splitlines()[-1]
    state = torch.load(data / 'w.pth')['model']
    del state['norm.weight']
    torch.save(state, tmp_path / 'w.pth')
    run(tmp_path, tmp_path, '--calib', data / 'train', status=2)
    assert 'norm.weight' in capsys.readouterr().err.splitlines()[-1]


def test_parts_that_are_not_supported_are_refused(data, tmp_path, capsys):
    source = timm.create_model(MODEL, num_classes=CLASSES, qk_norm=True)
    torch.save(source.state_dict(), tmp_path / 'w.pth')

    @register_model
    def vit_drawn_with_more(pretrained=False, **kwargs):
        return vit_small_drawn_32(pretrained, qk_norm=True, **kwargs)

    run(tmp_path,
        tmp_path,
        '--calib',
        data / 'train',
        status=2,
        model='vit_drawn_with_more')
    assert 'parts beyond a plain ViT' in capsys.readouterr().err


def test_the_command_shows_its_help():
    tool = REPO / 'tools/quantize_cls.py'
    done = subprocess.run([sys.executable, str(tool), '--help'],
                          capture_output=True,
                          text=True,
                          check=True)
    assert '--calib DIR' in done.stdout
