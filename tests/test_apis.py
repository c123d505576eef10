"""Quantizing from Python: the same codes as the tool, and what is refused."""
import copy

import cv2
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from torch.nn.utils.parametrize import register_parametrization

from isvit_det.apis import quantize_detector, save_detector
from isvit_det.calibration import stages
from isvit_det.commands.quantize_det import main
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import list_sites


@pytest.fixture(scope='module')
def model(tiny):
    return init_detector(tiny.config, tiny.checkpoint, device='cpu')


def pictures(tiny, split='train'):
    return sorted((tiny.data / split).iterdir())


def predictions(model, path):
    return inference_detector(model, str(path)).pred_instances


def same(one, other):
    return len(one) == len(other) > 0 and all(
        torch.equal(one[key], other[key]) for key in ('bboxes', 'scores'))


@pytest.mark.parametrize('scope', ['backbone', 'detector'])
def test_a_detector_is_quantized_run_saved_and_loaded(tiny, model, tmp_path,
                                                      scope):
    path = pictures(tiny, 'val')[0]
    before = copy.deepcopy(model.state_dict())
    expected = predictions(model, path)
    images = pictures(tiny)[:3]
    images[1] = cv2.imread(str(images[1]))
    quantized = quantize_detector(
        model, images, bits='w4a5', scope=scope, iters=2)
    sites = list_sites(quantized)
    assert {site.bits for site in sites if site.role == 'weight'} == {4}
    heads = [site for site in sites if not site.name.startswith('backbone')]
    assert bool(heads) == (scope == 'detector')
    found = predictions(quantized, path)
    assert not same(found, expected)
    again = init_detector(*save_detector(quantized, tmp_path), device='cpu')
    assert same(predictions(again, path), found)
    assert again.dataset_meta['classes'] == ['a', 'b']
    # The float detector is as it was.
    assert same(predictions(model, path), expected)
    assert all(
        torch.equal(value, before[key])
        for key, value in model.state_dict().items())
    # MMDetection's config and ours test the file alike.
    assert main([
        tiny.config,
        str(tmp_path / 'packed.pth'), '--work-dir',
        str(tmp_path / 'work')
    ]) == 0


def test_files_and_their_arrays_give_the_same_codes(tiny, model):
    paths = pictures(tiny)[:2]
    states = [
        quantize_detector(model, images, method='repq').state_dict()
        for images in (paths, [cv2.imread(str(path)) for path in paths])
    ]
    assert all(
        torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_unfinished_calibration_goes_on(tiny, model, tmp_path, monkeypatch):
    arguments = dict(iters=2, work_dir=tmp_path)
    first = quantize_detector(model, pictures(tiny)[:2], **arguments)
    # Nothing is left to optimise.
    monkeypatch.setattr(stages, 'reconstruct', None)
    again = quantize_detector(model, pictures(tiny)[:2], **arguments)
    first, again = first.state_dict(), again.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_other_settings_are_taken(tiny, model):
    quantized = quantize_detector(
        model,
        pictures(tiny)[:1],
        iters=0,
        quant=dict(exponent='integer'),
        sos=dict(closed_form_start=False))
    assert quantized.quant_config.exponent == 'integer'
    assert quantized.provenance['sos']['closed_form_start'] is False


@pytest.mark.slow
def test_what_the_caller_stands_in_does_not_matter(tiny, model):
    images = pictures(tiny)[:1]
    expected = quantize_detector(model, images, iters=1).state_dict()
    with torch.inference_mode():
        found = quantize_detector(model, images, iters=1).state_dict()
        inside = init_detector(tiny.config, tiny.checkpoint, device='cpu')
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        other = quantize_detector(inside, images, iters=1).state_dict()
    for state in (found, other):
        assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_parts_may_be_compiled(tiny, model):
    images = pictures(tiny)[:1]
    expected = quantize_detector(model, images, method='minmax').state_dict()
    parts = copy.deepcopy(model)
    parts.backbone = torch.compile(parts.backbone)
    found = quantize_detector(parts, images, method='minmax').state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_bad_input_is_refused(tiny, model, tmp_path):
    path = pictures(tiny)[0]
    damaged = tmp_path / 'damaged.png'
    damaged.write_text('no picture')
    for images, words in (([], 'at least 1'), (dict(a=path), 'a list'),
                          ([tmp_path / 'missing.png'],
                           'missing.png'), ([path, damaged], 'damaged.png')):
        with pytest.raises(QuantError, match=words):
            quantize_detector(model, images, iters=1)
    with pytest.raises(QuantError, match='2..8'):
        quantize_detector(model, [path], bits='w9a4')
    with pytest.raises(QuantError, match='weight_bits'):
        quantize_detector(model, [path], quant=dict(bit=4))
    with pytest.raises(QuantError, match='closed_form_start'):
        quantize_detector(model, [path], sos=dict(rate=4))
    with pytest.raises(QuantError, match='MaskRCNN reads no text'):
        quantize_detector(model, [path], text_prompt='disc')
    with pytest.raises(QuantError, match='init_detector'):
        quantize_detector(model.backbone, [path])
    for name in ('sos', 'quant'):
        with pytest.raises(QuantError, match=f'{name}: expected a dict'):
            quantize_detector(model, [path], **{name: 'x'})
    with pytest.raises(QuantError, match='work_dir: expected the path'):
        quantize_detector(model, [path], work_dir=3)
    with pytest.raises(QuantError, match='on the meta device'):
        quantize_detector(copy.deepcopy(model).to('meta'), [path])
    changed = copy.deepcopy(model)
    register_parametrization(changed.neck.lateral_convs[0].conv, 'weight',
                             torch.nn.Identity())
    with pytest.raises(QuantError, match='lateral_convs.0.conv has a param'):
        quantize_detector(changed, [path])
    with pytest.raises(QuantError, match='quantize it first'):
        save_detector(model, tmp_path)
    quantized = quantize_detector(model, [path], method='minmax')
    with pytest.raises(QuantError, match='already'):
        quantize_detector(quantized, [path])
    with pytest.raises(QuantError, match='folder: expected the path'):
        save_detector(quantized, None)
    (tmp_path / 'config.py').write_text('custom = 1\n')
    with pytest.raises(QuantError, match='config.py would be replaced'):
        save_detector(quantized, tmp_path)
    assert (tmp_path / 'config.py').read_text() == 'custom = 1\n'
