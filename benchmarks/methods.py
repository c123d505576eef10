#!/usr/bin/env python
"""Methods, bits and scopes on one detector, images and seeds, in one table.

Each cell is a run of quantize_det in a folder of its own. A cell
that is done is not run again; one that was interrupted goes on.
"""
import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from isvit_det.commands.cells import QUANTIZE_DET, Cell, Result
from isvit_det.commands.console import run_command
from isvit_det.core.presets import METHODS
from isvit_det.evaluation.figures import in_points
from isvit_det.inputs.configs import load_config
from isvit_det.report.tables import format_table

CONFIG = 'configs/drawn/mask-rcnn_swin-mini_fpn_isvit-w3a3_drawn.py'
COLUMNS = [
    'method', 'seed', 'bits', 'scope', 'box AP', 'mask AP', 'backbone error',
    'calibration s'
]
ALSO_COLUMNS = ['learned box AP', 'learned mask AP']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', nargs='?', default=CONFIG)
    add('checkpoint', nargs='?', help="default: the config's load_from")
    add('--bits', nargs='+', default=['w3a3'])
    add('--scopes', nargs='+', default=['detector'])
    add('--seeds', type=int, nargs='+', default=[0, 1])
    add('--methods', nargs='+', default=list(METHODS))
    add('--learned',
        metavar='CONFIG',
        help='a config that differs in its test set, images that the '
        'detector learned: every packed file is evaluated on it as well')
    add('--work-dir', type=Path, default=Path('work_dirs/methods'))
    return parser.parse_args()


class Grid:
    """The runs of all cells.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        source = args.checkpoint or load_config(args.config, None).load_from
        self.checkpoint = Path(source)
        self.folder = args.work_dir / Path(args.config).stem
        self.float: Optional[Mapping[str, Any]] = None

    def cell(self, *values: Any) -> Result:
        """The result for bits, scope, method and seed; runs it if need be."""
        bits, scope, method, seed = map(str, values)
        folder = self.folder / f'{bits}_{scope}_{method}_seed{seed}'
        quant = ['--bits', bits, '--scope', scope, '--method', method]
        argv = [self.args.config, str(self.checkpoint), *quant, '--seed', seed]
        # The float model is the same in all cells: one of them evaluates it.
        cells = [
            Cell(QUANTIZE_DET, [*argv, *more], folder, self.checkpoint)
            for more in ([], ['--no-float-eval'])
        ]
        earlier = cells[0].find() or cells[1].find()
        result = dict(earlier or cells[self.float is not None].run())
        self.float = self.float or result['float']
        if self.args.learned:
            packed = [self.args.learned, str(folder / 'packed.pth'), *quant]
            learned = Cell(QUANTIZE_DET, packed, folder, self.checkpoint,
                           'result_packed.json')
            result['learned'] = learned.run()['quantized']
        return result

    def float_row(self) -> Dict[str, str]:
        """The row of the float model, by runs of its own if no cell has it."""
        result = self.float or self._float_of(self.args.config, 'float')
        learned = None
        if self.args.learned:
            learned = self._float_of(self.args.learned, 'float_learned')
        return row(result, learned, method='float', bits='32')

    def _float_of(self, config: str, folder: str) -> Mapping[str, Any]:
        argv = [config, str(self.checkpoint), '--method', 'minmax']
        return Cell(QUANTIZE_DET, argv, self.folder / folder,
                    self.checkpoint).run()['float']


def row(result: Mapping[str, Any], learned: Optional[Mapping[str, Any]],
        **cells: str) -> Dict[str, str]:
    cells['box AP'] = in_points(result.get('box_ap'))
    cells['mask AP'] = in_points(result.get('mask_ap'))
    columns = COLUMNS
    if learned is not None:
        columns = COLUMNS + ALSO_COLUMNS
        cells['learned box AP'] = in_points(learned.get('box_ap'))
        cells['learned mask AP'] = in_points(learned.get('mask_ap'))
    return {key: cells.get(key, '-') for key in columns}


def main() -> None:
    args = parse_args()
    grid = Grid(args)
    rows: List[Dict[str, str]] = []
    for values in itertools.product(args.bits, args.scopes, args.methods,
                                    args.seeds):
        result = grid.cell(*values)
        rows.append(
            row(
                result['quantized'], result.get('learned'), **{
                    'method': result['method'],
                    'seed': str(values[-1]),
                    'bits': result['bits'],
                    'scope': result['scope'],
                    'backbone error': f'{result["backbone_error"]:.4g}',
                    'calibration s': f'{result["seconds"]["calibration"]:.0f}'
                }))
    print(f'\n{format_table([grid.float_row(), *rows])}')


if __name__ == '__main__':
    sys.exit(run_command(main))
