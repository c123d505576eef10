# Cascade Mask R-CNN on the Mask R-CNN's backbone, neck and RPN, 3.9 M
# parameters, whose float weights lie beside this file.
_base_ = './mask-rcnn_swin-mini_fpn_drawn.py'
# Regions that a stage trains on must overlap their object by this, and its
# regression is scaled to what is left to correct.
overlaps = [0.5, 0.6, 0.7]
target_stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1],
               [0.033, 0.033, 0.067, 0.067]]
model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(
                type='Shared2FCBBoxHead',
                in_channels=64,
                fc_out_channels=112,
                roi_feat_size=7,
                num_classes=10,
                reg_class_agnostic=True,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0., 0., 0., 0.],
                    target_stds=stds),
                loss_cls=dict(
                    type='CrossEntropyLoss',
                    use_sigmoid=False,
                    loss_weight=1.0),
                loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0))
            for stds in target_stds
        ]),
    train_cfg=dict(rcnn=[
        dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=overlap,
                neg_iou_thr=overlap,
                min_pos_iou=overlap,
                match_low_quality=False,
                ignore_iof_thr=-1),
            sampler=dict(
                type='RandomSampler',
                num=64,
                pos_fraction=0.25,
                neg_pos_ub=-1,
                add_gt_as_proposals=True),
            mask_size=28,
            pos_weight=-1,
            debug=False) for overlap in overlaps
    ]))
load_from = '{{ fileDirname }}/cascade-mask-rcnn_swin-mini_fpn_drawn.pth'
