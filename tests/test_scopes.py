"""benchmarks/scopes.py: the file of one scope from that of the other."""
import json

import pytest
import torch

from benchmarks.scopes import keep_backbone
from isvit_det.checkpoint import read_checkpoint
from isvit_det.commands.quantize_det import main
from isvit_det.packed.header import HEADER
from tests.engine.tiny import make_tiny


@pytest.mark.slow
def test_the_backbone_of_a_whole_detector_is_that_of_its_own_run(tmp_path):
    tiny = make_tiny(tmp_path)
    quant = ['--bits', 'w3a3', '--method', 'isvit']
    for scope in ('detector', 'backbone'):
        assert main([
            tiny.config, tiny.checkpoint, '--scope', scope, '--no-float-eval',
            '--iters', '2', '--calib-images', '3', '--work-dir',
            str(tmp_path / scope), *quant
        ]) == 0
    expected = tmp_path / 'backbone/packed.pth'
    packed = tmp_path / 'made/packed.pth'
    packed.parent.mkdir()
    keep_backbone(tiny.config, tmp_path / 'float.pth',
                  tmp_path / 'detector/packed.pth', packed)
    one, other = read_checkpoint(packed), read_checkpoint(expected)
    assert one['quant'] == other['quant'] and one['meta'] == other['meta']
    state = other['state_dict']
    assert one['state_dict'].keys() == state.keys()
    # Their headers tell of what they were made from.
    assert all(
        torch.equal(value, state[key])
        for key, value in one['state_dict'].items() if key != HEADER)
    # The benchmark evaluates it with the tool.
    assert main([
        tiny.config,
        str(packed), '--scope', 'backbone', '--work-dir',
        str(packed.parent), *quant
    ]) == 0
    results = [
        json.loads(path.read_text())['quantized']
        for path in (packed.parent / 'result_packed.json',
                     expected.parent / 'result.json')
    ]
    assert results[0]['metrics'] == results[1]['metrics']
