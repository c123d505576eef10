"""The library is compiled once, and where it cannot be, a line says why."""
import ctypes
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isvit_det.runtime import build
from isvit_det.runtime.build import NoLibrary

REPO = Path(__file__).parents[2]
LIBRARY = ('extern "C" __attribute__((visibility("default"))) '
           'int isvit_supported() { return 5; }\n')


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Small sources, which take no time, and an empty cache."""
    folder = tmp_path / 'csrc'
    folder.mkdir()
    (folder / 'dispatch.cpp').write_text(LIBRARY)
    (folder / 'kernels.cpp').write_text('int ISVIT_KERNELS;\n')
    monkeypatch.setattr(build, 'SOURCES', folder)
    monkeypatch.setattr(build, 'PACKAGED', tmp_path / 'package/libisvit.so')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv(build.FLAGS_VARIABLE, raising=False)
    return folder


def write_compiler(path, script):
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)
    return str(path)


def find_reason():
    """Why there is no library."""
    with pytest.raises(NoLibrary) as error:
        build.library_path()
    text = str(error.value)
    assert '\n' not in text
    return text


def test_a_compiler_that_is_not_there_is_named(sources, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert 'no-such-compiler' in find_reason()


def test_a_compiler_that_fails_is_quoted(sources, monkeypatch, tmp_path):
    compiler = write_compiler(
        tmp_path / 'broken', 'case "$1" in --version|-dumpmachine) exit 0;;'
        'esac\necho "x.cpp:1: error: out of luck" >&2\nexit 1')
    monkeypatch.setenv('CXX', compiler)
    assert 'broken failed: x.cpp:1: error: out of luck' in find_reason()
    left = [path.suffix for path in (tmp_path / 'cache/isvit_det').iterdir()]
    assert left == ['.lock']


def test_without_sources_there_is_no_library(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(build, 'SOURCES', tmp_path / 'nowhere')
    assert 'lacks the sources' in find_reason()


@pytest.mark.parametrize('kept', [0, 100, 8000, -1])
def test_a_library_that_ends_early_is_compiled_anew(sources, kept):
    path = build.library_path()
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    assert build.library_path() == path
    assert path.read_bytes()[:4] == b'\x7fELF'
    assert ctypes.CDLL(str(path)).isvit_supported() == 5


def test_a_library_that_cannot_be_loaded_is_named(sources):
    path = build.library_path()
    path.write_bytes(b'no library' + build._seal(b'no library'))
    outcome = build._try_to_load.__wrapped__()
    assert str(path) in outcome and 'could not be loaded' in outcome


def test_a_cache_that_cannot_be_written_is_named(sources, monkeypatch,
                                                 tmp_path):
    (tmp_path / 'file').write_text('')
    # Nobody may write in /proc, not even root.
    for folder in (tmp_path / 'file', Path('/proc/self')):
        monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
        reason = find_reason()
        assert str(folder) in reason and 'set XDG_CACHE_HOME' in reason
    monkeypatch.delenv('XDG_CACHE_HOME')

    def fail():
        raise RuntimeError

    monkeypatch.setattr(build.Path, 'home', fail)
    assert 'no home folder' in find_reason()


def test_what_a_library_is_made_of_has_a_name_of_its_own(
        sources, monkeypatch, tmp_path):
    paths = [build.library_path()]
    (sources / 'dispatch.cpp').write_text(LIBRARY + '\n')
    paths.append(build.library_path())
    included = tmp_path / 'included.h'
    for text in ('', '//\n'):
        included.write_text(text)
        monkeypatch.setenv(build.FLAGS_VARIABLE, f'-include {included}')
        paths.append(build.library_path())
    compiler = write_compiler(
        tmp_path / 'cross', 'if [ "$1" = -dumpmachine ]; then echo pdp11;'
        'else exec c++ "$@"; fi')
    monkeypatch.setenv('CXX', compiler)
    paths.append(build.library_path())
    assert len(set(paths)) == len(paths)


def test_only_the_targets_kernels_are_compiled(sources, monkeypatch, tmp_path):
    log = tmp_path / 'log'
    compiler = write_compiler(
        tmp_path / 'arm', 'if [ "$1" = -dumpmachine ]; then echo aarch64;'
        f'else echo "$@" >>{log}; exec c++ "$@"; fi')
    build.compile_library(tmp_path / 'libarm.so', [compiler])
    assert 'ISVIT_KERNELS=portable' in log.read_text()
    assert 'avx' not in log.read_text()


def test_processes_at_once_compile_once(sources, monkeypatch, tmp_path):
    log = tmp_path / 'log'
    compiler = write_compiler(
        tmp_path / 'slow', 'case "$1" in --version|-dumpmachine) ;;'
        f'*) echo "$@" >>{log}; sleep .3;; esac\nexec c++ "$@"')
    code = ('import pathlib\nfrom isvit_det.runtime import build\n'
            f'build.SOURCES = pathlib.Path({str(sources)!r})\n'
            'print(build.library_path())')
    children = [
        subprocess.Popen([sys.executable, '-c', code],
                         stdout=subprocess.PIPE,
                         text=True,
                         env=dict(
                             os.environ, CXX=compiler, PYTHONPATH=str(REPO)))
        for _ in range(3)
    ]
    paths = {child.communicate()[0] for child in children}
    assert len(paths) == 1 and build.is_sealed(Path(paths.pop().strip()))
    compiled = log.read_text().splitlines()
    assert len(compiled) == len(set(compiled)) > 2
    assert sum('-shared' in line for line in compiled) == 1


def test_what_a_killed_compilation_left_is_removed(sources):
    path = build.library_path()
    path.unlink()
    left = path.with_name(f'.{path.name}.left')
    left.mkdir()
    (left / 'portable.o').write_text('')
    assert build.library_path() == path and not left.exists()


def test_a_folder_without_locks_will_do(sources, monkeypatch):

    def fail(*args):
        raise OSError('no locks available')

    monkeypatch.setattr(fcntl, 'flock', fail)
    assert build.is_sealed(build.library_path())


def test_a_wheels_library_is_taken_while_it_fits(sources, monkeypatch):
    build.PACKAGED.parent.mkdir()
    build.compile_library(build.PACKAGED, build.find_compiler())
    with monkeypatch.context() as patch:
        patch.setenv('CXX', 'no-such-compiler')
        assert build.library_path() == build.PACKAGED
    monkeypatch.setenv(build.FLAGS_VARIABLE, '-g')
    assert build.library_path() != build.PACKAGED
    monkeypatch.delenv(build.FLAGS_VARIABLE)
    (sources / 'kernels.cpp').write_text('int ISVIT_KERNELS = 1;\n')
    assert build.library_path() != build.PACKAGED


def test_the_library_is_compiled_once():
    path = build.library_path()
    before = path.stat().st_mtime_ns
    assert build.library_path() == path
    assert path.stat().st_mtime_ns == before
