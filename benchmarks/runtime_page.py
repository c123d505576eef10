"""Tables of docs/speed.md, made from what make bench-runtime recorded."""
import json
from typing import Any, Dict, List, Mapping, Sequence

from benchmarks.runtime import RECORD
from benchmarks.runtime_subjects import ENGINES, LAYERS, NATIVE, SUBJECTS
from isvit_det.report.machine import machine_line

Line = Mapping[str, Any]
NOTHING = 'Nothing has been measured yet.\n'


def read_record() -> List[Line]:
    """Lines of the record with native figures, in order of the subjects."""
    lines = [json.loads(text) for text in RECORD.read_text().splitlines()]
    lines = [one for one in lines if NATIVE in one['results']]
    order = list(SUBJECTS)
    return sorted(
        lines,
        key=lambda one:
        (order.index(one['subject']), one['bits'], one['threads']))


def is_layer(line: Line) -> bool:
    return line['subject'] in LAYERS


def machines() -> str:
    """What the figures were measured on, and how busy it was."""
    found: Dict[str, List[float]] = {}
    for line in read_record():
        found.setdefault(machine_line(line['machine']),
                         []).extend(line['load'])
    return ''.join(
        f'* {name}, shared with other work: load {min(loads):.0f} to '
        f'{max(loads):.0f} meanwhile\n' for name, loads in found.items())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    rule = ['---', *(['---:'] * (len(header) - 1))]
    return ''.join(f'| {" | ".join(line)} |\n'
                   for line in (header, rule, *rows))


def speed(lines: Sequence[Line], unit: str, scale: float) -> str:
    """Table of user seconds, and how much faster native is.

    Args:
        lines: of the record.
        unit: of the figures.
        scale: of it in a second.
    """
    if not lines:
        return NOTHING
    engines = _engines_of(lines)
    others = [engine for engine in engines if engine != NATIVE]
    rows = []
    for line in lines:
        results = line['results']
        native = results[NATIVE]['user']
        cells = [line['title'], line['bits'], str(line['threads'])]
        cells += [
            f'{scale * results[engine]["user"]:.3g}'
            if engine in results else '-' for engine in engines
        ]
        cells += [
            f'{results[engine]["user"] / native:.2f}'
            if engine in results else '-' for engine in others
        ]
        rows.append(cells)
    header = ['subject', 'bits', 'threads']
    header += [f'{engine} {unit}' for engine in engines]
    header += [f'{engine} / native' for engine in others]
    return table(header, rows)


def models() -> str:
    """Backbones, detectors and classifiers, in seconds."""
    return speed([one for one in read_record() if not is_layer(one)], 's', 1.)


def layers() -> str:
    """Single layers, in milliseconds."""
    return speed([one for one in read_record() if is_layer(one)], 'ms', 1e3)


def memory() -> str:
    """Memory that each engine adds to that of its imports, in MB."""
    lines = [
        one for one in read_record()
        if not is_layer(one) and 'memory' in one['results'][NATIVE]
    ]
    if not lines:
        return NOTHING
    engines = [
        engine for engine in _engines_of(lines)
        if any('memory' in one['results'].get(engine, {}) for one in lines)
    ]
    rows = []
    for line in lines:
        found = [
            line['results'].get(engine, {}).get('memory') for engine in engines
        ]
        rows.append([
            line['title'],
            str(line['threads']),
            *('-' if value is None else f'{value / 1e6:.0f}'
              for value in found)
        ])
    return table(['subject', 'threads', *(f'{name} MB' for name in engines)],
                 rows)


def _engines_of(lines: Sequence[Line]) -> List[str]:
    return [
        engine for engine in ENGINES
        if any(engine in one['results'] for one in lines)
    ]
