# The paper's calibration: 1024 images of the training split, and the
# iterations and learning rate of the method (1000, or 200 from 6 bits up).
custom_hooks = [
    dict(type='isvit_det.SOSCalibrationHook', sos=dict(num_images=1024))
]
