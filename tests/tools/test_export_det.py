"""tools/export_det.py: what it writes and refuses, and the detectors that run
its files."""
import copy
import errno
import importlib
import json
import pickle
import re

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from torch import nn

from isvit_det.apis import export_detector
from isvit_det.commands.export_det import main
from isvit_det.commands.packed_model import load_packed
from isvit_det.core.errors import QuantError
from isvit_det.engine.calibrate import calibrate_detector_
from isvit_det.export import detector as exporting
from isvit_det.export.engine_backbone import EngineBackbone
from isvit_det.inputs.configs import quantize_config_
from isvit_det.registry import MODELS
from tests.export.written import need_engines

need_engines()
FORMATS = dict(openvino='xml', onnxruntime='onnx')

# Engines in a process that runs other tests too have ended it.
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def model(tiny, packed):
    return load_packed(tiny.config, packed)[1]


@pytest.fixture(scope='module')
def files(model, tmp_path_factory):
    """An exported file for each engine."""
    folder = tmp_path_factory.mktemp('files')
    return dict(
        openvino=export_detector(model, folder, 'openvino').path,
        onnxruntime=export_detector(model, folder, 'onnx').path)


def with_file(tiny, path, file, engine, **changes):
    """The config of the packed detector with an exported backbone."""

    def change(cfg):
        quantize_config_(cfg, dict(method='minmax', scope='detector'))
        cfg.model.backbone = dict(
            type='isvit_det.EngineBackbone', file=str(file), engine=engine)
        cfg.merge_from_dict(changes)

    return tiny.variant(path, change)


def predict(model, tiny):
    picture = sorted((tiny.data / 'val').iterdir())[0]
    return inference_detector(model, str(picture)).pred_instances


@pytest.mark.parametrize('to', ['openvino', 'onnx'])
def test_a_file_is_written_with_what_its_engine_does(tiny, packed, tmp_path,
                                                     to, capfd):
    out = tmp_path / 'out'
    assert main([
        tiny.config, packed, '--to', to, '--shape', '96x128', '--out',
        str(out)
    ]) == 0
    shown = capfd.readouterr()
    report = json.loads((out / 'export.json').read_text())
    assert f'{report["engine"]}: 20 of 20 quantized layers run in integers\n' \
        in shown.out
    assert re.search(r'other nodes in float: \d+ \w+, ', shown.out)
    names = {path.name for path in out.iterdir()}
    assert names == {*report['files'], 'export.json'}
    assert report['shape'] == [96, 128] and report['bits'] == 'w4a4'
    assert len(report['errors']) == 4 and max(report['errors']) < .3
    assert not report['float_layers'] and not report['divided_layers']


@pytest.mark.parametrize('engine', FORMATS)
def test_the_detector_with_a_file_is_that_of_the_simulation(
        tiny, packed, model, files, engine, tmp_path):
    config = with_file(tiny, tmp_path / 'c.py', files[engine], engine)
    found = init_detector(config, packed, device='cpu')
    model.cfg = found.cfg
    model.runtime.engine = found.runtime.engine = 'simulation'
    expected = predict(model, tiny)
    for one in (found, pickle.loads(pickle.dumps(found))):
        result = predict(one, tiny)
        assert len(result) == len(expected) > 0
        assert torch.allclose(result.scores, expected.scores, atol=.02)


def test_images_of_a_batch_run_one_after_another(files):
    backbone = EngineBackbone(str(files['onnxruntime']), 'onnxruntime')
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    maps = backbone(images)
    assert [tuple(one.shape[:1]) + tuple(one.shape[2:])
            for one in maps] == [(2, 16, 24), (2, 8, 12), (2, 4, 6), (2, 2, 3)]
    for one, other in zip(maps, backbone(images[1:])):
        assert torch.equal(one[1:], other)


def test_a_float_detector_refuses_quantized_heads(tiny, packed, files,
                                                  tmp_path):

    def change(cfg):
        cfg.model.backbone = dict(
            type='isvit_det.EngineBackbone',
            file=str(files['onnxruntime']),
            engine='onnxruntime')

    config = tiny.variant(tmp_path / 'c.py', change)
    with pytest.raises(QuantError, match='heads are quantized.* float'):
        init_detector(config, packed, device='cpu')


def test_a_file_of_other_bits_is_refused(files):
    with pytest.raises(QuantError, match='has w4a4, and the config says w3a3'):
        EngineBackbone(
            str(files['onnxruntime']), 'onnxruntime', quant=dict(bits='w3a3'))


