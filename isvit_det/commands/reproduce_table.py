"""A column of the paper's table: every detector at some bits."""
import argparse
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from mmengine.config import Config

from isvit_det.commands import parsers
from isvit_det.commands.cells import QUANTIZE_DET, Cell, Result
from isvit_det.commands.console import run_command
from isvit_det.commands.estimate import announce
from isvit_det.commands.zoo import (METAFILE, check_detector, fetch,
                                    find_sources, read_column)
from isvit_det.core.errors import QuantError
from isvit_det.core.files import local_checkpoint, write_atomically
from isvit_det.evaluation.figures import in_points
from isvit_det.inputs.configs import config_errors, load_config
from isvit_det.inputs.overrides import check_pairs
from isvit_det.report.tables import format_table

# Published figures are of the whole detector.
PUBLISHED_SCOPE = 'detector'


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = parsers.reproduce_table()
    args = parser.parse_args(argv)
    check_pairs(parser, args.cfg_options)
    return args


def data_options(cfg: Config, root: str) -> List[str]:
    """``--cfg-options`` that read a config's data from another folder.

    Args:
        cfg: of a detector, with one data set per split.
        root: laid out as the config's own folder.
    """
    options = []
    for split in ('train', 'val', 'test'):
        key = f'{split}_dataloader.dataset'
        dataset = cfg[f'{split}_dataloader'].dataset
        # What repeats a data set has it inside.
        while 'data_root' not in dataset:
            key, dataset = f'{key}.dataset', dataset.dataset
        options.append(f'{key}.data_root={os.path.join(root, "")}')
        if split != 'train':
            path = os.path.relpath(cfg[f'{split}_evaluator'].ann_file,
                                   dataset.data_root)
            options.append(
                f'{split}_evaluator.ann_file={os.path.join(root, path)}')
    return options


def pair(result: Optional[Mapping[str, Any]]) -> str:
    """Box and mask AP of a model, in points."""
    result = result or {}
    return '/'.join(
        in_points(result.get(f'{kind}_ap')) for kind in ('box', 'mask'))


class Column:
    """The cells of a column, and what is known of them.

    Args:
        args: of the command line.
        bits: of the column.

    Attributes:
        left: cells that are to be run, by detector.
        failures: why a detector has no result, by its name.
    """

    def __init__(self, args: argparse.Namespace, bits: str) -> None:
        self.args = args
        self.bits = bits
        self.entries = read_column(args.metafile or METAFILE, bits)
        detectors = list(self.entries)
        self.sources = find_sources(args.checkpoints, detectors)
        self.models = args.models or detectors
        for name in args.models or ():
            check_detector('--models', name, detectors)
            if name not in self.sources and not self._is_fetched(name):
                raise QuantError(f'--models: no checkpoint of {name!r} is '
                                 f'given; {self._advice(name)}.')
        root = args.data_root
        if root is not None and not Path(root).is_dir():
            raise QuantError(f'--data-root: {root} is no folder; give the one '
                             'that holds COCO, as data/coco does in the '
                             'configs.')
        self.folder = args.work_dir / f'{bits}_{args.scope}_{args.method}'
        self.table = self.folder.with_name(f'{self.folder.name}.md')
        self.left: Dict[str, Cell] = {}
        self.results: Dict[str, Result] = {}
        self.reasons: Dict[str, str] = {}
        self.failures: Dict[str, str] = {}

    def _is_fetched(self, detector: str) -> bool:
        """Whether a detector's checkpoint is to be downloaded."""
        return self.args.download and bool(self.entries[detector].address)

    def _advice(self, detector: str) -> str:
        given = f'add {detector}=FILE to --checkpoints'
        if self.entries[detector].address and not self.args.download:
            return f'{given}, or --download'
        return given

    def look_up(self) -> None:
        """Take over what is done, and find what is left to run."""
        for detector in self.entries:
            if detector not in self.sources and not (
                    detector in self.models and self._is_fetched(detector)):
                self.reasons[detector] = 'no checkpoint given'
                continue
            try:
                cell = self._cell(detector)
                result = cell.find()
            except QuantError as error:
                self._fail(detector, error)
                continue
            if result is not None:
                self.results[detector] = result
            elif detector not in self.models:
                self.reasons[detector] = 'not among --models'
            else:
                self.reasons[detector] = 'not run yet'
                self.left[detector] = cell
        self._write()

    def run(self) -> None:
        """Run what is left, and show the table."""
        for number, (detector, cell) in enumerate(self.left.items(), 1):
            print(f'{number}/{len(self.left)} {detector}', flush=True)
            try:
                self.results[detector] = cell.run()
            except QuantError as error:
                self._fail(detector, error)
            self._write()
        print(f'\n{self.table.read_text()}\ntable: {self.table}')

    def _cell(self, detector: str) -> Cell:
        args, config = self.args, self.entries[detector].config
        source = self.sources.get(detector)
        if source is None:
            source = fetch(detector, self.entries[detector],
                           args.work_dir / 'checkpoints')
        weights = local_checkpoint(source)
        argv = [config, str(weights), '--bits', self.bits]
        argv += ['--scope', args.scope, '--method', args.method]
        if args.calib_images is not None:
            argv += ['--calib-images', str(args.calib_images)]
        options = list(args.cfg_options)
        if args.data_root is not None:
            with config_errors():
                cfg = load_config(config, None)
                options = data_options(cfg, args.data_root) + options
        if options:
            argv += ['--cfg-options', *options]
        return Cell(
            QUANTIZE_DET,
            argv,
            self.folder / detector,
            weights,
            verbose=args.verbose)

    def _fail(self, detector: str, error: QuantError) -> None:
        self.reasons[detector] = 'failed'
        self.failures[detector] = ' '.join(str(error).split())

    def _write(self) -> None:
        args = self.args
        lines = [
            f'Box/mask AP in points, {self.bits}, scope {args.scope}, method '
            f'{args.method}. Published figures are those of I&S-ViT, '
            f'scope {PUBLISHED_SCOPE}.', '',
            format_table([self._row(detector) for detector in self.entries])
        ]
        if self.failures:
            lines += ['', 'Failed:', '']
            lines += [f'* {key}: {why}' for key, why in self.failures.items()]
        text = '\n'.join(lines) + '\n'
        write_atomically(self.table, lambda file: file.write(text.encode()))

    def _row(self, detector: str) -> Dict[str, str]:
        result, entry = self.results.get(detector), self.entries[detector]
        comparable = self.args.scope == PUBLISHED_SCOPE
        missing = f'not measured: {self.reasons.get(detector)}'
        return {
            'detector': detector,
            'float': '-' if result is None else pair(result['float']),
            self.bits:
            missing if result is None else pair(result['quantized']),
            'published float': entry.published('float '),
            f'published {self.bits}': entry.published() if comparable else '-'
        }


def reproduce(args: argparse.Namespace) -> bool:
    """Run all columns; whether all that was run went well."""
    columns = [Column(args, bits) for bits in dict.fromkeys(args.bits)]
    for column in columns:
        column.look_up()
    left = {
        f'{column.bits} {detector}': cell
        for column in columns
        for detector, cell in column.left.items()
    }
    if left and not args.no_estimate:
        announce(left)
    for column in columns:
        column.run()
    return not any(column.failures for column in columns)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""
    went_well = []
    status = run_command(lambda: went_well.append(reproduce(parse_args(argv))))
    return status or int(not all(went_well))
