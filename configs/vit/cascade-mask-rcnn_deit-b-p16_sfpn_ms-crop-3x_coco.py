_base_ = './cascade-mask-rcnn_deit-t-p16_sfpn_ms-crop-3x_coco.py'
model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(checkpoint='timm://deit_base_patch16_224.fb_in1k')),
    neck=dict(in_channels=768))
