"""What is tried before the work leaves no word and no trace."""
import logging

from mmengine.logging import MMLogger, print_log

from isvit_det.evaluation.trial import silence


def test_no_word_of_a_trial_is_shown_or_logged(tmp_path, capsys):
    """Though a logger has noted that it is enabled."""
    path = tmp_path / 'a.log'
    logger = MMLogger.get_instance(
        'trial', logger_name='trial', log_file=str(path))
    other = logging.getLogger('other of trial')
    logger.info('before')
    with silence():
        print_log('made up', logger=logger)
        print_log('made up', logger='current')
        print_log('made up')
        logger.warning('made up')
        other.error('made up')
    logger.info('after')
    shown = ''.join(capsys.readouterr()) + path.read_text()
    assert 'before' in shown and 'after' in shown
    assert 'made up' not in shown
