"""The README and docs/: what they link to, name and show is there."""
import doctest
import importlib.util
import re

import cv2
import pytest
from mmengine.fileio import load

from benchmarks import pages
from isvit_det.core import presets, settings
from isvit_det.datasets.drawing import draw_picture
from isvit_det.version import __version__
from tests.engine.tiny import REPO

README = REPO / 'README.md'
DOCS = sorted((REPO / 'docs').glob('*.md'))
PAGES = [README, *DOCS, REPO / 'CHANGELOG.md']
FENCED = re.compile(r'^```.*?^```$', re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r'^ {4}\S.*$', re.MULTILINE)
FOLDERS = ('benchmarks', 'configs', 'docs', 'isvit_det', 'requirements',
           'tests', 'tools')
# Part of a name that the reader is to replace.
PLACEHOLDER = re.compile(r'[A-Z]{3,}')


class Checker(doctest.OutputChecker):
    """Progress is not compared: only output that the text shows."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


def prose(text):
    """A page without its blocks of code."""
    return INDENTED.sub('', FENCED.sub('', text))


def code(text):
    """Blocks and spans of code, one a line, continued lines joined."""
    blocks = [block[0] for block in FENCED.finditer(text)]
    blocks += [line[0].strip() for line in INDENTED.finditer(text)]
    spans = re.findall(r'`([^`]+)`', FENCED.sub('', text))
    return '\n'.join(blocks + [' '.join(span.split()) for span in spans])


def anchors(text):
    """Anchors that GitHub gives to a page's headings."""
    found = []
    for heading in re.findall(r'^#+ (.*)$', FENCED.sub('', text),
                              re.MULTILINE):
        heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading)
        slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        taken = sum(
            other in (slug, f'{slug}-{number}')
            for number, other in enumerate(found))
        found.append(f'{slug}-{taken}' if taken else slug)
    return found


def broken_links(path, text):
    """Links of a page that lead to no file, or to no heading of one."""
    found = []
    for link in re.findall(r'\]\(([^)\s]+)\)', prose(text)):
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = path.parent / name if name else path
        if not target.exists():
            found.append(link)
        elif anchor:
            there = text if not name else target.read_text()
            if anchor not in anchors(there):
                found.append(link)
    return found


def unknown_commands(text):
    """Tools, modules, make targets and files in code that are not there."""
    shown = code(text)
    made = (REPO / 'Makefile').read_text()
    targets = set(re.findall(r'^([\w-]+):', made, re.MULTILINE))
    found = [
        f'make {target}'
        for target in re.findall(r'(?m)(?:^|\s)make ([a-z][\w-]*)', shown)
        if target not in targets
    ]
    for module in re.findall(r'python -m ([\w.]+)', shown):
        if importlib.util.find_spec(module) is None:
            found.append(f'python -m {module}')
    names = re.findall(rf'(?<![\w./-])((?:{"|".join(FOLDERS)})/[\w./-]*[\w/])',
                       shown)
    for name in names:
        # A name may be given without its ending.
        there = (REPO / name).exists() or [*REPO.glob(f'{name}.*')]
        if not there and not PLACEHOLDER.search(name):
            found.append(name)
    return found


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    photos = tmp_path / 'photos'
    photos.mkdir()
    for number in range(3):
        picture = draw_picture((7, number)).pixels
        cv2.imwrite(str(photos / f'{number}.jpg'), picture)
    (tmp_path / 'configs').symlink_to(REPO / 'configs')
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(README.read_text(), {},
                                               'README', str(README), 0)
    assert len(test.examples) > 5
    assert doctest.DocTestRunner(Checker()).run(test).failed == 0


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) < 180
    for path in DOCS:
        assert f'](docs/{path.name})' in text


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(path):
    assert broken_links(path, path.read_text()) == []


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_commands_name_what_is_there(path):
    assert unknown_commands(path.read_text()) == []


@pytest.mark.parametrize('text', [
    '[a](docs/nothing.md)', '[a](#nothing)', '[a](docs/data.md#nothing)',
    '[two\nlines](nothing.md)'
])
def test_a_broken_link_is_found(text):
    assert len(broken_links(README, text)) == 1


@pytest.mark.parametrize('text', [
    '    python tools/nothing.py CONFIG', '`python -m isvit_det.nothing`',
    'then `make nothing`', '    A=1 make nothing', '`isvit_det/nothing.py`',
    '```\npython tools/nothing.py\n```'
])
def test_an_unknown_command_is_found(text):
    assert len(unknown_commands(text)) == 1


