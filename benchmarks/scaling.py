#!/usr/bin/env python
"""How calibration grows with images and with depth.

Runs benchmarks.calibration once for each number of images and each depth;
what follows ``--`` is handed to it.
"""
import argparse

from benchmarks.calibration import run_alone
from isvit_det.engine.report import format_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, nargs='+', default=[4, 8, 16])
    parser.add_argument('--depths', nargs='+', default=['2,2,2,2', '2,2,6,2'])
    parser.add_argument('rest', nargs='*', help='for benchmarks.calibration')
    args = parser.parse_args()
    rows = []
    for depths in args.depths:
        for images in args.images:
            found = run_alone('items', [
                *args.rest, f'model.backbone.depths=[{depths}]', '--images',
                str(images), '--held-out', '1'
            ])
            rows.append({
                'depths': depths.replace(',', '-'),
                'images': str(images),
                'units': str(found['units']),
                'seconds': f'{found["seconds"]:.0f}',
                'seconds per unit': f'{found["seconds"] / found["units"]:.1f}',
                'GB before': f'{found["before"] / 1e9:.2f}',
                'peak GB': f'{found["peak"] / 1e9:.2f}'
            })
            print(rows[-1], flush=True)
    print(format_table(rows))


if __name__ == '__main__':
    main()
