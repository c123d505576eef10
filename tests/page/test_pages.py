"""Reports open whatever a run has left, and say what is missing."""
import json
import logging
import shutil
from html.parser import HTMLParser

import pytest

from isvit_det.commands.report import main
from isvit_det.page import plots, write
from isvit_det.page.write import write_page
from isvit_det.report.layer_file import LAYERS
from tests.page.made import make_result, make_run

ODD = ('<script>window.hacked=1</script>', '"quoted\' & <b>', '$x_{1}$',
       '</style></svg>', 'Straße 交通灯 🚦', '_hidden', '{{ 7 * 7 }}', ' ')
# Elements without an end.
VOID = {'meta', 'link', 'input', 'br', 'img'}


class Outline(HTMLParser):
    """Checks that elements are nested, and keeps text and addresses."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.addresses, self.ids = [], [], [], []
        self.num = {}

    def handle_starttag(self, tag, attrs):
        self.num[tag] = self.num.get(tag, 0) + 1
        attrs = dict(attrs)
        self.addresses += [attrs[k] for k in ('href', 'src') if k in attrs]
        self.ids.append(attrs.get('id'))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ('script', 'style'):
            self.text.append(data)


def read(path):
    """The outline of a page, which is whole, small, and asks for nothing."""
    text = path.read_text()
    assert len(text) < 10e6
    outline = Outline()
    outline.feed(text)
    outline.close()
    assert not outline.open
    assert all(one.startswith(('#', 'data:'))
               for one in outline.addresses), set(one[:40]
                                                  for one in outline.addresses)
    assert outline.num['script'] == outline.num['style'] == 1
    outline.text = ' '.join(' '.join(outline.text).split())
    return outline


def page(work_dir, name='result.json'):
    return read(write_page(work_dir / name))


@pytest.fixture(autouse=True)
def plots_that_cost_nothing(request, monkeypatch):
    """Instead of those of matplotlib, unless a test asks for these."""
    if 'drawn' not in request.fixturenames:
        for name in ('layer', 'by_threshold', 'precision_recall'):
            monkeypatch.setattr(plots, name, lambda *_: '(a plot)')


@pytest.fixture
def drawn():
    """Asks for real plots."""


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A run that has left all there is, not to be changed."""
    return make_run(tmp_path_factory.mktemp('plain'))


@pytest.fixture
def run(plain, tmp_path):
    """A copy of it, and a function that changes its file of figures."""
    shutil.copytree(plain, tmp_path / 'run')
    return tmp_path / 'run'


def change(run, **changes):
    path = run / 'result.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_run_has_every_part(plain, drawn):
    found = page(plain)
    for part in ('Result', 'Pictures', 'Accuracy in parts', 'Boxes', 'Masks',
                 'Kinds of errors', 'Calibration, unit by unit', 'Layers',
                 'Size, operations and time by part', 'Commands',
                 'What is quantized', 'What is not'):
        assert part in found.text, part
    # Figures of the command's table.
    assert '61.0' in found.text and '57.0' in found.text
    assert "python -m isvit_det quantize_det tiny.py --work-dir 'a folder'" \
        in found.text
    assert 'no prediction runs it' in found.text
    # One image lost an object.
    assert '1 lost' in found.text
    assert 'cannot be read' not in found.text and 'is not there' not in \
        found.text
    for anchor in found.addresses:
        if anchor.startswith('#') and len(anchor) > 1:
            assert anchor[1:] in found.ids


def test_the_same_run_gives_the_same_page(plain):
    first = write_page(plain / 'result.json').read_bytes()
    assert write_page(plain / 'result.json').read_bytes() == first


def test_odd_names_are_text(tmp_path, drawn):
    run = make_run(tmp_path / 'a <b> & "c"', ODD)
    text = write_page(run / 'result.json').read_text()
    assert '<script>window' not in text and '$x_{1}$' in text
    found = page(run)
    for name in ODD:
        assert name.strip() in found.text
    assert '49' not in [word for word in found.text.split()]


def test_eighty_classes(tmp_path):
    found = page(make_run(tmp_path, [f'class {i}' for i in range(80)]))
    assert 'show all 80 rows' in found.text and 'class 79' in found.text


def test_nothing_was_detected(tmp_path):
    empty = {image: [] for image in range(1, 5)}
    found = page(make_run(tmp_path, found=empty))
    assert '3 lost' in found.text and 'Boxes' in found.text


def test_no_masks(tmp_path):
    found = page(make_run(tmp_path, masks=False))
    assert 'Boxes' in found.text and 'Masks' not in found.text


def test_no_object_is_of_the_classes(run):
    truth = json.loads((run / 'result.json').read_text())['truth']
    change(run, truth=[dict(truth[0], cat_ids=[98, 99])])
    found = page(run)
    assert 'No object of these classes is annotated' in found.text
    assert 'Pictures' in found.text


@pytest.mark.parametrize('truth, reason', [
    (None, 'do not say where the annotations are'),
    ([], 'do not say where the annotations are'),
    (dict(ann_file=None), 'names an annotation file'),
    (dict(ann_file='gone.json'), 'gone.json cannot be used'),
    (dict(split=True), 'has its own data set'),
])
def test_without_ground_truth(run, truth, reason):
    known = json.loads((run / 'result.json').read_text())['truth'][0]
    entry = [dict(known, **truth)] if isinstance(truth, dict) else truth
    change(run, truth=entry)
    found = page(run)
    assert reason in found.text
    assert 'There are no predictions with ground truth' in found.text
    assert '1 lost' in found.text


