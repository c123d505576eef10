"""Files: whole or not at all, read without running code."""
import os
import pickle

import numpy as np
import pytest
import torch

from isvit_det.checkpoint import read_checkpoint
from isvit_det.core.digests import file_hash
from isvit_det.core.errors import QuantError
from isvit_det.core.files import local_checkpoint, write_atomically
from isvit_det.core.plain import plain


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / 'file'
    write_atomically(path, lambda file: file.write(b'old'))

    def full_disk(file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    with pytest.raises(QuantError, match='No space left'):
        write_atomically(path, full_disk)
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['file']


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'taken').write_text('')
    with pytest.raises(QuantError, match='taken'):
        write_atomically(tmp_path / 'taken/file', lambda file: None)


@pytest.mark.parametrize('keep', [0, 10, .5, .99])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / 'x.pth'
    torch.save(dict(state_dict=dict(a=torch.randn(999))), path)
    content = path.read_bytes()
    keep = keep if keep >= 1 else int(len(content) * keep)
    path.write_bytes(content[:keep])
    with pytest.raises(QuantError, match='x.pth'):
        read_checkpoint(path)


class Evil:

    def __reduce__(self):
        return os.system, ('touch evil', )


def test_a_file_that_would_run_code_is_refused_and_does_not(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={}, meta=Evil()), 'evil.pth')
    with pytest.raises(QuantError, match='evil.pth'):
        read_checkpoint(tmp_path / 'evil.pth')
    assert not (tmp_path / 'evil').exists()


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(QuantError, match="holds a list, expected a dict"):
        read_checkpoint(tmp_path / 'list.pth')
    with pytest.raises(QuantError, match='there is no file'):
        read_checkpoint(tmp_path / 'none.pth')


def test_checkpoints_of_mmengines_training_can_be_read(tmp_path):
    from mmengine.logging import HistoryBuffer
    history = HistoryBuffer()
    history.update(np.float64(1.))
    torch.save(
        dict(
            state_dict=dict(a=torch.ones(2)),
            message_hub=dict(
                log_scalars={'train/loss': history},
                runtime_info=dict(best=np.float64(.5), ids=np.arange(3)))),
        tmp_path / 'epoch_1.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    content = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert content['state_dict']['a'].tolist() == [1., 1.]


def test_plain_values_pass_weights_only_loading(tmp_path):

    class Name(str):
        pass

    value = plain({Name('a'): (torch.tensor(1.5), Name('b'), {3}, None)})
    assert value == {'a': [1.5, 'b', [3], None]}
    assert type(value['a'][1]) is str
    torch.save(value, tmp_path / 'v')
    assert torch.load(tmp_path / 'v', weights_only=True) == value
    pickle.dumps(value)


def test_the_hash_is_that_of_the_contents(tmp_path):
    (tmp_path / 'a').write_bytes(b'abc')
    assert file_hash(tmp_path / 'a') == (
        'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad')


def test_an_address_of_a_file_is_its_path(tmp_path):
    path = tmp_path / 'my weights.pth'
    assert local_checkpoint(path.as_uri()) == path
    assert '%20' in path.as_uri()
    assert local_checkpoint(f'file://localhost{path}') == path
    assert local_checkpoint('a:b.pth').name == 'a:b.pth'


@pytest.mark.parametrize('source', [
    's3://bucket/x.pth', 'gs://bucket/x.pth', 'open-mmlab://x',
    'file://elsewhere/x.pth'
])
def test_other_addresses_are_refused(source):
    with pytest.raises(QuantError, match=f'{source} is no .*https://'):
        local_checkpoint(source)
