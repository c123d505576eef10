# How the float weights of the drawn DeiT were made: RPN and heads start from
# the Swin sibling's, backbone and neck from scratch.
_base_ = './mask-rcnn_deit-mini_sfpn_drawn.py'
load_from = '{{ fileDirname }}/mask-rcnn_swin-mini_fpn_drawn.pth'
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
