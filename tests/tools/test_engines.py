"""--engine of tools/quantize_det.py: whose figures a run reports."""
import json

import pytest

from isvit_det.commands.quantize_det import main
from isvit_det.engine import run as run_module
from isvit_det.evaluation.loop import Evaluation
from isvit_det.runtime import engine as engine_module
from isvit_det.runtime.build import NoLibrary
from isvit_det.runtime.engine import VARIABLE
from tests.engine.tiny import pack_tiny


@pytest.fixture(scope='module')
def packed(tiny, tmp_path_factory):
    """A packed file; its engine is left to the machine."""
    return pack_tiny(tiny, tmp_path_factory.mktemp('packed'))


@pytest.fixture
def evaluate(tiny, packed, tmp_path, capsys, monkeypatch):
    """Evaluates the packed file; its report, and the rows of the table."""
    monkeypatch.delenv(VARIABLE, raising=False)

    def run(engine, folder='work'):
        argv = ['--engine', engine, '--work-dir', str(tmp_path / folder)]
        assert main([tiny.config, str(packed), *argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [[cell.strip() for cell in line[1:-1].split('|')]
                for line in lines if line.startswith('| ')]
        report = tmp_path / folder / 'result_packed.json'
        table = [dict(zip(rows[0], row)) for row in rows[2:]]
        return json.loads(report.read_text()), table

    return run


@pytest.fixture
def predicted(monkeypatch):
    """Names of the models that predict, as they do."""
    names = []
    predict = Evaluation._predict

    def note(self):
        names.append((self.name, self.file.kept.stem))
        return predict(self)

    monkeypatch.setattr(Evaluation, '_predict', note)
    return names


BOTH = [('packed (simulation)', 'packed_simulation'), ('packed', 'packed')]


def test_both_engines_have_a_row_and_figures_of_their_own(
        evaluate, predicted, tmp_path):
    result, table = evaluate('both')
    assert predicted == BOTH
    other, = result['also_evaluated']
    assert other['engine']['engine'] == 'simulation'
    assert result['engine']['engine'] == 'native'
    rows = table[-2:]
    assert [row['engine'] for row in rows] == ['simulation', 'native']
    for row, found in zip(rows, (other, result)):
        assert row['model'] == 'quantized'
        assert row['box AP'] == f'{100 * found["quantized"]["box_ap"]:.1f}'
        assert float(row['s/image']) > 0
        assert all(site['num_calls'] > 0 for site in found['sites'])
    for engine, found in (('simulation', other), ('native', result)):
        alone, _ = evaluate(engine, engine)
        assert alone['also_evaluated'] == []
        assert alone['engine']['engine'] == engine
        assert alone['quantized'] == found['quantized']


def test_a_report_that_was_not_written_costs_no_prediction_of_either(
        evaluate, tiny, packed, predicted, tmp_path, monkeypatch):

    def fail(*args):
        raise OSError('no space')

    with monkeypatch.context() as patch:
        patch.setattr(run_module, 'write_result', fail)
        argv = ['--engine', 'both', '--work-dir', str(tmp_path / 'work')]
        assert main([tiny.config, str(packed), *argv]) == 2
    again, _ = evaluate('both')
    assert predicted == BOTH
    assert again['also_evaluated'][0]['seconds_per_image'] > 0
    predicted.clear()
    wanted, _ = evaluate('both', 'undisturbed')
    assert predicted == BOTH
    assert again['quantized'] == wanted['quantized']
    assert (again['also_evaluated'][0]['quantized'] == wanted['also_evaluated']
            [0]['quantized'])
    kept = sorted(path.name for path in (tmp_path / 'work').glob('pred*/*'))
    assert kept == ['packed.zip', 'packed_simulation.zip']


def test_predictions_of_another_engine_are_not_taken(evaluate, tiny, packed,
                                                     predicted, tmp_path,
                                                     monkeypatch):

    def fail(*args):
        raise OSError('no space')

    with monkeypatch.context() as patch:
        patch.setattr(run_module, 'write_result', fail)
        argv = ['--engine', 'simulation', '--work-dir', str(tmp_path / 'work')]
        assert main([tiny.config, str(packed), *argv]) == 2
    evaluate('native')
    assert len(predicted) == 2


def test_without_native_kernels_both_is_the_simulation_and_a_note(
        evaluate, predicted, monkeypatch):

    def fail():
        raise NoLibrary('no C++ compiler was found')

    monkeypatch.setattr(engine_module, 'supported_isas', fail)
    result, table = evaluate('both')
    assert predicted == [('packed', 'packed')]
    assert result['also_evaluated'] == []
    assert result['engine']['engine'] == 'simulation'
    assert [row['engine'] for row in table] == ['-', 'simulation']
    assert any(
        'not evaluated natively, since there is no native library' in note
        for note in result['notes'])


def test_both_engines_and_one_of_the_environment_are_refused(
        tiny, packed, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, 'native')
    assert main([tiny.config, str(packed), '--engine', 'both']) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --engine: 'both'") and VARIABLE in line


LINE = 'this test runs in engine'


@pytest.mark.parametrize('reported, now, is_told', [
    ('native', 'simulation', True),
    ('simulation', 'native', True),
    ('native', 'native', False),
])
def test_a_test_in_another_engine_than_the_reports_says_so(
        evaluate, packed, tmp_path, reported, now, is_told):
    path = packed.with_name('result.json')
    before = path.read_text()
    result = json.loads(before)
    result['engine']['engine'] = reported
    path.write_text(json.dumps(result))
    try:
        evaluate(now)
        log = (tmp_path / 'work/quantize_det.log').read_text()
        assert log.count(f"{LINE} '{now}'") == is_told
        assert log.count(f"are of '{reported}'") == is_told
        # That of another calibration says nothing.
        result['provenance']['seed'] = 99
        path.write_text(json.dumps(result))
        evaluate(now, 'other')
        assert LINE not in (tmp_path / 'other/quantize_det.log').read_text()
    finally:
        path.write_text(before)
