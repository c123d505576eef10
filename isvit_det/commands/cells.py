"""Cells of a table: runs of a tool, each in a folder of its own."""
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

from isvit_det.core.digests import file_hash
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A run of a tool, and the report that it leaves.

    A note of the arguments is kept beside the report.

    Attributes:
        tool: the script.
        argv: its arguments, ``--work-dir`` aside.
        folder: its work directory.
        weights: file of the float weights that it starts from.
        report: name of the report in the folder.
    """
    tool: Path
    argv: Sequence[str]
    folder: Path
    weights: Path
    report: str = 'result.json'

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
        """The result, found or made; a run interrupted goes on.

        Raises:
            QuantError: with the last line of the errors if the tool fails.
        """
        found = self.find()
        if found is not None:
            return found
        run_tool(self.tool, [*self.argv, '--work-dir', str(self.folder)])
        text = json.dumps(list(self.argv)).encode()
        write_atomically(self._note, lambda file: file.write(text))
        found = self.find()
        if found is None:
            raise QuantError(
                f'{self.tool.name} left no {self.report} of {self.weights} '
                f'in {self.folder}; give a float checkpoint.')
        return found

    @property
    def _note(self) -> Path:
        return self.folder / f'{Path(self.report).stem}.argv.json'

    def _is_noted(self) -> bool:
        noted = json.loads(self._note.read_text())
        return len(noted) == len(self.argv) and all(
            now in (then, str(self.weights))
            for then, now in zip(noted, self.argv))


def run_tool(tool: Path, argv: Sequence[str]) -> None:
    """Run a script; what it prints appears here.

    Raises:
        QuantError: with the last line of its errors if it fails.
    """
    last = 'no message'
    with subprocess.Popen([sys.executable, str(tool), *argv],
                          stderr=subprocess.PIPE,
                          text=True,
                          errors='replace') as process:
        try:
            for line in process.stderr or ():
                # An error is told once, by who started the tool.
                if not line.startswith('error: '):
                    sys.stderr.write(line)
                last = line.strip() or last
        except BaseException:
            # It would go on alone.
            process.terminate()
            raise
    if process.returncode != 0:
        raise QuantError(f'{tool.name} failed with exit status '
                         f'{process.returncode}: {last}')
