"""reproduce_table: the column, what is kept, and what is refused."""
import json
import re
import shutil

import pytest

from isvit_det.commands import reproduce_table, zoo
from isvit_det.commands.cells import Cell
from isvit_det.commands.reproduce_table import main
from isvit_det.inputs.configs import load_config
from tests.engine.tiny import REPO, make_tiny

# Stands for the tool: as fast, and fails on request.
STAND_IN = '''
import hashlib, json, pathlib, sys
config, checkpoint, *options = sys.argv[1:]
folder = pathlib.Path(options[-1])
with open(folder.parents[1] / 'runs', 'a') as runs:
    runs.write(folder.name + '!' * ('--verbose' in options) + '\\n')
content = pathlib.Path(checkpoint).read_bytes()
if content == b'bad':
    sys.exit('some warning\\nerror: it is bad')
folder.mkdir(parents=True, exist_ok=True)
digest = hashlib.sha256(content).hexdigest()
(folder / 'result.json').write_text(json.dumps(dict(
    float=dict(box_ap=.5, mask_ap=.4),
    quantized=dict(box_ap=.4512, mask_ap=.35),
    provenance=dict(float_checkpoint_sha256=digest))))
'''


def write_metafile(path, config, detectors):
    """A metafile of detectors with one config; the first was published."""
    models = []
    for detector in detectors:
        metrics = [{f'{kind} AP': 'not measured'} for kind in ('box', 'mask')]
        if detector == detectors[0]:
            metrics[0].update({
                'Published (I&S-ViT) box AP': 37.5,
                'Published (I&S-ViT) float box AP': 46
            })
            metrics[1].update({
                'Published (I&S-ViT) mask AP': 36.6,
                'Published (I&S-ViT) float mask AP': 41.6
            })
        models.append(
            dict(
                Config=config,
                Metadata=dict(Detector=detector, Bits='w4a4'),
                Results=[dict(Metrics=one) for one in metrics]))
    path.write_text(json.dumps(dict(Models=models)))
    return path


def read_table(path):
    """The rows of the file's table by detector, without it."""
    lines = [
        line for line in path.read_text().splitlines() if line.startswith('|')
    ]
    rows = [[cell.strip() for cell in line[1:-1].split('|')] for line in lines]
    return {row[0]: dict(zip(rows[0][1:], row[1:])) for row in rows[2:]}


class Bench:
    """A folder with a metafile, checkpoints, and runs of a stand-in."""

    def __init__(self, folder):
        self.folder = folder
        self.metafile = write_metafile(folder / 'meta.yml', 'some.py', 'abc')
        self.sources = folder / 'checkpoints'
        self.sources.mkdir()
        for name in 'ab':
            self.write(name, name)

    def write(self, name, content):
        (self.sources / f'{name}.pth').write_text(content)

    def run(self, *more, checkpoints=None):
        """Run the command; status, the runs that it took, and the table."""
        runs = self.folder / 'table/runs'
        runs.parent.mkdir(exist_ok=True)
        runs.write_text('')
        argv = [
            '--metafile',
            str(self.metafile), '--work-dir',
            str(runs.parent), '--checkpoints',
            *(checkpoints or [str(self.sources)]), '--no-estimate', *more
        ]
        status = main(argv)
        scope = 'backbone' if 'backbone' in more else 'detector'
        table = read_table(runs.parent / f'w4a4_{scope}_isvit.md')
        return status, runs.read_text().split(), table


@pytest.fixture
def bench(tmp_path, monkeypatch):
    tool = tmp_path / 'stand_in.py'
    tool.write_text(STAND_IN)
    monkeypatch.setattr(reproduce_table, 'QUANTIZE_DET', [str(tool)])
    return Bench(tmp_path)


def test_a_column_is_run_and_not_run_again(bench, capsys):
    status, runs, table = bench.run()
    assert (status, runs) == (0, ['a', 'b'])
    assert table == {
        'a': {
            'float': '50.0/40.0',
            'w4a4': '45.1/35.0',
            'published float': '46.0/41.6',
            'published w4a4': '37.5/36.6'
        },
        'b': {
            'float': '50.0/40.0',
            'w4a4': '45.1/35.0',
            'published float': '-',
            'published w4a4': '-'
        },
        'c': {
            'float': '-',
            'w4a4': 'not measured: no checkpoint given',
            'published float': '-',
            'published w4a4': '-'
        }
    }
    assert '| a ' in capsys.readouterr().out
    assert bench.run() == (0, [], table)


