#!/usr/bin/env python
"""How accurate methods and single options are: mean and spread over seeds.

There are four models: the detectors of the demo with Swin and with DeiT; a
real DeiT-tiny as a classifier, if COCO_ROOT names a folder and DEIT_TINY a
file; and, if COCO_ROOT is given, the detector of `make learn-coco60` on the
images that it has learned. From 6 bits up only `isvit` is run. An ablation is
`isvit` with one option as in `isvit_paper` or set to another value, and its
table shows by how much that changes the figures of the same seeds. Ablations
are run on Swin, and with --tune on DeiT and the classifier too. A third table,
of the same models, has other numbers of images and of iterations, on the
first seed.

Each run is a cell of a table and writes a line of cells.jsonl in the work
directory. A cell that has a line there, with the same weights and names of
images, is not run again, so that the command goes on after an interruption.
Give another --work-dir after a change of the code. With --budget no cell is
started after so many minutes, and the tables say how many of the cells were
run. The scopes of a detector share one calibration. benchmarks/measured holds
the cells that the tables of docs/accuracy.md were made of.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from benchmarks.accuracy_runs import BITS, Key, ablations, keys, subjects
from benchmarks.accuracy_tables import measures, print_tables
from benchmarks.scopes import keep_backbone
from isvit_det.commands.cells import QUANTIZE_CLS, QUANTIZE_DET, Cell
from isvit_det.commands.console import run_command
from isvit_det.core.digests import file_hash
from isvit_det.core.presets import optimises

ROOT = Path(__file__).parents[1]
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


def hash_names(root: Path) -> str:
    """Tells COCO folders apart by the names of their images."""
    names = [
        f'{split}/{path.name}' for split in ('train2017', 'val2017')
        for path in root.joinpath(split).rglob('*')
    ]
    return hashlib.sha256('\n'.join(sorted(names)).encode()).hexdigest()[:16]


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
            command = QUANTIZE_DET
        else:
            argv = [subject.config, '--weights', str(subject.weights), *argv]
            command = QUANTIZE_CLS
        argv += _options(changed)
        return Cell(command, argv, self._folder(key), subject.weights)

    def _float(self, key: Key) -> Mapping[str, Any]:
        """The result of a detector as it was given, in a run of minmax."""
        subject = self.subjects[key.subject]
        argv = [subject.config, str(subject.weights), '--method', 'minmax']
        argv += ['--calib-images', str(key.images)]
        argv += _options(self._images())
        result = Cell(QUANTIZE_DET, argv, self._folder(key),
                      subject.weights).run()
        return dict(quantized=result['float'], seconds=result['seconds'])

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
        packed_result = Cell(whole.command, argv, folder, subject.weights,
                             'result_packed.json').run()
        return dict(packed_result, backbone_error=result['backbone_error'])

    def _images(self) -> Dict[str, Any]:
        return TUNE if self.args.tune else {}

    def _folder(self, key: Key) -> Path:
        parts = ['tune'] * self.args.tune + list(dataclasses.astuple(key))
        return self.args.work_dir / '_'.join(
            str(part).replace(' ', '') for part in parts)


def _options(changed: Mapping[str, Any]) -> List[str]:
    """Settings as a tool's arguments."""
    pairs = [f'{key}={_text(value)}' for key, value in changed.items()]
    return ['--cfg-options', *pairs] if pairs else []


def _text(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    text = ','.join(map(str, value))
    # No or one element without brackets would be no list.
    return text if len(value) > 1 else f'[{text}]'


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
    planned = list(keys(args, accuracy.subjects))
    left = []
    for key in planned:
        if accuracy.find(key) is not None:
            continue
        if time.monotonic() >= end:
            left.append(key)
        else:
            accuracy.run(key)
    for name, subject in accuracy.subjects.items():
        print_tables(name, subject,
                     [key for key in planned if key.subject == name],
                     (args.images, args.iters), accuracy.find, accuracy.change)
    if left:
        print(f'\n{len(left)} of {len(planned)} cells not run: --budget')


if __name__ == '__main__':
    sys.exit(run_command(main))
