"""An argument parser with the options that several commands have.

Nothing here imports the host's packages, so that ``--help`` answers at once.
"""
import argparse
from pathlib import Path
from typing import Any, NoReturn, Optional

from isvit_det.core.presets import METHODS
from isvit_det.host import quiet_imports
from isvit_det.runtime import BOTH, ENGINES


def some_text(text: str) -> str:
    """An argument that must not be empty, as an unset variable makes it.

    Raises:
        argparse.ArgumentTypeError: if it is empty.

    >>> some_text('data')
    'data'
    """
    if not text:
        raise argparse.ArgumentTypeError("'' is empty; give a value")
    return text


def some_path(text: str) -> Path:
    """A path, which must not be empty: Path('') is the current folder."""
    return Path(some_text(text))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, description: Optional[str] = None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(
            2, f'error: {message.rstrip(".")}; --help lists what can be '
            'given.\n')

    def add_engine(self, both: bool = False) -> None:
        """The option for what runs the quantized model.

        Args:
            both: whether it may be evaluated by both engines.
        """
        self.add_argument(
            '--engine',
            choices=[*ENGINES, BOTH] if both else ENGINES,
            help='what runs the quantized layers of the calibrated model on a '
            "CPU: 'native', integer kernels, wherever they can; 'simulation', "
            "torch in float; 'auto' (default), the first where it is known to "
            'be faster; the environment variable ISVIT_DET_ENGINE overrides '
            'these' + ("; 'both' evaluates in the simulation and natively"
                       if both else ''))

    def add_overrides(self, purpose: str) -> None:
        """Add ``--cfg-options``, read into a dict by dotted key."""
        self.add_argument(
            '--cfg-options',
            nargs='+',
            action=OverrideAction,
            metavar='KEY=VALUE',
            help=purpose)

    def add_calibration(self) -> None:
        """Add the options of all commands that calibrate."""
        add = self.add_argument
        add('--bits', help='wNaM with N and M in 2..8, such as w4a4')
        add('--layer-bits',
            nargs='+',
            metavar='PATTERN=wNaM',
            help='bits of single layers or units, such as '
            "'backbone.stages.0.*=w8a8', or w8 or a8 alone; later ones "
            'replace earlier ones')
        add('--protocol',
            help="'literature' (default) or 'practical', which keeps the "
            'first layer and the predictors in 8 bits where they cost under '
            '1 %% of the size')
        self.add_method()
        add('--iters', type=int, metavar='N', help='per unit and stage')
        add('--store-gb',
            type=float,
            metavar='GB',
            help='memory for activations; default: half of what is free')
        self.add_verbose()

    def add_method(self) -> None:
        """Add what is calibrated how, on which images and where."""
        add = self.add_argument
        add('--method', help=', '.join(METHODS))
        add('--calib-images', type=int, metavar='N', help='drawn by the seed')
        add('--seed', type=int, metavar='N')
        add('--device',
            help='cpu, cuda or cuda:N; default: a GPU if there is one')

    def add_packed(self) -> None:
        """Add a packed detector: its config, and its file."""
        add = self.add_argument
        add('config',
            metavar='CONFIG',
            help='that of the calibration, or the float one')
        add('checkpoint', metavar='PACKED', help='packed file, or its address')

    def add_verbose(self) -> None:
        """Add ``--verbose``."""
        self.add_argument(
            '--verbose',
            action='store_true',
            help='show all that is written to the log')


class OverrideAction(argparse.Action):
    """Reads KEY=VALUE as MMEngine does, which is imported only then."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with quiet_imports():
            from isvit_det.inputs import overrides
        overrides.OverrideAction(self.option_strings, self.dest)(*args,
                                                                 **kwargs)
