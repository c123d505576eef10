"""Packed files: nothing in one can change without its readers noticing."""
import hashlib
import io
import json
import random
import zipfile

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config

from isvit_det.checkpoint import read_checkpoint, save_packed
from isvit_det.core.digests import checksum, digest_of
from isvit_det.core.errors import QuantError
from isvit_det.inputs.configs import quantize_config_
from isvit_det.packed.header import HEADER, read_header
from tests.packed.test_state import build, fit_

PROVENANCE = dict(seed=0, image_files=['a.png', 'b.png'], sos=dict(lr=1e-4))
META = dict(classes=('cat', 'dog'), palette=[(1, 2, 3), (4, 5, 6)])


@pytest.fixture(scope='module')
def packed(tiny, tmp_path_factory):
    model = fit_(build(Config.fromfile(tiny.config)))
    path = tmp_path_factory.mktemp('packed') / 'packed.pth'
    save_packed(model, path, PROVENANCE, META)
    return path


def load(path):
    return torch.load(path, weights_only=True)


def rewritten(path, change):
    """A file of a packed one's content, changed and saved by torch."""
    content = load(path)
    change(content)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def edit_header(content, change):
    state = content['state_dict']
    header = json.loads(bytes(state[HEADER].tolist()))
    change(header)
    text = json.dumps(header, sort_keys=True).encode()
    state[HEADER] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


def as_version_1(content):
    """Sign a state by the rule of version 1, which knew nothing else."""
    state = content['state_dict']
    header = dict(version=1, quant=content['quant'])
    rest = {key: value for key, value in state.items() if key != HEADER}
    text = json.dumps(header, sort_keys=True) + checksum(rest)
    header['checksum'] = hashlib.sha256(text.encode()).hexdigest()
    edit_header(content, lambda found: (found.clear(), found.update(header)))


def refused(tmp_path, file):
    path = tmp_path / 'changed.pth'
    path.write_bytes(file)
    with pytest.raises(QuantError) as error:
        read_checkpoint(path)
    return str(error.value)


def test_a_file_of_version_1_loads_as_before(packed, tiny, tmp_path):
    path = tmp_path / 'packed.pth'
    path.write_bytes(rewritten(packed, as_version_1))
    content = read_checkpoint(path)
    assert read_header(content['state_dict'])['version'] == 1
    assert content['provenance'] == json.loads(json.dumps(PROVENANCE))
    build(Config.fromfile(tiny.config)).load_state_dict(content['state_dict'])


@pytest.mark.parametrize('change, name', [
    (lambda c: c['meta']['dataset_meta']['classes'].reverse(), 'meta'),
    (lambda c: c['meta']['dataset_meta'].update(classes=('cat', 'dog')),
     'meta'),
    (lambda c: c['meta']['dataset_meta']['palette'].pop(), 'meta'),
    (lambda c: c.pop('meta'), 'meta'),
    (lambda c: c['provenance'].update(seed=1), 'provenance'),
    (lambda c: c['provenance'].update(seed=0.), 'provenance'),
    (lambda c: c['provenance'].update(seed=False), 'provenance'),
    (lambda c: c['provenance'].update(more=torch.ones(1)), 'provenance'),
    (lambda c: c['provenance'].update(self=c), 'provenance'),
    (lambda c: c.pop('provenance'), 'provenance'),
    (lambda c: c['quant'].update(weight_bits=3), 'quant'),
    (lambda c: c.update(format='other'), 'format'),
    (lambda c: c.update(more=1), 'more'),
    (lambda c: c.update({3: 1}), '3'),
])
def test_what_lies_beside_the_state_cannot_change(packed, tmp_path, change,
                                                  name):
    line = refused(tmp_path, rewritten(packed, change))
    assert f'{name} is not what the calibration wrote' in line.replace("'", '')


def repeat_one_value(content):
    """A tensor that would fill the memory if it were read."""
    state = content['state_dict']
    key = next(key for key in state if key.endswith('.scale'))
    state[key] = torch.ones(1).expand(2**40)


@pytest.mark.parametrize('change', [
    lambda c: edit_header(c, lambda h: h.update(more=1)),
    lambda c: edit_header(c, lambda h: h.update(version=1)),
    lambda c: edit_header(c, lambda h: h['others'].pop('meta')),
    lambda c: c['state_dict'].update(more='x'),
    lambda c: c['state_dict'].update({5: torch.ones(1)}),
    lambda c: c['state_dict'].update({HEADER: 'x'}),
    lambda c: c['state_dict'].update({HEADER: torch.ones(2, 2)}),
    lambda c: c['state_dict'].pop(HEADER),
    lambda c: (c['state_dict'].pop(HEADER), c.pop('format')),
    lambda c: (c['state_dict'].pop(HEADER), c.update(format=3)),
    lambda c: c.update(state_dict=[1]),
    lambda c: c.update(format='other', state_dicx=c.pop('state_dict')),
    repeat_one_value,
])
def test_a_changed_state_or_header_is_refused(packed, tmp_path, change):
    assert '\n' not in refused(tmp_path, rewritten(packed, change))


def zipped_anew(path, change):
    """A file whose archive is whole, with other bytes in its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(file, 'w') as new:
        for name in old.namelist():
            value = old.read(name)
            new.writestr(name,
                         change(value) if name.endswith('data.pkl') else value)
    return file.getvalue()


@pytest.mark.parametrize('old, new', [
    (b'cat', b'cow'),
    (b'a.png', b'c.png'),
    (b'state_dict', b'state_dicx'),
    (b'provenance', b'provenancx'),
    (HEADER.encode(), HEADER.upper().encode()),
])
def test_other_words_in_the_pickle_are_noticed(packed, tmp_path, old, new):
    file = zipped_anew(packed, lambda value: value.replace(old, new))
    assert '\n' not in refused(tmp_path, file)


def others(content):
    """What lies beside a state, without the line on what was read."""
    return digest_of({**content, 'state_dict': None, 'taken': None})


def test_any_byte_of_the_pickle_gives_one_line_or_the_same(packed, tmp_path):
    draw = random.Random(0)
    content = read_checkpoint(packed)

    def change(value):
        places = draw.sample(range(len(value)), draw.choice([1, 3]))
        changed = bytearray(value)
        for place in places:
            changed[place] = draw.randrange(256)
        return bytes(changed)

    for _ in range(40):
        path = tmp_path / 'changed.pth'
        path.write_bytes(zipped_anew(packed, change))
        try:
            found = read_checkpoint(path)
        except QuantError:
            continue
        assert others(found) == others(content)
        assert checksum(found['state_dict']) == checksum(content['state_dict'])


def quantized(tiny):
    cfg = Config.fromfile(tiny.config)
    quantize_config_(cfg, dict(scope='detector'))
    return cfg


def test_mmdetections_own_loader_predicts_with_no_other_classes(
        packed, tiny, tmp_path):
    image = str(next(tiny.data.glob('val/*')))
    path = tmp_path / 'changed.pth'
    path.write_bytes(
        rewritten(
            packed, lambda c: c['meta'].update(
                dataset_meta=dict(classes=['cow', 'dog']))))
    model = init_detector(quantized(tiny), str(path), device='cpu')
    with pytest.raises(QuantError, match='class names .* not those'):
        inference_detector(model, image)
    model = init_detector(quantized(tiny), str(packed), device='cpu')
    inference_detector(model, image)
    # Whoever has seen them may call them otherwise.
    model.dataset_meta['classes'] = ['chat', 'chien']
    inference_detector(model, image)
