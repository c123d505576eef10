"""The MMEngine side: hooks, calibration images, configs and reports."""
from isvit_det.engine.hook import SOSCalibrationHook

__all__ = ['SOSCalibrationHook']