def test_other_metrics_than_cocos_have_kinds_of_errors_alone(run):
    truth = json.loads((run / 'result.json').read_text())['truth'][0]
    change(run, truth=[dict(truth, coco=False)])
    found = page(run)
    assert 'was measured by another metric' in found.text
    assert 'Kinds of errors' in found.text and 'Boxes' not in found.text


def test_without_a_float_evaluation(run):
    change(run, float=None)
    found = page(run)
    assert '--no-float-eval' in found.text
    assert 'Accuracy in parts' in found.text


def test_of_a_packed_file(run):
    change(run, float=None, units=None, bytes=dict(float=None, packed=5e5))
    (run / 'result.json').rename(run / 'result_packed.json')
    found = page(run, 'result_packed.json')
    assert 'evaluated a packed file' in found.text
    assert 'layers_packed.npz cannot be read' in found.text
    assert (run / 'report_packed.html').exists()


@pytest.mark.parametrize('damage, reason', [
    (lambda path: path.unlink(), 'float.zip is not there'),
    (lambda path: path.write_bytes(path.read_bytes()[:90]), 'is damaged'),
    (lambda path: path.rename(path.with_name('float_0of2.zip')),
     '1 of 2 files are not there'),
])
def test_predictions_that_are_missing(run, damage, reason):
    damage(run / 'predictions/float.zip')
    found = page(run)
    assert reason in found.text and 'Accuracy in parts' in found.text


def test_predictions_of_another_run(run):
    result = json.loads((run / 'result.json').read_text())
    change(
        run,
        float=dict(
            result['float'], predictions=dict(name='float', key='other')))
    assert 'is of another run' in page(run).text


def test_layers_of_another_run_or_damaged(run):
    change(run, predictions=dict(name='quantized', key='other'))
    assert 'layers.npz cannot be read (ValueError: it is of another run' in \
        page(run).text
    (run / LAYERS).write_bytes(b'PK')
    assert 'layers.npz cannot be read' in page(run).text


def test_images_that_were_moved(tmp_path):
    run = make_run(tmp_path)
    for path in tmp_path.glob('*.png'):
        path.unlink()
    assert 'the image cannot be read now' in page(run).text


def test_figures_of_an_earlier_version(run):
    result = make_result(run, ['cat'])
    for key in ('truth', 'command', 'packed', 'predictions'):
        del result[key]
    del result['float']['predictions']
    (run / 'result.json').write_text(json.dumps(result))
    assert 'figures are of an earlier version' in page(run).text


def test_of_a_classifier(tmp_path):
    result = make_result(tmp_path, ['cat'])
    keep = ('bits', 'method', 'engine', 'bytes', 'seconds', 'peak_memory',
            'units', 'sites', 'notes', 'command', 'packed', 'provenance',
            'float_modules')
    scores = dict(images=3, agreement=.9, kl=.01)
    result = {key: result[key] for key in keep}
    result.update(model='vit <b>', scores=scores)
    (tmp_path / 'result.json').write_text(json.dumps(result))
    found = page(tmp_path)
    assert 'vit <b>: w4a4, isvit' in found.text and '90.00' in found.text
    assert 'Pictures' not in found.text


def test_the_command_makes_the_page_again(run, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f'report: {run}/report.html\n'
    assert (run / 'report.html').exists()


def test_runs_side_by_side(plain, tmp_path, capsys):
    other = make_run(tmp_path / 'other', bits='w3a3')
    fewer = make_run(tmp_path / 'fewer', num_images=2)
    alone = make_run(tmp_path / 'alone', ('cat', 'ox'), float=None)
    out = tmp_path / 'sides.html'
    names = [str(path) for path in (other, other, fewer, alone)]
    assert main([str(plain), '--compare', *names, '--out', str(out)]) == 0
    assert capsys.readouterr().out == f'report: {out}\n'
    found = read(out)
    assert '5 runs side by side' in found.text
    assert 'w3a3' in found.text and 'its images are others' in found.text
    assert 'its classes are others' in found.text
    assert main(['--compare', str(plain), str(other)]) == 0
    assert (plain / 'comparison.html').exists()


@pytest.mark.parametrize('argv, message', [
    ([], 'WORK_DIR: none is given'),
    (['--compare', 'one'], '--compare: one is one run; give two'),
    (['one', '--out', 'x'], '--out: x is given without --compare'),
    (['empty'], 'empty: there is no result.json and no result_packed.json'),
    (['--compare', 'empty', 'one'], 'empty: there is no result.json'),
])
def test_wrong_arguments_are_one_line(argv, message, capsys):
    assert main(argv) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {message}')


@pytest.mark.parametrize('text', ['', '[1]', '{"bits": 3}', '{'])
def test_figures_that_are_none_are_refused(text, tmp_path, capsys):
    (tmp_path / 'result.json').write_text(text)
    assert main([str(tmp_path)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert 'result.json' in line and 'give the work directory' in line


class Broken:
    """Stands for what a report is made from."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


@pytest.mark.parametrize('error, told', [
    (RuntimeError('no <b> such thing'), 'RuntimeError: no <b> such thing'),
    (KeyboardInterrupt(), 'KeyboardInterrupt'),
    (MemoryError(), 'MemoryError'),
])
def test_a_finished_run_outlives_a_report_that_fails(run, error, told,
                                                     monkeypatch, caplog):
    monkeypatch.setattr(write, 'read_run', Broken(error))
    logger = logging.getLogger('test of reports')
    with caplog.at_level('INFO', 'test of reports'):
        assert write.write_page_or_warn(run / 'result.json', logger) is None
    line = caplog.records[-1]
    assert line.levelname == 'WARNING' and told in line.message
    assert f'python -m isvit_det report {run}' in line.message
    assert (run / 'result.json').exists()
    assert not (run / 'report.html').exists()
