"""Progress: what is shown of a calibration, for every stage."""
import logging

from isvit_det.calibration.sos import Event
from isvit_det.report.progress import CalibrationProgress


def show(*events):
    progress = CalibrationProgress(logging.getLogger('progress'), False)
    for event in events:
        progress(event)
    return [task.completed for task in progress.bars.tasks]


START = Event('images', num_units=4)


def test_every_stage_has_a_bar_that_counts_units():
    assert show(START) == [0, 0, 0]
    assert show(START, Event('step', 'a', 1, 4, 1, 25, 100)) == [1.25, 0, 0]
    assert show(START, Event('step', 'a', 2, 4, 3, 100, 100)) == [0, 0, 3]


def test_a_stage_without_iterations_is_passed_at_once():
    assert show(START, Event('step', 'a', 0, 4, 1, 0, 0)) == [1, 0, 0]


def test_a_unit_taken_over_moves_all_bars():
    assert show(START, Event('unit', 'a', 2, 4)) == [3, 3, 3]


def test_a_line_is_logged_for_every_unit_and_warning(caplog):
    with caplog.at_level(logging.INFO, 'progress'):
        show(START, Event('warning', message='odd'),
             Event('unit', 'stages.0.blocks.1', 2, 12, message='error 1 -> 0'))
    assert caplog.messages == [
        'odd', 'unit 3/12 stages.0.blocks.1: error 1 -> 0'
    ]
