_base_ = [
    '../vit/cascade-mask-rcnn_deit-s-p16_sfpn_ms-crop-3x_coco.py',
    '../_base_/sos_calibration.py'
]
model = dict(
    type='isvit_det.quantized_detector',
    base='CascadeRCNN',
    quant=dict(method='isvit', bits='w4a4', scope='detector'),
    # Weights come from the detector's checkpoint.
    backbone=dict(type='isvit_det.QuantDeiT', init_cfg=None))
