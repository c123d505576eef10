# How the float weights of the drawn Mask R-CNN were made: from scratch.
_base_ = './mask-rcnn_swin-mini_fpn_drawn.py'
load_from = None
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
