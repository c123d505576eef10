_base_ = [
    '../swin/cascade-mask-rcnn_swin-s-p4-w7_fpn_4conv1fc_ms-crop-3x_coco.py',
    '../_base_/sos_calibration.py'
]
model = dict(
    type='isvit_det.quantized_detector',
    base='CascadeRCNN',
    quant=dict(method='isvit', bits='w4a4', scope='detector'),
    # Weights come from the detector's checkpoint.
    backbone=dict(type='isvit_det.QuantSwinTransformer', init_cfg=None))
