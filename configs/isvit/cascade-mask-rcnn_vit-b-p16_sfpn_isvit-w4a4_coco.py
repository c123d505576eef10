_base_ = [
    '../vit/cascade-mask-rcnn_vit-b-p16_sfpn_lsj-100e_coco.py',
    '../_base_/sos_calibration.py'
]
model = dict(
    type='isvit_det.quantized_detector',
    base='CascadeRCNN',
    quant=dict(method='isvit', bits='w4a4', scope='detector'),
    # Weights come from the detector's checkpoint.
    backbone=dict(type='isvit_det.QuantVisionTransformer', init_cfg=None))
