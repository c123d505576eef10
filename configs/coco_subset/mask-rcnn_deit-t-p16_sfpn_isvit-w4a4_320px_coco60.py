# Calibrated on train images other than the 60 that the detector learned.
_base_ = './mask-rcnn_deit-t-p16_sfpn_320px_coco60.py'
model = dict(
    type='isvit_det.quantized_detector',
    base='MaskRCNN',
    quant=dict(method='isvit', bits='w4a4', scope='detector'),
    backbone=dict(type='isvit_det.QuantDeiT', init_cfg=None))
custom_hooks = [
    dict(
        type='isvit_det.SOSCalibrationHook',
        sos=dict(num_images=64, iters=100),
        calib_dataloader=dict(
            dataset=dict(
                type='CocoDataset',
                data_root=_base_.data_root,
                ann_file='annotations/instances_train2017.json',
                data_prefix=dict(img='train2017/'),
                # Of a folder with at least so many train images.
                indices=list(range(_base_.num_learned, 343)),
                test_mode=True,
                pipeline=_base_.test_pipeline)))
]
