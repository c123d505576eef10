"""Files of weights: what is read, what is refused, and that nothing runs."""
import argparse
import collections
import datetime
import importlib
import io
import os
import pathlib
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from isvit_det.core.errors import QuantError
from isvit_det.core.reading import read_file

ZIP = [True, False]


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def everything():
    """What training scripts leave beside their weights."""
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer
    history = HistoryBuffer()
    history.update(np.float64(1.))
    return dict(
        args=argparse.Namespace(lr=.1, out=pathlib.Path('x')),
        metric=np.float64(81.25),
        best=np.float32(2.),
        epoch=np.int64(3),
        ids=np.arange(6).reshape(2, 3),
        columns=np.asfortranarray(np.arange(6.).reshape(2, 3)),
        names=np.array(['a', None], dtype=object),
        dtype=np.dtype('f4'),
        when=datetime.datetime(2024, 1, 2),
        history=history,
        config=ConfigDict(a=1),
        count=collections.Counter('aab'),
        lists=collections.defaultdict(list, {1: [2]}),
        row=collections.deque([1]),
        numbers={1, 2},
        raw=b'ab',
        version=torch.__version__,
        device=torch.device('cpu'),
        type=torch.float16,
        pair=(np.ones(1), 2))


@pytest.mark.parametrize('zipped', ZIP)
def test_what_trainings_save_is_read(tmp_path, zipped):
    content = everything()
    found = read_file(save(content, tmp_path / 'x.pth', zipped))
    assert found.keys() == content.keys()
    assert (found['metric'], found['best'], found['epoch']) == (81.25, 2., 3)
    for key in ('ids', 'columns'):
        assert found[key].tolist() == content[key].tolist()
    assert found['pair'][0].tolist() == [1.] and found['pair'][1] == 2
    assert found['count'] == content['count'] and found['lists'] == {1: [2]}
    assert found['numbers'] == {1, 2} and found['raw'] == b'ab'
    # Nothing else is made.
    made = {type(found[key]).__module__ for key in content}
    assert made <= {'builtins', 'torch', 'isvit_det.core.unpickling'}


@pytest.mark.parametrize('zipped', ZIP)
def test_tensors_are_read_bit_for_bit(tmp_path, zipped):
    whole = torch.randn(4, 5)
    content = dict(
        half=torch.randn(3).bfloat16(),
        part=whole[1:3, ::2],
        turned=whole.T,
        flags=torch.tensor([True, False]),
        scalar=torch.tensor(3),
        none=torch.empty(0, 2),
        parameter=torch.nn.Parameter(torch.ones(2)),
        complex=torch.randn(2, dtype=torch.complex64))
    found = read_file(save(content, tmp_path / 'x.pth', zipped))
    for key, value in content.items():
        assert torch.equal(found[key], value.detach())
        assert found[key].dtype == value.dtype
        assert found[key].stride() == value.stride()
    # As torch has it: what shared memory does so again.
    assert (found['part'].untyped_storage().data_ptr() ==
            found['turned'].untyped_storage().data_ptr())


def test_safetensors_are_read_as_by_their_own_library(tmp_path):
    from safetensors.torch import load_file, save_file
    state = dict(
        a=torch.randn(2, 3),
        b=torch.randn(2).bfloat16(),
        c=torch.tensor(7),
        d=torch.empty(0),
        e=torch.tensor([True]),
        f=torch.arange(3, dtype=torch.uint8))
    path = tmp_path / 'x.safetensors'
    save_file(state, path, metadata=dict(format='pt'))
    found, expected = read_file(path), load_file(path)
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[key], value) and found[key].dtype == value.dtype
        for key, value in expected.items())


@pytest.mark.parametrize('protocol', range(6))
def test_a_pickle_of_arrays_is_read_in_every_protocol(tmp_path, protocol):
    arrays = dict(
        a=np.arange(6.).reshape(2, 3),
        b=np.asfortranarray(np.arange(6, dtype='f4').reshape(2, 3)),
        c=np.float32(1.))
    path = tmp_path / 'x.pkl'
    path.write_bytes(pickle.dumps(dict(model=arrays), protocol))
    found = read_file(path)['model']
    for key, value in arrays.items():
        assert np.array_equal(np.asarray(found[key]), value)


