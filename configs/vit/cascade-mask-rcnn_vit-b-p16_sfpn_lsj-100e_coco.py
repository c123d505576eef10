# ViTDet-B of Detectron2, projects/ViTDet, with its losses and its deviations
# of box regression. tools/convert_vitdet.py makes its published weights fit.
_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    '../_base_/vit-b_lsj-100e_coco-instance.py'
]
norm_cfg = dict(type='isvit_det.LayerNorm2d', eps=1e-6)
model = dict(
    # Padded with zeros to 1024x1024 in training and in test, as Detectron2
    # does: images are never larger.
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type='isvit_det.VisionTransformer',
        arch='base',
        pretrain_img_size=224,
        antialias=False,
        window_size=14,
        global_blocks=[2, 5, 8, 11],
        rel_pos_size=64,
        final_norm=False,
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/'
            'mae_pretrain_vit_base.pth')),
    neck=dict(
        _delete_=True,
        type='isvit_det.SimpleFPN',
        in_channels=768,
        out_channels=256),
    rpn_head=dict(
        num_convs=2,
        loss_bbox=dict(_delete_=True, type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead',
                in_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=norm_cfg,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0., 0., 0., 0.],
                    target_stds=[
                        0.1 / stage, 0.1 / stage, 0.2 / stage, 0.2 / stage
                    ]),
                reg_class_agnostic=True,
                loss_cls=dict(
                    type='CrossEntropyLoss',
                    use_sigmoid=False,
                    loss_weight=1.0),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0))
            for stage in (1, 2, 3)
        ],
        mask_head=dict(norm_cfg=norm_cfg)),
    train_cfg=dict(
        rpn=dict(allowed_border=-1), rpn_proposal=dict(max_per_img=1000)))
