"""make bench-runtime: what it measures, records and leaves out."""
import argparse
import builtins
import json
import sys

import pytest
import torch

from benchmarks import runtime, runtime_page
from benchmarks.rivals import Unavailable, export
from benchmarks.runtime import default_engines, main, measure, record, rows
from benchmarks.runtime_subjects import (COMPILED, NATIVE, OPENVINO,
                                         OPENVINO_BF16, SUBJECTS, TORCH, Conv,
                                         Linear)
from isvit_det.core.errors import QuantError
from isvit_det.runtime.engine import VARIABLE

SMALL = {
    'linear': Linear('a linear layer', 2, (8, 16, 16)),
    'conv': Conv('a convolution', 1, (4, 8, 3, 6, 7))
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(runtime, 'SUBJECTS', SMALL)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(tmp_path):
    return argparse.Namespace(rounds=1, no_memory=True, work_dir=tmp_path)


@pytest.mark.parametrize('name', SMALL)
def test_a_subject_is_run_by_each_engine(small, tmp_path, name):
    line = measure(name, 'w4a4', 1, [TORCH, NATIVE], settings(tmp_path))
    assert list(line['results']) == [TORCH, NATIVE]
    assert line['native']['engine'] == 'native'
    assert line['native']['native_layers'] == 1
    assert line['missing'] == {}
    first, second = rows(line)
    ratio = line['results'][TORCH]['wall'] / line['results'][NATIVE]['wall']
    assert first['wall / native'] == f'{ratio:.2f}'
    assert second['wall / native'] == '1.00'


@pytest.mark.parametrize('name', SMALL)
def test_float_and_quantized_compute_about_the_same(small, tmp_path, name):
    subject = SMALL[name]
    expected = subject.load(TORCH, 'w8a8', 1, tmp_path).run()
    found = subject.load(NATIVE, 'w8a8', 1, tmp_path).run()
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < .02


def test_an_engine_that_is_not_installed_is_left_out_with_its_reason(
        small, tmp_path, monkeypatch, capsys):
    really = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name in ('onnx', 'openvino'):
            raise ImportError(name)
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', refuse)
    line = measure('linear', 'w4a4', 1, [OPENVINO, NATIVE], settings(tmp_path))
    assert list(line['results']) == [NATIVE]
    assert 'onnx is not installed' in line['missing'][OPENVINO]
    assert f'{OPENVINO} is left out' in capsys.readouterr().out


def test_a_model_that_cannot_be_exported_is_left_out_with_the_reason(
        tmp_path, monkeypatch):

    def refuse(*args, **kwargs):
        raise RuntimeError('operator Sort is not supported\nmore')

    monkeypatch.setitem(sys.modules, 'onnx', torch)
    monkeypatch.setattr(torch.onnx, 'export', refuse)
    with pytest.raises(Unavailable, match='cannot export it: .* supported$'):
        export(torch.nn.Identity(), torch.ones(1), tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


def test_a_line_of_the_record_is_replaced_by_a_new_one(tmp_path):
    path = tmp_path / 'record.jsonl'

    def line(subject, threads, rounds):
        return dict(
            subject=subject,
            bits='w4a4',
            threads=threads,
            rounds=rounds,
            machine=dict(cpu='one'))

    for one in (line('a', 1, 1), line('b', 1, 2), line('a', 2,
                                                       3), line('a', 1, 4)):
        record(path, one)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [one['rounds'] for one in lines] == [2, 3, 4]


def test_bf16_is_compared_where_the_cpu_has_it():
    assert COMPILED not in default_engines(['avx2'])
    assert OPENVINO_BF16 not in default_engines(['avx2'])
    assert OPENVINO_BF16 in default_engines(['avx2', 'amx_bf16'])


def test_an_engine_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, 'simulation')
    with pytest.raises(QuantError, match=VARIABLE):
        main(['--subjects', 'demo'])


def test_the_page_has_what_was_recorded_with_the_native_one_last(monkeypatch):
    results = {
        TORCH: dict(user=3., memory=5e6),
        NATIVE: dict(user=1.5, memory=2e6)
    }
    line = dict(
        subject='swin-t',
        title='Swin-T backbone',
        bits='w4a4',
        threads=1,
        results=results)
    layer = dict(line, subject=runtime_page.LAYERS[0], title='a layer')
    monkeypatch.setattr(runtime_page, 'read_record', lambda: [line, layer])
    assert runtime_page.models().splitlines()[2:] == [
        '| Swin-T backbone | w4a4 | 1 | 3 | 1.5 | 2.00 |'
    ]
    assert '| a layer | w4a4 | 1 | 3e+03 | 1.5e+03 | 2.00 |' in \
        runtime_page.layers()
    assert '| Swin-T backbone | 1 | 5 | 2 |' in runtime_page.memory()


def test_every_subject_has_a_title_and_a_name_of_its_own():
    titles = [subject.title for subject in SUBJECTS.values()]
    assert all(titles) and len(set(titles)) == len(titles)
