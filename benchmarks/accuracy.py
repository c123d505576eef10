#!/usr/bin/env python
"""How accurate methods and single options are: mean and spread over seeds.

Four models: the embedded detectors with Swin and DeiT; a real DeiT-tiny as a
classifier, where COCO_ROOT names a folder and DEIT_TINY a file; and, where
COCO_ROOT does, the detector of `make learn-coco60` on the images that it has
learned. From 6 bits up only `isvit` is run. An ablation, on Swin, with
--tune on DeiT and the classifier too, is `isvit` with one option as in
`isvit_paper` or set otherwise; its table shows by how much that changes the
figures of the same seeds. A third table, of the same models, has other numbers
of images and of iterations, on the first seed.

A run is a cell, a line of cells.jsonl in the work directory; cells found
there, of the same weights and names of images, are not run again, so the
command goes on after an interruption; give another --work-dir after a change
of the code. With --budget no cell is started after so many minutes; the
tables count those that are there. The scopes of a detector share one
calibration. benchmarks/measured holds the cells that the tables of
docs/accuracy.md were made of.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import (Any, Dict, Iterable, Iterator, List, Mapping, Optional,
                    Sequence, Tuple)

from benchmarks.scopes import keep_backbone
from isvit_det.commands.cells import Cell
from isvit_det.commands.console import run_command
from isvit_det.core.digests import file_hash
from isvit_det.core.presets import optimises
from isvit_det.core.settings import QuantConfig, SOSConfig, parse_bits
from isvit_det.inputs.configs import load_config
from isvit_det.report.tables import format_table

ROOT = Path(__file__).parents[1]
BITS = ('w3a3', 'w4a4', 'w6a6', 'w8a8')
METHOD_ROWS = ('repq', 'isvit_paper', 'isvit')
# Variants with other numbers of images or of iterations than usual, which are
# run on the first seed.
EXTENTS = (
    ('isvit', 16, None),
    ('isvit', 256, None),
    ('isvit', None, 0),
    ('isvit', None, 500),
    ('isvit, sos.stage_one_share=0.0', None, 500),
    ('isvit_paper', None, 500),
)
# Titles of the figures, their units and digits.
DETECTOR_FIGURES = dict(
    box_ap=('box AP', .01, 1),
    mask_ap=('mask AP', .01, 1),
    backbone_error=('backbone error', 1., 4))
CLASSIFIER_FIGURES = dict(agreement=('agreement %', .01, 1), kl=('KL', 1., 3))
# Ablations that set an option otherwise than isvit_paper has it.
OTHERWISE = {
    'sos.stage_one_share': 0.,
    'sos.rotate_heads': True,
    'sos.mirror_images': True,
}
# Options that do nothing in a scope, '-' being a classifier's.
IDLE = {
    'detector': ('sos.weigh_tokens', ),
    '-': ('sos.correct_heads', 'sos.weigh_locations'),
}
# Images of the train split at its end that --tune evaluates.
TUNE_IMAGES = 320
TUNE = {
    'train_dataloader.dataset.indices':
    2680,
    'test_dataloader.dataset.ann_file':
    'annotations/instances_train.json',
    'test_dataloader.dataset.data_prefix.img':
    'train/',
    'test_dataloader.dataset.indices':
    -TUNE_IMAGES,
    'test_evaluator.ann_file':
    None,
    'test_dataloader.dataset.pipeline.3.meta_keys':
    "('img_id','img_path','ori_shape','img_shape','scale_factor','instances')",
}


@dataclass(frozen=True)
class Subject:
    """A model whose accuracy is measured.

    Attributes:
        config: of a quantized detector, or the name of a timm classifier.
        weights: file of its float weights.
        scopes: of a detector; none for a classifier.
        ablated: whether single options are tried on it.
        options: settings of the command line.
        images: folder of COCO; None for drawn images.
    """
    config: str
    weights: Path
    scopes: Tuple[str, ...] = ()
    ablated: bool = False
    options: Tuple[str, ...] = ()
    images: Optional[Path] = None


@dataclass(frozen=True)
class Key:
    """What identifies a cell: settings by name.

    Attributes:
        subject: name of the model.
        bits: as of ``--bits``; '32' is float.
        scope: of the quantization, '-' for a classifier.
        variant: a method, or ``isvit`` with one setting changed.
        seed: of the calibration.
        images: number of images to calibrate on.
        iters: iterations per unit and stage.
    """
    subject: str
    bits: str
    scope: str
    variant: str
    seed: int
    images: int
    iters: int

    @property
    def extent(self) -> Tuple[int, int]:
        return self.images, self.iters

    @property
    def option(self) -> str:
        """The setting that is changed, '' if none is."""
        return self.variant.partition(', ')[2]


def subjects(args: argparse.Namespace) -> Dict[str, Subject]:
    """The models whose files are there, by name."""
    found = {}
    for name, backbone in (('swin', 'swin-mini_fpn'), ('deit',
                                                       'deit-mini_sfpn')):
        config = f'configs/drawn/mask-rcnn_{backbone}_isvit-w4a4_drawn.py'
        found[name] = Subject(config,
                              Path(load_config(config, None).load_from),
                              ('detector', 'backbone'), name == 'swin'
                              or args.tune)
    images = os.environ.get('COCO_ROOT')
    weights = Path(os.environ.get('DEIT_TINY', ''))
    if images and weights.is_file():
        options = ['--calib', f'{images}/train2017']
        if not args.tune:
            options += ['--val', f'{images}/val2017']
        found['deit-tiny'] = Subject('deit_tiny_patch16_224', weights, (),
                                     args.tune, tuple(options), Path(images))
    learned = Path('work_dirs/coco60/float.pth')
    if images and learned.is_file() and not args.tune:
        found['coco60'] = Subject(
            'configs/coco_subset/'
            'mask-rcnn_deit-t-p16_sfpn_isvit-w4a4_320px_coco60_learned.py',
            learned, ('detector', 'backbone'),
            images=Path(images))
    return {name: found[name] for name in args.models if name in found}


def hash_names(root: Path) -> str:
    """Tells COCO folders apart by the names of their images."""
    names = [
        f'{split}/{path.name}' for split in ('train2017', 'val2017')
        for path in root.joinpath(split).rglob('*')
    ]
    return hashlib.sha256('\n'.join(sorted(names)).encode()).hexdigest()[:16]


def ablations(scope: str) -> Dict[str, Dict[str, Any]]:
    """Settings of every variant of ``isvit`` with one option changed.

    Args:
        scope: of the quantization, '-' for a classifier.
    """
    ours, paper = QuantConfig(), QuantConfig.from_dict(
        dict(method='isvit_paper'))
    pairs = {'quant': (ours, paper)}
    kind = 'classifier' if scope == '-' else 'detector'
    pairs['sos'] = tuple(  # type: ignore
        SOSConfig.from_dict({}, config, kind) for config in (ours, paper))
    found = {}
    for part, (one, other) in pairs.items():
        for field in dataclasses.fields(one):
            value = getattr(other, field.name)
            key = f'{part}.{field.name}'
            if field.name != 'method' and key not in IDLE.get(
                    scope, ()) and getattr(one, field.name) != value:
                found[f'isvit, {key} as published'] = {key: value}
    for key, value in OTHERWISE.items():
        part, name = key.split('.')
        if getattr(pairs[part][0], name) != value:
            found[f'isvit, {key}={value}'] = {key: value}
    return found


def keys(args: argparse.Namespace, known: Mapping[str,
                                                  Subject]) -> Iterator[Key]:
    """All cells, the ones that most depends on first."""
    usual = args.images, args.iters
    for name, subject in known.items():
        if subject.scopes:
            yield Key(name, '32', '-', 'float', 0, *usual)
    for seed in args.seeds:
        for bits in args.bits:
            for name, subject in known.items():
                methods = METHOD_ROWS if is_low(bits) else ('isvit', )
                for scope in subject.scopes or ('-', ):
                    for method in methods:
                        yield Key(name, bits, scope, method, seed, *usual)
    if args.no_ablations:
        return
    for seed in args.seeds:
        for bits in args.bits:
            for name, subject in known.items():
                if is_low(bits) and subject.ablated:
                    scope = 'detector' if subject.scopes else '-'
                    variants = [(variant, *usual)
                                for variant in ablations(scope)]
                    if seed == args.seeds[0]:
                        variants += extents(args)
                    for variant, images, iters in variants:
                        yield Key(name, bits, scope, variant, seed, images,
                                  iters)


def is_low(bits: str) -> bool:
    """Whether methods differ enough at these bits to be compared."""
    return min(parse_bits(bits)) < 6


def extents(args: argparse.Namespace) -> Iterator[Tuple[str, int, int]]:
    """Variants with other images or iterations than usual.

    Those with other images are not for tuning, where a classifier is
    evaluated on what its calibration leaves.
    """
    for variant, images, iters in EXTENTS:
        if args.tune and images:
            continue
        found = (images or args.images, args.iters if iters is None else iters)
        if found != (args.images, args.iters):
            yield (variant, *found)


class Accuracy:
    """The cells of a work directory.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.subjects = subjects(args)
        self.hashes = {
            name: file_hash(subject.weights)[:16]
            for name, subject in self.subjects.items()
        }
        # One pass over the names in a folder, whatever it is used for.
        folders = {subject.images for subject in self.subjects.values()}
        self.datasets = {
            folder: hash_names(folder) if folder else 'drawn'
            for folder in folders
        }
        self.path = args.work_dir / 'cells.jsonl'
        self.done: Dict[str, Mapping[str, Any]] = {}
        if self.path.is_file():
            text = self.path.read_text()
            if text and not text.endswith('\n'):
                with self.path.open('a') as file:
                    file.write('\n')
            for line in text.splitlines():
                # A line that was cut off is of a cell that is run again.
                with contextlib.suppress(json.JSONDecodeError):
                    cell = json.loads(line)
                    self.done[cell['id']] = cell

    def id(self, key: Key) -> str:
        """Names settings, weights and images of a cell, but not the code."""
        settings = dataclasses.asdict(key)
        settings.update(
            tune=self.args.tune,
            weights=self.hashes[key.subject],
            dataset=self.datasets[self.subjects[key.subject].images])
        return json.dumps(settings, sort_keys=True)

    def find(self, key: Key) -> Optional[Mapping[str, Any]]:
        """The cell, None if it has not been run."""
        return self.done.get(self.id(key))

    def change(self, key: Key) -> Optional[Mapping[str, float]]:
        """By how much the figures of an ablation differ from ``isvit``'s."""
        new = self.find(key)
        old = self.find(dataclasses.replace(key, variant='isvit'))
        if new is None or old is None:
            return None
        return {
            name: new[name] - old[name]
            for name in new.keys() - {'id', 'seconds'}
        }

    def run(self, key: Key) -> None:
        """Run a cell and write its line."""
        if key.variant == 'float':
            result = self._float(key)
        elif key.scope == 'backbone':
            result = self._backbone(key)
        else:
            result = self._calibrated(key).run()
        cell = dict(
            id=self.id(key), seconds=result['seconds'], **measures(result))
        with self.path.open('a') as file:
            file.write(json.dumps(cell) + '\n')
        self.done[cell['id']] = cell

    def _calibrated(self, key: Key) -> Cell:
        """A run that calibrates, of a whole detector or of a classifier."""
        subject = self.subjects[key.subject]
        method = key.variant.split(',')[0]
        iters = key.iters if optimises(method) else 0
        argv = ['--bits', key.bits, '--method', method]
        argv += ['--seed', str(key.seed), '--iters', str(iters)]
        argv += ['--calib-images', str(key.images)]
        argv += subject.options
        changed = ablations(key.scope).get(key.variant, {})
        if subject.scopes:
            argv = [subject.config, str(subject.weights), *argv]
            argv += ['--scope', key.scope, '--no-float-eval']
            changed = {**changed, **self._images()}
            tool = 'quantize_det.py'
        else:
            argv = [subject.config, '--weights', str(subject.weights), *argv]
            tool = 'quantize_cls.py'
        argv += _options(changed)
        return Cell(ROOT / 'tools' / tool, argv, self._folder(key),
                    subject.weights)

    def _float(self, key: Key) -> Mapping[str, Any]:
        """The result of a detector as it was given, in a run of minmax."""
        subject = self.subjects[key.subject]
        argv = [subject.config, str(subject.weights), '--method', 'minmax']
        argv += ['--calib-images', str(key.images)]
        argv += _options(self._images())
        found = Cell(ROOT / 'tools/quantize_det.py', argv, self._folder(key),
                     subject.weights).run()
        return dict(quantized=found['float'], seconds=found['seconds'])

    def _backbone(self, key: Key) -> Mapping[str, Any]:
        """The result with neck and heads in float."""
        subject = self.subjects[key.subject]
        whole = self._calibrated(dataclasses.replace(key, scope='detector'))
        result = whole.run()
        folder = self._folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        packed = folder / 'packed.pth'
        keep_backbone(subject.config, subject.weights,
                      whole.folder / 'packed.pth', packed)
        argv = [subject.config, str(packed), '--scope', key.scope]
        argv += ['--bits', key.bits, '--method', key.variant]
        argv += _options(self._images())
        found = Cell(whole.tool, argv, folder, subject.weights,
                     'result_packed.json').run()
        return dict(found, backbone_error=result['backbone_error'])

    def _images(self) -> Dict[str, Any]:
        return TUNE if self.args.tune else {}

    def _folder(self, key: Key) -> Path:
        parts = ['tune'] * self.args.tune + list(dataclasses.astuple(key))
        return self.args.work_dir / '_'.join(
            str(part).replace(' ', '') for part in parts)