def test_anchors_follow_githubs_rule():
    text = "# The paper's table\n## Terms\n## `sos`: a_b, *c*\n## Terms\n"
    assert anchors(text) == [
        'the-papers-table', 'terms', 'sos-a_b-c', 'terms-1'
    ]


@pytest.mark.parametrize('page', pages.PAGES)
def test_made_tables_are_up_to_date(page):
    text = (REPO / page).read_text()
    assert pages.fill(page, text) == text, 'run python -m benchmarks.pages'


def test_the_table_of_methods_has_a_new_one(monkeypatch):
    preset = presets.Preset(quant=dict(softmax='log2'), sos=dict(iters=0))
    monkeypatch.setitem(presets.METHODS, 'another', preset)
    header, *rows = pages.methods().splitlines()
    assert '| `another` |' in header
    assert any("`'log2'`" in row for row in rows)


def test_a_page_without_its_tables_is_refused():
    with pytest.raises(ValueError, match='docs/zoo.md has the tables'):
        pages.fill('docs/zoo.md', '<!-- made: configs -->\n<!-- end -->')


def test_settings_name_every_choice():
    text = (REPO / 'docs/settings.md').read_text()
    choices = (*presets.METHODS, *settings.SOFTMAX_QUANTIZERS,
               *settings.EXPONENTS, *settings.SHIFT_ERRORS, *settings.SCOPES,
               *settings.ITEMS, *settings.STAGE_ONE_INPUTS)
    for choice in choices:
        assert f"`'{choice}'`" in text


@pytest.mark.parametrize('folder', ['isvit', 'vit', 'swin'])
def test_every_config_of_the_zoo_is_linked(folder):
    text = (REPO / 'docs/zoo.md').read_text()
    for path in (REPO / 'configs' / folder).glob('*.py'):
        assert f'](../configs/{folder}/{path.name})' in text


def rows_of(text):
    """Rows of the tables of a text, by the names of their columns."""
    header = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip('|').split('|')]
        if not line.strip().startswith('|'):
            header = None
        elif header is None:
            header = cells
        elif not cells[0].startswith('--'):
            yield dict(zip(header, cells))


@pytest.mark.parametrize('detector, page, heading', [
    ('Mask R-CNN, Swin', 'accuracy', '### Swin Mask R-CNN'),
    ('Mask R-CNN, DeiT', 'accuracy', '### DeiT Mask R-CNN'),
    ('Cascade Mask R-CNN, Swin', 'demo_data', "## The demo's other"),
])
def test_what_to_expect_is_what_was_measured(detector, page, heading):
    shown, = (
        row for row in rows_of(README.read_text())
        if row.get('detector') == detector)
    text = (REPO / f'docs/{page}.md').read_text()
    text = text.split(heading)[1].split('\n#')[0]
    found = {}
    for row in rows_of(text):
        key = row.get('variant', row.get('method')), row['bits'], row['scope']
        found[key] = ' / '.join(row[f'{kind} AP'].split()[0]
                                for kind in ('box', 'mask'))
    assert shown['float'] == found['float', '32', '-']
    for bits in ('W4A4', 'W3A3'):
        assert shown[bits] == found['isvit', bits.lower(), 'detector']


@pytest.mark.parametrize('detector, path', [
    ('Mask R-CNN, Swin', 'README.md'),
    ('Mask R-CNN, DeiT', 'docs/demo_data.md'),
])
def test_sizes_are_those_of_the_demos(detector, path):
    shown, = (
        row for row in rows_of(README.read_text())
        if row.get('detector') == detector)
    demo = [
        row['MB'] for row in rows_of((REPO / path).read_text()) if 'MB' in row
    ]
    # By both engines, the quantized detector has two rows.
    assert [shown['MB float'], shown['MB W4A4']] == list(dict.fromkeys(demo))


def test_the_citation_is_of_this_version_and_of_the_paper():
    text = ' '.join((REPO / 'CITATION.cff').read_text().split())
    collection, = load(str(REPO / 'configs/isvit/metafile.yml'))['Collections']
    assert f' version: {__version__} ' in text
    assert collection['Paper']['Title'] in text
    assert collection['Paper']['URL'] in text
