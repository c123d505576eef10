"""Cells of a table: runs of a command, each in a folder of its own."""
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import isvit_det
from isvit_det.core.digests import file_hash
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically

Result = Mapping[str, Any]
# What Python is given to run a command of this package.
QUANTIZE_DET, QUANTIZE_CLS = (('-m', 'isvit_det', name)
                              for name in ('quantize_det', 'quantize_cls'))
PACKAGE = Path(isvit_det.__file__).parent


@dataclass(frozen=True)
class Cell:
    """A run of a command, and the report that it leaves.

    A note of the arguments is kept beside the report.

    Attributes:
        command: what Python is given to run it: a script, or the options
            for a module.
        argv: its arguments, ``--work-dir`` aside.
        folder: its work directory.
        weights: file of the float weights that it starts from.
        report: name of the report in the folder.
        verbose: whether the command shows all that it logs.
        quiet: whether what it prints is thrown away, errors aside.
    """
    command: Sequence[str]
    argv: Sequence[str]
    folder: Path
    weights: Path
    report: str = 'result.json'
    verbose: bool = False
    quiet: bool = False

    def find(self) -> Optional[Result]:
        """The result, if there is one of these arguments and weights.

        Weights are known by their content, wherever they lie.
        """
        try:
            result = json.loads((self.folder / self.report).read_text())
            made_from = result['provenance'].get('float_checkpoint_sha256')
            noted = self._is_noted()
        # What was damaged is made again.
        except (FileNotFoundError, ValueError, KeyError, TypeError,
                AttributeError):
            return None
        if noted and made_from == file_hash(self.weights):
            return result
        return None

    def run(self) -> Result:
        """The result; the command runs if there is none, or goes on.

        Raises:
            QuantError: with the last line of the errors if the command fails.
        """
        result = self.find()
        if result is not None:
            return result
        # What is shown changes no result, and is not noted.
        shown = ['--verbose'] if self.verbose else []
        argv = [*self.argv, *shown, '--work-dir', str(self.folder)]
        run_command_line(self.command, argv, self.quiet)
        text = json.dumps(list(self.argv)).encode()
        write_atomically(self._note, lambda file: file.write(text))
        result = self.find()
        if result is None:
            name = command_name(self.command)
            raise QuantError(f'{name} left no {self.report} of {self.weights} '
                             f'in {self.folder}; give a float checkpoint.')
        return result

    @property
    def _note(self) -> Path:
        return self.folder / f'{Path(self.report).stem}.argv.json'

    def _is_noted(self) -> bool:
        noted = json.loads(self._note.read_text())
        return len(noted) == len(self.argv) and all(
            now in (then, str(self.weights))
            for then, now in zip(noted, self.argv))


def command_name(command: Sequence[str]) -> str:
    """What a command is called.

    >>> command_name(QUANTIZE_DET)
    'quantize_det'
    """
    return Path(command[-1]).name


def run_command_line(command: Sequence[str],
                     argv: Sequence[str],
                     quiet: bool = False) -> None:
    """Run a command in a process of its own; what it prints appears here.

    Args:
        command: what Python is given to run it.
        argv: arguments of the command.
        quiet: whether nothing appears.

    Raises:
        QuantError: with the last line of its errors if it fails.
    """
    last = 'no message'
    # It finds the package that this process uses.
    paths = [str(PACKAGE.parent), os.environ.get('PYTHONPATH', '')]
    with subprocess.Popen([sys.executable, *command, *argv],
                          stdout=subprocess.DEVNULL if quiet else None,
                          stderr=subprocess.PIPE,
                          env={
                              **os.environ, 'PYTHONPATH':
                              os.pathsep.join(filter(None, paths))
                          },
                          text=True,
                          errors='replace') as process:
        try:
            for line in process.stderr or ():
                # An error is told once, by who started the command.
                if not (quiet or line.startswith('error: ')):
                    sys.stderr.write(line)
                last = line.strip() or last
        except BaseException:
            # It would go on alone.
            process.terminate()
            raise
    if process.returncode != 0:
        raise QuantError(f'{command_name(command)} failed with exit status '
                         f'{process.returncode}: {last}')
