_base_ = './mask-rcnn_deit-t-p16_sfpn_ms-crop-3x_coco.py'
model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(checkpoint='timm://deit_small_patch16_224.fb_in1k')),
    neck=dict(in_channels=384))
