"""What quantize_cls takes: weights of trainings, class folders, names."""
import argparse
import json
import shutil
import socket
import urllib.request

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import VisionTransformer, register_model

from isvit_det.classifiers.models import build_classifiers
from isvit_det.classifiers.run import ClassifierRun
from isvit_det.commands.quantize_cls import main
from isvit_det.core.errors import QuantError
from isvit_det.core.settings import QuantConfig
from isvit_det.datasets.drawn import generate
from tests.engine.classifiers import (CLASSES, NAMES, SIZES, make_weights,
                                      vit_small_drawn_32)

NAME = 'vit_small_drawn_32'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures') / 'data'
    generate(folder, dict(train=4, val=6))
    return folder


@pytest.fixture
def classes(pictures, tmp_path):
    """A folder for each class, a, b and c, two images in each."""
    for index, path in enumerate(sorted((pictures / 'val').iterdir())):
        place = tmp_path / 'classes' / 'abc'[index % CLASSES]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return tmp_path / 'classes'


@pytest.fixture
def run(pictures, tmp_path, capsys):
    """Quantizes with some weights; status, report, output and errors."""
    make_weights(NAME, tmp_path / 'w.pth')

    def quantize(weights='w.pth', val=None, model=NAME):
        work = tmp_path / 'work'
        shutil.rmtree(work, ignore_errors=True)
        argv = [
            model, '--weights', tmp_path / weights, '--calib',
            pictures / 'train', '--calib-images', 2, '--method', 'minmax',
            '--bits', 'w8a8', '--work-dir', work
        ]
        argv += ['--val', val or pictures / 'val']
        status = main(list(map(str, argv)))
        said = capsys.readouterr()
        report = work / 'result.json'
        found = json.loads(report.read_text()) if report.exists() else None
        return status, found, said.out, said.err

    return quantize


def error_of(answer):
    status, found, _, err = answer
    line = err.strip().splitlines()[-1]
    assert status == 2 and found is None and line.startswith('error: ')
    assert '\x1b' not in line and 'Traceback' not in err
    return line


@pytest.mark.parametrize('form, words', [
    ('timm', "entry 'state_dict_ema', not 'state_dict'"),
    ('deit', "entry 'model', not 'model_ema'"),
    ('ema', "entry 'state_dict_ema'"),
    ('module', "all of it, without the prefix 'module.'"),
    ('compiled', "entry 'model', without the prefix 'module._orig_mod.'"),
    ('legacy', "entry 'model'"),
    ('safetensors', 'all of it'),
])
def test_checkpoints_of_trainings_are_taken(form, words, run, tmp_path):
    state = torch.load(tmp_path / 'w.pth')['model']
    other = {key: value + 1 for key, value in state.items()}
    more = dict(
        args=argparse.Namespace(lr=.1), metric=np.float64(81.2), epoch=3)
    prefixed = {f'module.{key}': value for key, value in state.items()}
    compiled = {
        f'module._orig_mod.{key}': value
        for key, value in state.items()
    }
    forms = dict(
        timm=dict(more, state_dict=other, state_dict_ema=state),
        deit=dict(more, model=state, model_ema=other),
        ema=dict(state_dict_ema=state),
        module=prefixed,
        compiled=dict(model=compiled),
        legacy=dict(more, model=state))
    name = 'x.pth'
    if form == 'safetensors':
        from safetensors.torch import save_file
        name = 'x.safetensors'
        save_file(state, tmp_path / name)
    else:
        torch.save(
            forms[form],
            tmp_path / name,
            _use_new_zipfile_serialization=form != 'legacy')
    status, found, out, _ = run(name)
    assert status == 0
    assert f'weights of {name}: {words}\n' in out
    assert found['weights'] == f'weights of {name}: {words}'
    # The same model as by the plain file.
    assert found['scores'] == run()[1]['scores']


def test_weights_of_others_are_told(run, tmp_path):
    state = torch.load(tmp_path / 'w.pth')['model']
    torch.save({
        f'backbone.{k}': v
        for k, v in state.items()
    }, tmp_path / 'x.pth')
    assert 'tools/quantize_det.py' in error_of(run('x.pth'))
    torch.save(make_weights(NAME, tmp_path / 'w.pth'), tmp_path / 'x.pth')
    assert 'VisionTransformer, which is no part' in error_of(run('x.pth'))
    del state['norm.weight']
    state['more'] = torch.ones(1)
    state['norm.bias'] = torch.ones(3)
    torch.save(state, tmp_path / 'x.pth')
    line = error_of(run('x.pth'))
    assert "1 missing: ['norm.weight']; 1 unknown: ['more']" in line
    assert 'norm.bias is (3,) instead of (16,)' in line


