"""Speed and memory of a packed detector on this machine, float and native."""
import argparse
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from mmdet.utils import get_test_pipeline_cfg
from mmengine.logging import MMLogger

from isvit_det.apis import GivenImages, without_annotations
from isvit_det.commands import parsers
from isvit_det.commands.children import call_elsewhere
from isvit_det.commands.console import run_command
from isvit_det.commands.packed_model import load_packed
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import quantized_layers
from isvit_det.detector import language_model
from isvit_det.engine.speed import (FLOAT, kind_of, predicting, time_layers,
                                    time_model)
from isvit_det.inputs.configs import config_errors
from isvit_det.report.machine import describe_machine, machine_line, peak_bytes
from isvit_det.report.tables import format_table, write_result
from isvit_det.runtime.engine import VARIABLE, describe_engine, engine_line

FORMAT_VERSION = 1
SIMULATION, NATIVE = 'simulation', 'native'
# Width and height of the noise where the config resizes nothing.
SIZE = (1333, 800)


class Subject(NamedTuple):
    """What is measured.

    Attributes:
        model: calibrated, in eval mode, to run natively.
        batch: of one image, as a data loader yields it.
    """
    model: Any
    batch: Dict[str, Any]

    @property
    def shape(self) -> Tuple[int, ...]:
        """Of the image as the test pipeline gives it, (3, H, W)."""
        return tuple(self.batch['inputs'][0].shape)


def read_subject(config: str, checkpoint: str,
                 image: Optional[str]) -> Subject:
    """Build a detector, load its packed weights, and prepare an image.

    Args:
        config: float, or of the calibration.
        checkpoint: packed; a path or an address.
        image: a file; None draws noise of the size that the config tests.

    Raises:
        QuantError: if one of them cannot be used.
    """
    cfg, model = load_packed(config, checkpoint)
    model.runtime.engine = NATIVE
    with config_errors():
        pipeline = without_annotations(get_test_pipeline_cfg(cfg.copy()))
    if language_model(model) is not None:
        raise QuantError(f'config: a {type(model).__name__} reads text, which '
                         'this command does not give it; take a detector of '
                         'images alone.')
    source = draw_noise(image_size(pipeline)) if image is None else image
    try:
        batch = GivenImages([source], pipeline).read(0)
    except QuantError as error:
        reason = str(error).replace('calib_images[0]: ', '')
        raise QuantError(f'--image: {reason}') from error
    return Subject(model, batch)


def image_size(pipeline: Sequence[Dict[str, Any]]) -> Tuple[int, int]:
    """Width and height that a test pipeline resizes to, as in its config.

    >>> image_size([dict(type='mmdet.Resize', scale=(640, 480))])
    (640, 480)
    """
    for step in pipeline:
        scale = step.get('scale')
        if isinstance(scale, (tuple, list)) and len(scale) == 2:
            return int(scale[0]), int(scale[1])
    return SIZE


def draw_noise(size: Tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) of random values."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (size[1], size[0], 3), np.uint8)


def measure_peak(args: argparse.Namespace, engine: str) -> int:
    """Peak memory in bytes of a process that predicts in one engine."""
    _be_silent()
    subject = read_subject(args.config, args.checkpoint, args.image)
    torch.set_num_threads(args.threads[0])
    for _ in range(2):
        predicting(*subject, engine)()
    return peak_bytes()


def _be_silent() -> None:
    """Every change of the engine would be told."""
    MMLogger.get_current_instance().setLevel(logging.WARNING)


def check_args(args: argparse.Namespace) -> None:
    """Raise if a number is too small, or the environment names an engine."""
    if min(args.threads) < 1:
        raise QuantError(f'--threads: {min(args.threads)} is not allowed; '
                         'give numbers from 1 on.')
    if args.rounds < 1:
        raise QuantError(f'--rounds: {args.rounds} is not allowed; give a '
                         'number from 1 on.')
    if os.environ.get(VARIABLE):
        raise QuantError(f'the environment variable {VARIABLE} names one '
                         'engine, and this command compares them; unset it.')


