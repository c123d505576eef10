# The Swin sibling with a small DeiT, 2.5 M parameters: patches of 8 pixels,
# blocks in windows of 7x7 tokens, two of them global.
_base_ = './mask-rcnn_swin-mini_fpn_drawn.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='isvit_det.DeiT',
        arch=dict(embed_dims=128, depth=6, num_heads=4),
        patch_size=8,
        window_size=7,
        global_blocks=[2, 5],
        drop_path_rate=0.),
    neck=dict(
        _delete_=True,
        type='isvit_det.SimpleFPN',
        in_channels=128,
        in_stride=8,
        out_channels=64))
load_from = '{{ fileDirname }}/mask-rcnn_deit-mini_sfpn_drawn.pth'
