"""Bad input: one clear line, exit code 2, nothing lost, no traceback."""
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from isvit_det.commands import quantize_det
from isvit_det.commands.quantize_det import main
from isvit_det.core.files import alone_in

COCO = (
    Path(__file__).parents[2] /
    'configs/isvit/mask-rcnn_swin-t-p4-w7_fpn_isvit-w4a4_coco.py')


@pytest.fixture(scope='module')
def packed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp('packed')
    assert main([
        tiny.config, tiny.checkpoint, '--method', 'minmax', '--no-float-eval',
        '--work-dir',
        str(folder)
    ]) == 0
    return folder / 'packed.pth'


@pytest.fixture
def refuse(tiny, tmp_path, capsys, monkeypatch):
    """Run a command that must be refused; what its one line says."""
    # MMEngine's logger keeps the stream that pytest gave an earlier test.
    monkeypatch.setattr(logging, 'raiseExceptions', False)

    def run(*argv, config=tiny.config, work_dir=tmp_path / 'work'):
        words = [config, *argv, '--work-dir', work_dir]
        status: Any
        try:
            status = main([str(word) for word in words])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        assert status == 2
        assert 'Traceback (most recent call last)' not in captured.err
        line, = (
            line for line in captured.err.splitlines()
            if 'Warning' not in line and not line.startswith(' '))
        assert line.startswith('error: ')
        # Refused before anything expensive was done.
        assert 'evaluating the' not in captured.out
        return line

    return run


@pytest.mark.parametrize('options, words', [
    (['--bits', 'w4a9'], ["'w4a9'", '2..8', 'such as w4a4']),
    (['--bits', 'w1a4'], ["'w1a4'"]),
    (['--bits', 'four'], ["'four'"]),
    (['--scope', 'heads'], ['quant.scope', 'backbone', 'detector']),
    (['--method', 'magic'], ['quant.method', 'isvit_paper']),
    (['--iters', '-1'], ['sos.iters', '-1']),
    (['--calib-images', '0'], ['sos.num_images']),
    (['--calib-images', 'x'], ['--calib-images']),
    (['--store-gb', '-1'], ['store_gb', '-1']),
    (['--store-gb', 'inf'], ['store_gb', 'inf']),
    (['--store-gb', 'nan'], ['store_gb', 'nan']),
    (['--seed', '9' * 20], ['sos.seed', '9' * 20]),
    (['--iters', '9' * 20], ['sos.iters', '9' * 20]),
    (['--device', 'abacus'], ['--device', 'abacus']),
    (['--device', 'meta'], ['--device', 'meta']),
    (['--device', 'hpu'], ['--device', 'hpu']),
    (['--device', 'cpu', '--launcher', 'slurm'], ['--device']),
    (['--launcher', 'pytorch'], ['--launcher', 'RANK', 'torchrun']),
    (['--no-such-option'], ['--no-such-option']),
    (['--cfg-options', 'model'], ['--cfg-options', 'KEY=VALUE']),
    (['--cfg-options', 'model=3'], ['config']),
    (['--cfg-options', 'model.quant=w4a4'], ['config']),
    (['--cfg-options', 'custom_hooks=3'], ['config']),
    (['--cfg-options', 'train_dataloader.dataset.data_root=/dev/null/x/'
      ], ['/dev/null']),
    (['--cfg-options', 'model.quant.bit=4'], ["['bit']", 'weight_bits']),
    (['--cfg-options', 'model.quant.input_bits=9'], ['quant.input_bits', '9']),
    (['--cfg-options', 'quant.bit=4'], ["['bit']", 'weight_bits']),
    (['--cfg-options', 'quant=w3a3'], ['quant=w3a3', 'quant.bits=w4a4']),
    (['--cfg-options', 'bits=w3a3'], ["'bits'", 'quant.bits']),
    (['--cfg-options', 'sos.rate=1'], ["['rate']", 'lr']),
    (['--cfg-options', 'model.no_such_key=4'], ['no_such_key']),
    (['--cfg-options', 'model.backbone.type=ResNet'
      ], ['ResNet', 'SwinTransformer']),
    (['--cfg-options', 'model.backbone.type=NoSuchNet'], ['NoSuchNet']),
    (['--cfg-options', 'model.type=NoSuchDetector'], ['NoSuchDetector']),
    ([
        '--cfg-options', 'train_dataloader=None', 'train_cfg=None',
        'optim_wrapper=None', 'param_scheduler=None'
    ], ['train_dataloader', 'calib_dataloader']),
    (['--cfg-options', 'train_dataloader.dataset.ann_file=lost.json'
      ], ['lost.json']),
    (['--cfg-options', 'test_dataloader.dataset.ann_file=lost.json'
      ], ['lost.json']),
    (['--cfg-options', 'test_evaluator.ann_file=lost.json'], ['lost.json']),
    (['--cfg-options', 'train_dataloader.dataset.data_prefix.img=lost/'
      ], ['lost/000', 'cannot be read']),
])
def test_options_and_settings(refuse, tiny, options, words):
    line = refuse(tiny.checkpoint, *options)
    for word in words:
        assert word in line


