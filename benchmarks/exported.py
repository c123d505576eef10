#!/usr/bin/env python
"""Exported backbones beside the other engines: AP, seconds, size.

    python -m benchmarks.exported ap CONFIG PACKED
    python -m benchmarks.exported speed swin-t --bits w4a4

The first evaluates a packed detector in the simulation, natively, and with its
backbone exported for OpenVINO and onnxruntime. The second measures a backbone
of make bench-runtime on that benchmark's image; the engines take turns.
"""
import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import Tensor

from benchmarks.runtime_subjects import (OPENVINO, ORT, SUBJECTS, Backbone,
                                         load_rival)
from isvit_det.apis import export_detector
from isvit_det.commands.console import run_command
from isvit_det.commands.packed_model import load_packed
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import simulation
from isvit_det.evaluation.figures import average_precision, in_points
from isvit_det.evaluation.stopwatch import Stopwatch
from isvit_det.export.detector import ENGINE_OF
from isvit_det.export.engines import load
from isvit_det.report.machine import describe_machine, machine_line
from isvit_det.report.tables import format_table
from isvit_det.report.timing import take_turns

ENGINES = ('simulation', 'native')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest='kind', required=True)
    precision = kinds.add_parser('ap')
    precision.add_argument('config', metavar='CONFIG')
    precision.add_argument('packed', metavar='PACKED')
    engines = (*ENGINES, *ENGINE_OF)
    precision.add_argument(
        '--engines', nargs='+', choices=engines, default=engines)
    speed = kinds.add_parser('speed')
    speed.add_argument(
        'subject',
        choices=[
            name for name, one in SUBJECTS.items()
            if isinstance(one, Backbone)
        ])
    speed.add_argument('--bits', default='w4a4')
    speed.add_argument('--rounds', type=int, default=5)
    for kind in (precision, speed):
        kind.add_argument(
            '--work-dir', type=Path, default=Path('work_dirs/exported'))
    return parser.parse_args()


class Watch(Stopwatch):
    """Times what a runner predicts."""

    def after_test_iter(self, *args: Any, **kwargs: Any) -> None:
        self.stop(1)


def measure_ap(args: argparse.Namespace) -> List[Dict[str, str]]:
    """AP of a packed detector in each engine."""
    cfg, model = load_packed(args.config, args.packed)
    rows = []
    for engine in args.engines:
        changed = Config(cfg._cfg_dict.copy(), filename=cfg.filename)
        size = Path(args.packed).stat().st_size
        if engine in ENGINES:
            changed.model.engine = engine
        else:
            folder = args.work_dir / Path(args.config).stem / engine
            path, report = export_detector(model, folder, engine)
            size = sum(report['files'].values())
            changed.model.backbone = dict(
                type='isvit_det.EngineBackbone',
                file=str(path),
                engine=ENGINE_OF[engine],
                threads=torch.get_num_threads())
        changed.merge_from_dict(
            dict(
                load_from=args.packed,
                work_dir=str(args.work_dir / 'runs'),
                custom_hooks=[],
                log_level='WARNING'))
        runner = Runner.from_cfg(changed)
        watch = Watch()
        runner.register_hook(watch)
        metrics = runner.test()
        rows.append({
            'backbone run by': engine,
            'box AP': in_points(average_precision(metrics, 'bbox')),
            'mask AP': in_points(average_precision(metrics, 'segm')),
            's/image': f'{watch.median():.3g}',
            'file MB': f'{size / 1e6:.1f}'
        })
        print(format_table(rows[-1:]), flush=True)
    return rows


def measure_speed(args: argparse.Namespace) -> List[Dict[str, str]]:
    """Seconds of a backbone in each engine, in float and quantized."""
    subject = SUBJECTS[args.subject]
    assert isinstance(subject, Backbone)
    made = Path('work_dirs/bench_runtime')
    made.mkdir(parents=True, exist_ok=True)
    source, x = subject.make()
    detector = subject.detector.quantized(args.bits, made)
    runs: Dict[str, Callable[[], Any]] = {
        'torch, float': partial(_run, source, x)
    }
    sizes: Dict[str, int] = {}
    for rival in (OPENVINO, ORT):
        run = load_rival(rival, source, x, 1, made, subject.exported)
        runs[f'{rival}, float'] = partial(run, x)
    detector.runtime.engine = 'native'
    runs['native'] = partial(_run, detector.backbone, x)
    runs['simulation'] = partial(_simulate, detector.backbone, x)
    height, width = x.shape[-2:]
    for to, engine in ENGINE_OF.items():
        for shape in (None, (height, width)):
            name = f'{engine}, {"any size" if shape is None else "one size"}'
            folder = args.work_dir / f'{args.subject}_{args.bits}_{name}'
            try:
                path, report = export_detector(detector, folder, to, shape)
            except QuantError as error:
                print(f'{name} is left out: {error}')
                continue
            print(
                f'{name}: errors {report["errors"]}, in float '
                f'{report["others_in_float"]}',
                flush=True)
            sizes[name] = sum(report['files'].values())
            loaded = load(engine, str(path), 1)
            runs[name] = partial(loaded.run, dict(image=x.numpy()))
    seconds = take_turns(runs, args.rounds)
    base = seconds['OpenVINO, float'].user
    return [{
        f'{subject.title}, {args.bits}': name,
        'user s': f'{found.user:.3g}',
        'OpenVINO in float / it': f'{base / found.user:.2f}',
        'wall s': f'{found.wall:.3g}',
        'file MB': f'{sizes[name] / 1e6:.1f}' if name in sizes else '-'
    } for name, found in seconds.items()]


def _run(model: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


def _simulate(model: Any, x: Tensor) -> Any:
    with simulation(model):
        return _run(model, x)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    print(machine_line(describe_machine()))
    measure = measure_ap if args.kind == 'ap' else measure_speed
    print(f'\n{format_table(measure(args))}')


if __name__ == '__main__':
    sys.exit(run_command(main))
