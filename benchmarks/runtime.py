#!/usr/bin/env python
"""The native kernels beside torch, OpenVINO and onnxruntime in float32.

Each subject is run by all engines in turns, in one process, so that other
work on the machine hits all of them, and once more by each engine in a
process of its own, which tells its memory. Medians of processor seconds in
user mode are compared. A subject is a line that is added to --record, from
which docs/speed.md is made (python -m benchmarks.pages).
"""
import argparse
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from mmengine.logging import MMLogger

from benchmarks.rivals import Unavailable
from benchmarks.runtime_subjects import (COMPILED, ENGINES, LAYERS, NATIVE,
                                         OPENVINO_BF16, SUBJECTS, Loaded)
from isvit_det.commands.children import call_elsewhere
from isvit_det.commands.console import run_command
from isvit_det.commands.parser import Parser
from isvit_det.core.errors import QuantError
from isvit_det.report.machine import describe_machine, machine_line, peak_bytes
from isvit_det.report.tables import format_table
from isvit_det.report.timing import take_turns
from isvit_det.runtime.engine import VARIABLE

RECORD = Path(__file__).parent / 'measured/speed.jsonl'
# CPUs that OpenVINO runs in bf16.
BF16 = {'avx512_bf16', 'amx_bf16'}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add('--subjects',
        nargs='+',
        default=['swin-t'],
        choices=['all', 'layers', *SUBJECTS],
        metavar='NAME',
        help=f'default: swin-t; all, layers, or of {", ".join(SUBJECTS)}')
    add('--engines',
        nargs='+',
        choices=ENGINES,
        metavar='NAME',
        help=f'default: all but {COMPILED}, which takes minutes; of '
        f'{", ".join(ENGINES)}')
    add('--bits', nargs='+', default=['w4a4'])
    add('--threads', nargs='+', type=int, default=[1])
    add('--rounds', type=int, default=5)
    add('--no-memory', action='store_true', help='measure no memory')
    add('--work-dir',
        type=Path,
        default=Path('work_dirs/bench_runtime'),
        help='keeps exported and calibrated models')
    add('--record', type=Path, default=RECORD, help='default: %(default)s')
    return parser.parse_args(argv)


def names_of(asked: List[str]) -> List[str]:
    """The subjects that are asked for.

    >>> names_of(['swin-t', 'layers'])[:2]
    ['swin-t', 'linear-67200x96x384']
    """
    names: List[str] = []
    for name in asked:
        more = dict(all=list(SUBJECTS), layers=list(LAYERS))
        names += more.get(name, [name])
    return list(dict.fromkeys(names))


def default_engines(instructions: List[str]) -> List[str]:
    """Those that a CPU of some instructions runs and that start at once."""
    left_out = {COMPILED}
    if not BF16 & {*instructions}:
        left_out.add(OPENVINO_BF16)
    return [name for name in ENGINES if name not in left_out]


def load(name: str, engine: str, bits: str, threads: int,
         work_dir: Path) -> Loaded:
    """A subject in one engine.

    Raises:
        Unavailable: if it does not run there.
    """
    # Every change of the engine would be told.
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    work_dir.mkdir(parents=True, exist_ok=True)
    return SUBJECTS[name].load(engine, bits, threads, work_dir)


def measure_memory(*loading: Any) -> int:
    """What a subject adds at its peak to the memory of imports, in bytes.

    Args:
        *loading: arguments of ``load``, which finds all files made.
    """
    before = peak_bytes()
    found = load(*loading)
    for _ in range(2):
        found.run()
    return peak_bytes() - before


def measure(name: str, bits: str, threads: int, engines: List[str],
            args: argparse.Namespace) -> Dict[str, Any]:
    """A line of the record: a subject in all engines."""
    loaded: Dict[str, Loaded] = {}
    missing: Dict[str, str] = {}
    for engine in engines:
        try:
            loaded[engine] = load(name, engine, bits, threads, args.work_dir)
        except Unavailable as error:
            missing[engine] = str(error)
            print(f'{engine} is left out: {error}')
    subject = SUBJECTS[name]
    runs: Dict[str, Callable[[], Any]] = {
        engine: partial(_repeat, found.run, subject.calls)
        for engine, found in loaded.items()
    }
    load_before = os.getloadavg()[0]
    seconds = take_turns(runs, args.rounds)
    load_after = os.getloadavg()[0]
    facts = loaded[NATIVE].facts if NATIVE in loaded else {}
    loaded.clear()
    runs.clear()
    results: Dict[str, Dict[str, Any]] = {}
    for engine, found in seconds.items():
        results[engine] = {
            key: value / subject.calls
            for key, value in found._asdict().items()
        }
        if not args.no_memory and engine != COMPILED:
            results[engine]['memory'] = call_elsewhere(measure_memory, name,
                                                       engine, bits, threads,
                                                       args.work_dir)
    return dict(
        subject=name,
        title=subject.title,
        bits=bits,
        threads=threads,
        rounds=args.rounds,
        load=[load_before, load_after],
        machine=describe_machine(),
        native=facts,
        missing=missing,
        results=results)


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def rows(line: Mapping[str, Any]) -> List[Dict[str, str]]:
    """A table of a line of the record, with a row for each engine."""
    results = line['results']
    base = results.get(NATIVE)
    table = []
    for engine, found in results.items():
        memory = found.get('memory')
        cells = {
            f'{line["title"]}, {line["bits"]}': engine,
            'threads': str(line['threads']),
            'user s': f'{found["user"]:.4g}',
            'processor s': f'{found["processor"]:.4g}',
            'wall s': f'{found["wall"]:.4g}'
        }
        for key in ('user', 'wall') if base else ():
            cells[f'{key} / native'] = f'{found[key] / base[key]:.2f}'
        cells['MB'] = '-' if memory is None else f'{memory / 1e6:.0f}'
        table.append(cells)
    return table


def record(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to the record; an earlier one of the same is replaced."""

    def key(one: Mapping[str, Any]) -> Tuple[Any, ...]:
        return one['subject'], one['bits'], one['threads'], one['machine'][
            'cpu']

    lines = [] if not path.exists() else [
        json.loads(text) for text in path.read_text().splitlines()
    ]
    kept = [one for one in lines if key(one) != key(line)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{json.dumps(one)}\n' for one in [*kept, line]))


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    if os.environ.get(VARIABLE):
        raise QuantError(f'the environment variable {VARIABLE} names one '
                         'engine, and this command compares them; unset it.')
    machine = describe_machine()
    print(machine_line(machine), flush=True)
    engines = args.engines or default_engines(machine['instructions'])
    for name in names_of(args.subjects):
        for bits in args.bits:
            for threads in args.threads:
                line = measure(name, bits, threads, engines, args)
                record(args.record, line)
                print(f'{format_table(rows(line))}\n', flush=True)


if __name__ == '__main__':
    sys.exit(run_command(main))