def test_several_columns_and_a_number_of_images(bench):
    entries = json.loads(bench.metafile.read_text())['Models']
    more = [dict(one, Metadata=dict(one['Metadata'], Bits='w3a3'))
            for one in entries]  # yapf: disable
    bench.metafile.write_text(json.dumps(dict(Models=entries + more)))
    argv = ['--bits', 'w4a4', 'w3a3', '--calib-images', '512']
    assert bench.run(*argv)[:2] == (0, ['a', 'b', 'a', 'b'])
    folder = bench.folder / 'table'
    assert read_table(folder /
                      'w3a3_detector_isvit.md')['a']['w3a3'] == ('45.1/35.0')
    noted = json.loads((folder / 'w3a3_detector_isvit/a/result.argv.json'
                        ).read_text())  # yapf: disable
    assert noted[noted.index('--calib-images') + 1] == '512'
    assert bench.run(*argv)[:2] == (0, [])


CONVERTER = '''
import pathlib, sys
source, out, option, config = sys.argv[1:]
assert (option, config) == ('--config', 'mmdet::x.py')
pathlib.Path(out).write_text('converted ' + pathlib.Path(source).read_text())
'''


def test_checkpoints_are_downloaded_and_converted_when_asked(
        bench, monkeypatch, tmp_path, capsys):
    loaded = []

    def download(address):
        loaded.append(address)
        path = tmp_path / 'cached.pth'
        path.write_text('release')
        return path

    tool = tmp_path / 'convert.py'
    tool.write_text(CONVERTER)
    run = zoo.run_command_line

    def convert(command, argv):
        assert command == ('-m', 'isvit_det', 'convert_it')
        run([str(tool)], argv)

    monkeypatch.setattr(zoo, 'local_checkpoint', download)
    monkeypatch.setattr(zoo, 'run_command_line', convert)
    content = json.loads(bench.metafile.read_text())
    content['Models'][2]['Metadata'].update({
        'Float Config':
        'mmdet::x.py',
        'Float Checkpoint':
        'https://example.org/c.pth',
        'Float Converter':
        'tools/convert_it.py'
    })
    bench.metafile.write_text(json.dumps(content))
    assert bench.run()[1] == ['a', 'b'] and not loaded
    argv = [
        '--metafile',
        str(bench.metafile), '--models', 'c', '--work-dir',
        str(bench.folder / 'table')
    ]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.endswith('add c=FILE to --checkpoints, or --download.\n')
    assert bench.run('--download', '--models', 'c')[1] == ['c']
    assert loaded == ['https://example.org/c.pth']
    converted = bench.folder / 'table/checkpoints/c.pth'
    assert converted.read_text() == 'converted release'
    assert bench.run('--download')[1] == []


def test_what_is_shown_is_passed_on_and_makes_no_other_run(bench):
    status, runs, table = bench.run('--verbose')
    assert (status, runs) == (0, ['a!', 'b!'])
    assert bench.run() == (0, [], table)


def test_other_weights_or_arguments_are_run_again(bench):
    bench.run()
    bench.write('b', 'others')
    assert bench.run()[:2] == (0, ['b'])
    more = ['--cfg-options', 'a.b=1']
    assert bench.run(*more)[1] == ['a', 'b']
    assert bench.run(*more)[1] == []
    _, runs, table = bench.run('--scope', 'backbone')
    assert runs == ['a', 'b'] and table['a']['published w4a4'] == '-'


def test_the_same_weights_elsewhere_are_not_run_again(bench):
    bench.run()
    moved = shutil.move(bench.sources / 'a.pth', bench.folder / 'moved.pth')
    _, runs, table = bench.run(checkpoints=[f'a={moved}'])
    assert runs == [] and table['a']['w4a4'] == '45.1/35.0'
    assert table['b']['w4a4'] == 'not measured: no checkpoint given'


def test_a_choice_of_models_forgets_no_other(bench):
    _, runs, table = bench.run('--models', 'b')
    assert runs == ['b']
    assert table['a']['w4a4'] == 'not measured: not among --models'
    _, runs, table = bench.run('--models', 'a')
    assert runs == ['a'] and table['b']['w4a4'] == '45.1/35.0'


def test_a_failure_is_reported_and_the_others_go_on(bench, capsys):
    bench.write('a', 'bad')
    status, runs, table = bench.run()
    assert (status, runs) == (1, ['a', 'b'])
    assert table['a']['w4a4'] == 'not measured: failed'
    assert table['b']['w4a4'] == '45.1/35.0'
    captured = capsys.readouterr()
    why = 'stand_in.py failed with exit status 1: error: it is bad'
    assert f'* a: {why}' in captured.out
    assert captured.err == 'some warning\n'
    bench.write('a', 'good')
    assert bench.run()[:2] == (0, ['a'])


def test_an_interruption_keeps_what_is_done(bench, monkeypatch, capsys):
    run = Cell.run

    def stop_at_b(cell):
        if cell.folder.name == 'b':
            raise KeyboardInterrupt
        return run(cell)

    with monkeypatch.context() as patch:
        patch.setattr(Cell, 'run', stop_at_b)
        status, runs, table = bench.run()
    assert (status, runs) == (130, ['a'])
    assert table['a']['w4a4'] == '45.1/35.0'
    assert table['b']['w4a4'] == 'not measured: not run yet'
    assert 'goes on from here' in capsys.readouterr().err
    assert bench.run()[:2] == (0, ['b'])


