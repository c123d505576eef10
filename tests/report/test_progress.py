"""Progress: what is shown of a calibration, for every stage."""
import logging
from types import SimpleNamespace

import pytest
from torch import nn

from isvit_det.calibration.events import Event, UnitRecord
from isvit_det.core.layers import QuantLinear
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.report import progress as report
from isvit_det.report.progress import CalibrationProgress, announcement
from isvit_det.screen import progress as screen

# Layers of the units.
LAYERS = [1, 4, 4, 1]


@pytest.fixture(scope='module')
def units():

    def layer():
        return QuantLinear(nn.Linear(2, 2), QuantConfig())

    return [
        SimpleNamespace(module=nn.Sequential(*(layer() for _ in range(num))))
        for num in LAYERS
    ]


@pytest.fixture
def show(units):

    def after(*events):
        progress = CalibrationProgress(
            logging.getLogger('progress'), units, False)
        for event in events:
            progress(event)
        return [task.completed for task in progress.bars.tasks]

    return after


START = Event('images', num_units=4)


def test_every_stage_has_a_bar_that_counts_units(show):
    assert show(START) == [0, 0, 0]
    assert show(START, Event('step', 'a', 1, 4, 1, 25, 100)) == [1.25, 0, 0]
    assert show(START, Event('step', 'a', 2, 4, 3, 100, 100)) == [0, 0, 3]


def test_a_stage_without_iterations_is_passed_at_once(show):
    assert show(START, Event('step', 'a', 0, 4, 1, 0, 0)) == [1, 0, 0]


def test_a_unit_taken_over_moves_all_bars(show):
    assert show(START, Event('unit', 'a', 2, 4)) == [3, 3, 3]


def test_a_line_is_logged_for_every_unit_and_warning(show, caplog):
    with caplog.at_level(logging.INFO, 'progress'):
        show(START, Event('warning', message='odd'),
             Event('unit', 'stages.0.blocks.1', 2, 4, message='error 1 -> 0'))
    assert caplog.messages == [
        'odd', 'unit 3/4 stages.0.blocks.1: error 1 -> 0'
    ]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test says."""
    now = [0.]
    for module in (report, screen):
        monkeypatch.setattr(module, 'time',
                            SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_the_first_unit_says_how_long_the_others_take(units, caplog, clock):
    progress = CalibrationProgress(logging.getLogger('progress'), units, False)
    with caplog.at_level(logging.INFO, 'progress'):
        # Reading the images takes time too.
        clock[0] = 50.
        progress(START)
        for index, seconds in enumerate((10., 40., 60., 10.)):
            progress(Event('step', 'a', index, 4, 1, 1, 1))
            clock[0] += seconds
            progress(Event('unit', 'a', index, 4, message='done'))
    first, second, third, last = caplog.messages
    # By layers: 9 are left, each of 10 s; then 5 of 10 s; then 1 of 110 / 9 s.
    assert first.endswith('done, about 90 s left')
    assert second.endswith('done, about 50 s left')
    assert third.endswith('done, about 12 s left')
    assert last.endswith('done')


def test_units_of_an_earlier_run_say_nothing_of_time(units, caplog, clock):
    progress = CalibrationProgress(logging.getLogger('progress'), units, False)
    with caplog.at_level(logging.INFO, 'progress'):
        progress(START)
        progress(Event('unit', 'a', 0, 4, message='taken'))
        progress(Event('step', 'b', 1, 4, 1, 1, 1))
        clock[0] = 40.
        progress(Event('unit', 'b', 1, 4, message='done'))
    assert caplog.messages == [
        'unit 1/4 a: taken', 'unit 2/4 b: done, about 50 s left'
    ]


def test_a_unit_that_takes_long_is_heard_of(units, caplog, clock):
    progress = CalibrationProgress(logging.getLogger('progress'), units, False)
    with caplog.at_level(logging.INFO, 'progress'):
        progress(START)
        for step in range(1, 101):
            clock[0] = 9. * step
            progress(Event('step', 'a', 0, 4, 1, step, 100))
    assert caplog.messages == [
        f'  unit 1/4 stage 1: {step}/100 iterations' for step in (34, 68)
    ]


def test_an_announcement_says_what_will_be_done():
    quant = QuantConfig.from_dict(dict(bits='w3a4', scope='detector'))
    values = dict(iters=50, stage_one_share=.2, lr=1e-4)
    sos = SOSConfig.from_dict(values, quant)
    line = announcement(quant, sos, 12, 32, quant.scope)
    for words in ('w3a4 by isvit, scope detector', '12 units on 32 images',
                  '20 iterations in stage 1, 80 in stage 3', 'rate 0.0001'):
        assert words in line


def test_a_method_without_iterations_announces_no_stages():
    quant = QuantConfig.from_dict(dict(method='minmax'))
    line = announcement(quant, SOSConfig.from_dict({}, quant), 12, 2)
    assert line == ('calibrating w4a4 by minmax: 12 units on 2 images, '
                    'without optimization')


@pytest.mark.parametrize('iters, line', [(0, 'error 0.25 (3.0 s)'),
                                         (9, 'error 0.5 -> 0.25 (3.0 s)')])
def test_a_unit_names_the_error_before_iterations_if_there_were_any(
        iters, line):
    errors = dict(before_stage_3=.5, after_stage_3=.25)
    assert UnitRecord('a', errors, 3., iters).describe() == line


def test_a_unit_says_which_stages_were_undone():
    errors = dict(before_stage_3=.5, after_stage_3=.5)
    record = UnitRecord('a', errors, 3., 9, undone=dict(stage_3=.75))
    assert record.describe() == ('error 0.5 -> 0.5, stage 3 undone, which '
                                 'ended at 0.75 (3.0 s)')
