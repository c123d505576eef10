"""Files that are written whole or not at all, and downloads."""
import contextlib
import errno
import glob
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, Optional
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

from isvit_det.core.errors import QuantError

try:
    import fcntl
except ImportError:
    # Windows has other locks.
    fcntl = None  # type: ignore

# Errors of a write without space or permission.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Bytes that are written to check a directory before any work is done.
PROBE = 2**16


def disk_error(error: BaseException) -> Optional[QuantError]:
    """The message for an error of a full or read-only disk, else None."""
    if not isinstance(error, OSError) or error.errno not in CANNOT_WRITE:
        return None
    path = 'a file' if error.filename is None else error.filename
    return QuantError(f'{path} could not be written ({error.strerror}); free '
                      'some disk or choose another work directory, and give '
                      'the same command again.')


class _Watched:
    """A file that keeps the error of a failed write.

    torch's archive writer replaces every error by one of its own.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: Optional[OSError] = None

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_atomically(path: Path,
                     write: Callable[[Any], Any],
                     named: Optional[Path] = None) -> None:
    """Write a file under a temporary name and rename it.

    Args:
        path: of the file.
        write: is called with the temporary file, open for writing bytes.
        named: what an error names; default: the file.

    Raises:
        QuantError: if the directory cannot be written or the disk is full.
    """
    temporary = watched = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        with tempfile.NamedTemporaryFile(
                dir=path.parent,
                prefix=f'.{path.name}.{os.getpid()}.',
                delete=False) as file:
            temporary = file.name
            watched = _Watched(file)
            write(watched)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = error if watched is None else watched.error or error
        raise QuantError(
            f'{named or path} could not be written ({_reason(reason)}); '
            f'{_advice(reason)}.') from error


def _reason(error: BaseException) -> str:
    """The message of an error without the names of temporary files."""
    if isinstance(error, OSError) and error.strerror:
        return f'[Errno {error.errno}] {error.strerror}'
    return str(error)


def _advice(error: BaseException) -> str:
    """What to do about a file that could not be written."""
    place = 'choose another work directory or file'
    has_room = isinstance(error, OSError) and error.errno not in CANNOT_WRITE
    return place if has_room else f'free some disk or {place}'


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of processes that were killed."""
    for old in path.parent.glob(f'.{glob.escape(path.name)}.*.*'):
        number = old.name[len(path.name) + 2:].split('.')[0]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            old.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            continue


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Lock a directory for this process in this context.

    The lock of a process that is killed is released. On a file system without
    locks, nothing is done.

    Args:
        directory: created if it does not exist.

    Raises:
        QuantError: if another process has the lock, or the directory cannot
            be written.
    """
    if fcntl is None:
        yield
        return
    check_writable(directory)
    path = directory / '.lock'
    with open(path, 'a+', encoding='ascii') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had the lock may just have removed the file.
            is_free = path.exists() and os.path.samestat(
                os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            is_free = False
        except OSError:
            is_free = True
        if not is_free:
            file.seek(0)
            raise QuantError(
                f'--work-dir: process {file.read().strip() or "?"} is at work '
                f'in {directory}; wait until it has ended, or give another '
                'folder.')
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_writable(directory: Path) -> None:
    """Create a directory, and raise unless files can be written there."""
    probe = directory / '.probe'
    write_atomically(probe, lambda file: file.write(bytes(PROBE)), directory)
    # Another process may have removed it.
    probe.unlink(missing_ok=True)


def path_of(source: str) -> Optional[Path]:
    """Path for a path or a ``file://`` address, None for an http(s) address.

    Raises:
        QuantError: if it is an address of another kind.

    >>> path_of('file:///data/my%20weights.pth').as_posix()
    '/data/my weights.pth'
    """
    if '://' not in source:
        return Path(source)
    address = urlparse(source)
    if address.scheme in ('http', 'https'):
        return None
    if address.scheme == 'file' and address.netloc in ('', 'localhost'):
        return Path(url2pathname(address.path))
    raise QuantError(f'checkpoint: {source} is no address that is read; give '
                     'a path, or an address that begins with http:// or '
                     'https://.')


def local_checkpoint(source: str) -> Path:
    """Path of a checkpoint, which is downloaded if it is an http(s) address.

    Downloads are kept in the cache of ``torch.hub``.

    Raises:
        QuantError: if it cannot be downloaded.
    """
    given = path_of(source)
    if given is not None:
        return given
    address = urlparse(source)
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    # Different addresses may have the same file name.
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    name = Path(address.path)
    path = folder / f'{name.stem}-{digest}{name.suffix}'
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(path))
        except (URLError, OSError) as error:
            raise QuantError(f'checkpoint: {source} could not be downloaded '
                             f'({error}); check the address and the network, '
                             'or download it and give its path.') from error
    return path
