"""The library is compiled once, and where it cannot be, a line says why."""
import pytest

from isvit_det.runtime import build
from isvit_det.runtime.build import NoLibrary


def reason(monkeypatch, tmp_path, compiler):
    """Why there is no library with another compiler and an empty cache."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('CXX', compiler)
    with pytest.raises(NoLibrary) as error:
        build.library_path()
    text = str(error.value)
    assert '\n' not in text
    return text


def test_a_compiler_that_is_not_there_is_named(monkeypatch, tmp_path):
    assert 'no-such-compiler' in reason(monkeypatch, tmp_path,
                                        'no-such-compiler')


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / 'broken'
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
                        'echo "x.cpp:1: error: out of luck" >&2\nexit 1\n')
    compiler.chmod(0o755)
    text = reason(monkeypatch, tmp_path, str(compiler))
    assert 'broken failed: x.cpp:1: error: out of luck' in text
    left = [p for p in (tmp_path / 'isvit_det').iterdir()]
    assert left == []


def test_a_damaged_library_is_named(monkeypatch, tmp_path):
    damaged = tmp_path / 'libisvit.so'
    damaged.write_bytes(b'no library')
    monkeypatch.setattr(build, 'PREBUILT', damaged)
    outcome = build._try_to_load.__wrapped__()
    assert str(damaged) in outcome and 'could not be loaded' in outcome


def test_without_sources_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(build, 'SOURCES', tmp_path / 'csrc')
    with pytest.raises(NoLibrary, match='neither its library nor its sources'):
        build.library_path()


def test_the_library_is_compiled_once():
    path = build.library_path()
    before = path.stat().st_mtime_ns
    assert build.library_path() == path
    assert path.stat().st_mtime_ns == before
