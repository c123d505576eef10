"""Where the output of a command goes: to the screen, or to its log only.

While a screen is open, ``sys.stdout`` writes to the log. The screen shows the
texts given to ``say``, what the modules of this package log, and warnings;
with ``verbose`` it shows everything. Without an open screen nothing is
redirected, so that our hooks print as MMEngine's do when other tools run them.
"""
import contextlib
import io
import logging
import re
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any, Iterator, List, Optional, TextIO

from rich.console import Console

PACKAGE = Path(__file__).parents[1]
# Colours and movements of a terminal's cursor.
ESCAPES = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')
_open: List['Screen'] = []


class Screen:
    """What the user sees of a command, and its log.

    Args:
        stream: the stream that the user sees.
        verbose: show everything.

    Attributes:
        console: writes to the stream.
        is_muted: whether nothing is shown.
    """

    def __init__(self, stream: TextIO, verbose: bool = False) -> None:
        self.stream = stream
        self.verbose = verbose
        self.is_muted = False
        self.console = Console(file=stream)
        self.output = _Output(self)
        self._handler = _Handler(self)
        self._watched: List[logging.Logger] = []
        # Lines for the log, until it is opened.
        self._early: Optional[List[str]] = []
        self._log: Optional[logging.Handler] = None

    @property
    def is_terminal(self) -> bool:
        """Whether progress bars can be drawn and updated."""
        return self.stream.isatty() and not self.console.is_dumb_terminal

    def open_log(self, path: Path) -> None:
        """Append to a log file from now on, first the lines said so far.

        Raises:
            OSError: if it cannot be opened.
        """
        early, self._early = self._early or [], None
        self._log = logging.FileHandler(
            path, encoding='utf-8', errors='backslashreplace')
        for line in early:
            self.log(line)
        self.say(f'log: {path}')

    def mute(self) -> None:
        """Show nothing and log nothing, because another process does so."""
        self.is_muted, self._early = True, None

    def say(self, text: str) -> None:
        """Show a text of one or more lines."""
        self.show(text)
        for line in text.split('\n'):
            self.log(line)

    def show(self, text: str) -> None:
        """Show a text, and do not add it to the log."""
        if self.is_muted:
            return
        if self.is_terminal:
            # The console prints above progress bars, if there are any.
            self.console.print(
                text,
                markup=False,
                highlight=False,
                emoji=False,
                soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def log(self, line: str) -> None:
        """Add a line to the log alone."""
        if self._early is not None:
            self._early.append(line)
        elif self._log is not None:
            self._log.emit(logging.makeLogRecord(dict(msg=line)))

    def watch(self, logger: logging.Logger) -> None:
        """Show what this package logs with a logger, and all its warnings."""
        if not self.verbose and self._handler not in logger.handlers:
            logger.addHandler(self._handler)
            self._watched.append(logger)

    def close(self) -> None:
        """Close the log, and show nothing more."""
        for logger in self._watched:
            logger.removeHandler(self._handler)
        if self._log is not None:
            # The disk may have no room for the lines that were not written.
            with contextlib.suppress(OSError):
                self._log.close()
        self._log = self._early = None


class _Output(io.TextIOBase):
    """Replaces ``sys.stdout``, and writes its lines to the log.

    Loggers keep the stream that they were created with. Therefore, after the
    screen is closed, this writes to the ``sys.stdout`` of that time.
    """

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self._rest = ''

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.screen.verbose and self.screen.stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.screen.stream, 'encoding', None) or 'utf-8'

    def write(self, text: str) -> int:
        if self.screen not in _open:
            return _write_elsewhere(self, text)
        if self.screen.verbose:
            self.screen.stream.write(text)
        *lines, self._rest = (self._rest + text).split('\n')
        for line in lines:
            # If a line was overwritten, the log gets its last state.
            last = ESCAPES.sub('', line).rstrip('\r').rpartition('\r')[2]
            self.screen.log(last)
        return len(text)

    def flush(self) -> None:
        if self.screen in _open and self.screen.verbose:
            self.screen.stream.flush()


def _write_elsewhere(output: _Output, text: str) -> int:
    other = sys.stdout
    if other is output or getattr(other, 'closed', False):
        return len(text)
    return other.write(text)


class _Handler(logging.Handler):
    """Shows records of this package's modules, and warnings."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.INFO)
        self.screen = screen
        self.addFilter(_OncePerWarning())

    def emit(self, record: logging.LogRecord) -> None:
        is_of_package = PACKAGE in Path(record.pathname).parents
        if record.levelno >= logging.WARNING:
            kind = record.levelname.lower()
            self.screen.show(f'{kind}: {record.getMessage()}')
        elif is_of_package:
            self.screen.show(record.getMessage())


class _OncePerWarning(logging.Filter):
    """Lets a warning pass once, as MMEngine's loggers do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        is_new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return is_new


@contextlib.contextmanager
def showing(verbose: bool = False, early: str = '') -> Iterator[Screen]:
    """Show the user the essential output of the work in this context.

    Args:
        verbose: show everything.
        early: text that was printed before, for the log.
    """
    screen = Screen(sys.stdout, verbose)
    _open.append(screen)
    try:
        with contextlib.redirect_stdout(screen.output), _warnings_to(screen):
            sys.stdout.write(early)
            try:
                yield screen
            except BaseException:
                # The user sees one line; the log gets the whole traceback.
                for line in traceback.format_exc().rstrip().split('\n'):
                    screen.log(line)
                raise
    finally:
        screen.close()
        _open.remove(screen)


@contextlib.contextmanager
def _warnings_to(screen: Screen) -> Iterator[None]:
    """Show warnings of the user's own code; those of packages are logged."""
    before = warnings.showwarning
    packages = [
        Path(sysconfig.get_path(name)) for name in ('purelib', 'platlib')
    ]

    def show(message: Any,
             category: Any,
             filename: str,
             lineno: int,
             file: Optional[TextIO] = None,
             line: Optional[str] = None) -> None:
        text = warnings.formatwarning(message, category, filename, lineno,
                                      line)
        for part in text.rstrip().split('\n'):
            screen.log(part)
        is_installed = any(
            folder in Path(filename).parents for folder in packages)
        if screen.verbose or not (is_installed or screen.is_muted):
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        # Unless another context has replaced it since.
        if warnings.showwarning is show:
            warnings.showwarning = before


def current() -> Optional[Screen]:
    """The open screen, if there is one."""
    return _open[-1] if _open else None


def say(text: str) -> None:
    """Show a text to the user; it is printed where no screen is open."""
    screen = current()
    if screen is None:
        print(text, flush=True)
    else:
        screen.say(text)


def watch(logger: logging.Logger) -> None:
    """Let the open screen, if there is one, show what a logger is told."""
    screen = current()
    if screen is not None:
        screen.watch(logger)
