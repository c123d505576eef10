"""A packed detector's backbone as a file for OpenVINO or onnxruntime."""
import argparse
import logging
from typing import Any, Dict, List, Optional, Tuple

from mmengine.logging import MMLogger

from isvit_det.apis import export_detector
from isvit_det.commands import parsers
from isvit_det.commands.console import run_command
from isvit_det.commands.packed_model import load_packed
from isvit_det.core.errors import QuantError
from isvit_det.core.files import local_checkpoint
from isvit_det.export.detector import REPORT
from isvit_det.report.machine import describe_machine, machine_line

DYNAMIC = 'dynamic'


def parse_shape(text: str) -> Optional[Tuple[int, int]]:
    """(height, width) of ``HxW``; None for ``dynamic``.

    Raises:
        QuantError: if the text has another form.

    >>> parse_shape('800x1344')
    (800, 1344)
    """
    if text == DYNAMIC:
        return None
    sides = text.split('x')
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise QuantError(f'--shape: {text!r} is not allowed; give HxW, such '
                         f'as 800x1344, or {DYNAMIC}.')
    return int(sides[0]), int(sides[1])


def export(args: argparse.Namespace) -> None:
    """Do what the arguments ask for, and print what was found."""
    shape = parse_shape(args.shape)
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    _, model = load_packed(args.config, args.checkpoint)
    folder = args.out or local_checkpoint(args.checkpoint).parent / args.to
    print(machine_line(describe_machine()))
    images = 'any size' if shape is None else args.shape
    print(
        f'writing and compiling the backbone, {model.quant_config.label}, for '
        f'images of {images} ...',
        flush=True)
    path, report = export_detector(model, folder, args.to, shape,
                                   args.allow_float, args.vnni)
    print('\n'.join(describe(report)))
    print(f'file: {path}\nreport: {folder / REPORT}')


def describe(report: Dict[str, Any]) -> List[str]:
    """Lines that say what an engine does with a file."""
    integer, in_float = report['integer_layers'], report['float_layers']
    lines = [
        f'{report["engine"]}: {len(integer)} of '
        f'{len(integer) + len(in_float)} quantized layers run in integers'
    ]
    if in_float:
        lines.append(f'quantized layers in float: {", ".join(in_float)}')
    others = [
        f'{number} {kind}'
        for kind, number in report['others_in_float'].items()
    ]
    lines.append(f'other nodes in float: {", ".join(others)}')
    divided = report['divided_layers']
    if divided:
        lines.append(
            f'weights of {len(divided)} layers are divided in two or more, so '
            'that no CPU without VNNI clips their sums; --vnni leaves them '
            'whole')
    errors, rounding = (', '.join(f'{error:.2g}' for error in report[key])
                        for key in ('errors', 'errors_of_rounding'))
    lines.append('relative error of each output on noise, against the '
                 f'simulation: {errors}; rounding explains about {rounding}')
    sizes = sum(report['files'].values())
    lines.append(f'size: {sizes / 1e6:.1f} MB')
    return lines


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""
    args = parsers.export_det().parse_args(argv)
    return run_command(lambda: export(args))
