# The demo's Cascade, with its short settings.
_base_ = './cascade-mask-rcnn_swin-mini_fpn_drawn.py'
model = dict(
    type='isvit_det.quantized_detector',
    base='CascadeRCNN',
    quant=dict(method='isvit', bits='w4a4', scope='detector'),
    backbone=dict(type='isvit_det.QuantSwinTransformer'))
custom_hooks = [
    dict(
        type='isvit_det.SOSCalibrationHook',
        sos=dict(num_images=64, iters=100))
]
