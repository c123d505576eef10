#!/usr/bin/env python
"""Three schemes of calibration compared: time, memory and error.

``items`` keeps the activations of one unit and advances them to the next, and
draws minibatches of items, which is our default. ``images`` does so too, and
draws whole images. ``restart`` draws whole images and computes the activations
from the images again for each unit, as published. All calibrate the same float
backbone on the same images with the settings of ``isvit_paper``, each in a
process of its own, and are scored on the same held-out images: by the output
of the last unit, and by the backbone's maps.
"""
import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor

from benchmarks.restart import calibrate_by_restart
from isvit_det.calibration.sos import calibrate
from isvit_det.checkpoint import read_checkpoint
from isvit_det.commands.console import run_command, settings
from isvit_det.commands.parser import Parser
from isvit_det.core.errors import QuantError
from isvit_det.core.settings import SOSConfig
from isvit_det.core.units import State
from isvit_det.engine.images import calibration_images
from isvit_det.inputs.configs import load_config, quantize_config_
from isvit_det.registry import MODELS
from isvit_det.report.tables import format_table, peak_memory, relative_errors

SCHEMES = ('items', 'images', 'restart')
DRAWN = 'configs/drawn/mask-rcnn_swin-mini_fpn_drawn.py'


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add('config', nargs='?', default=DRAWN, help='a float config')
    add('checkpoint',
        nargs='?',
        help="default: the config's load_from; 'random' for random weights")
    add('--bits', default='w4a4')
    add('--images', type=int, default=16, help='to calibrate on')
    add('--held-out', type=int, default=8, help='images to score on')
    add('--iters', type=int, default=100)
    add('--seed', type=int, default=0)
    parser.add_overrides('override settings of the config, or of the '
                         'quantization: quant.KEY=VALUE, sos.KEY=VALUE')
    add('--store-gb',
        type=float,
        help='memory for activations, except in restart')
    add('--scheme', choices=SCHEMES, help='run one, and print JSON')
    add('--method',
        default='isvit_paper',
        help='of a scheme other than restart that is run alone')
    return parser.parse_args(argv)


def build(cfg: Config, checkpoint: str, seed: int) -> Any:
    """The quantized detector with float weights, in eval mode."""
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    if checkpoint == 'random':
        # Weights of a detector without a checkpoint: only speed means much.
        for module in model.modules():
            if hasattr(module, 'init_cfg'):
                module.init_cfg = None
        model.init_weights()
    else:
        content = read_checkpoint(Path(checkpoint))
        model.load_state_dict(content['state_dict'])
    return model.eval()


def measure(args: argparse.Namespace) -> Dict[str, float]:
    """Calibrate by one scheme; seconds, bytes and errors."""
    register_all_modules(init_default_scope=True)
    more = settings(args.cfg_options)
    cfg = load_config(args.config, more.rest)
    quantize_config_(cfg, dict(more.quant, bits=args.bits, method=args.method))
    cfg.model.backbone.init_cfg = None
    model = build(cfg, args.checkpoint or cfg.load_from, args.seed)
    # One draw: the last images are held out from the first.
    picked = calibration_images(cfg, None, args.images + args.held_out,
                                args.seed)
    tensors = list(picked.tensors(model, False))
    held_out, images = tensors[args.images:], tensors[:args.images]
    backbone = model.backbone
    teacher = copy.deepcopy(backbone)
    sos = SOSConfig.from_dict(
        dict(
            more.sos,
            iters=args.iters,
            num_images=args.images,
            seed=args.seed,
            items='unit' if args.scheme == 'items' else 'image'),
        model.quant_config)
    before = peak_memory()['host']
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.scheme == 'restart':
            calibrate_by_restart(backbone, teacher, images, model.quant_config,
                                 sos)
        else:
            calibrate(
                backbone,
                images,
                model.quant_config,
                sos,
                Path(folder),
                'benchmark',
                args.store_gb,
                teacher=teacher)
    seconds = time.perf_counter() - start
    peak = peak_memory()['host']
    with torch.no_grad():
        maps = [compare(backbone(image), teacher(image)) for image in held_out]
        last = [
            compare([last_output(backbone, image)],
                    [last_output(teacher, image)]) for image in held_out
        ]
    return dict(
        units=len(backbone.units()),
        seconds=seconds,
        before=before,
        peak=peak,
        last_unit=sum(last) / len(last),
        maps=sum(maps) / len(maps))


def compare(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> float:
    """Relative error of the maps of one image, in the mean."""
    each = [relative_errors(*pair).item() for pair in zip(student, teacher)]
    return sum(each) / len(each)


def last_output(backbone: Any, image: Tensor) -> Tensor:
    """What the last unit gives for an image."""
    state = State(image, (image.shape[-2], image.shape[-1]))
    for unit in backbone.units():
        state = unit.forward(state)
    return state.x


def run_alone(scheme: str, argv: Sequence[str]) -> Dict[str, float]:
    """``measure`` in a process of its own.

    Raises:
        QuantError: if it fails, after its own errors.
    """
    command = [sys.executable, '-m', 'benchmarks.calibration', *argv]
    run = subprocess.run(
        command + ['--scheme', scheme], stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        raise QuantError(f'scheme {scheme} failed with exit status '
                         f'{run.returncode}.')
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    args = parse_args()
    if args.scheme:
        print(json.dumps(measure(args)))
        return
    rows = []
    for scheme in SCHEMES:
        measured = run_alone(scheme, sys.argv[1:])
        rows.append({
            'scheme': scheme,
            'seconds': f'{measured["seconds"]:.1f}',
            'GB before': f'{measured["before"] / 1e9:.2f}',
            'peak GB': f'{measured["peak"] / 1e9:.2f}',
            'last unit error': f'{measured["last_unit"]:.4g}',
            'backbone error': f'{measured["maps"]:.4g}'
        })
    print(f'{Path(args.config).name}, {args.bits}: {args.images} images, '
          f'{args.iters} iterations per unit and stage, '
          f'{torch.get_num_threads()} threads')
    print(format_table(rows))


if __name__ == '__main__':
    sys.exit(run_command(main))