def benchmark(args: argparse.Namespace) -> None:
    """Do what the arguments ask for, and print the tables."""
    check_args(args)
    _be_silent()
    subject = read_subject(args.config, args.checkpoint, args.image)
    model = subject.model
    engine = describe_engine(model)
    engines = [FLOAT, SIMULATION]
    if engine['engine'] == NATIVE:
        engines.append(NATIVE)
    machine = describe_machine()
    quant = model.quant_config
    print(machine_line(machine))
    print(f'{quant.label}, scope {quant.scope}; {engine_line(engine)}')
    print(f'{args.image or "noise"}, prepared to {subject.shape[-1]}x'
          f'{subject.shape[-2]}; medians of {args.rounds} rounds of a '
          'prediction, without reading the image')
    results = []
    print(f'timing {", ".join(engines)} ...', flush=True)
    for threads in args.threads:
        torch.set_num_threads(threads)
        seconds = time_model(*subject, engines, args.rounds)
        for name, found in seconds.items():
            results.append(
                dict(
                    engine=name,
                    threads=threads,
                    wall=found.wall,
                    processor=found.processor,
                    speedup=seconds[FLOAT].wall / found.wall))
    memory = {
        name: call_elsewhere(measure_peak, args, name)
        for name in engines
    }
    print(f'\n{format_table([_row(one, memory) for one in results])}')
    layers = []
    if args.layers:
        torch.set_num_threads(args.threads[0])
        print(
            f'\ntiming {len(quantized_layers(model))} layers ...', flush=True)
        layers = time_layers(*subject, engines, args.rounds)
        print(f'\n{format_table(layer_rows(layers, engines))}')
        print(f'\neach layer by itself, on {args.threads[0]} threads, '
              'slowest first; of blocks that run as a whole, the layers '
              'together may take longer than the block')
    if args.json is not None:
        write_result(
            args.json,
            dict(
                format_version=FORMAT_VERSION,
                config=args.config,
                checkpoint=Path(args.checkpoint).name,
                image=args.image,
                shape=subject.shape,
                quant=quant.to_dict(),
                rounds=args.rounds,
                machine=machine,
                engine=engine,
                results=results,
                peak_memory=memory,
                layers=layers))
        print(f'report: {args.json}')


def _row(found: Dict[str, Any], memory: Dict[str, int]) -> Dict[str, str]:
    return {
        'engine': found['engine'],
        'threads': str(found['threads']),
        'wall s': f'{found["wall"]:.3g}',
        'processor s': f'{found["processor"]:.3g}',
        'float / engine': f'{found["speedup"]:.2f}',
        'peak GB': f'{memory[found["engine"]] / 1e9:.2f}'
    }


def layer_rows(layers: Sequence[Dict[str, Any]],
               engines: Sequence[str]) -> List[Dict[str, str]]:
    """A row for each layer, the slowest in the last engine first.

    Args:
        layers: of ``time_layers``.
        engines: what they were timed in, ``FLOAT`` first.
    """
    last = engines[-1]
    rows = []
    for layer in sorted(layers, key=lambda one: -one['seconds'][last]):
        seconds = layer['seconds']
        cells = {
            'layer': layer['name'],
            'kind': kind_of(layer['shape']),
            'calls': str(layer['calls'])
        }
        for engine in engines:
            is_missing = engine == NATIVE and layer['reason']
            cells[f'{engine} ms'] = ('-' if is_missing else
                                     f'{1e3 * seconds[engine]:.2f}')
        ratio = seconds[FLOAT] / seconds[last]
        cells[f'float / {last}'] = f'{ratio:.2f}'
        rows.append(cells)
    return rows


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""
    args = parsers.benchmark_det().parse_args(argv)
    return run_command(lambda: benchmark(args))
