"""``python -m isvit_det``: the package's commands, and the other tools."""
import importlib
import sys
from typing import List, Optional

from isvit_det.host import quiet_imports

# Module and purpose of each command.
COMMANDS = {
    'quantize_det': ('isvit_det.commands.quantize_det',
                     'a detector in 2 to 8 bits, and its COCO AP'),
    'quantize_cls': ('isvit_det.commands.quantize_cls',
                     "one of timm's classifiers in 2 to 8 bits")
}
# Of the repository's folder tools/ only.
TOOLS = {
    'convert_swin_od': 'checkpoints of Swin-Transformer-Object-Detection',
    'convert_vitdet': "Detectron2's ViTDet checkpoints",
    'reproduce_table': 'a column of the table of published results',
    'publish_float': "a training checkpoint's weights alone"
}


def describe() -> str:
    """The text of ``--help``."""

    def lines(purposes: dict) -> List[str]:
        return [f'  {name:16} {purpose}' for name, purpose in purposes.items()]

    return '\n'.join([
        'usage: python -m isvit_det COMMAND ...', '', 'commands:',
        *lines({
            name: purpose
            for name, (_, purpose) in COMMANDS.items()
        }), '', "in the repository's folder tools/ (python tools/NAME.py):",
        *lines(TOOLS), '', 'Each takes --help. In Python: isvit_det.apis.'
    ])


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name in ('-h', '--help'):
        print(describe())
        return 0
    if name not in COMMANDS:
        print(
            f'error: {name!r} is not a command; expected one of '
            f'{list(COMMANDS)}, or --help.',
            file=sys.stderr)
        return 2
    sys.argv[0] = f'python -m isvit_det {name}'
    with quiet_imports():
        module = importlib.import_module(COMMANDS[name][0])
    return module.main(rest)


if __name__ == '__main__':
    sys.exit(main())
