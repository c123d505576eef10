# The demo: short settings that two cores run in minutes.
_base_ = './mask-rcnn_deit-mini_sfpn_drawn.py'
model = dict(
    type='isvit_det.quantized_detector',
    base='MaskRCNN',
    quant=dict(method='isvit', bits='w4a4', scope='detector'),
    backbone=dict(type='isvit_det.QuantDeiT'))
custom_hooks = [
    dict(
        type='isvit_det.SOSCalibrationHook',
        sos=dict(num_images=64, iters=100))
]
