"""``python -m isvit_det``, and the console script ``isvit_det``."""
import importlib
import sys
from pathlib import Path
from typing import List, Optional

from isvit_det.commands import parsers
from isvit_det.host import check_host, quiet_imports

# Purpose of each command: a module of isvit_det/commands, and its parser.
COMMANDS = {
    'quantize_det': 'a detector in 2 to 8 bits, and its COCO AP',
    'quantize_cls': "one of timm's classifiers in 2 to 8 bits",
    'report': 'a finished run as an HTML page, or several side by side',
    'convert_swin_od': 'checkpoints of Swin-Transformer-Object-Detection',
    'convert_vitdet': "Detectron2's ViTDet checkpoints",
    'reproduce_table': 'a column of the table of published results',
    'benchmark_det': 'speed and memory of a packed detector, float and native',
    'analyze_det': 'which parts of a detector low bits hurt',
    'export_det': 'a packed backbone for OpenVINO or onnxruntime',
    'publish_float': "a training checkpoint's weights alone"
}


def describe(name: str) -> str:
    """The text of ``--help``.

    Args:
        name: name of this program.
    """
    lines = [f'  {key:16} {purpose}' for key, purpose in COMMANDS.items()]
    return '\n'.join([
        f'usage: {name} COMMAND ...', '', 'commands:', *lines, '',
        'Each takes --help. In Python: isvit_det.apis.'
    ])


def run(name: str, argv: List[str]) -> int:
    """Run a command; the exit status.

    Args:
        name: one of ``COMMANDS``.
        argv: its arguments.
    """
    try:
        # This answers --help and refuses wrong options before the packages
        # are imported, which takes seconds.
        getattr(parsers, name)().parse_args(argv)
        with quiet_imports():
            check_host()
            command = importlib.import_module(f'isvit_det.commands.{name}')
    except ImportError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return command.main(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command that is named first; the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    program = Path(sys.argv[0]).name
    if program == '__main__.py':
        program = 'python -m isvit_det'
    if name in ('-h', '--help'):
        print(describe(program))
        return 0
    if name not in COMMANDS:
        print(
            f'error: {name!r} is not a command; expected one of '
            f'{list(COMMANDS)}, or --help.',
            file=sys.stderr)
        return 2
    sys.argv[0] = f'{program} {name}'
    return run(name, rest)


if __name__ == '__main__':
    sys.exit(main())
