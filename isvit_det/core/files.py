"""Files that are written whole or not at all, and downloads."""
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Callable
from urllib.error import URLError
from urllib.parse import urlparse

import torch

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


def check_writable(directory: Path) -> None:
    """Raise unless files can be made in a directory, which is made."""
    probe = directory / '.probe'
    write_atomically(probe, lambda file: None)
    # Another process may have been here first.
    probe.unlink(missing_ok=True)


def local_checkpoint(source: str) -> Path:
    """Path of a checkpoint, which is downloaded if ``source`` is an address.

    Downloads lie where torch keeps its own and are not repeated.

    Raises:
        QuantError: if it cannot be downloaded.
    """
    address = urlparse(source)
    if address.scheme not in ('http', 'https'):
        return Path(source)
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    # Other addresses may end alike.
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    name = Path(address.path)
    path = folder / f'{name.stem}-{digest}{name.suffix}'
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(path))
        except (URLError, OSError) as error:
            raise QuantError(f'checkpoint: {source} could not be downloaded '
                             f'({error}).') from error
    return path
