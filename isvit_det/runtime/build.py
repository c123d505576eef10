"""Compiling the kernels of csrc/ into a shared library, and loading it.

The library is compiled once, into the user's cache.
"""
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple, Union

SOURCES = Path(__file__).resolve().parents[1] / 'csrc'
# A platform wheel ships the compiled library beside this module.
PACKAGED = Path(__file__).with_name('libisvit.so')
COMPILERS = ('c++', 'g++', 'clang++')
FLAGS = ('-O2', '-std=c++17', '-fPIC', '-fvisibility=hidden',
         '-ffp-contract=off', '-pthread')
# The user's own flags for compiling and linking, such as sanitizers.
FLAGS_VARIABLE = 'ISVIT_DET_CXXFLAGS'
# Flags for each instruction set, for which kernels.cpp is compiled once each.
# The compiler vectorises the portable kernels. They are linked first: of
# template instantiations that several sets contain, the linker keeps the
# first, which thus runs on every CPU.
KERNELS: Dict[str, Tuple[str, ...]] = {'portable': ('-O3', )}
X86_KERNELS: Dict[str, Tuple[str, ...]] = {
    'avx2': ('-mavx2', '-mfma'),
    'avxvnni': ('-mavx2', '-mfma', '-mavxvnni'),
    'avx512vnni': ('-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512vnni'),
}
# Time limit for each run of the compiler.
SECONDS = 1200
# A library ends in a seal, a SHA-256 of its content and of its sources.
SEAL_BYTES = 32


class NoLibrary(Exception):
    """The native library is not available; one line says why."""


@functools.lru_cache(maxsize=None)
def load_library() -> ctypes.CDLL:
    """Load the library, and compile it first if necessary.

    Raises:
        NoLibrary: if it cannot be compiled or loaded. Later calls in the same
            process raise the same without another attempt.
    """
    outcome = _try_to_load()
    if isinstance(outcome, str):
        raise NoLibrary(outcome)
    return outcome


@functools.lru_cache(maxsize=None)
def _try_to_load() -> Union[ctypes.CDLL, str]:
    """The library, or why it is not available."""
    try:
        return ctypes.CDLL(str(library_path()))
    except NoLibrary as error:
        return str(error)
    except OSError as error:
        return f'it could not be loaded ({str(error).splitlines()[0]})'


def library_path() -> Path:
    """Path of the library, which is compiled if it does not exist.

    Raises:
        NoLibrary: if it cannot be compiled, or the cache cannot be written.
    """
    if not SOURCES.is_dir():
        raise NoLibrary('this installation lacks the sources of its library '
                        f'({SOURCES}); install it again')
    if is_sealed(PACKAGED):
        return PACKAGED
    compiler = find_compiler()
    digest = hashlib.sha256(_source_digest())
    # --version alone does not tell a compiler's target.
    for option in ('--version', '-dumpmachine'):
        digest.update(_run([*compiler, option]).encode())
    folder = _cache_folder()
    path = folder / f'libisvit-{digest.hexdigest()[:16]}.so'
    if not is_sealed(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                if not is_sealed(path):
                    compile_library(path, compiler)
        except OSError as error:
            raise NoLibrary(
                f'the cache {folder} cannot be written ({error.strerror}); '
                'set XDG_CACHE_HOME to another folder') from error
    return path


def _cache_folder() -> Path:
    root = os.environ.get('XDG_CACHE_HOME')
    try:
        return Path(root or Path.home() / '.cache') / 'isvit_det'
    except RuntimeError as error:
        raise NoLibrary('there is no home folder for a cache; set '
                        'XDG_CACHE_HOME to a folder') from error


def _source_digest() -> bytes:
    """Digest of the sources and flags, but not of the compiler."""
    digest = hashlib.sha256()
    for flag in (*_flags(), *KERNELS, *X86_KERNELS,
                 *(flag for own in X86_KERNELS.values() for flag in own)):
        digest.update(flag.encode() + b'\0')
    files = [path for path in sorted(SOURCES.iterdir()) if path.is_file()]
    # A flag such as -include names a file that is a source as well.
    files += [Path(flag) for flag in _flags() if os.path.isfile(flag)]
    for path in files:
        digest.update(path.name.encode() + b'\0' + path.read_bytes())
    return digest.digest()


def _flags() -> List[str]:
    return [*FLAGS, *os.environ.get(FLAGS_VARIABLE, '').split()]


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content + _source_digest()).digest()


def is_sealed(path: Path) -> bool:
    """Whether a file is a complete library made of the current sources.

    A truncated library would crash the process that loads it.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-SEAL_BYTES:] == _seal(content[:-SEAL_BYTES])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time create a file, while others wait."""
    with open(f'{path}.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # Not every file system supports locks. Two processes may then both
            # compile, which is harmless, since files are replaced atomically.
            yield
            return
        # While this process has the lock, these are left from killed ones.
        for killed in path.parent.glob(f'.{path.name}.*'):
            shutil.rmtree(killed, ignore_errors=True)
        yield


def find_compiler() -> List[str]:
    """Command of the C++ compiler: the variable ``CXX``, or a common name.

    Raises:
        NoLibrary: if no compiler is installed.
    """
    given = os.environ.get('CXX', '').split()
    for command in [given] if given else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise NoLibrary(f'no C++ compiler was found ({given or list(COMPILERS)}); '
                    'install one, or set CXX to one')


def compile_library(path: Path, compiler: Sequence[str]) -> None:
    """Compile the sources into a shared library for the compiler's target.

    Args:
        path: of the library, which is written completely or not at all.
        compiler: command of the compiler.

    Raises:
        NoLibrary: with the compiler's first error.
        OSError: if the folder cannot be written.
    """
    kernels = dict(KERNELS)
    if _run([*compiler, '-dumpmachine']).startswith('x86_64'):
        kernels.update(X86_KERNELS)
    unfinished = tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f'.{path.name}.')
    with unfinished as folder:
        compilations = []
        for name, source, own in _object_files(kernels):
            made = f'{folder}/{name}.o'
            compilations.append(
                [*compiler, *own, *_flags(), '-c',
                 str(source), '-o', made])
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(_run, compilations))
        objects = [compilation[-1] for compilation in compilations]
        library = Path(folder) / 'library.so'
        _run([*compiler, *_flags(), '-shared', *objects, '-o', str(library)])
        with open(library, 'r+b') as file:
            seal = _seal(file.read())
            file.write(seal)
        os.replace(library, path)


def _object_files(
    kernels: Dict[str, Tuple[str, ...]]
) -> Iterator[Tuple[str, Path, Sequence[str]]]:
    """Name, source and additional flags of each object file."""
    for source in sorted(SOURCES.glob('*.cpp')):
        if source.stem != 'kernels':
            yield source.stem, source, ()
    for name, flags in kernels.items():
        define = f'-DISVIT_KERNELS={name}'
        yield name, SOURCES / 'kernels.cpp', (define, *flags)


def _run(command: Sequence[str]) -> str:
    """Run a compiler and return its output."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoLibrary(f'{command[0]} could not be run ({error})') from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if 'error' in line] or lines
        raise NoLibrary(
            f'{command[0]} failed: {(errors or ["no output"])[0]}; '
            'set CXX to a C++17 compiler')
    return done.stdout