class Runs:
    """Calls a function as soon as it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(path):
    return f'open({str(path)!r}, "w").close()'


def gadgets(victim):
    """Pickled objects that make a file where pickles are trusted."""
    victim = str(victim)
    return dict(
        system=Runs(os.system, f'touch {victim}'),
        mkdir=Runs(os.mkdir, victim),
        eval=Runs(eval, touch(victim)),
        exec=Runs(exec, touch(victim)),
        open=Runs(open, victim, 'w'),
        popen=Runs(subprocess.Popen, ['touch', victim]),
        imported=Runs(importlib.import_module, 'antigravity'),
        saved=Runs(torch.save, 1, victim),
        numpy=Runs(np.save, victim, np.ones(1)))


@pytest.mark.parametrize('zipped', ZIP)
@pytest.mark.parametrize('name', sorted(gadgets('x')))
def test_no_function_that_a_file_names_is_run(tmp_path, name, zipped):
    victim = tmp_path / 'victim'
    content = dict(state_dict={}, meta=gadgets(victim)[name])
    path = save(content, tmp_path / 'evil.pth', zipped)
    with pytest.raises(QuantError, match='evil.pth .*for safety') as error:
        read_file(path)
    assert '\n' not in str(error.value) and '\x1b' not in str(error.value)
    assert not victim.exists()


def test_methods_of_what_is_not_made_do_nothing(tmp_path):
    """They are looked up in what stands for their class."""
    victim = tmp_path / 'victim'
    gadget = Runs(pathlib.Path.write_text, pathlib.Path(victim), 'x')
    read_file(save(dict(meta=gadget), tmp_path / 'x.pth'))
    assert not victim.exists()


def as_archive(path, pickled):
    """A file of torch.save around a pickle that was written by hand."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('x/data.pkl', pickled)
        archive.writestr('x/version', '3\n')
    return path


def call(function, *args):
    """Code of a pickle that calls ``module name`` with strings."""
    code = b'c' + function.replace(' ', '\n').encode() + b'\n('
    for arg in args:
        code += arg if isinstance(arg, bytes) else b'V' + arg.encode() + b'\n'
    return code + b'tR'


@pytest.mark.parametrize(
    'code',
    [
        # getattr(os, 'system')('touch victim'), in what stands for getattr.
        b'(' + b'c__builtin__\ngetattr\n(' + b'cargparse\nNamespace\n' +
        b'Vsystem\ntR(Vtouch victim\ntR' + b't.',
        # What stands for a class is given a method, and made.
        b'cargparse\nNamespace\n(N}V__init__\ncpathlib\nPath\nstb'
        b'cargparse\nNamespace\n)R.',
        # A function that makes tensors is given a state.
        b'ctorch._utils\n_rebuild_tensor_v2\n}V__code__\nNsb.',
        b'ctorch._utils\n_rebuild_tensor_v2\n(N}V__defaults__\n(tstb.',
        b'ccollections\nOrderedDict\n(N}V__init__\nNstb.',
        call('ccopy_reg _reconstructor'[1:], b'cargparse\nNamespace\n',
             b'c__builtin__\nobject\n', b'N') + b'.',
        # Dotted names reach into modules that are known.
        b'\x80\x04\x8c\x05torch\x8c\x0dhub.os.system\x93\x8c\x0ctouch victim'
        b'\x85R.',
        b'\x80\x04\x8c\x07pathlib\x8c\x09os.system\x93\x8c\x0ctouch victim'
        b'\x85R.',
        b'\x80\x04\x8c\x08datetime\x8c\x0asys.modules\x93.',
        call('isvit_det.core.unpickling SafeUnpickler') + b'.',
        call('torch load', 'other.pth') + b'.',
        call('torch.hub load', 'a/b', 'c') + b'.',
        call('torch.storage _load_from_bytes', b"C\x01x") + b'.',
        call('numpy load', 'x.npy') + b'.',
        call('mmengine.config.config Config.fromfile', 'x.py') + b'.',
    ])
