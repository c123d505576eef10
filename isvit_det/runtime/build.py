"""The library of csrc/: compiled once into the user's cache, then loaded."""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple, Union

VERSION = 3
SOURCES = Path(__file__).resolve().parents[1] / 'csrc'
# A wheel for one platform has the library beside this module.
PREBUILT = Path(__file__).with_name('libisvit.so')
COMPILERS = ('c++', 'g++', 'clang++')
FLAGS = ('-O2', '-std=c++17', '-fPIC', '-fvisibility=hidden',
         '-ffp-contract=off', '-pthread')
# Flags of every set of kernels, each of which is a compilation of its own.
KERNELS: Dict[str, Tuple[str, ...]] = {'portable': ()}
if platform.machine() in ('x86_64', 'AMD64'):
    KERNELS.update(
        avx2=('-mavx2', ),
        avxvnni=('-mavx2', '-mavxvnni'),
        avx512vnni=('-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512vnni'))
SECONDS = 1200


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
        path = library_path()
        library = ctypes.CDLL(str(path))
        found = library.isvit_version()
    except NoLibrary as error:
        return str(error)
    except (OSError, AttributeError) as error:
        return f'it could not be loaded ({str(error).splitlines()[0]})'
    if found != VERSION:
        return f'{path} has version {found}, expected {VERSION}'
    return library


def library_path() -> Path:
    """Path of the library, which is compiled if it is not there.

    Raises:
        NoLibrary: if it cannot be compiled.
    """
    if PREBUILT.exists():
        return PREBUILT
    if not SOURCES.is_dir():
        raise NoLibrary('this installation has neither its library nor its '
                        'sources (csrc)')
    compiler = find_compiler()
    digest = hashlib.sha256()
    for part in (_run([*compiler, '--version']), *FLAGS, *KERNELS,
                 *(flag for flags in KERNELS.values() for flag in flags)):
        digest.update(part.encode() + b'\0')
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b'\0' + source.read_bytes())
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    name = f'libisvit-{digest.hexdigest()[:16]}.so'
    path = Path(root) / 'isvit_det' / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        compile_library(path, compiler)
    return path


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
    """Compile the sources into a shared library.

    Args:
        path: of the library; it is written whole or not at all.
        compiler: its command.

    Raises:
        NoLibrary: with the compiler's first error.
    """
    command = [*compiler, *FLAGS]
    unfinished = tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f'.{path.name}.')
    with unfinished as folder:
        compilations = []
        for name, source, own in _units():
            made = f'{folder}/{name}.o'
            compilations.append(
                [*command, *own, '-c',
                 str(source), '-o', made])
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(_run, compilations))
        objects = [compilation[-1] for compilation in compilations]
        library = f'{folder}/library.so'
        _run([*command, '-shared', *objects, '-o', library])
        os.replace(library, path)


def _units() -> Iterator[Tuple[str, Path, Sequence[str]]]:
    """Compilations by name, with their source and flags of their own."""
    for source in sorted(SOURCES.glob('*.cpp')):
        if source.stem != 'kernels':
            yield source.stem, source, ()
    for name, flags in KERNELS.items():
        define = f'-DISVIT_KERNELS={name}_kernels'
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
