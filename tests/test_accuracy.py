"""benchmarks/accuracy.py: its cells, what it resumes, what it prints."""
import json
import sys

import pytest

from benchmarks import accuracy, accuracy_runs
from benchmarks.accuracy import Accuracy, Key, ablations, keys
from isvit_det.core.settings import QuantConfig, SOSConfig


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the benchmark with some arguments; cells are made up.

    What it returns are the arguments of each folder's last run.
    """
    monkeypatch.delenv('COCO_ROOT', raising=False)
    monkeypatch.delenv('DEIT_TINY', raising=False)
    made, kept = {}, {}

    class Made:

        def __init__(self, command, argv, folder, weights, report=None):
            self.command, self.argv, self.folder = command, argv, folder

        def run(self):
            made[self.folder.name] = self.argv
            ap = .5 + .01 * len(made)
            return dict(
                seconds={},
                quantized=dict(box_ap=ap, mask_ap=ap),
                float=dict(box_ap=.9, mask_ap=.8),
                backbone_error=.02)

    def keep(config, weights, whole, packed):
        kept[packed.parent.name] = whole

    monkeypatch.setattr(accuracy, 'Cell', Made)
    monkeypatch.setattr(accuracy, 'keep_backbone', keep)

    def run(*args):
        made.clear()
        argv = ['accuracy', '--work-dir', str(tmp_path), *args]
        monkeypatch.setattr(sys, 'argv', argv)
        accuracy.main()
        return list(made.values())

    run.kept = kept
    return run


# Names of the images that the record is of.
COCO = '1764347d93442420'
FEW = ('--models', 'swin', 'deit-tiny', '--bits', 'w3a3', '--seeds', '0', '1',
       '--no-ablations')


def name_files(monkeypatch, root, weights):
    """Name a COCO folder and a file of weights, which nothing reads."""
    weights.touch()
    monkeypatch.setenv('COCO_ROOT', str(root))
    monkeypatch.setenv('DEIT_TINY', str(weights))


def test_cells_that_are_done_are_not_run_again(bench, tmp_path, capsys):
    made = bench(*FEW)
    # The float model; three methods, two scopes, two seeds.
    assert len(made) == 13
    lines = (tmp_path / 'cells.jsonl').read_text().splitlines()
    assert len({json.loads(line)['id'] for line in lines}) == 13
    first = capsys.readouterr().out
    assert 'deit-tiny: skipped' in first and '2 of 2' in first
    float_row, = [line for line in first.splitlines() if 'float' in line]
    assert ' 90.0 |' in float_row and ' 80.0 |' in float_row
    # Means and spreads of two seeds: cells 2 and 8 are one row.
    assert '| 55.0 ± 4.2 |' in first
    assert bench(*FEW) == []
    assert capsys.readouterr().out == first
    assert len(bench(*FEW, '--iters', '50')) == 13


def test_without_time_no_cell_is_run_and_all_are_named(bench, capsys):
    assert bench(*FEW, '--budget', '0') == []
    out = capsys.readouterr().out
    assert '0 of 2' in out and '13 of 13 cells not run: --budget' in out


@pytest.mark.parametrize('rest', ['{"id": "{', '{"id": "{\\"bits\\": 3}'])
def test_a_line_that_was_cut_off_is_of_a_cell_that_is_run_again(
        rest, bench, tmp_path):
    bench(*FEW)
    path = tmp_path / 'cells.jsonl'
    _, *kept = path.read_text().splitlines()
    path.write_text('\n'.join([*kept, rest]))
    assert len(bench(*FEW)) == 1
    assert bench(*FEW) == []


def test_a_model_without_its_file_is_skipped(bench, tmp_path, monkeypatch,
                                             capsys):
    monkeypatch.setenv('COCO_ROOT', str(tmp_path))
    monkeypatch.setenv('DEIT_TINY', str(tmp_path / 'none.pth'))
    assert bench(*FEW, '--budget', '0') == []
    assert 'deit-tiny: skipped' in capsys.readouterr().out


def test_tuning_stays_on_the_train_split(bench):
    made = bench(*FEW, '--tune')
    assert len(made) == 13
    for argv in made:
        options = argv[argv.index('--cfg-options'):]
        assert any('instances_train' in option for option in options)
        assert not any('_val' in x or '=val' in x for x in options)


def test_a_classifier_is_tuned_on_the_train_split(bench, tmp_path,
                                                  monkeypatch):
    name_files(monkeypatch, tmp_path, tmp_path / 'tiny.pth')
    for words in ([], ['--tune']):
        made = bench('--models', 'deit-tiny', '--bits', 'w3a3', '--seeds', '0',
                     *words)
        for argv in made:
            assert f'{tmp_path}/train2017' in argv
            assert (f'{tmp_path}/val2017' in argv) == (not words)
        # Single options are for choosing settings; what is left of the
        # images would depend on their number.
        assert any('sos.rotate_heads=False' in argv
                   for argv in made) == bool(words)
        assert {argv[argv.index('--calib-images') + 1]
                for argv in made} == {'64'}
        iters = {argv[argv.index('--iters') + 1] for argv in made}
        assert iters == ({'0', '100', '500'} if words else {'0', '100'})
        assert (len(made) == 3) == (not words)


@pytest.mark.parametrize('split', ['train2017', 'val2017'])
def test_cells_are_of_the_images_that_are_there(bench, tmp_path, monkeypatch,
                                                split):
    root = tmp_path / 'coco'
    (root / split).mkdir(parents=True)
    name_files(monkeypatch, root, tmp_path / 'tiny.pth')
    few = ('--models', 'deit-tiny', *FEW[3:])
    assert len(bench(*few)) == 6
    assert bench(*few) == []
    (root / split / '000000000009.jpg').touch()
    assert len(bench(*few)) == 6


def test_options_are_chosen_on_both_detectors(bench):
    for words in ([], ['--tune']):
        made = bench('--models', 'deit', '--bits', 'w4a4', '--seeds', '0',
                     *words)
        assert any('sos.weigh_locations=False' in argv
                   for argv in made) == bool(words)


def test_scopes_share_a_calibration(bench):
    made = bench(*FEW)
    whole, = [
        argv for argv in made[:7] if 'isvit' in argv and '--seed' in argv
    ]
    backbone, = [
        argv for argv in made[:7] if 'isvit' in argv and '--seed' not in argv
    ]
    assert '--seed' in whole and whole[whole.index('--scope') +
                                       1] == 'detector'
    assert '--seed' not in backbone and backbone[1].endswith('packed.pth')
    assert backbone[backbone.index('--scope') + 1] == 'backbone'
    # Each of the calibration of its own method and seed.
    assert len(bench.kept) == 6
    for name, whole in bench.kept.items():
        assert whole.name == 'packed.pth'
        assert whole.parent.name == name.replace('backbone', 'detector')


def test_an_ablation_changes_one_setting():
    for name, changed in ablations('detector').items():
        assert len(changed) == 1 and name.startswith('isvit, ')
        (key, value), = changed.items()
        part, key = key.split('.')
        ours = QuantConfig()
        if part == 'sos':
            ours = SOSConfig.from_dict({}, ours)
        assert getattr(ours, key) != value


def test_ablations_come_after_all_methods(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['accuracy'])
    args = accuracy.parse_args()
    swin = accuracy.subjects(args)['swin']
    found = list(keys(args, dict(swin=swin)))
    order = [key.variant for key in found if key.extent == (64, 100)]
    assert order.pop(0) == 'float'
    num = len([name for name in order if name in accuracy_runs.METHOD_ROWS])
    assert all(name in accuracy_runs.METHOD_ROWS for name in order[:num])
    assert len(order) == num + 3 * 2 * len(ablations('detector'))
    # A detector has no token to weigh, a classifier no heads to correct.
    assert not any('weigh_tokens' in name for name in order)
    assert not any('correct_heads' in name for name in ablations('-'))
    # What only a classifier's preset turns on is tried the other way round.
    for option in ('mirror_images', 'rotate_heads'):
        assert ablations('-')[f'isvit, sos.{option} as published'] == {
            f'sos.{option}': False
        }
        assert ablations('detector')[f'isvit, sos.{option}=True'] == {
            f'sos.{option}': True
        }


def test_from_six_bits_up_only_the_default_is_run(monkeypatch):
    bits = ['w2a2', 'w4a8', 'w6a6', 'w8a8']
    monkeypatch.setattr(sys, 'argv', ['accuracy', '--bits', *bits])
    args = accuracy.parse_args()
    swin = accuracy.subjects(args)['swin']
    for low, high in zip(bits[:2], bits[2:]):
        variants = {
            key.variant
            for key in keys(args, dict(swin=swin)) if key.bits == low
        }
        assert variants > set(accuracy_runs.METHOD_ROWS)
        found = [
            key for key in keys(args, dict(swin=swin)) if key.bits == high
        ]
        assert {key.variant for key in found} == {'isvit'}
        assert {key.scope for key in found} == {'detector', 'backbone'}
        assert len(found) == 2 * 3


def test_other_images_and_iterations(bench, capsys):
    made = bench('--models', 'swin', '--bits', 'w4a4')
    runs = [
        tuple(argv[argv.index(flag) + 1]
              for flag in ('--method', '--calib-images', '--iters'))
        for argv in made if '--seed' in argv
    ]
    assert {runs.count(('isvit', images, '100'))
            for images in ('16', '256')} == {1}
    assert runs.count(('isvit', '64', '0')) == 1
    # With and without stage 1.
    assert runs.count(('isvit', '64', '500')) == 2
    assert runs.count(('isvit_paper', '64', '500')) == 1
    table = capsys.readouterr().out.split(
        'swin, scope detector, images and iterations\n\n')[1]
    lines = [line.split('|')[2:6] for line in table.splitlines()[2:7]]
    assert [tuple(map(str.strip, line)) for line in lines] == [
        ('isvit', '16', '100', '1 of 1'),
        ('isvit', '64', '0', '1 of 1'),
        # The same seed as the others.
        ('isvit', '64', '100', '1 of 1'),
        ('isvit', '64', '500', '1 of 1'),
        ('isvit', '256', '100', '1 of 1'),
    ]


def test_an_ablation_is_compared_on_its_own_seeds(bench, tmp_path, capsys):
    bench('--models', 'swin', '--bits', 'w4a4')
    path = tmp_path / 'cells.jsonl'
    kept = []
    for line in path.read_text().splitlines():
        cell = json.loads(line)
        key = json.loads(cell['id'])
        if key['variant'] == 'isvit':
            cell['box_ap'] = .1 * key['seed']
        if 'closed_form_start' in key['variant']:
            if key['seed'] == 0:
                continue
            cell['box_ap'] = .1 * key['seed'] - .001
        kept.append(json.dumps(cell) + '\n')
    path.write_text(''.join(kept))
    capsys.readouterr()
    bench('--models', 'swin', '--bits', 'w4a4', '--budget', '0')
    row, = [
        line for line in capsys.readouterr().out.splitlines()
        if 'closed_form_start' in line
    ]
    assert '2 of 3 | -0.1 ± 0.0' in ' '.join(row.split())


def test_the_settings_of_an_ablation_reach_the_tool(bench, monkeypatch):
    made = bench('--models', 'swin', '--bits', 'w3a3', '--seeds', '0')
    found = [argv for argv in made if '--cfg-options' in argv]
    # One is run with more iterations as well.
    assert len(found) == len(ablations('detector')) + 1
    text = ' '.join(' '.join(argv) for argv in found)
    assert ' quant.exponent=integer' in text
    assert ' sos.closed_form_start=False' in text
    assert ' quant.percentiles=0.999,0.9999,0.99999' in text


def test_the_page_shows_what_was_measured(bench, tmp_path, monkeypatch,
                                          capsys):
    record = accuracy.ROOT / 'benchmarks/measured/cells.jsonl'
    (tmp_path / 'cells.jsonl').write_text(record.read_text())
    # Stand-ins for the user's files: nothing is run.
    weights = {
        'deit_tiny.pth': '02b279d8dea80288',
        'float.pth': 'f714ecb4d3df7a83'
    }
    hash_of = accuracy.file_hash
    monkeypatch.setattr(accuracy, 'file_hash',
                        lambda path: weights.get(path.name) or hash_of(path))
    monkeypatch.setattr(accuracy, 'hash_names', lambda root: COCO)
    name_files(monkeypatch, tmp_path, tmp_path / 'deit_tiny.pth')
    learned = accuracy_runs.Subject(
        '', tmp_path / 'float.pth', ('detector', 'backbone'), images=tmp_path)
    known = accuracy.subjects
    monkeypatch.setattr(accuracy, 'subjects',
                        lambda args: dict(known(args), coco60=learned))
    assert not bench('--budget', '0')
    page = (accuracy.ROOT / 'docs/accuracy.md').read_text()
    tables = [
        part for part in capsys.readouterr().out.split('\n\n')
        if part.startswith('|')
    ]
    assert len(tables) == 6
    for table in tables:
        assert table.strip() in page, table


def test_weights_are_part_of_a_cell(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['accuracy', '--work-dir', str(tmp_path)])
    found = Accuracy(accuracy.parse_args())
    one, other = (
        found.id(Key(name, 'w3a3', 'backbone', 'isvit', 0, 64, 100))
        for name in ('swin', 'deit'))
    assert json.loads(one)['weights'] != json.loads(other)['weights']
