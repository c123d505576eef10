"""What the commands share: one-line errors and exit statuses."""
import contextlib
import logging
import sys
from pathlib import Path
from typing import (Any, Callable, Dict, Iterator, List, Mapping, NamedTuple,
                    Optional, Sequence, Set)

import torch

from isvit_det.core.errors import QuantError
from isvit_det.core.files import disk_error
from isvit_det.core.overrides import parse_override
from isvit_det.screen.output import say


def given(**values: Any) -> Dict[str, Any]:
    """The arguments that the user gave: those that are not None.

    >>> given(bits='w4a4', seed=None)
    {'bits': 'w4a4'}
    """
    return {key: value for key, value in values.items() if value is not None}


class Settings(NamedTuple):
    """Values of ``--cfg-options`` by what they are settings of.

    Attributes:
        quant: of ``QuantConfig``, given as ``quant.KEY``.
        sos: of ``SOSConfig``, given as ``sos.KEY``.
        rest: of anything else.
    """
    quant: Dict[str, Any]
    sos: Dict[str, Any]
    rest: Dict[str, Any]


def settings(options: Optional[Mapping[str, Any]]) -> Settings:
    """Sort the values of ``--cfg-options``.

    Raises:
        QuantError: if ``quant`` or ``sos`` itself is given a value.

    >>> settings({'sos.lr': 1e-4, 'model.backbone.depth': 3})
    Settings(quant={}, sos={'lr': 0.0001}, rest={'model.backbone.depth': 3})
    """
    by_owner = Settings({}, {}, {})
    for key, value in (options or {}).items():
        owner, _, name = key.partition('.')
        if owner not in ('quant', 'sos'):
            by_owner.rest[key] = value
        elif name:
            getattr(by_owner, owner)[name] = value
        else:
            example = 'quant.bits=w4a4' if key == 'quant' else 'sos.lr=1e-4'
            raise QuantError(f'--cfg-options: {key}={value} names no setting; '
                             f'give {key}.KEY=VALUE, such as {example}.')
    return by_owner


def layer_bits(options: Optional[Sequence[str]]) -> List[Dict[str, Any]]:
    """The values of ``--layer-bits`` as those of ``quant.overrides``.

    Raises:
        QuantError: naming one that cannot be read.

    >>> layer_bits(['neck.*=w8'])
    [{'match': 'neck.*', 'weight_bits': 8}]
    """
    return [parse_override(text).to_dict() for text in options or ()]


def check_device(device: str) -> None:
    """Raise unless tensors can be made on a device and read back from it."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise QuantError(f'--device: {device!r} is not available here; give '
                         'cpu, cuda or cuda:N.') from error


def show_files(packed: Any, figures: Path, page: Optional[Path]) -> None:
    """Show where the files of a run are, the report last.

    Args:
        packed: path of the packed file.
        figures: the JSON file of all figures.
        page: the report; None if it was not written.
    """
    say(f'packed checkpoint: {packed}\nfigures: {figures}')
    if page is not None:
        say(f'report: {page}')


@contextlib.contextmanager
def log_errors_told_once() -> Iterator[None]:
    """Warn once if a log file cannot be written, and go on.

    Without this, logging prints a traceback for each line of the log.
    """
    told: Set[str] = set()

    def tell(handler: logging.FileHandler, record: logging.LogRecord) -> None:
        path, error = handler.baseFilename, sys.exc_info()[1]
        if path not in told:
            told.add(path)
            reason = getattr(error, 'strerror', None) or error
            print(
                f'warning: {path} could not be written ({reason}); the run '
                'goes on without that part of its log',
                file=sys.stderr)

    setattr(logging.FileHandler, 'handleError', tell)
    try:
        yield
    finally:
        # From here on the method of the base class is used again.
        delattr(logging.FileHandler, 'handleError')


def run_command(work: Callable[[], None]) -> int:
    """Do a command's work; its exit status."""
    try:
        with log_errors_told_once():
            work()
    except QuantError as error:
        return _refuse(error)
    except OSError as error:
        return _refuse(disk_error(error) or error)
    except KeyboardInterrupt:
        print(
            'interrupted: the same command goes on from here', file=sys.stderr)
        return 130
    return 0


def _refuse(error: Exception) -> int:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