def test_a_gpu_without_operators_for_it(refuse, tiny, monkeypatch):
    monkeypatch.setattr(quantize_det, 'get_compiling_cuda_version',
                        lambda: 'not available')
    monkeypatch.setattr(quantize_det, 'check_device', lambda device: None)
    line = refuse(tiny.checkpoint, '--device', 'cuda:1')
    assert "'cuda:1'" in line and 'operators' in line


def test_settings_of_the_hook(refuse, tiny, tmp_path):
    for hook, word in ((dict(sos=dict(step=3)), "['step']"),
                       (dict(sos=dict(items='row')),
                        'sos.items'), (dict(foo=3), 'foo')):
        config = tiny.variant(
            tmp_path / 'hook.py', lambda cfg: cfg.update(custom_hooks=[
                dict(type='isvit_det.SOSCalibrationHook', **hook)
            ]))
        assert word in refuse(tiny.checkpoint, config=config)


def test_no_such_config(refuse, tiny):
    assert 'nowhere.py' in refuse(tiny.checkpoint, config='nowhere.py')
    line = refuse(tiny.checkpoint, config='mmdet::swin/nowhere.py')
    assert 'nowhere.py' in line


def test_a_config_or_a_checkpoint_that_is_a_folder(refuse, tmp_path):
    line = refuse(tmp_path / 'float.pth', config=tmp_path)
    assert f'config: {tmp_path} is a folder; give the path' in line
    assert f'checkpoint: {tmp_path} is a folder; give' in refuse(tmp_path)


def test_a_checkpoint_in_place_of_a_config(refuse, tiny):
    line = refuse(tiny.checkpoint, config=tiny.checkpoint)
    assert f'config: {tiny.checkpoint} does not end with one of' in line
    assert "'.py'" in line


def test_a_config_that_is_no_python(refuse, tiny, tmp_path):
    path = tmp_path / 'broken.py'
    path.write_text('model = dict(')
    assert 'SyntaxError' in refuse(tiny.checkpoint, config=path)


def test_no_checkpoint(refuse, tmp_path):
    assert 'load_from' in refuse()
    assert 'there is no file' in refuse(tmp_path / 'none.pth')


def test_a_published_config_downloads_nothing_by_itself(refuse):
    assert 'load_from' in refuse(config=COCO)


def test_a_checkpoint_of_another_architecture_names_the_keys(
        refuse, tiny, tmp_path):
    content = torch.load(tiny.checkpoint, weights_only=True)
    state = content['state_dict']
    state['extra.weight'] = state.pop('rpn_head.rpn_cls.bias')
    key = 'backbone.patch_embed.projection.weight'
    state[key] = state[key][:, :1]
    torch.save(content, tmp_path / 'other.pth')
    line = refuse(tmp_path / 'other.pth')
    for word in ('rpn_head.rpn_cls.bias', 'extra.weight', key):
        assert word in line


@pytest.mark.parametrize('make, words', [
    (lambda x: (100 * x).to(torch.int8), 'is of torch.int8'),
    (lambda x: x * float('nan'), 'NaN or infinite'),
])
def test_weights_that_are_no_numbers(refuse, tiny, tmp_path, make, words):
    content = torch.load(tiny.checkpoint, weights_only=True)
    key = 'roi_head.bbox_head.fc_cls.weight'
    content['state_dict'][key] = make(content['state_dict'][key])
    torch.save(content, tmp_path / 'other.pth')
    line = refuse(tmp_path / 'other.pth')
    assert repr(key) in line and words in line


def test_a_truncated_float_file(refuse, tiny, tmp_path):
    path = tmp_path / 'short.pth'
    path.write_bytes(Path(tiny.checkpoint).read_bytes()[:-1000])
    assert 'short.pth' in refuse(path)


def test_a_page_instead_of_a_checkpoint(refuse, tmp_path):
    path = tmp_path / 'page.pth'
    path.write_text('<html>Not found</html>')
    assert 'page.pth is no checkpoint' in refuse(path)


def test_a_packed_file_with_a_config_that_has_no_model(refuse, packed,
                                                       tmp_path):
    config = tmp_path / 'empty.py'
    config.write_text('a = 1')
    assert 'has no model' in refuse(packed, config=config)