@pytest.mark.parametrize('name, parts, key', [
    (NAME, dict(patch_size=4), 'patch_embed.proj.weight'),
    (NAME, dict(patch_size=16, img_size=64), 'patch_embed.proj.weight'),
    (NAME, dict(img_size=64), 'pos_embed'),
    ('swin_drawn_32', dict(window_size=2), 'relative_position_bias_table'),
])
def test_weights_that_timm_would_resample_are_refused(name, parts, key):
    if name == NAME:
        source = VisionTransformer(**{**SIZES, **parts}, num_classes=CLASSES)
    else:
        source = timm.create_model(name, num_classes=CLASSES, **parts)
    state = source.state_dict()
    expected = timm.create_model(name, num_classes=CLASSES).state_dict()
    with pytest.raises(QuantError, match='do not fit') as error:
        build_classifiers(name, state, QuantConfig(), packed=False)
    full = next(one for one in state if one.endswith(key))
    assert (f'{full} is {tuple(state[full].shape)} instead of '
            f'{tuple(expected[full].shape)}') in str(error.value)


def test_a_linear_patch_embedding_and_names_of_the_papers_are_taken():
    expected = timm.create_model(NAME, num_classes=CLASSES).state_dict()
    state = dict(expected)
    key = 'patch_embed.proj.weight'
    state[key] = state[key].flatten(1)
    found, _ = build_classifiers(NAME, state, QuantConfig(), packed=False)
    assert torch.equal(found.state_dict()[key], expected[key])
    swin = timm.create_model('swin_drawn_32', num_classes=CLASSES).state_dict()
    state = {}
    for key, value in swin.items():
        parts = key.split('.')
        if 'downsample' in parts:
            parts[1] = str(int(parts[1]) - 1)
        state['.'.join(parts).replace('head.fc', 'head')] = value.half()
    found, _ = build_classifiers('swin_drawn_32', state, QuantConfig(), False)
    for key, value in found.state_dict().items():
        assert torch.equal(value, swin[key].half().float()), key


def test_weights_that_are_no_numbers_are_refused(run, tmp_path):
    state = torch.load(tmp_path / 'w.pth')['model']
    key = 'blocks.0.attn.qkv.weight'
    for value, words in ((state[key].to(torch.int8), 'is of torch.int8'),
                         (state[key] * float('nan'), 'NaN or infinite')):
        torch.save({**state, key: value}, tmp_path / 'x.pth')
        line = error_of(run('x.pth'))
        assert repr(key) in line and words in line


def wanted_top1(tmp_path, classes, labels):
    """Top-1 of the float model, classes numbered as given."""
    source = ClassifierRun(NAME, str(tmp_path / 'w.pth'), classes, None,
                           dict(bits='w8a8'), dict(num_images=1),
                           tmp_path / 'other')
    hits = []
    for path in sorted(classes.rglob('*.png')):
        if path.parent.name in labels:
            with Image.open(path) as image, torch.no_grad():
                x = source.transform(image.convert('RGB'))
                best = source.source(x[None]).argmax().item()
            hits.append(best == labels[path.parent.name])
    return sum(hits) / len(hits)


@pytest.mark.parametrize('hidden', ['.ipynb_checkpoints', '@eaDir', '.cache'])
def test_a_hidden_folder_does_not_shift_labels(hidden, run, classes, tmp_path):
    before = run(val=classes)[1]['scores']
    assert before['float_top1'] == wanted_top1(tmp_path, classes,
                                               dict(a=0, b=1, c=2))
    shutil.copytree(classes / 'a', classes / hidden)
    assert run(val=classes)[1]['scores'] == before
    # Three folders as before, of which one is no class.
    shutil.rmtree(classes / 'c')
    status, found, out, _ = run(val=classes)
    assert 'float_top1' not in found['scores'] and status == 0
    assert 'has 2 class folders, the model 3 classes: no top-1' in out


def test_an_empty_class_keeps_its_label_and_is_named(run, classes, tmp_path):
    for path in (classes / 'b').iterdir():
        path.unlink()
    status, found, out, _ = run(val=classes)
    assert status == 0 and found['scores']['images'] == 4
    assert found['scores']['float_top1'] == wanted_top1(
        tmp_path, classes, dict(a=0, c=2))
    assert '1 class folders have no image, and keep their labels: b' in out
    # A fourth folder is one too many, images or not.
    (classes / 'd').mkdir()
    status, found, out, _ = run(val=classes)
    assert 'float_top1' not in found['scores']
    assert 'has 4 class folders, 2 without an image, the model 3' in out


