"""The first part of the report: figures, settings, provenance, commands."""
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

from isvit_det.evaluation.figures import Figures
from isvit_det.page.table import NOTHING, Cell, Table, name
from isvit_det.page.work_dir import Run
from isvit_det.report.classifier_table import classifier_rows
from isvit_det.report.tables import silent_sites, table_rows
from isvit_det.runtime.engine import engine_line

Pairs = List[Tuple[str, str]]


@dataclass
class Summary:
    """What the report says first.

    Attributes:
        title: of the run.
        table: as the command shows it.
        more: other metrics; empty if there are none.
        notes: sentences.
        quantizers: how many there are of each kind.
        in_float: what stays in float, and why.
        facts: names and values.
        settings: of the quantization and the calibration.
        commands: what they do, and the commands.
    """
    title: str
    table: Table
    more: Table
    notes: List[str]
    quantizers: Table
    in_float: Pairs
    facts: Pairs
    settings: Pairs
    commands: Pairs = field(default_factory=list)


def describe_run(run: Run) -> Summary:
    """The summary of a run."""
    result = run.result
    model = result['config'] if run.is_detector else result['model']
    title = f'{Path(model).stem}: {result["bits"]}, {result["method"]}'
    if run.is_detector:
        title += f', scope {result["scope"]}'
    rows = table_rows(result) if run.is_detector else classifier_rows(result)
    origin = result['provenance']
    settings: Pairs = []
    for group in ('quant', 'sos'):
        settings += [(f'{group}.{key}', _text(value))
                     for key, value in (origin.get(group) or {}).items()]
    notes = [*run.missing, *result.get('notes', ())]
    if result.get('engine'):
        notes.append(engine_line(result['engine']))
    return Summary(title, as_table(rows), _more(run), notes,
                   _quantizers(result['sites']), _in_float(result),
                   _facts(run), settings, _commands(run))


def as_table(rows: List[Dict[str, str]]) -> Table:
    """Rows of text as a table of the page.

    >>> table = as_table([{'model': 'float', 'box AP': '61.2'},
    ...                   {'model': 'quantized', 'box AP': '-'}])
    >>> [(cell.text, cell.value, cell.is_name) for cell in table.rows[0]]
    [('float', None, True), ('61.2', 61.2, False)]
    """
    every = [[cell(text) for text in row.values()] for row in rows]
    for column in zip(*every):
        # A peak of memory names a place.
        is_name = any(one.value is None and one.text != NOTHING
                      and not one.text[:1].isdigit() for one in column)
        for one in column:
            one.is_name = is_name
    return Table(list(rows[0]), every)


def cell(text: str) -> Cell:
    """A cell of the table of results.

    >>> cell('61.2').value, cell('-').text
    (61.2, '–')
    """
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell(NOTHING if text == '-' else text)


def _more(run: Run) -> Table:
    if not run.is_detector:
        return Table([])
    results = [one.figures for one in run.evaluated]
    figures = Figures(*results)
    rows = [[
        name(metric), *(cell(figures.cell(each, metric) or '-')
                        for each in results)
    ] for metric in figures.rest]
    return Table(['metric', *(one.title for one in run.evaluated)], rows)


def _quantizers(sites: List[Mapping[str, Any]]) -> Table:
    counts = Counter(
        (site['role'], site['kind'], site['bits'], site['granularity'])
        for site in sites)
    rows = [[
        name('weights' if role == 'weight' else 'activations'),
        name(kind),
        Cell(str(bits), bits),
        name(f'one scale per {granularity}'),
        Cell(str(num), num)
    ] for (role, kind, bits, granularity), num in counts.items()]
    return Table(['of', 'quantizer', 'bits', 'granularity', 'number'], rows)


def _in_float(result: Mapping[str, Any]) -> Pairs:
    found: Pairs = [(str(one['name']), str(one['type']))
                    for one in result.get('float_modules') or ()]
    found += [(str(layer), f'turned back: {reason}')
              for layer, reason in (result.get('float_layers') or {}).items()]
    silent = silent_sites(result['sites'])
    found += [(site, 'quantized, but not reached in the evaluation, for want '
               'of detections') for site in silent]
    found += [(hook, 'hook left out, since it changes weights when a test '
               'begins') for hook in result.get('hooks_left_out') or ()]
    return found


def _facts(run: Run) -> Pairs:
    result = run.result
    origin, size = result['provenance'], result['bytes']
    facts: Pairs = []
    if size.get('float'):
        share = size['packed'] / size['float']
        facts.append(('size', f'{size["float"] / 1e6:.2f} MB of float weights '
                      f'-> {size["packed"] / 1e6:.2f} MB packed '
                      f'({share:.1%})'))
    else:
        facts.append(('size', f'{size["packed"] / 1e6:.2f} MB packed'))
    images = result.get('images') or {}
    evaluated = images.get('evaluated', result.get('scores', {}).get('images'))
    if evaluated is not None:
        facts.append(('evaluated on', f'{evaluated} images'))
    if origin.get('images_used') is not None:
        facts.append(('calibrated on', f'{origin["images_used"]} images, '
                      f'seed {origin.get("seed")}'))
    facts += [(f'time of {phase.replace("_", " ")}', f'{seconds:.1f} s')
              for phase, seconds in result['seconds'].items()]
    memory = result.get('peak_memory') or {}
    facts += [(f'peak memory, {where}', f'{value / 1e9:.2f} GB')
              for where, value in memory.items()]
    for key, title in (('float_checkpoint', 'float checkpoint'),
                       ('float_checkpoint_sha256', 'its SHA-256'),
                       ('float_weights_sha256', 'SHA-256 of its weights')):
        if origin.get(key):
            facts.append((title, str(origin[key])))
    facts += [(f'version of {package}', str(version))
              for package, version in (origin.get('versions') or {}).items()]
    return facts


def _commands(run: Run) -> Pairs:
    result, folder = run.result, run.path.parent
    commands: Pairs = []
    if result.get('command'):
        commands.append(('Run it again',
                         _shell('python', '-m', 'isvit_det',
                                *result['command'])))
    packed = str(result.get('packed') or folder / 'packed.pth')
    if run.is_detector:
        config = str(folder / result['config'])
        commands += [
            ("Test the packed file with MMDetection's tool",
             _shell('python', 'MMDET/tools/test.py', config, packed)),
            ('Measure its speed here',
             _shell('python', '-m', 'isvit_det', 'benchmark_det', config,
                    packed)),
            ('Load it in Python',
             'from mmdet.apis import inference_detector, init_detector\n'
             f"model = init_detector({config!r}, {packed!r}, device='cpu')\n"
             "found = inference_detector(model, 'IMAGE')")
        ]
    commands.append(('Make this report again',
                     _shell('python', '-m', 'isvit_det', 'report',
                            str(folder))))
    return commands


def _shell(*words: str) -> str:
    return shlex.join(words)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ', '.join(map(str, value)) or '[]'
    return str(value)