def damaged(tiny, folder, split):
    """A copy of a split's pictures, one of them cut."""
    shutil.copytree(tiny.data / split, folder)
    path = sorted(folder.iterdir())[1]
    path.write_bytes(path.read_bytes()[:40])
    return path


def test_a_damaged_calibration_image(refuse, tiny, tmp_path):
    path = damaged(tiny, tmp_path / 'pictures', 'train')
    line = refuse(tiny.checkpoint, '--no-float-eval', '--cfg-options',
                  f'train_dataloader.dataset.data_prefix.img={path.parent}')
    assert str(path) in line and 'damaged' in line


@pytest.mark.parametrize('num_workers', [0, 1])
@pytest.mark.parametrize('content', ['float', 'packed'])
def test_a_damaged_or_missing_evaluation_image(refuse, tiny, packed, tmp_path,
                                               content, num_workers):
    path = damaged(tiny, tmp_path / 'pictures', 'val')
    checkpoint = packed if content == 'packed' else tiny.checkpoint
    options = [
        '--cfg-options',
        f'test_dataloader.dataset.data_prefix.img={path.parent}',
        f'test_dataloader.num_workers={num_workers}'
    ]
    line = refuse(checkpoint, *options)
    assert str(path) in line and 'damaged' in line
    path.unlink()
    assert str(path) in refuse(checkpoint, *options)


def test_a_truncated_packed_file(refuse, packed, tmp_path):
    path = tmp_path / 'short.pth'
    path.write_bytes(packed.read_bytes()[:-1000])
    assert 'short.pth' in refuse(path)


def test_a_packed_file_that_was_changed(refuse, packed, tmp_path):
    content = torch.load(packed, weights_only=True)
    name = next(k for k in content['state_dict'] if k.endswith('_codes'))
    content['state_dict'][name][0] ^= 1
    torch.save(content, tmp_path / 'changed.pth')
    assert 'checksum' in refuse(tmp_path / 'changed.pth')


@pytest.mark.parametrize('part', ['provenance', 'meta'])
def test_a_packed_file_whose_origin_was_changed(refuse, packed, tmp_path,
                                                part):
    content = torch.load(packed, weights_only=True)
    content[part]['more'] = 1
    torch.save(content, tmp_path / 'changed.pth')
    line = refuse(tmp_path / 'changed.pth')
    assert f"'{part}' is not what the calibration wrote" in line


@pytest.mark.parametrize('options, word', [
    (['--bits', 'w3a4'], 'w4a4'),
    (['--scope', 'detector'], 'backbone'),
    (['--method', 'repq'], 'minmax'),
])
def test_a_packed_file_of_other_settings_than_asked_for(
        refuse, packed, options, word):
    line = refuse(packed, *options)
    assert options[1] in line and word in line


def test_a_packed_file_of_another_config(refuse, packed, tiny, tmp_path):

    def change(cfg):
        cfg.model.update(
            base=cfg.model.type,
            type='isvit_det.quantized_detector',
            quant=dict(bits='w3a4', scope='backbone', method='minmax'))
        cfg.model.backbone.type = 'isvit_det.QuantSwinTransformer'

    config = tiny.variant(tmp_path / 'ours.py', change)
    line = refuse(packed, config=config)
    assert 'weight_bits 4 (the config says 3)' in line

    def widen(cfg):
        cfg.model.neck.out_channels = 32

    config = tiny.variant(tmp_path / 'wide.py', widen)
    assert 'neck.' in refuse(packed, config=config)


def rewritten(tiny, tmp_path, **values):
    source = tiny.data / 'annotations/instances_train.json'
    path = tmp_path / 'train.json'
    path.write_text(json.dumps({**json.loads(source.read_text()), **values}))
    return path


def test_an_empty_calibration_set(refuse, tiny, tmp_path):
    path = rewritten(tiny, tmp_path, images=[], annotations=[])
    line = refuse(tiny.checkpoint, '--cfg-options',
                  f'train_dataloader.dataset.ann_file={path}')
    assert 'calibration set: it is empty' in line


def test_calibration_on_the_evaluation_set_itself(refuse, tiny):
    line = refuse(
        tiny.checkpoint, '--cfg-options',
        'train_dataloader.dataset.ann_file=annotations/instances_val.json',
        'train_dataloader.dataset.data_prefix.img=val/')
    assert 'is the evaluation image' in line


def test_calibration_on_a_renamed_evaluation_image(refuse, tiny, tmp_path):
    folder = tmp_path / 'train'
    shutil.copytree(tiny.data / 'train', folder)
    shutil.copy(tiny.data / 'val/000002.png', folder / '000005.png')
    line = refuse(tiny.checkpoint, '--cfg-options',
                  f'train_dataloader.dataset.data_prefix.img={folder}')
    assert '000005.png is the evaluation image' in line
    assert 'val/000002.png' in line