def test_stray_images_are_named_and_top1_stays(run, classes):
    before = run(val=classes)[1]['scores']
    for name in ('stray.png', 'other.PNG'):
        shutil.copy(next((classes / 'a').iterdir()), classes / name)
    status, found, out, err = run(val=classes)
    assert found['scores'] == before and status == 0
    words = ('2 images lie in no class folder and are not evaluated: '
             'other.PNG, stray.png')
    assert words in out and words in found['notes'][0]


def test_pictures_of_other_formats_are_named_and_top1_stays(run, classes):
    before = run(val=classes)[1]['scores']
    (classes / 'a/more.gif').touch()
    status, found, out, err = run(val=classes)
    assert found['scores'] == before and status == 0
    words = ('--val: 1 files are of formats that are not read as images, and '
             'left out: more.gif')
    assert words in out and words in found['notes']


def test_an_empty_image_is_found_before_the_calibration(
        run, classes, monkeypatch):
    monkeypatch.setattr('isvit_det.classifiers.run.calibrate', None)
    (classes / 'c/last.png').touch()
    status, _, _, err = run(val=classes)
    assert status == 2
    assert 'last.png cannot be read' in err.strip().splitlines()[-1]


def test_a_flat_folder_with_other_folders_is_flat(run, pictures, tmp_path):
    flat = tmp_path / 'flat'
    shutil.copytree(pictures / 'val', flat)
    (flat / 'notes').mkdir()
    status, found, out, _ = run(val=flat)
    assert found['scores']['images'] == 6 and not found['notes']


@pytest.fixture
def no_network(monkeypatch):
    """Fails a test that tries to reach the network, whatever comes of it."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError('there is no network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    yield
    assert not tried


def test_a_convolutional_stem_is_refused_without_a_download(
        run, tmp_path, no_network):
    name = 'vit_tiny_r_s16_p8_224'
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=CLASSES).state_dict()
    torch.save(state, tmp_path / 'x.pth')
    for weights in ('x.pth', 'w.pth'):
        line = error_of(run(weights, model=name))
        assert name in line and 'patches by one convolution' in line


HYBRIDS = [
    name for name in timm.list_models(['vit_*', 'deit*', 'swin_*'])
    if '_r' in name.split('patch')[0]
]


@pytest.mark.parametrize('name', HYBRIDS)
def test_no_hybrid_reaches_the_network(name, no_network):
    """Without weights in them; tensors without memory take no time."""
    weights = {'head.weight': torch.empty(2, 1)}
    with torch.device('meta'), pytest.raises(QuantError):
        build_classifiers(name, weights, QuantConfig(), packed=False)


@pytest.mark.parametrize('kind, parts, works', [
    ('plain', {}, True),
    ('dinov2', dict(init_values=1e-5), True),
    ('deit3', dict(init_values=1e-5, no_embed_class=True), True),
    ('mean of patches', dict(global_pool='avg', fc_norm=True), True),
    ('no bias', dict(qkv_bias=False), True),
    ('clip', dict(pre_norm=True), False),
    ('reg tokens', dict(reg_tokens=2, no_embed_class=True), False),
    ('query norm', dict(qk_norm=True), False),
    ('attention pool', dict(global_pool='map', class_token=False), False),
    ('other norm', dict(norm_layer='rmsnorm'), False),
])
def test_a_model_works_or_is_refused_in_one_line(kind, parts, works,
                                                 no_network):

    @register_model
    def vit_drawn_with_parts_32(pretrained=False, **kwargs):
        return vit_small_drawn_32(pretrained, **parts, **kwargs)

    name = 'vit_drawn_with_parts_32'
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=CLASSES).eval()
    for param in source.parameters():
        param.data += torch.randn_like(param) * .1
    state = source.state_dict()
    if works:
        found, quantized = build_classifiers(name, state, QuantConfig(), False)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(found(x), source(x))
            assert torch.allclose(quantized(x), source(x), atol=1e-4)
    else:
        with pytest.raises(QuantError, match='parts beyond a plain ViT'):
            build_classifiers(name, state, QuantConfig(), False)


@pytest.mark.parametrize('name, words', [
    ('swinv2_tiny_window8_256', "' is not supported; give a timm model that"),
    ('swin_none', "timm .* has no 'swin_none'; give a name that timm.list"),
])
def test_names_that_are_not_known_are_refused(name, words, no_network):
    weights = {'head.weight': torch.empty(2, 1)}
    with pytest.raises(QuantError, match=words):
        build_classifiers(name, weights, QuantConfig(), False)


@pytest.mark.parametrize('name', NAMES)
def test_weights_reach_the_model_without_the_network(name, tmp_path,
                                                     no_network):
    source = make_weights(name, tmp_path / 'w.pth')
    found, _ = build_classifiers(name, source.state_dict(), QuantConfig(),
                                 False)
    for key, value in source.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)
