# Short settings that two cores run in minutes, for the drawn detectors.
custom_hooks = [
    dict(
        type='isvit_det.SOSCalibrationHook',
        sos=dict(num_images=64, iters=100))
]
