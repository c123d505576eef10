"""What the calibration hook refuses."""
from types import SimpleNamespace

import pytest
from mmdet.models import DetTTAModel

from isvit_det.core.errors import QuantError
from isvit_det.engine.hook import SOSCalibrationHook
from tests.toy import toy


def test_a_model_is_not_calibrated_with_augmentation_at_test_time():
    detector = toy()
    detector.test_step = None
    runner = SimpleNamespace(model=DetTTAModel(module=detector))
    with pytest.raises(QuantError, match='calibrate it without'):
        SOSCalibrationHook().before_test(runner)
