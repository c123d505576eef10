"""Progress elsewhere than on a terminal: an occasional line."""
import io
import sys
from types import SimpleNamespace

import pytest

from isvit_det.screen import progress
from isvit_det.screen.output import showing
from isvit_det.screen.progress import Pace, bars, track


class Terminal(io.StringIO):

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test says."""
    now = [0.]
    monkeypatch.setattr(progress, 'time',
                        SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def said(clock):
    """Gives the times at which a line is due."""

    def times(seconds_in_all, until):
        clock[0] = 0.
        pace = Pace()
        found = []
        for second in range(until):
            clock[0] = float(second)
            if pace.is_due(min(1, second / seconds_in_all)):
                found.append(second)
        return found

    return times


def test_a_line_every_tenth_but_not_more_often_than_every_30_s(said):
    assert said(640, 640) == [64 * i for i in range(1, 10)]
    assert said(128, 128) == [30, 60, 90, 120]
    assert said(2, 10) == []


def test_a_line_after_five_minutes_in_any_case(said):
    assert said(10**6, 1000) == [300, 600, 900]


def test_the_end_is_told_of_by_what_comes_after(said):
    assert said(128, 1000)[-1] == 120


def test_time_left_is_what_has_passed_for_what_is_done(clock):
    pace = Pace()
    assert pace.left(0.) == ''
    clock[0] = 30.
    assert pace.left(.25) == ', about 90 s left'


@pytest.fixture
def slow(clock, monkeypatch):
    """Time of which 20 s pass from one look at it to the next."""

    def look():
        clock[0] += 20.
        return clock[0]

    monkeypatch.setattr(progress, 'time', SimpleNamespace(monotonic=look))


def track_some(stream, verbose, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', stream)
    with showing(verbose), track('float', 10) as advance:
        for _ in range(5):
            advance(2)
    return stream.getvalue()


def test_a_file_gets_lines(slow, monkeypatch):
    out = track_some(io.StringIO(), False, monkeypatch)
    assert out.startswith('  4/10 images, about ')
    assert '\r' not in out and '\x1b' not in out
    assert all(line.endswith(' left') for line in out.splitlines())


def test_a_terminal_gets_a_bar(slow, monkeypatch):
    monkeypatch.setenv('TERM', 'xterm')
    out = track_some(Terminal(), False, monkeypatch)
    assert '10/10' in out and '\x1b' in out and 'about' not in out


def test_a_terminal_that_cannot_move_gets_lines(slow, monkeypatch):
    monkeypatch.setenv('TERM', 'dumb')
    out = track_some(Terminal(), False, monkeypatch)
    assert 'about' in out and '\x1b' not in out


def test_the_hosts_own_lines_are_enough(slow, monkeypatch):
    assert track_some(Terminal(), True, monkeypatch) == ''


def test_bars_without_a_screen_are_for_terminals(monkeypatch):
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr(sys, 'stdout', Terminal())
    assert not bars('units').disable and bars('units', False).disable
    monkeypatch.setattr(sys, 'stdout', io.StringIO())
    assert bars('units').disable
