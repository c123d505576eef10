"""A column of the paper's table: every detector at some bits."""
import argparse
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import yaml
from mmengine.config import Config
from mmengine.fileio import load

import isvit_det
from isvit_det.commands import parsers
from isvit_det.commands.cells import QUANTIZE_DET, Cell, Result
from isvit_det.commands.console import run_command
from isvit_det.core.errors import QuantError
from isvit_det.core.files import local_checkpoint, path_of, write_atomically
from isvit_det.evaluation.figures import in_points
from isvit_det.inputs.configs import config_errors, load_config
from isvit_det.inputs.overrides import check_pairs
from isvit_det.report.tables import format_table

# A clone's own folder, or that of the installed package.
ROOT = (Path(isvit_det.__file__).parent / '.mim/configs').resolve().parent
METAFILE = ROOT / 'configs/isvit/metafile.yml'
PUBLISHED = 'Published (I&S-ViT) '
# Published figures are of the whole detector.
PUBLISHED_SCOPE = 'detector'


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = parsers.reproduce_table()
    args = parser.parse_args(argv)
    check_pairs(parser, args.cfg_options)
    return args


class Entry(NamedTuple):
    """What a metafile says of one detector at some bits."""
    config: str
    metrics: Mapping[str, Any]

    def published(self, prefix: str = '') -> str:
        """Published box and mask AP.

        Args:
            prefix: ``'float '`` for those of the float model.
        """
        keys = [f'{PUBLISHED}{prefix}{kind} AP' for kind in ('box', 'mask')]
        if not set(keys) <= set(self.metrics):
            return '-'
        return '/'.join(f'{self.metrics[key]:.1f}' for key in keys)


def read_column(path: Path, bits: str) -> Dict[str, Entry]:
    """What a metafile says of all detectors at some bits, by detector.

    Raises:
        QuantError: if it cannot be read or has no such bits.
    """
    if not path.is_file():
        raise QuantError(f'--metafile: there is no file {path}; give the path '
                         'of one, or leave it out.')
    column: Dict[str, Entry] = {}
    known = set()
    try:
        for model in load(str(path))['Models']:
            facts = model['Metadata']
            known.add(facts['Bits'])
            if facts['Bits'] != bits:
                continue
            metrics: Dict[str, Any] = {}
            for result in model['Results']:
                metrics.update(result['Metrics'])
            for key in metrics:
                if key.startswith(PUBLISHED):
                    metrics[key] = float(metrics[key])
            config = os.path.relpath(ROOT / model['Config'])
            column[facts['Detector']] = Entry(config, metrics)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise QuantError(
            f'--metafile: {path} is not in the form of '
            f'configs/isvit/metafile.yml ({error}); give one that '
            'is, or leave it out.') from error
    if not column:
        raise QuantError(f'--bits: {bits!r} is not in {path}; expected one '
                         f'of {sorted(map(str, known))}.')
    return column


def find_sources(given: Sequence[str],
                 detectors: Sequence[str]) -> Dict[str, str]:
    """Files or addresses of float checkpoints, by detector.

    Args:
        given: ``DETECTOR=FILE`` or folders.
        detectors: that there are.

    Raises:
        QuantError: if something given is for none of them or is not there.
    """
    sources: Dict[str, str] = {}
    for text in given:
        if Path(text).is_dir():
            files = {one: Path(text) / f'{one}.pth' for one in detectors}
            present = {
                one: str(path)
                for one, path in files.items() if path.is_file()
            }
            if not present:
                raise QuantError(f'--checkpoints: no file in {text} is named '
                                 f'as a detector, such as {detectors[0]}.pth.')
            sources.update(present)
            continue
        detector, _, source = text.partition('=')
        if not source:
            raise QuantError(f'--checkpoints: {text!r} is no folder; give '
                             f'DETECTOR=FILE, such as {detectors[0]}=FILE.')
        check_detector('--checkpoints', detector, detectors)
        path = path_of(source)
        if path is not None and not path.is_file():
            raise QuantError(f'--checkpoints: there is no file {source}, '
                             f'given for {detector}.')
        sources[detector] = source
    return sources


def check_detector(option: str, name: str, detectors: Sequence[str]) -> None:
    """Raise unless there is a detector of that name."""
    if name not in detectors:
        raise QuantError(f'{option}: {name!r} is no detector; expected one of '
                         f'{list(detectors)}.')


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
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.entries = read_column(args.metafile or METAFILE, args.bits)
        detectors = list(self.entries)
        self.sources = find_sources(args.checkpoints, detectors)
        self.models = args.models or detectors
        for name in args.models or ():
            check_detector('--models', name, detectors)
            if name not in self.sources:
                raise QuantError(f'--models: no checkpoint of {name!r} is '
                                 f'given; add {name}=FILE to --checkpoints.')
        root = args.data_root
        if root is not None and not Path(root).is_dir():
            raise QuantError(f'--data-root: {root} is no folder; give the one '
                             'that holds COCO, as data/coco does in the '
                             'configs.')
        self.folder = args.work_dir / f'{args.bits}_{args.scope}_{args.method}'
        self.table = self.folder.with_name(f'{self.folder.name}.md')
        self.results: Dict[str, Result] = {}
        self.reasons: Dict[str, str] = {}
        self.failures: Dict[str, str] = {}

    def run(self) -> bool:
        """Run what is to be run; whether all that was run went well."""
        cells = self._look_up()
        self._write()
        for number, (detector, cell) in enumerate(cells.items(), 1):
            print(f'{number}/{len(cells)} {detector}', flush=True)
            try:
                self.results[detector] = cell.run()
            except QuantError as error:
                self._fail(detector, error)
            self._write()
        print(f'\n{self.table.read_text()}\ntable: {self.table}')
        return not self.failures

    def _look_up(self) -> Dict[str, Cell]:
        """Take over what is done; the cells that are left to run."""
        left: Dict[str, Cell] = {}
        for detector in self.entries:
            if detector not in self.sources:
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
                left[detector] = cell
        return left

    def _cell(self, detector: str) -> Cell:
        args, config = self.args, self.entries[detector].config
        weights = local_checkpoint(self.sources[detector])
        argv = [config, str(weights), '--bits', args.bits]
        argv += ['--scope', args.scope, '--method', args.method]
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
            f'Box/mask AP in points, {args.bits}, scope {args.scope}, method '
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
            'detector':
            detector,
            'float':
            '-' if result is None else pair(result['float']),
            self.args.bits:
            missing if result is None else pair(result['quantized']),
            'published float':
            entry.published('float '),
            f'published {self.args.bits}':
            entry.published() if comparable else '-'
        }


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""
    went_well = []
    status = run_command(
        lambda: went_well.append(Column(parse_args(argv)).run()))
    return status or int(not all(went_well))
