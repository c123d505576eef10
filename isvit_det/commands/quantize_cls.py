"""The command line of tools/quantize_cls.py."""
import argparse
from pathlib import Path
from typing import List, Optional

from mmengine.device import get_device

from isvit_det.classifiers.run import ClassifierRun, table
from isvit_det.commands.console import (Parser, check_device, given,
                                        run_command, settings)
from isvit_det.core.errors import QuantError
from isvit_det.core.files import alone_in
from isvit_det.core.presets import METHODS

DESCRIPTION = """\
Calibrate a timm ViT, DeiT or Swin classifier in low bits, write a packed
checkpoint, and compare it with the float one. A run that was interrupted is
resumed by the same command. Packed weights are evaluated only."""


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = Parser(
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('model',
        metavar='MODEL',
        help='a timm classifier: vit_*, deit*_* or swin_*')
    add('--weights',
        required=True,
        metavar='FILE',
        help='its weights or a packed file, a path or an address; timm://NAME '
        'has timm download them')
    add('--calib',
        type=Path,
        metavar='DIR',
        help='images to calibrate on, in any folders')
    add('--val',
        type=Path,
        metavar='DIR',
        help='images to evaluate: a folder for each class, empty or not, '
        'gives top-1 and top-5, any other agreement and KL only; hidden '
        'files and folders are passed by; default: those of --calib that '
        'were not drawn')
    add('--bits', help='wNaM with N and M in 2..8; default w4a4')
    add('--method', help=', '.join(METHODS))
    add('--calib-images', type=int, metavar='N', help='drawn by the seed')
    add('--iters', type=int, metavar='N', help='per unit and stage')
    add('--seed', type=int, metavar='N')
    add('--items',
        help="'unit' (default) draws windows and query rows, 'image' whole "
        'images')
    add('--batch',
        type=int,
        metavar='N',
        help='items, or whole images, per iteration')
    parser.add_overrides(
        'other settings, such as quant.exponent=integer or sos.lr=1e-4')
    add('--work-dir',
        help='default: work_dirs/MODEL, with the bits and the method given '
        'here added to the name')
    add('--device', help='default: a GPU if there is one')
    add('--store-gb',
        type=float,
        metavar='GB',
        help='memory for activations; default: half of what is free')
    add('--eval-batch', type=int, default=32, metavar='N')
    add('--workers',
        type=int,
        default=0,
        metavar='N',
        help='processes that read evaluation images')
    return parser.parse_args(argv)


def quantize(args: argparse.Namespace) -> None:
    """Do what the arguments ask for and print the table."""
    device = args.device or get_device()
    check_device(device)
    asked = given(bits=args.bits, method=args.method)
    name = '_'.join([args.model, *asked.values()])
    more = settings(args.cfg_options)
    if more.rest:
        raise QuantError(f'--cfg-options: unknown key {min(more.rest)!r}; '
                         'expected quant.KEY or sos.KEY.')
    work_dir = Path(args.work_dir or f'work_dirs/{name}')
    run = ClassifierRun(
        args.model,
        args.weights,
        args.calib,
        args.val,
        quant={
            **more.quant,
            **asked
        },
        sos={
            **more.sos,
            **given(
                num_images=args.calib_images,
                iters=args.iters,
                seed=args.seed,
                items=args.items,
                batch=args.batch)
        },
        work_dir=work_dir,
        device=device,
        store_gb=args.store_gb,
        batch=args.eval_batch,
        workers=args.workers)
    with alone_in(work_dir):
        result = run.run()
    scores = result['scores']
    print(f'\n{table(result)}\n\n{scores["images"]} images evaluated')
    for note in [*result['notes'], result['weights']]:
        print(note)
    if result['units'] is not None:
        sos = result['provenance']['sos']
        print(f'{result["provenance"]["images_used"]} calibration images, '
              f'{sos["iters"]} iterations per unit and stage, learning rate '
              f'{sos["lr"]:g}, {result["seconds"]["calibration"]:.0f} s')
    print(f'packed checkpoint: {result["packed"]}\nreport: {run.report}')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""
    return run_command(lambda: quantize(parse_args(argv)))
