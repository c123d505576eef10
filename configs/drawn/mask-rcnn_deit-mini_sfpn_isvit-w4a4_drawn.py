# The demo's detector.
_base_ = [
    './mask-rcnn_deit-mini_sfpn_drawn.py',
    '../_base_/drawn_sos_calibration.py'
]
model = dict(
    type='isvit_det.quantized_detector',
    base='MaskRCNN',
    quant=dict(method='isvit', bits='w4a4', scope='detector'),
    backbone=dict(type='isvit_det.QuantDeiT'))