def test_a_report_of_other_weights_is_no_result(bench, tmp_path):
    """As when a packed file is given for a float one."""
    cell = Cell([str(tmp_path / 'stand_in.py')],
                ['x', str(bench.sources / 'a.pth')], tmp_path / 'table/one',
                bench.sources / 'b.pth')
    with pytest.raises(ValueError, match='give a float checkpoint'):
        cell.run()


@pytest.mark.parametrize('argv, message', [
    (['--bits', 'w5a5'], "--bits: 'w5a5' is not in .*expected"),
    (['--models', 'x'], "--models: 'x' is no detector"),
    (['--models', 'a'], "--models: no checkpoint of 'a' is given; add a=FILE"),
    (['--checkpoints', 'x=y'], "--checkpoints: 'x' is no detector"),
    (['--checkpoints', 'a=gone'], '--checkpoints: there is no file gone'),
    (['--checkpoints', 'gone'], "--checkpoints: 'gone' is no folder"),
    (['--checkpoints', '.'], '--checkpoints: no file in . is named'),
    (['--metafile', 'gone.yml'], '--metafile: there is no file gone.yml'),
    (['--metafile', 'bad.yml'], '--metafile: bad.yml is not in the form'),
    (['--metafile', 'mixed.yml'], "--bits: 'w4a4' is not in mixed.yml; "
     r"expected one of \['1', 'w'\]"),
    (['--metafile', 'text.yml'], '--metafile: text.yml is not in the form'),
    (['--data-root', 'gone'], '--data-root: gone is no folder; give the one'),
    (['--checkpoints', 'a=s3://b/c.pth'], 'checkpoint: s3://b/c.pth is no'),
    (['--checkpoints', 'a=file:///gone.pth'
      ], '--checkpoints: there is no file file:///gone.pth'),
])
def test_errors_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.yml').write_text('Models: [1]')
    (tmp_path / 'mixed.yml'
     ).write_text('Models: [{Metadata: {Bits: 1}}, {Metadata: {Bits: w}}]')
    model = json.loads(
        write_metafile(tmp_path / 'text.yml', 'some.py', 'a').read_text())
    model['Models'][0]['Results'][0]['Metrics'][
        'Published (I&S-ViT) box AP'] = 'high'
    (tmp_path / 'text.yml').write_text(json.dumps(model))
    metafile = write_metafile(tmp_path / 'meta.yml', 'some.py', 'a')
    assert main(['--metafile', str(metafile), *argv]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.match(f'error: {message}', error)
    assert not (tmp_path / 'work_dirs').exists()


@pytest.mark.parametrize('name', [
    'isvit/mask-rcnn_swin-t-p4-w7_fpn_isvit-w4a4_coco.py',
    'isvit/mask-rcnn_vit-b-p16_sfpn_isvit-w4a4_coco.py'
])
def test_data_are_read_from_another_folder(name):
    path = str(REPO / 'configs' / name)
    options = reproduce_table.data_options(
        load_config(path, None), '/elsewhere')
    cfg = load_config(path, dict(option.split('=') for option in options))
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        assert 'data/coco' not in str(loader) and '/elsewhere/' in str(loader)
    assert cfg.val_evaluator == cfg.test_evaluator
    assert cfg.test_evaluator.ann_file == (
        '/elsewhere/annotations/instances_val2017.json')


@pytest.mark.slow
def test_a_real_detector_in_real_processes(tmp_path, capfd):
    tiny = make_tiny(tmp_path)
    metafile = write_metafile(tmp_path / 'meta.yml', tiny.config, ['tiny'])
    argv = [
        '--metafile',
        str(metafile), '--checkpoints', f'tiny={tiny.checkpoint}', '--method',
        'minmax', '--work-dir',
        str(tmp_path / 'table'), '--data-root',
        str(tiny.data)
    ]
    assert main(argv) == 0
    # The first one says that the data are drawn.
    lines = capfd.readouterr().out.splitlines()[1:]
    assert lines[0].startswith('estimating how long this takes')
    assert re.match(r'  w4a4 tiny: about .* \(float evaluation ', lines[1])
    assert re.match('about .* in all on this machine$', lines[2])
    folder = tmp_path / 'table/w4a4_detector_minmax'
    report = folder / 'tiny/result.json'
    result, written = json.loads(report.read_text()), report.stat().st_mtime_ns
    assert (result['bits'], result['scope'],
            result['method']) == ('w4a4', 'detector', 'minmax')
    row = read_table(folder.with_name(f'{folder.name}.md'))['tiny']
    for key, kind in (('float', 'float'), ('w4a4', 'quantized')):
        found = result[kind]
        assert row[key] == (f'{100 * found["box_ap"]:.1f}/'
                            f'{100 * found["mask_ap"]:.1f}')
    assert row['published float'] == '46.0/41.6'
    assert main(argv) == 0
    assert report.stat().st_mtime_ns == written
