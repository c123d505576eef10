"""What reaches the user's screen, and what the log alone."""
import contextlib
import io
import logging
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest

from isvit_det.screen import output
from isvit_det.screen.output import say, showing, watch

OURS = str(output.PACKAGE / 'engine/run.py')
THEIRS = '/site-packages/mmengine/runner.py'


@pytest.fixture
def logger():
    """A logger whose lines go to sys.stdout, as MMEngine's do."""
    logger = logging.Logger('host')
    yield logger
    logger.handlers.clear()


def log(logger, path, level, text):
    logger.handle(logger.makeRecord('host', level, path, 1, text, (), None))


def work(logger):
    logger.addHandler(logging.StreamHandler(sys.stdout))
    watch(logger)
    print('\x1b[31mloading\x1b[0m 10%\rloading 100%')
    say('phase')
    log(logger, OURS, logging.INFO, 'ours')
    log(logger, THEIRS, logging.INFO, 'theirs')
    log(logger, THEIRS, logging.WARNING, 'odd')
    log(logger, THEIRS, logging.WARNING, 'odd')
    say('table')


def test_ours_and_warnings_are_shown_and_all_is_logged(capsys, logger,
                                                       tmp_path):
    path, before = tmp_path / 'x.log', sys.stdout
    with showing(early='imported\n') as screen:
        print('configured')
        screen.open_log(path)
        work(logger)
    assert capsys.readouterr().out.splitlines() == [
        f'log: {path}', 'phase', 'ours', 'warning: odd', 'table'
    ]
    assert path.read_text().splitlines() == [
        'imported', 'configured', f'log: {path}', 'loading 100%', 'phase',
        'ours', 'theirs', 'odd', 'odd', 'table'
    ]
    assert sys.stdout is before and len(logger.handlers) == 1


def test_verbose_shows_what_is_logged(capsys, logger, tmp_path):
    path = tmp_path / 'x.log'
    with showing(verbose=True, early='imported\n') as screen:
        screen.open_log(path)
        work(logger)
    shown = output.ESCAPES.sub('', capsys.readouterr().out)
    assert shown.replace('loading 10%\r', '') == path.read_text()
    assert 'theirs' in shown


def test_another_process_shows_and_logs_nothing(capsys, logger, tmp_path):
    with showing() as screen:
        screen.mute()
        work(logger)
    assert capsys.readouterr().out == ''


def test_a_log_goes_on(capsys, tmp_path):
    for text in ('one', 'two'):
        with showing() as screen:
            screen.open_log(tmp_path / 'x.log')
            print(text)
    lines = (tmp_path / 'x.log').read_text().splitlines()
    assert lines[1::2] == ['one', 'two']


def test_a_log_says_where_an_error_came_from(capsys, tmp_path):
    with pytest.raises(KeyError), showing() as screen:
        screen.open_log(tmp_path / 'x.log')
        raise KeyError('lost')
    lines = (tmp_path / 'x.log').read_text().splitlines()
    assert lines[1].startswith('Traceback') and lines[-1] == "KeyError: 'lost'"
    assert 'Traceback' not in capsys.readouterr().out


def test_a_logger_that_outlives_the_screen_prints_elsewhere(logger, capsys):
    with showing():
        logger.addHandler(logging.StreamHandler(sys.stdout))
    assert capsys.readouterr().out == ''
    later = io.StringIO()
    with contextlib.redirect_stdout(later):
        log(logger, THEIRS, logging.INFO, 'later')
    assert later.getvalue() == 'later\n' and capsys.readouterr().out == ''


def warn(path):
    warnings.warn_explicit('odd', UserWarning, path, 7)


@pytest.mark.parametrize('verbose', [False, True])
def test_packages_warn_the_log_and_users_code_the_user(verbose, capsys,
                                                       tmp_path):
    package = str(Path(sysconfig.get_path('purelib')) / 'mmdet/x.py')
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        # As it is where no test records warnings.
        warnings.showwarning = lambda *args: print(
            warnings.formatwarning(*args[:4]), file=sys.stderr)
        with showing(verbose) as screen:
            screen.open_log(tmp_path / 'x.log')
            warn(package)
            warn('/home/user/plugin.py')
    shown = capsys.readouterr().err
    assert 'plugin.py:7: UserWarning: odd' in shown
    assert (package in shown) == verbose
    assert package in (tmp_path / 'x.log').read_text()
    assert 'plugin.py' in (tmp_path / 'x.log').read_text()


def test_without_a_screen_nothing_is_redirected(capsys, logger):
    watch(logger)
    say('text')
    assert capsys.readouterr().out == 'text\n' and not logger.handlers


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_full_disk_stops_the_log_and_not_the_work(monkeypatch):
    told = []
    monkeypatch.setattr(
        logging.FileHandler,
        'handleError',
        lambda handler, record: told.append(handler.baseFilename),
        raising=False)
    with showing() as screen:
        screen.open_log(Path('/dev/full'))
        print('one')
    assert set(told) == {'/dev/full'}
