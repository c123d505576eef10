"""publish_float: what is kept, and what is refused."""

import pytest
import torch

from isvit_det.checkpoint import save_packed
from isvit_det.commands.publish_float import main
from isvit_det.core.settings import QuantConfig
from tests.toy import toy


def work_dir(tmp_path):
    torch.save(
        dict(
            state_dict=dict(a=torch.ones(3).half(), n=torch.arange(2)),
            optimizer=dict(state={}),
            meta=dict(dataset_meta=dict(classes=('x', )), cfg='/home/me')),
        tmp_path / 'epoch_2.pth')
    (tmp_path / 'last_checkpoint').write_text('/moved/since/epoch_2.pth')
    return tmp_path


def test_weights_in_float32_and_class_names_are_kept(tmp_path, capsys):
    out = tmp_path / 'out' / 'float.pth'
    assert main([str(work_dir(tmp_path)), str(out)]) == 0
    content = torch.load(out, weights_only=True)
    assert content.keys() == {'state_dict', 'meta'}
    assert content['meta'] == dict(dataset_meta=dict(classes=['x']))
    assert content['state_dict']['a'].dtype == torch.float32
    assert content['state_dict']['n'].tolist() == [0, 1]
    assert '2 tensors' in capsys.readouterr().out


def test_a_folder_without_training_is_named(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / 'out.pth')]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and len(error.splitlines()) == 1


@pytest.mark.parametrize('state, words', [
    (dict(a=torch.tensor([1, float('nan')])), "'a' holds NaN"),
    (dict(a=torch.ones(1).to(torch.float8_e4m3fn)), "'a' is of torch.float8"),
    ({}, 'no weights'),
])
def test_what_is_no_float_detector_is_refused(tmp_path, capsys, state, words):
    try:
        torch.save(dict(state_dict=state), tmp_path / 'in.pth')
    except KeyError as error:
        pytest.skip(f'this torch does not write it: {error}')
    out = tmp_path / 'out.pth'
    assert main([str(tmp_path / 'in.pth'), str(out)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line
    assert not out.exists()


def test_a_packed_file_is_refused(tmp_path, capsys):
    model = toy()
    model.quant_config = QuantConfig()
    save_packed(model, tmp_path / 'in.pth', {}, {})
    out = tmp_path / 'out.pth'
    assert main([str(tmp_path / 'in.pth'), str(out)]) == 2
    assert 'give the float one' in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize('source', ['epoch_2.pth', '.'])
@pytest.mark.parametrize('out', ['epoch_2.pth', 'link.pth'])
def test_the_checkpoint_that_is_read_is_not_written_over(
        tmp_path, capsys, source, out):
    path = work_dir(tmp_path) / 'epoch_2.pth'
    (tmp_path / 'link.pth').symlink_to(path)
    before = path.read_bytes()
    assert main([str(tmp_path / source), str(tmp_path / out)]) == 2
    assert 'is the file that is read' in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_folder_is_not_written_to_as_a_file(tmp_path, capsys):
    assert main([str(work_dir(tmp_path) / 'epoch_2.pth'), str(tmp_path)]) == 2
    assert f'out: {tmp_path} is a folder; give' in capsys.readouterr().err


@pytest.mark.parametrize('content', [b'\xff\xfe\x00', b'', b'\n'])
def test_a_note_of_no_checkpoint_is_one_line(tmp_path, capsys, content):
    (tmp_path / 'last_checkpoint').write_bytes(content)
    assert main([str(tmp_path), str(tmp_path / 'out.pth')]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert 'last_checkpoint names no checkpoint' in line