def test_a_work_directory_that_cannot_be_written(refuse, tiny, tmp_path):
    file = tmp_path / 'file'
    file.write_text('custom')
    line = refuse(tiny.checkpoint, work_dir=file / 'work')
    assert str(file) in line and '; choose another work directory' in line
    # The disk is not the cause, and temporary files are not the user's.
    assert 'free some' not in line and '.probe.' not in line
    assert file.read_text() == 'custom'


def test_an_older_packed_file_survives_a_refused_run(refuse, packed, tiny):
    before = packed.read_bytes()
    refuse(tiny.checkpoint, '--bits', 'w9a9', work_dir=packed.parent)
    assert packed.read_bytes() == before


@pytest.mark.parametrize('out',
                         ['sub/my.pth', '../my.pth', 'result.json', '', 3])
def test_a_packed_file_lies_in_the_work_directory(refuse, tiny, tmp_path, out):
    config = tiny.variant(
        tmp_path / 'tiny.py', lambda cfg: cfg.update(
            custom_hooks=[dict(type='isvit_det.SOSCalibrationHook', out=out)]))
    line = refuse(tiny.checkpoint, config=config)
    assert f'out={out!r}' in line and 'a .pth file' in line


def test_a_float_checkpoint_is_not_replaced(refuse, tiny, tmp_path):
    folder = tmp_path / 'work'
    folder.mkdir()
    source = folder / 'packed.pth'
    shutil.copy(tiny.checkpoint, source)
    content = source.read_bytes()
    line = refuse(source, '--method', 'minmax')
    assert str(source) in line and 'another folder' in line
    assert source.read_bytes() == content


@pytest.mark.parametrize('text', ['', '_base_ = "x.py"\n', '# custom\n'])
def test_a_config_is_not_replaced(refuse, tiny, tmp_path, text):
    config = tmp_path / 'tiny.py'
    content = text + Path(tiny.config).read_text().replace(
        "type='MaskRCNN'",
        "type='isvit_det.quantized_detector', base='MaskRCNN'"
        if text.startswith('#') else "type='MaskRCNN'")
    config.write_text(content)
    given = tiny.config if '_base_' in text else str(config)
    line = refuse(
        tiny.checkpoint, '--method', 'minmax', config=given, work_dir=tmp_path)
    assert str(config) in line and 'another folder' in line
    assert config.read_text() == content


@pytest.mark.slow
def test_the_folder_of_a_training_keeps_its_config(tiny, tmp_path,
                                                   monkeypatch):
    """By default MMDetection's training and a run have the same folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'work_dirs/tiny'
    folder.mkdir(parents=True)
    trained = folder / 'tiny.py'
    shutil.copy(tiny.config, trained)
    content = trained.read_text()
    argv = ['--method', 'minmax', '--calib-images', '1', '--no-float-eval']
    quantized = tmp_path / 'work_dirs/tiny_minmax_quantized'
    for config in (tiny.config, str(trained)):
        assert main([config, tiny.checkpoint, *argv]) == 0
    assert trained.read_text() == content
    # A path in the training's folder has no other default.
    assert (tmp_path / 'work_dirs/tiny_minmax/packed.pth').exists()
    assert not quantized.exists()
    # What a run left is its own to write again.
    kept = tmp_path / 'work_dirs/tiny_minmax/tiny.py'
    assert main([str(kept), str(kept.with_name('packed.pth'))]) == 0
    # Without options in the name the folders are the same.
    config = tiny.variant(tmp_path / 'tiny.py',
                          lambda cfg: cfg.update(work_dir='work_dirs/tiny'))
    assert main([
        config, tiny.checkpoint, '--calib-images', '1', '--iters', '0',
        '--no-float-eval'
    ]) == 0
    assert trained.read_text() == content
    assert (tmp_path / 'work_dirs/tiny_quantized/packed.pth').exists()


def test_two_runs_in_a_folder_are_told_apart(refuse, tiny, tmp_path):
    with alone_in(tmp_path / 'work'):
        line = refuse(tiny.checkpoint, '--method', 'minmax')
    assert str(tmp_path / 'work') in line and 'process' in line
    assert not (tmp_path / 'work/.lock').exists()


@pytest.mark.parametrize('option', [
    'model.backbone.out_indices=(0,1,2,7)', 'model.backbone.depths=(1,1)',
    'model.backbone.num_heads=(1,2)', 'model.backbone.embed_dims=-16',
    'model.neck.out_channels=-1', 'model.backbone.window_size=0',
    'log_processor.window_size=a'
])
def test_what_a_class_raises_when_it_is_built(refuse, tiny, option):
    refuse(tiny.checkpoint, '--method', 'minmax', '--cfg-options', option)
