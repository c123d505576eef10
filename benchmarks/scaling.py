#!/usr/bin/env python
"""How calibration grows with images and with depth.

Calibrates a backbone of random weights by ``benchmarks.calibration`` for each
number of images and each depth, in processes of their own.
"""
import argparse
import sys
from typing import List, Optional

from benchmarks.calibration import DRAWN, run_alone
from isvit_det.commands.console import run_command
from isvit_det.commands.parser import Parser
from isvit_det.inputs.overrides import check_pairs
from isvit_det.report.tables import format_table


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add('config', nargs='?', default=DRAWN, help='a float config')
    add('--images', type=int, nargs='+', default=[4, 8, 16])
    add('--depths', nargs='+', default=['2,2,2,2', '2,2,6,2'])
    add('--iters', type=int, default=100)
    add('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    check_pairs(parser, args.cfg_options)
    return args


def main() -> None:
    args = parse_args()
    rows = []
    for depths in args.depths:
        for images in args.images:
            measured = run_alone('items', [
                args.config, 'random', '--method', 'isvit', '--images',
                str(images), '--held-out', '1', '--iters',
                str(args.iters), '--cfg-options',
                f'model.backbone.depths=[{depths}]', *args.cfg_options
            ])
            rows.append({
                'depths': depths.replace(',', '-'),
                'images': str(images),
                'units': str(measured['units']),
                'seconds': f'{measured["seconds"]:.0f}',
                'seconds per unit':
                f'{measured["seconds"] / measured["units"]:.1f}',
                'GB before': f'{measured["before"] / 1e9:.2f}',
                'peak GB': f'{measured["peak"] / 1e9:.2f}'
            })
            print(rows[-1], flush=True)
    print(format_table(rows))


if __name__ == '__main__':
    sys.exit(run_command(main))
