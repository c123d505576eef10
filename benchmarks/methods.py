#!/usr/bin/env python
"""All methods on the same detector, images and seeds, in one table.

Each cell is a run of tools/quantize_det.py in a folder of its own. A cell
that is done is not run again; one that was interrupted goes on.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping

from isvit_det.checkpoint import file_hash
from isvit_det.core.spec import METHODS
from isvit_det.engine.configs import load_config
from isvit_det.engine.report import format_table, in_points

TOOL = Path(__file__).parents[1] / 'tools/quantize_det.py'
CONFIG = 'configs/drawn/mask-rcnn_swin-mini_fpn_isvit-w3a3_drawn.py'
COLUMNS = ('method', 'seed', 'bits', 'scope', 'box AP', 'mask AP',
           'backbone error', 'calibration s')
Result = Mapping[str, Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', nargs='?', default=CONFIG)
    add('--bits', help="default: the config's")
    add('--scope', help="default: the config's")
    add('--seeds', type=int, nargs='+', default=[0, 1])
    add('--methods', nargs='+', default=list(METHODS))
    add('--work-dir', type=Path, default=Path('work_dirs/methods'))
    return parser.parse_args()


def is_done(report: Path, config: str) -> bool:
    """Whether a report is of the float weights that a config names."""
    if not report.is_file():
        return False
    made_from = json.loads(report.read_text())['provenance']
    weights = Path(load_config(config, None).load_from)
    return made_from['float_checkpoint_sha256'] == file_hash(weights)


def run_cell(args: argparse.Namespace, method: str, seed: int) -> Result:
    """The result of one run, made or found."""
    name = '_'.join([
        Path(args.config).stem, args.bits or 'bits', args.scope or 'scope',
        method, f'seed{seed}'
    ])
    folder = args.work_dir / name
    if not is_done(folder / 'result.json', args.config):
        command = [
            sys.executable,
            str(TOOL), args.config, '--method', method, '--seed',
            str(seed), '--work-dir',
            str(folder)
        ]
        for option in ('bits', 'scope'):
            if getattr(args, option):
                command += [f'--{option}', getattr(args, option)]
        # The float model is the same in all cells: the first one tells.
        if (method, seed) != (args.methods[0], args.seeds[0]):
            command.append('--no-float-eval')
        subprocess.run(command, check=True)
    return json.loads((folder / 'result.json').read_text())


def row(method: str, seed: str, found: Result, **more: str) -> Dict[str, str]:
    cells = dict(more, method=method, seed=seed)
    cells['box AP'] = in_points(found.get('box_ap'))
    cells['mask AP'] = in_points(found.get('mask_ap'))
    return {key: cells.get(key, '-') for key in COLUMNS}


def float_row(result: Result) -> Dict[str, str]:
    # Only the first run of a work directory evaluates the float model.
    return row('float', '-', result['float'] or {}, bits='32')


def quantized_row(method: str, seed: int, result: Result) -> Dict[str, str]:
    more = {
        'backbone error': f'{result["backbone_error"]:.4g}',
        'calibration s': f'{result["seconds"]["calibration"]:.0f}'
    }
    return row(
        method,
        str(seed),
        result['quantized'],
        bits=result['bits'],
        scope=result['scope'],
        **more)


def main() -> None:
    args = parse_args()
    rows: List[Dict[str, str]] = []
    for method in args.methods:
        for seed in args.seeds:
            result = run_cell(args, method, seed)
            if not rows:
                rows.append(float_row(result))
            rows.append(quantized_row(method, seed, result))
    print(f'\n{format_table(rows)}')


if __name__ == '__main__':
    main()
