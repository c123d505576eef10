"""A classifier in low bits, beside the float one."""
import argparse
import sys
from pathlib import Path
from typing import Any, List, Mapping, Optional

from mmengine.device import get_device

from isvit_det.classifiers.run import ClassifierRun, table
from isvit_det.commands import parsers
from isvit_det.commands.console import (check_device, given, layer_bits,
                                        run_command, settings, show_files)
from isvit_det.core.errors import QuantError
from isvit_det.core.files import alone_in
from isvit_det.core.settings import QuantConfig
from isvit_det.host import said_at_import
from isvit_det.report.tables import protocol_line
from isvit_det.runtime.engine import engine_line
from isvit_det.screen.output import say, showing

# Name of the log in the work directory.
LOG = 'quantize_cls.log'


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    args = parsers.quantize_cls().parse_args(argv)
    args.command = ['quantize_cls', *argv]
    return args


def quantize(args: argparse.Namespace) -> None:
    """Do what the arguments ask for and show the table."""
    device = args.device or get_device()
    check_device(device)
    asked = given(bits=args.bits, method=args.method, protocol=args.protocol)
    mixed = ['mixed'] if args.layer_bits else []
    name = '_'.join([args.model, *asked.values(), *mixed])
    more = settings(args.cfg_options)
    if more.rest:
        raise QuantError(f'--cfg-options: unknown key {min(more.rest)!r}; '
                         'expected quant.KEY or sos.KEY.')
    # What has an option of its own is taken from there.
    quant = {**more.quant, **asked}
    if args.layer_bits:
        quant['overrides'] = layer_bits(args.layer_bits)
    sos = {
        **more.sos,
        **given(
            num_images=args.calib_images,
            iters=args.iters,
            seed=args.seed,
            items=args.items,
            batch=args.batch)
    }
    work_dir = Path(args.work_dir or f'work_dirs/{name}')
    with showing(args.verbose, said_at_import()) as screen, alone_in(work_dir):
        screen.open_log(work_dir / LOG)
        run = ClassifierRun(
            args.model,
            args.weights,
            args.calib,
            args.val,
            quant=quant,
            sos=sos,
            work_dir=work_dir,
            device=device,
            store_gb=args.store_gb,
            batch=args.eval_batch,
            workers=args.workers,
            engine=args.engine or 'auto',
            command=args.command)
        result = run.run()
        show(result, run.model.quant_config)
        show_files(result['packed'], run.report, run.write_page())


def show(result: Mapping[str, Any], quant: QuantConfig) -> None:
    """Show the results of a run with these settings."""
    scores = result['scores']
    say(f'\n{table(result)}\n\n{scores["images"]} images evaluated')
    say(engine_line(result['engine']))
    say(protocol_line(quant))
    for note in [*result['notes'], result['weights']]:
        say(note)
    if result['units'] is not None:
        sos = result['provenance']['sos']
        say(f'{result["provenance"]["images_used"]} calibration images, '
            f'{sos["iters"]} iterations per unit and stage, learning rate '
            f'{sos["lr"]:g}, {result["seconds"]["calibration"]:.0f} s')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""
    return run_command(lambda: quantize(parse_args(argv)))
