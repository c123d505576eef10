"""tools/benchmark_det.py: what it measures, and what it refuses."""
import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from isvit_det.commands import benchmark_det
from isvit_det.commands.benchmark_det import main, read_subject
from isvit_det.core.layers import quantized_layers, quantizers
from isvit_det.engine.speed import predicting, running, time_layers
from isvit_det.runtime import engine
from isvit_det.runtime.build import NoLibrary
from isvit_det.runtime.engine import VARIABLE


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def threads():
    """What the command sets is given back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def subject(tiny, packed):
    return read_subject(tiny.config, packed, None)


def rows_of(out):
    """Tables of what was printed, as lists of rows."""
    tables = [[]]
    for line in out.splitlines():
        if line.startswith('| '):
            cells = [cell.strip() for cell in line[1:-1].split('|')]
            tables[-1].append(cells)
        elif tables[-1]:
            tables.append([])
    return [[dict(zip(table[0], row)) for row in table[2:]] for table in tables
            if table]


@pytest.mark.slow
def test_engines_threads_and_memory_are_compared(tiny, packed, tmp_path, capfd,
                                                 threads):
    out = tmp_path / 'out.json'
    assert main([
        tiny.config, packed, '--rounds', '1', '--threads', '1', '2',
        '--layers', '--json',
        str(out)
    ]) == 0
    shown = capfd.readouterr()
    # What packages say when a child process imports them.
    assert shown.err == ''
    times, layers = rows_of(shown.out)
    assert [(row['engine'], row['threads']) for row in times
            ] == [(name, count) for count in '12'
                  for name in ('float', 'simulation', 'native')]
    assert all(float(row['peak GB']) > .1 for row in times)
    content = json.loads(out.read_text())
    assert content['engine']['engine'] == 'native'
    for row, found in zip(times, content['results']):
        assert found['wall'] > 0 and found['processor'] > 0
        assert row['wall s'] == f'{found["wall"]:.3g}'
    base = content['results'][0]
    other = content['results'][2]
    assert other['speedup'] == base['wall'] / other['wall']
    # The neck and the RPN are among them.
    assert {'neck.fpn_convs.0.conv',
            'rpn_head.rpn_conv'} <= {row['layer']
                                     for row in layers}
    found = [float(row['native ms']) for row in layers]
    assert found == sorted(found, reverse=True)


def test_each_engine_is_what_it_says(subject, monkeypatch):
    model, batch = subject
    counts = quantizers(model).values()

    def ran(name):
        for quantizer in counts:
            quantizer.num_calls = 0
        native = []
        for kind in (engine.NativeConv, engine.NativeLinear):
            call = kind.__call__
            monkeypatch.setattr(
                kind,
                '__call__',
                lambda self, x, call=call:
                (native.append(1), call(self, x))[1])
        predicting(model, batch, name)()
        monkeypatch.undo()
        calls = sum(quantizer.num_calls for quantizer in counts)
        return calls > 0, bool(native)

    assert ran('float') == (False, False)
    assert ran('simulation') == (True, False)
    assert ran('native') == (True, True)


def test_an_engine_is_given_back_on_error(subject):
    model = subject.model
    with pytest.raises(RuntimeError):
        with running(model, model.runtime, 'float'):
            assert not any(q.enabled for q in quantizers(model).values())
            raise RuntimeError
    assert all(q.enabled for q in quantizers(model).values())
    assert model.runtime.engine == 'native' and torch.is_grad_enabled()


def test_layers_are_timed_for_all_their_calls(subject):
    rows = time_layers(*subject, ['float', 'native'], 1)
    calls = {row['name']: row['calls'] for row in rows}
    assert calls['rpn_head.rpn_conv'] == 5
    assert calls['backbone.patch_embed.projection'] == 1
    assert all(row['seconds']['native'] > 0 for row in rows)
    assert not any(
        layer._forward_hooks for layer in quantized_layers(subject.model))


def test_noise_has_the_size_that_the_config_tests(subject):
    # Longest and shortest side of 96 and 80 pixels.
    assert subject.shape == (3, 80, 96)


def test_an_image_is_read_as_the_test_does(tiny, packed, tmp_path):
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), np.full((40, 60, 3), 7, np.uint8))
    found = read_subject(tiny.config, packed, str(path))
    assert found.shape == (3, 64, 96)
    assert found.batch['data_samples'][0].ori_shape == (40, 60)


def test_a_config_of_the_calibration_does_as_well(tiny, packed):
    config = packed.replace('packed.pth', 'tiny.py')
    assert Config.fromfile(config).model.type == 'isvit_det.quantized_detector'
    assert read_subject(config, packed, None).model.runtime.engine == 'native'


def test_without_a_library_what_there_is_is_compared(tiny, packed, capsys,
                                                     monkeypatch, threads):

    def fail():
        raise NoLibrary('no C++ compiler was found')

    monkeypatch.setattr(engine, 'supported_isas', fail)
    monkeypatch.setattr(benchmark_det, 'call_elsewhere', lambda *args: 1)
    assert main([tiny.config, packed, '--rounds', '1']) == 0
    out = capsys.readouterr().out
    assert 'there is no native library: no C++ compiler was found' in out
    assert [row['engine']
            for row in rows_of(out)[0]] == ['float', 'simulation']


@pytest.mark.parametrize('change, words', [
    (dict(checkpoint='no.pth'), 'no.pth'),
    (dict(image='no.png'), '--image: there is no file no.png'),
    (dict(threads='0'), '--threads: 0 is not allowed'),
    (dict(rounds='0'), '--rounds: 0 is not allowed'),
    (dict(config='no.py'), 'config: there is no file no.py'),
])
def test_what_cannot_be_used_is_named_in_one_line(tiny, packed, capsys, change,
                                                  words):
    given = {'config': tiny.config, 'checkpoint': packed, **change}
    argv = [given.pop('config'), given.pop('checkpoint')]
    for name, value in given.items():
        argv += [f'--{name}', value]
    assert main(argv) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line


def test_a_float_checkpoint_is_refused(tiny, capsys):
    assert main([tiny.config, tiny.checkpoint]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert 'is a float one' in line and 'quantize_det' in line


def test_what_is_no_image_is_refused(tiny, packed, tmp_path, capsys):
    path = tmp_path / 'text.png'
    path.write_text('no image')
    assert main([tiny.config, packed, '--image', str(path)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('error: --image: ') and 'text.png' in line


def test_an_engine_of_the_environment_is_refused(tiny, packed, monkeypatch,
                                                 capsys):
    monkeypatch.setenv(VARIABLE, 'native')
    assert main([tiny.config, packed]) == 2
    assert VARIABLE in capsys.readouterr().err