def _options(changed: Mapping[str, Any]) -> List[str]:
    """Settings as a tool's arguments."""
    found = [f'{key}={_text(value)}' for key, value in changed.items()]
    return ['--cfg-options', *found] if found else []


def _text(value: Any) -> str:
    return ','.join(map(str, value)) if isinstance(value,
                                                   tuple) else str(value)


def measures(result: Mapping[str, Any]) -> Dict[str, float]:
    """The figures of a cell."""
    if 'scores' in result:
        return {key: result['scores'][key] for key in ('agreement', 'kl')}
    found = {key: result['quantized'][key] for key in ('box_ap', 'mask_ap')}
    if 'backbone_error' in result:
        found['backbone_error'] = result['backbone_error']
    return found


def rows(cells: Iterable[Tuple[Key, Optional[Mapping[str, float]]]],
         names: Sequence[str],
         figures: Mapping[str, Tuple[str, float, int]],
         sign: str = '') -> List[Dict[str, str]]:
    """One row for all seeds of a cell: mean and standard deviation.

    Args:
        cells: keys of one model with their figures, None if not there.
        names: attributes of a key that a row has in common and shows.
        figures: titles, units and digits of what is shown.
        sign: '+' for changes.
    """
    groups: Dict[Tuple[Any, ...], List[Optional[Mapping[str, float]]]] = {}
    for key, cell in cells:
        group = tuple(getattr(key, name) for name in names)
        groups.setdefault(group, []).append(cell)
    table = []
    for group, found in groups.items():
        there = [cell for cell in found if cell is not None]
        row = dict(zip(names, map(str, group)))
        row['seeds'] = f'{len(there)} of {len(found)}'
        for name, (title, unit, digits) in figures.items():
            values = [cell[name] / unit for cell in there if name in cell]
            row[title] = spread(values, digits, sign)
        table.append(row)
    return table


