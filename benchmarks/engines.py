#!/usr/bin/env python
"""AP of the drawn detectors by both engines, at several bits and scopes.

Each cell is a run of quantize_det in a folder of its own, which evaluates the
same packed model in the simulation and natively. A cell that is done is not
run again; one that was interrupted goes on.
"""
import argparse
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping

from isvit_det.commands.cells import QUANTIZE_DET, Cell, Result
from isvit_det.commands.console import run_command
from isvit_det.commands.parser import Parser
from isvit_det.core.errors import QuantError
from isvit_det.evaluation.figures import in_points
from isvit_det.inputs.configs import load_config
from isvit_det.report.tables import format_table

DETECTORS = {
    'mask-rcnn_swin-mini_fpn': 'Mask R-CNN Swin',
    'mask-rcnn_deit-mini_sfpn': 'Mask R-CNN DeiT',
    'cascade-mask-rcnn_swin-mini_fpn': 'Cascade Mask R-CNN Swin',
}
FIGURES = {'box AP': 'box_ap', 'mask AP': 'mask_ap'}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--detectors', nargs='+', choices=DETECTORS, default=list(DETECTORS))
    add('--bits', nargs='+', default=['w3a3', 'w4a4', 'w6a6'])
    add('--scopes', nargs='+', default=['backbone', 'detector'])
    add('--method', default='isvit', help='default: isvit')
    add('--iters',
        type=int,
        default=0,
        help='default: 0, the closed forms, whose calibration takes a minute')
    add('--calib-images', type=int, default=16, help='default: 16')
    add('--work-dir', type=Path, default=Path('work_dirs/engines'))
    return parser.parse_args()


def run_cell(detector: str, scope: str, bits: str,
             args: argparse.Namespace) -> Result:
    config = f'configs/drawn/{detector}_isvit-w4a4_drawn.py'
    weights = Path(load_config(config, None).load_from)
    argv = [
        config,
        str(weights), '--bits', bits, '--scope', scope, '--method',
        args.method, '--iters',
        str(args.iters), '--calib-images',
        str(args.calib_images), '--engine', 'both', '--no-float-eval'
    ]
    folder = args.work_dir / f'{detector}_{bits}_{scope}_{args.method}'
    result = Cell(QUANTIZE_DET, argv, folder, weights).run()
    if result['engine']['engine'] != 'native':
        raise QuantError(f'engines: {result["engine"]["reason"]}.')
    return result


def row(cells: Mapping[str, str], simulation: Mapping[str, Any],
        native: Mapping[str, Any]) -> Dict[str, str]:
    found = dict(cells)
    for name, key in FIGURES.items():
        for engine, result in (('simulation', simulation), ('native', native)):
            found[f'{name}, {engine}'] = in_points(result['quantized'][key])
    found['s/image, simulation'] = f'{simulation["seconds_per_image"]:.3g}'
    found['s/image, native'] = f'{native["seconds_per_image"]:.3g}'
    return found


def main() -> None:
    args = parse_args()
    rows: List[Dict[str, str]] = []
    differences: List[float] = []
    for detector, scope, bits in itertools.product(args.detectors, args.scopes,
                                                   args.bits):
        native = run_cell(detector, scope, bits, args)
        simulation, = native['also_evaluated']
        differences += [
            100 * (native['quantized'][key] - simulation['quantized'][key])
            for key in FIGURES.values()
        ]
        cells = dict(detector=DETECTORS[detector], scope=scope, bits=bits)
        rows.append(row(cells, simulation, native))
    print(f'\n{format_table(rows)}')
    worst = max(differences, key=abs)
    print(f'\nnative - simulation: mean {statistics.mean(differences):+.3f}, '
          f'mean size {statistics.mean(map(abs, differences)):.3f}, '
          f'largest {worst:+.2f} points of AP')


if __name__ == '__main__':
    sys.exit(run_command(main))
