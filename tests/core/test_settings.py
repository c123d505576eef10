"""Settings: presets, and one clear line for each wrong one."""
import dataclasses

import pytest

from isvit_det.core.errors import QuantError
from isvit_det.core.presets import METHODS
from isvit_det.core.settings import QuantConfig, SOSConfig


@pytest.mark.parametrize('values, words', [
    (dict(bits='w9a4'), ['w9a4', '2..8']),
    (dict(bits='w1a4'), ['w1a4', '2..8']),
    (dict(bits='4'), ["'4'", 'w4a4']),
    (dict(weight_bits=9), ['quant.weight_bits', '9', '2 and 8']),
    (dict(act_bits=4.), ['quant.act_bits', '4.0', 'integer']),
    (dict(act_bits=True), ['quant.act_bits', 'True']),
    (dict(bit='w4a4'), ["['bit']", 'weight_bits']),
    (dict(bits='w4a4', act_bits=8), ['w4a4', 'act_bits', 'leave one out']),
    (dict(method='lsq'), ['quant.method', 'lsq', 'isvit_paper']),
    (dict(scope='head'), ['quant.scope', 'head', 'detector']),
    (dict(softmax='log3'), ['quant.softmax', 'log_sqrt2']),
    (dict(exponent='float'), ['quant.exponent', 'table']),
    (dict(shifts=[]), ['quant.shifts', 'list']),
    (dict(percentiles=[1.2]), ['quant.percentiles', '1.2']),
])
def test_a_wrong_setting_is_named_with_what_is_allowed(values, words):
    with pytest.raises(QuantError) as caught:
        QuantConfig.from_dict(values)
    assert all(word in str(caught.value) for word in words)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('values, words', [
    (dict(num_images=0), ['sos.num_images', '0', '1']),
    (dict(iters=-1), ['sos.iters', '-1']),
    (dict(items='window'), ['sos.items', 'unit', 'image']),
    (dict(epochs=3), ["['epochs']", 'iters']),
    (dict(lr='fast'), ['sos.lr', 'fast', 'number']),
    (dict(stage_one_inputs='mixed'), ['sos.stage_one_inputs', 'quantized']),
    (dict(stage_one_share=2), ['sos.stage_one_share', '2', '0 and 1']),
    (dict(mirror_images=1.5), ['sos.mirror_images', '1.5', 'True']),
])
def test_a_wrong_setting_of_the_run_is_named(values, words):
    with pytest.raises(QuantError) as caught:
        SOSConfig.from_dict(values, QuantConfig())
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize('method', METHODS)
def test_settings_survive_plain_values(method):
    config = QuantConfig.from_dict(dict(method=method, bits='w3a6'))
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert config.bits == 'w3a6'
    sos = SOSConfig.from_dict({}, config)
    assert SOSConfig.from_dict(sos.to_dict(), config) == sos


def test_the_papers_method_has_the_papers_settings():
    paper = QuantConfig.from_dict(dict(method='isvit_paper'))
    assert paper.softmax == 'sulq' and paper.exponent == 'integer'
    assert paper.percentiles == (.999, .9999, .99999)
    assert paper.shift_error == 'attention' and paper.channelwise
    assert (min(paper.shifts), max(paper.shifts)) == (.001, 1.)
    sos = SOSConfig.from_dict({}, paper)
    assert (sos.num_images, sos.iters, sos.lr) == (1024, 1000, 4e-5)
    assert sos.stage_one_inputs == 'float'
    assert not (sos.closed_form_start or sos.rotate_heads or sos.weigh_tokens
                or sos.correct_heads or sos.weigh_locations
                or sos.mirror_images)
    assert sos.iters_of(1) == sos.iters_of(3) == 1000
    six = QuantConfig.from_dict(dict(method='isvit_paper', bits='w6a6'))
    sos = SOSConfig.from_dict({}, six)
    assert (sos.iters, sos.lr) == (200, 4e-5)


def test_baselines_do_not_optimise():
    for method in ('minmax', 'repq'):
        config = QuantConfig.from_dict(dict(method=method))
        assert SOSConfig.from_dict({}, config).iters == 0
    minmax = QuantConfig.from_dict(dict(method='minmax'))
    assert minmax.percentiles == (1., ) and not minmax.channelwise
    assert minmax.softmax == 'uniform'
    repq = QuantConfig.from_dict(dict(method='repq'))
    assert repq.softmax == 'log_sqrt2' and repq.channelwise


@pytest.mark.parametrize('share, first', [(0., 0), (.25, 50), (1., 202)])
def test_stages_share_the_iterations_of_both(share, first):
    sos = SOSConfig(iters=101, stage_one_share=share)
    assert (sos.iters_of(1), sos.iters_of(3)) == (first, 202 - first)


def test_a_shortened_run_has_a_larger_learning_rate():
    for method in METHODS:
        quant = QuantConfig.from_dict(dict(method=method))
        for proportional, lr in ((False, .000126), (True, .00032)):
            sos = SOSConfig.from_dict(
                dict(iters=100, proportional_lr=proportional), quant)
            assert sos.lr == lr
    # Parameters can move as far as in a whole run.
    for iters in (125, 250, 500, 1000):
        sos = SOSConfig.from_dict(
            dict(iters=iters, proportional_lr=True), QuantConfig())
        assert sos.lr * iters == pytest.approx(1000 * 4e-5)
    given = SOSConfig.from_dict(dict(iters=100, lr=1e-3), QuantConfig())
    assert given.lr == 1e-3


def test_settings_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().act_bits = 3


def test_a_classifier_has_what_the_preset_adds_for_it():
    quant = QuantConfig()
    detector, classifier = (
        SOSConfig.from_dict({}, quant, kind)
        for kind in ('detector', 'classifier'))
    assert not detector.mirror_images and not detector.rotate_heads
    assert classifier == dataclasses.replace(
        detector, mirror_images=True, rotate_heads=True)
    given = SOSConfig.from_dict(dict(rotate_heads=False), quant, 'classifier')
    assert given.mirror_images and not given.rotate_heads
    repq = QuantConfig.from_dict(dict(method='repq'))
    assert SOSConfig.from_dict({}, repq,
                               'classifier') == SOSConfig.from_dict({}, repq)
