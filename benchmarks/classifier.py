#!/usr/bin/env python
"""Methods and bits on one classifier, images and seeds, in one table.

Each cell is a run of tools/quantize_cls.py in a folder of its own. A cell
that is done is not run again; one that was interrupted goes on.
"""
import argparse
import itertools
import sys
from pathlib import Path
from typing import Dict, List

from isvit_det.core.spec import METHODS, optimises
from isvit_det.engine.cells import Cell, Result
from isvit_det.engine.console import run_command
from isvit_det.engine.report import format_table

TOOL = Path(__file__).parents[1] / 'tools/quantize_cls.py'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('model', help='a timm classifier')
    add('weights', type=Path, help='a file')
    add('calib', help='folder of images')
    add('val', help='folder of images')
    add('--bits', nargs='+', default=['w3a3', 'w4a4', 'w6a6'])
    add('--seeds', type=int, nargs='+', default=[0, 1])
    add('--methods', nargs='+', default=list(METHODS))
    add('--images', type=int, default=64, help='to calibrate on')
    add('--iters', type=int, default=100, help='per unit and stage')
    add('--work-dir', type=Path, default=Path('work_dirs/classifier'))
    return parser.parse_args()


def cell(args: argparse.Namespace, bits: str, method: str,
         seed: int) -> Result:
    """The result of one run, made or found."""
    argv = [
        args.model, '--weights',
        str(args.weights), '--calib', args.calib, '--val', args.val, '--bits',
        bits, '--method', method, '--seed',
        str(seed), '--calib-images',
        str(args.images)
    ]
    iters = args.iters if optimises(method) else 0
    argv += ['--iters', str(iters)]
    name = f'{args.model}_{bits}_{method}_{args.images}_{iters}_seed{seed}'
    return Cell(TOOL, argv, args.work_dir / name, args.weights).run()


def row(result: Result, seed: int) -> Dict[str, str]:
    scores, sos = result['scores'], result['provenance']['sos']
    cells = {
        'method': result['method'],
        'bits': result['bits'],
        'iterations': str(sos['iters']),
        'seed': str(seed),
        'agreement': f'{100 * scores["agreement"]:.1f}',
        'KL': f'{scores["kl"]:.4f}'
    }
    for kind in ('float', 'quantized'):
        if f'{kind}_top1' in scores:
            cells[f'{kind} top-1'] = f'{100 * scores[f"{kind}_top1"]:.2f}'
    cells['calibration s'] = f'{result["seconds"]["calibration"]:.0f}'
    return cells


def main() -> None:
    args = parse_args()
    rows: List[Dict[str, str]] = []
    for bits, method, seed in itertools.product(args.bits, args.methods,
                                                args.seeds):
        rows.append(row(cell(args, bits, method, seed), seed))
    print(f'\n{format_table(rows)}')


if __name__ == '__main__':
    sys.exit(run_command(main))
