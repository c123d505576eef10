_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/ms-crop-3x_coco-instance.py'
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='isvit_det.DeiT',
        arch='tiny',
        window_size=14,
        global_blocks=[2, 5, 8, 11],
        init_cfg=dict(
            type='Pretrained',
            checkpoint='timm://deit_tiny_patch16_224.fb_in1k')),
    neck=dict(
        _delete_=True,
        type='isvit_det.SimpleFPN',
        in_channels=192,
        out_channels=256))
