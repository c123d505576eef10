"""Cells of a benchmark: runs of a tool, each in a folder of its own."""
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping, Sequence

from isvit_det.checkpoint import file_hash

TOOLS = Path(__file__).parents[1] / 'tools'
Result = Mapping[str, Any]


def run_cell(tool: str,
             argv: Sequence[str],
             folder: Path,
             weights: Path,
             report: str = 'result.json') -> Result:
    """The result of one run, made or found; one interrupted goes on.

    Args:
        tool: file in ``tools/``.
        argv: its arguments. A result of others is made again.
        folder: its work directory.
        weights: float weights that it starts from. A result made from
            others is made again, too.
        report: of the run, in the folder.
    """
    path = folder / report
    note = folder / f'{path.stem}.argv.json'
    if path.is_file() and note.is_file():
        result = json.loads(path.read_text())
        made_from = result['provenance'].get('float_checkpoint_sha256')
        if (json.loads(note.read_text()) == list(argv)
                and made_from == file_hash(weights)):
            return result
    command = [sys.executable, str(TOOLS / tool), *argv]
    subprocess.run([*command, '--work-dir', str(folder)], check=True)
    note.write_text(json.dumps(list(argv)))
    return json.loads(path.read_text())
