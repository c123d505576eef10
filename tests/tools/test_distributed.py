"""Two processes calibrate as one does, and share the evaluation."""
import json
import os
import socket
import subprocess
import sys

import pytest

from tests.engine.tiny import REPO, make_tiny, same_file_state

# MMEngine's own launchers want a GPU for each process.
DRIVER = '''
import json, sys
import torch
from isvit_det.engine.command import main

torch.set_num_threads(1)
argv = json.loads(sys.argv[1])
if 'pytorch' in argv:
    torch.distributed.init_process_group('gloo')
sys.exit(main(argv))
'''


def start(argv, **environment):
    return subprocess.Popen([sys.executable, '-c', DRIVER,
                             json.dumps(argv)],
                            cwd=REPO,
                            env={
                                **os.environ,
                                **environment
                            },
                            stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            text=True)


@pytest.mark.slow
def test_two_processes_end_with_the_codes_and_ap_of_one(tmp_path):
    tiny = make_tiny(tmp_path)

    def command(folder, *more):
        return [
            tiny.config, tiny.checkpoint, '--scope', 'detector', '--iters',
            '3', '--calib-images', '4', '--work-dir',
            str(tmp_path / folder), *more
        ]

    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    shared = command('two', '--launcher', 'pytorch', '--cfg-options',
                     'model_wrapper_cfg.type=MMDistributedDataParallel',
                     'model_wrapper_cfg.device_ids=None')
    processes = [start(command('one'))]
    processes += [
        start(
            shared,
            RANK=str(rank),
            LOCAL_RANK='0',
            WORLD_SIZE='2',
            MASTER_ADDR='localhost',
            MASTER_PORT=str(port)) for rank in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
    assert ['| quantized' in output
            for output in outputs] == [True, True, False]
    one, two = (tmp_path / name for name in ('one', 'two'))
    assert same_file_state(one / 'packed.pth', two / 'packed.pth')
    alone, together = (
        json.loads((folder / 'result.json').read_text())
        for folder in (one, two))
    for name in ('float', 'quantized'):
        assert alone[name]['metrics'] == together[name]['metrics']
    assert together['backbone_error'] == pytest.approx(alone['backbone_error'])
    # Each process evaluates its half.
    calls = {site['name']: site['num_calls'] for site in together['sites']}
    assert calls['backbone.patch_embed.projection.input_quantizer'] == 2
    assert not (two / 'calibration').exists()
