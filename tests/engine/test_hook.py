"""What the calibration hook refuses."""
from types import SimpleNamespace

import pytest
import torch
from mmdet.models import DetTTAModel

from isvit_det.core.errors import QuantError
from isvit_det.engine.hook import SOSCalibrationHook
from isvit_det.packed.header import HEADER, describe_others, write_header
from tests.toy import toy


def test_a_model_is_not_calibrated_with_augmentation_at_test_time():
    detector = toy()
    detector.test_step = None
    runner = SimpleNamespace(model=DetTTAModel(module=detector))
    with pytest.raises(QuantError, match='calibrate it without'):
        SOSCalibrationHook().before_test(runner)


def test_what_lies_beside_a_packed_state_is_checked_when_it_is_loaded():
    others = dict(meta=dict(dataset_meta=dict(classes=['cat'])))
    state = dict(a=torch.ones(2))
    state[HEADER] = write_header(
        dict(version=2, **describe_others(others)), state)
    hook = SOSCalibrationHook()
    hook.after_load_checkpoint(None, dict(others, state_dict=state))
    others['meta']['dataset_meta']['classes'] = ['cow']
    with pytest.raises(QuantError, match="'meta' is not what the calib"):
        hook.after_load_checkpoint(None, dict(others, state_dict=state))
    hook.after_load_checkpoint(None, dict(state_dict=dict(a=torch.ones(2))))
