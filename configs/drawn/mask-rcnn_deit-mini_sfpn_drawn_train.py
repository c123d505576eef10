# How the float weights of the drawn DeiT were made: from scratch.
_base_ = './mask-rcnn_deit-mini_sfpn_drawn.py'
load_from = None
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
