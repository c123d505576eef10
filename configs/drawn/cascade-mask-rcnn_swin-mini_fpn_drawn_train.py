# How the float weights of the drawn Cascade Mask R-CNN were made: backbone,
# neck and RPN start from the Mask R-CNN's, the heads from scratch.
_base_ = './cascade-mask-rcnn_swin-mini_fpn_drawn.py'
load_from = '{{ fileDirname }}/mask-rcnn_swin-mini_fpn_drawn.pth'
max_epochs = 4
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=3e-6,
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True)
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
