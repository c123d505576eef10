"""benchmarks/methods.py: what it runs again, and the float model's row."""
import sys

import pytest

from benchmarks import methods


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Runs the benchmark; cells are made up, and kept for the next run.

    What it returns are the folders of cells that ran, and what was printed.
    """
    kept = {}

    class Made:

        def __init__(self, tool, argv, folder, weights, report=None):
            self.name = str(folder.relative_to(tmp_path)), report
            self.argv = argv

        def find(self):
            return kept.get((self.name, str(self.argv)))

        def run(self):
            if self.find() is None:
                ran.append(self.name[0].split('/')[-1])
                ap = dict(box_ap=.5, mask_ap=.4)
                kept[self.name, str(self.argv)] = dict(
                    method=self.argv[self.argv.index('--method') + 1],
                    bits='w4a4',
                    scope='backbone',
                    backbone_error=.1,
                    seconds=dict(calibration=1),
                    quantized=ap,
                    float=None if '--no-float-eval' in self.argv else dict(
                        box_ap=.625))
            return self.find()

    monkeypatch.setattr(methods, 'Cell', Made)

    def run(*argv):
        nonlocal ran
        ran = []
        monkeypatch.setattr(sys, 'argv',
                            ['methods', '--work-dir',
                             str(tmp_path), *argv])
        methods.main()
        return ran, capsys.readouterr().out

    ran = []
    return run


FEW = '--methods', 'isvit', '--seeds', '0', '1'


def test_cells_are_not_run_again_in_another_order(table):
    ran, first = table(*FEW, '--bits', 'w3a3', 'w4a4')
    assert len(ran) == 4
    assert '62.5' in first.splitlines()[3]
    ran, second = table(*FEW, '--bits', 'w4a4', 'w3a3')
    assert ran == []
    assert sorted(second.splitlines()) == sorted(first.splitlines())


def test_the_float_model_is_measured_where_no_cell_tells(table):
    table(*FEW)
    ran, out = table('--methods', 'isvit', '--seeds', '1')
    assert ran == ['float']
    assert '62.5' in out.splitlines()[3]
