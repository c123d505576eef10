"""tools/publish_float.py: what is kept, and what is refused."""
import runpy

import torch

from tests.engine.tiny import REPO

main = runpy.run_path(str(REPO / 'tools/publish_float.py'))['main']


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