def spread(values: List[float], digits: int, sign: str = '') -> str:
    """Mean and sample standard deviation, or '-' of nothing.

    >>> spread([1., 2.], 1), spread([3.], 2, '+'), spread([], 1)
    ('1.5 ± 0.7', '+3.00', '-')
    """
    if not values:
        return '-'
    text = f'{statistics.mean(values):{sign}.{digits}f}'
    if len(values) > 1:
        text += f' ± {statistics.stdev(values):.{digits}f}'
    return text


def print_tables(accuracy: Accuracy, name: str, wanted: List[Key]) -> None:
    """Print what is known of a model."""
    figures, title = CLASSIFIER_FIGURES, name
    if accuracy.subjects[name].scopes:
        figures, title = DETECTOR_FIGURES, f'{name}, scope detector'
    usual = accuracy.args.images, accuracy.args.iters
    # Runs go seed by seed; a row has all seeds.
    wanted = sorted(wanted, key=lambda key: (key.bits, key.scope))
    cells = [key for key in wanted if key.extent == usual]
    methods = [key for key in cells if not key.option]
    single = [key for key in cells if key.option]
    extent = [key for key in wanted if key.extent != usual]
    table = rows(((key, accuracy.find(key)) for key in methods),
                 ('bits', 'scope', 'variant'), figures)
    print(f'\n{name}\n\n{format_table(table)}')
    if single:
        table = rows(((key, accuracy.change(key)) for key in single),
                     ('bits', 'option'), figures, '+')
        print(f'\n{title}, what a single option changes\n\n'
              f'{format_table(table)}')
    if extent:
        twins = {
            dataclasses.replace(key, images=usual[0], iters=usual[1])
            for key in extent
        }
        extent += [key for key in cells if key in twins]
        extent.sort(key=lambda key: (key.bits, key.variant, *key.extent))
        table = rows(((key, accuracy.find(key)) for key in extent),
                     ('bits', 'variant', 'images', 'iters'), figures)
        print(f'\n{title}, images and iterations\n\n{format_table(table)}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    models = ['swin', 'deit', 'deit-tiny', 'coco60']
    add('--models', nargs='+', choices=models, default=models)
    add('--bits', nargs='+', default=BITS)
    add('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add('--images', type=int, default=64, help='to calibrate on')
    add('--iters', type=int, default=100, help='per unit and stage')
    add('--no-ablations',
        action='store_true',
        help='nor other numbers of images and iterations')
    add('--tune',
        action='store_true',
        help='calibrate and evaluate on parts of the train splits, apart')
    add('--budget',
        type=float,
        default=float('inf'),
        help='minutes after which no cell is started')
    add('--work-dir', type=Path, default=Path('work_dirs/accuracy'))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.budget
    accuracy = Accuracy(args)
    for name in args.models:
        if name not in accuracy.subjects:
            print(f'{name}: skipped, for want of its files'
                  f'{" or of images to tune on" if args.tune else ""}')
    wanted = list(keys(args, accuracy.subjects))
    left = []
    for key in wanted:
        if accuracy.find(key) is not None:
            continue
        if time.monotonic() >= end:
            left.append(key)
        else:
            accuracy.run(key)
    for name in accuracy.subjects:
        print_tables(accuracy, name,
                     [key for key in wanted if key.subject == name])
    if left:
        print(f'\n{len(left)} of {len(wanted)} cells not run: --budget')


if __name__ == '__main__':
    sys.exit(run_command(main))