@pytest.mark.parametrize('beside', [False, True])
def test_pickles_written_by_hand_run_nothing(tmp_path, monkeypatch, code,
                                             beside):
    monkeypatch.chdir(tmp_path)
    if beside:
        # Weights are there, what is evil lies beside them.
        code = b'}(Vmeta\n' + code[:-1] + b'Vstate_dict\n}u.'
    path = as_archive(tmp_path / 'x.pth', code)
    before = vars(torch._utils._rebuild_tensor_v2).copy()
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    try:
        read_file(path)
    except QuantError as error:
        assert 'x.pth' in str(error) and len(str(error).splitlines()) == 1
    assert os.listdir(tmp_path) == ['x.pth']
    assert vars(torch._utils._rebuild_tensor_v2) == before
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    # The next file is read as if there had been none.
    content = dict(args=argparse.Namespace(a=1), w=torch.ones(2))
    found = read_file(save(content, tmp_path / 'y.pth'))
    assert torch.equal(found['w'], content['w'])


@pytest.mark.parametrize('numbers', [(0, (9, ), (1, )), (1, (4, ), (1, )),
                                     (-1, (2, ), (1, )), (0, (2, ), (-1, )),
                                     (0, (2, ), (9, ))])
def test_a_tensor_beyond_its_storage_is_damage(tmp_path, numbers):

    class Beyond:

        def __reduce__(self):
            storage = torch.ones(4).storage()
            return (torch._utils._rebuild_tensor_v2,
                    (storage, *numbers, False, collections.OrderedDict()))

    path = save(dict(a=Beyond()), tmp_path / 'x.pth')
    with pytest.raises(QuantError, match='x.pth cannot be read'):
        read_file(path)


@pytest.mark.parametrize('zipped', ZIP)
def test_a_damaged_file_is_one_line_whatever_the_damage(tmp_path, zipped):
    path = save(
        dict(state_dict=dict(a=torch.randn(99)), args=argparse.Namespace()),
        tmp_path / 'x.pth', zipped)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for place in generator.integers(len(data), size=3):
            data[place] = generator.integers(256)
        path.write_bytes(data[:generator.integers(len(data))] if generator.
                         random() < .3 else data)
        try:
            read_file(path)
        except QuantError as error:
            assert 'x.pth' in str(error)
            assert len(str(error).splitlines()) == 1


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    path = save(dict(a=torch.ones(99)), tmp_path / 'x.pth')
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack('<f', 1.) * 9) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(QuantError, match='x.pth cannot be read'):
        read_file(path)


@pytest.mark.parametrize('name, content, words', [
    ('x.pth', b'<html>', 'x.pth is no checkpoint'),
    ('x.pth', b'', 'x.pth is empty'),
    ('x.pth', pickle.dumps(dict(a=1)), 'is a pickle and no checkpoint'),
    ('x.safetensors', b'<html></html>', 'cannot be read'),
    ('x.safetensors', b'\x02' + bytes(7) + b'[]', 'cannot be read'),
    ('x.safetensors', b'', 'cannot be read'),
    ('x.pkl', b'<html>', 'cannot be read'),
])
def test_what_is_no_file_of_weights_is_said(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantError, match=words):
        read_file(tmp_path / name)


def test_programs_and_archives_are_told_from_weights(tmp_path):
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), stream)
    (tmp_path / 'x.pth').write_bytes(stream.getvalue())
    with pytest.raises(QuantError, match='TorchScript'):
        read_file(tmp_path / 'x.pth')
    with zipfile.ZipFile(tmp_path / 'y.pth', 'w') as archive:
        archive.writestr('a.txt', 'a')
    with pytest.raises(QuantError, match='an archive and no checkpoint'):
        read_file(tmp_path / 'y.pth')


def test_a_whole_model_is_told_from_its_weights(tmp_path):
    save(torch.nn.Linear(1, 1), tmp_path / 'x.pth')
    with pytest.raises(
            QuantError,
            match=r'torch.nn.modules.linear.Linear.*'
            r'state_dict\(\)'):
        read_file(tmp_path / 'x.pth')
