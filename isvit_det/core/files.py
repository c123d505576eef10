"""Files that are written whole or not at all."""
import os
import tempfile
from pathlib import Path
from typing import Any, Callable

from isvit_det.core.errors import QuantError


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Call ``write(file)`` on a temporary file that then takes its name.

    Raises:
        QuantError: if the directory cannot be written or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=f'.{path.name}.',
                delete=False) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise QuantError(f'{path} could not be written ({error}); free some '
                         'disk or choose another work directory.') from error