def test_an_exported_backbone_is_not_calibrated(files):
    model = nn.Module()
    model.backbone = EngineBackbone(str(files['onnxruntime']), 'onnxruntime')
    with pytest.raises(QuantError, match='no weights to calibrate'):
        calibrate_detector_(model, None, None, None, None, None)


def test_files_that_cannot_be_used_are_refused(files, tmp_path, monkeypatch):
    path = str(files['onnxruntime'])
    missing = str(tmp_path / 'none.xml')
    with pytest.raises(QuantError, match='there is no .*none.xml'):
        EngineBackbone(missing)
    with pytest.raises(QuantError, match="'torch' is not allowed"):
        EngineBackbone(path, 'torch')
    for engine in FORMATS:
        broken = tmp_path / f'broken.{FORMATS[engine]}'
        broken.write_text('nothing')
        with pytest.raises(QuantError, match=f'{engine} cannot read'):
            EngineBackbone(str(broken), engine)
    monkeypatch.setattr('isvit_det.export.files.FORMAT_VERSION', 2)
    with pytest.raises(QuantError, match='format version 1, expected 2'):
        EngineBackbone(path, 'onnxruntime')


def test_onnx_files_run_in_openvino_too(files):
    facts = EngineBackbone(str(files['onnxruntime']), 'openvino').facts
    assert facts['bits'] == 'w4a4' and facts['pad_size_divisor'] == 32


def test_a_file_for_one_size_refuses_others(model, tmp_path):
    path = export_detector(model, tmp_path, 'onnx', (64, 96)).path
    backbone = EngineBackbone(str(path), 'onnxruntime')
    assert len(backbone(torch.zeros(1, 3, 64, 96))) == 4
    with pytest.raises(QuantError, match='of 64x96, got 96x64'):
        backbone(torch.zeros(1, 3, 96, 64))


@pytest.mark.parametrize('argv, message', [
    (['--shape', '800'], "--shape: '800' is not allowed; give HxW"),
    (['--shape', '800x1300'], 'multiples of 32, such as 800x1312'),
    (['--shape', '64x96', '--allow-float', 'neck'], 'neck is no quantized'),
])
def test_wrong_options_are_one_line(tiny, packed, tmp_path, capfd, argv,
                                    message):
    out = tmp_path / 'out'
    assert main(
        [tiny.config, packed, '--to', 'openvino', '--out',
         str(out), *argv]) == 2
    error = capfd.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    assert message in error
    assert not out.exists() or not list(out.iterdir())


def test_a_float_file_is_refused(tiny, tmp_path, capfd):
    assert main([tiny.config, tiny.checkpoint, '--to', 'onnx']) == 2
    assert 'is a float one' in capfd.readouterr().err


def test_models_that_are_not_calibrated_are_refused(tiny, tmp_path):
    model = init_detector(tiny.config, tiny.checkpoint, device='cpu')
    with pytest.raises(QuantError, match='SwinTransformer is not written'):
        export_detector(model, tmp_path)
    cfg = Config.fromfile(tiny.config)
    quantize_config_(cfg, {})
    model = MODELS.build(cfg.model)
    with pytest.raises(QuantError, match='it is not calibrated'):
        export_detector(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('to', ['openvino', 'onnx'])
def test_without_the_packages_a_line_says_what_to_install(
        model, tmp_path, monkeypatch, to):

    def refuse(name):
        raise ImportError(f'No module named {name!r}')

    monkeypatch.setattr(importlib, 'import_module', refuse)
    with pytest.raises(QuantError, match="install .*'isvit_det\\[export\\]'"):
        export_detector(model, tmp_path, to)


@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, 'No space left on device'),
    RuntimeError('Can not write the file')
])
def test_what_cannot_be_written_leaves_nothing(model, files, monkeypatch,
                                               error):
    folder = files['openvino'].parent
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def fail(*args):
        raise error

    monkeypatch.setattr(exporting, 'save_openvino', fail)
    with pytest.raises(QuantError, match='could not be written .*free'):
        export_detector(model, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_engine_that_computes_something_else_is_found(
        model, tmp_path, monkeypatch):
    write = exporting.write_backbone

    def write_wrong(backbone, *args):
        changed = copy.deepcopy(backbone)
        changed.norm0.weight.data.neg_()
        return write(changed, *args)

    monkeypatch.setattr(exporting, 'write_backbone', write_wrong)
    with pytest.raises(QuantError, match='something else.* No file'):
        export_detector(model, tmp_path, 'onnx')
    assert not list(tmp_path.iterdir())
