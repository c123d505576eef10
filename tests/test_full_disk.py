"""A full disk: one line that names the file, and nothing that was is lost."""
import contextlib
import errno
import io
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isvit_det.calibration.store import ActivationPool, ActivationStore
from isvit_det.commands.cells import Cell
from isvit_det.commands.console import log_errors_told_once, run_command
from isvit_det.core import files
from isvit_det.core.errors import QuantError
from isvit_det.core.files import PROBE, check_writable, write_atomically
from isvit_det.inputs.configs import config_errors
from isvit_det.inputs.data_errors import TestWatch
from tests.processes import in_process

FULL = OSError(errno.ENOSPC, 'No space left on device')


@pytest.fixture
def limit():
    """Sets how long files may get, as a disk that is full there."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))

    yield set_
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize('size', [100, 9000])
def test_torchs_writer_says_why_and_the_older_file_stays(
        tmp_path, limit, size):
    path = tmp_path / 'file.pth'
    write_atomically(path, lambda file: file.write(b'old'))
    limit(size)
    with pytest.raises(QuantError, match='file.pth .*File too large'):
        write_atomically(
            path, lambda file: torch.save(
                dict(a=torch.ones(9999), b='x' * 9999), file))
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['file.pth']


def test_a_disk_without_room_is_known_before_any_work(tmp_path, limit):
    check_writable(tmp_path)
    limit(PROBE // 2)
    with pytest.raises(QuantError) as caught:
        check_writable(tmp_path)
    # It is the folder that the user has to do with.
    assert str(caught.value).startswith(
        f'{tmp_path} could not be written ([Errno 27] File too large)')
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    names = [f'.a[1].{ended.pid}.xyz', f'.a[1].{os.getpid()}.xyz', '.a1.x.y']
    for name in names:
        (tmp_path / name).write_text('half')
    write_atomically(tmp_path / 'a[1]', lambda file: file.write(b'whole'))
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], 'a[1]'])


def test_activations_beyond_the_disk_leave_it_as_it_was(tmp_path, limit):
    pool = ActivationPool(tmp_path / 'spilled', 0)
    store = ActivationStore(pool)
    store.append(torch.ones(10))
    limit(1000)
    with pytest.raises(QuantError, match='spilled.*File too large'):
        store.append(torch.ones(1000))
    pool.clear()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('context', [config_errors, TestWatch().errors])
def test_a_full_disk_is_no_mistake_of_the_config_or_the_data(context):
    with pytest.raises(QuantError, match='^a file could not be written'):
        with context():
            raise FULL


@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, 'No space left', 'log.json'),
    OSError(errno.EDQUOT, 'Quota exceeded', 'log.json'),
    PermissionError(errno.EACCES, 'Permission denied', 'log.json'),
])
def test_what_cannot_be_written_is_one_line(capsys, error):

    def work():
        raise error

    assert run_command(work) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and 'log.json' in line


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_log_on_a_full_disk_is_told_of_once(capsys):
    logger = logging.getLogger('on_a_full_disk')
    handler = logging.FileHandler('/dev/full')
    logger.addHandler(handler)
    with log_errors_told_once():
        logger.warning('one')
        logger.warning('two')
    logger.removeHandler(handler)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('warning: /dev/full could not be written (No sp')
    assert 'handleError' not in vars(logging.FileHandler)


def run_limited(argv, sizes, path):
    """Run with files limited to several sizes, then without a limit.

    Args:
        argv: of the command.
        sizes: in bytes.
        path: of a file that gets exit status and errors of each run.
    """
    # Its models are registered with timm.
    from tests.tools.test_quantize_cls import main
    files.PROBE = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = []
    for size in [*sizes, soft]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            status = main(argv)
        found.append([status, errors.getvalue()])
    path.write_text(json.dumps(found))
    return 0


@pytest.mark.slow
def test_a_classifiers_run_goes_on_when_there_is_room(tmp_path):
    from isvit_det.core.digests import checksum
    from isvit_det.datasets.drawn import generate
    from tests.tools.test_quantize_cls import CLASSES, MODEL, timm
    generate(tmp_path / 'data', dict(train=6, val=2))
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=CLASSES)
    torch.save(model.state_dict(), tmp_path / 'w.pth')

    def run(name, sizes):
        argv = [
            MODEL, '--weights', tmp_path / 'w.pth', '--calib',
            tmp_path / 'data/train', '--val', tmp_path / 'data/val',
            '--calib-images', 5, '--iters', 2, '--store-gb', 0, '--work-dir',
            tmp_path / name
        ]
        path = tmp_path / f'{name}.json'
        status, printed = in_process(run_limited, [*map(str, argv)], sizes,
                                     path)
        assert status == 0, printed
        *refused, (status, _) = json.loads(path.read_text())
        assert status == 0
        content = torch.load(tmp_path / name / 'packed.pth', weights_only=True)
        return refused, checksum(content['state_dict'])

    _, expected = run('undisturbed', [])
    # Room for no spilled activations, and for no unit.
    refused, found = run('full', [3000, 14000])
    for (status, errors), path in zip(refused, ['spilled', 'units']):
        lines = [line for line in errors.splitlines() if 'rror: ' in line]
        assert status == 2 and 'Traceback' not in errors
        line, = lines
        assert line.startswith('error: ') and path in line, line
    assert found == expected


def test_a_damaged_report_of_a_cell_is_made_again(tmp_path):
    weights = tmp_path / 'w.pth'
    weights.write_bytes(b'x')
    cell = Cell(['tool.py'], [], tmp_path, weights)
    for text in ('', '[', '[]', '{}', '{"provenance": 3}'):
        (tmp_path / 'result.json').write_text(text)
        (tmp_path / 'result.argv.json').write_text('[]')
        assert cell.find() is None
