"""The time that runs of quantize_det will take."""
import json

import pytest

from isvit_det.commands import estimate
from isvit_det.commands.cells import Cell
from isvit_det.core.errors import QuantError
from isvit_det.core.settings import SOSConfig
from tests.engine.tiny import make_tiny

# A calibration takes a second, 2 for each image and .5 for each iteration; an
# evaluation takes 3 for each of 2 images.
STAND_IN = '''
import hashlib, json, pathlib, sys
config, checkpoint, _, images, _, iters, *options = sys.argv[1:]
assert options[-3] == 'test_dataloader.dataset.indices=2', options
folder = pathlib.Path(options[-1])
folder.mkdir(parents=True)
print('shown')
digest = hashlib.sha256(pathlib.Path(checkpoint).read_bytes()).hexdigest()
(folder / 'result.json').write_text(json.dumps(dict(
    seconds=dict(calibration=1 + 2 * int(images) + int(iters) / 2,
                 float_evaluation=6, quantized_evaluation=6),
    provenance=dict(float_checkpoint_sha256=digest))))
'''


@pytest.fixture
def cell(tmp_path):
    tool = tmp_path / 'stand_in.py'
    tool.write_text(STAND_IN)
    weights = tmp_path / 'w.pth'
    weights.write_text('w')
    return Cell([str(tool)], ['x.py', str(weights), '--bits', 'w4a4'],
                tmp_path / 'table/a', weights)


@pytest.mark.parametrize('iters, seconds', [(100, 1 + 2 * 1024 + 50),
                                            (0, 1 + 2 * 1024)])
def test_short_runs_are_extrapolated_and_kept(cell, iters, seconds,
                                              monkeypatch, capfd):
    monkeypatch.setattr(estimate, 'planned',
                        lambda argv: estimate.Work(1024, iters, 5000))
    found = estimate.estimate(cell)
    assert found.calibration == seconds
    assert found.float_evaluation == found.quantized_evaluation == 15000
    # The stand-in would not make its folder again.
    assert estimate.estimate(cell) == found
    assert capfd.readouterr() == ('', '')
    assert not cell.folder.exists()


def test_what_cannot_be_estimated_is_named(cell, monkeypatch, capsys):
    monkeypatch.setattr(estimate, 'planned',
                        lambda argv: estimate.Work(4, 2, 2))
    broken = Cell(['-c', 'raise SystemExit("error: it is bad")'], cell.argv,
                  cell.folder.with_name('b'), cell.weights)
    estimate.announce({'good': cell, 'broken': broken})
    _, good, bad, total = capsys.readouterr().out.splitlines()
    assert good == ('  good: about 22 s (float evaluation 6 s, calibration '
                    '10 s, quantized evaluation 6 s)')
    assert bad.startswith('  broken: no estimate: ') and 'it is bad' in bad
    assert total == ('about 22 s in all on this machine, and 1 without an '
                     'estimate')


def test_the_work_is_that_of_the_configured_run(tmp_path):
    tiny = make_tiny(tmp_path)
    argv = [tiny.config, tiny.checkpoint, '--bits', 'w4a4']
    annotations, = tiny.data.rglob('*val*.json')
    num_images = len(json.loads(annotations.read_text())['images'])
    assert estimate.planned([*argv, '--iters',
                             '7']) == estimate.Work(SOSConfig.num_images, 7,
                                                    num_images)
    assert estimate.planned([*argv, '--method', 'repq']).iters == 0
    with pytest.raises(QuantError, match='w9a9'):
        estimate.planned([*argv, '--bits', 'w9a9'])
