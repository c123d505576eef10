"""The library of csrc/: compiled once into the user's cache, then loaded."""
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
# A wheel for one platform has the library beside this module.
PACKAGED = Path(__file__).with_name('libisvit.so')
COMPILERS = ('c++', 'g++', 'clang++')
FLAGS = ('-O2', '-std=c++17', '-fPIC', '-fvisibility=hidden',
         '-ffp-contract=off', '-pthread')
# More of them, for compiling and linking: sanitizers, emulated instructions.
FLAGS_VARIABLE = 'ISVIT_DET_CXXFLAGS'
# Flags of every set of kernels, each of which is a compilation of its own. The
# portable ones are left to the compiler to vectorise, and are linked first:
# what the standard library's templates share runs on every CPU then.
KERNELS: Dict[str, Tuple[str, ...]] = {'portable': ('-O3', )}
X86_KERNELS: Dict[str, Tuple[str, ...]] = {
    'avx2': ('-mavx2', '-mfma'),
    'avxvnni': ('-mavx2', '-mfma', '-mavxvnni'),
    'avx512vnni': ('-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512vnni'),
}
SECONDS = 1200
SEAL_BYTES = 32


class NoLibrary(Exception):
    """There is no native library; the message says why in one line."""


@functools.lru_cache(maxsize=None)
def load_library() -> ctypes.CDLL:
    """The library, compiled by the first who asks for it.

    Raises:
        NoLibrary: if it cannot be compiled or loaded. Nothing is tried again
            in this process.
    """
    outcome = _try_to_load()
    if isinstance(outcome, str):
        raise NoLibrary(outcome)
    return outcome


@functools.lru_cache(maxsize=None)
def _try_to_load() -> Union[ctypes.CDLL, str]:
    """The library, or why there is none."""
    try:
        return ctypes.CDLL(str(library_path()))
    except NoLibrary as error:
        return str(error)
    except OSError as error:
        return f'it could not be loaded ({str(error).splitlines()[0]})'


def library_path() -> Path:
    """Path of the library, which is compiled if it is not there.

    Raises:
        NoLibrary: if it cannot be compiled, or the cache cannot be written.
    """
    if not SOURCES.is_dir():
        raise NoLibrary('this installation lacks the sources of its library '
                        f'({SOURCES}); install it again')
    if is_sealed(PACKAGED):
        return PACKAGED
    compiler = find_compiler()
    digest = hashlib.sha256(_ingredients())
    # What a compiler is called and prints is alike for all its targets.
    for option in ('--version', '-dumpmachine'):
        digest.update(_run([*compiler, option]).encode())
    folder = _cache_folder()
    path = folder / f'libisvit-{digest.hexdigest()[:16]}.so'
    if not is_sealed(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(path):
                if not is_sealed(path):
                    compile_library(path, compiler)
        except OSError as error:
            raise NoLibrary(
                f'the cache {folder} cannot be written ({error.strerror}); '
                'name another folder by XDG_CACHE_HOME') from error
    return path


def _cache_folder() -> Path:
    root = os.environ.get('XDG_CACHE_HOME')
    try:
        return Path(root or Path.home() / '.cache') / 'isvit_det'
    except RuntimeError as error:
        raise NoLibrary('there is no home folder for a cache; name a folder '
                        'by XDG_CACHE_HOME') from error


def _ingredients() -> bytes:
    """Digest of what the library is made of, whatever compiler does it."""
    digest = hashlib.sha256()
    for flag in (*_flags(), *KERNELS, *X86_KERNELS,
                 *(flag for own in X86_KERNELS.values() for flag in own)):
        digest.update(flag.encode() + b'\0')
    files = [path for path in sorted(SOURCES.iterdir()) if path.is_file()]
    # Flags may name a file that is included.
    files += [Path(flag) for flag in _flags() if os.path.isfile(flag)]
    for path in files:
        digest.update(path.name.encode() + b'\0' + path.read_bytes())
    return digest.digest()


def _flags() -> List[str]:
    return [*FLAGS, *os.environ.get(FLAGS_VARIABLE, '').split()]


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content + _ingredients()).digest()


def is_sealed(path: Path) -> bool:
    """Whether a file is a whole library, made of the sources as they are.

    A library that ends early would kill the process that loads it.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-SEAL_BYTES:] == _seal(content[:-SEAL_BYTES])


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time make a file; the others wait."""
    with open(f'{path}.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # Not every file system has locks. A file is replaced as a whole,
            # so that whoever makes it as well does no harm.
            yield
            return
        for killed in path.parent.glob(f'.{path.name}.*'):
            shutil.rmtree(killed, ignore_errors=True)
        yield


def find_compiler() -> List[str]:
    """Command of the C++ compiler: ``CXX`` of the environment, or a usual one.

    Raises:
        NoLibrary: if there is none.
    """
    given = os.environ.get('CXX', '').split()
    for command in [given] if given else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise NoLibrary(f'no C++ compiler was found ({given or list(COMPILERS)})')


def compile_library(path: Path, compiler: Sequence[str]) -> None:
    """Compile the sources into a shared library for the compiler's target.

    Args:
        path: of the library; it is written whole or not at all.
        compiler: its command.

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
        for name, source, own in _units(kernels):
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


def _units(
    kernels: Dict[str, Tuple[str, ...]]
) -> Iterator[Tuple[str, Path, Sequence[str]]]:
    """Compilations by name, with their source and flags of their own."""
    for source in sorted(SOURCES.glob('*.cpp')):
        if source.stem != 'kernels':
            yield source.stem, source, ()
    for name, flags in kernels.items():
        define = f'-DISVIT_KERNELS={name}'
        yield name, SOURCES / 'kernels.cpp', (define, *flags)


def _run(command: Sequence[str]) -> str:
    """Run a compiler, and give what it prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoLibrary(f'{command[0]} could not be run ({error})') from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if 'error' in line] or lines
        raise NoLibrary(f'{command[0]} failed: {(errors or ["no output"])[0]}')
    return done.stdout
