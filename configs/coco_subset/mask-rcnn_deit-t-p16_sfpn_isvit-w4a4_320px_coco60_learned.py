# Tested on the 60 images that the detector learned.
_base_ = './mask-rcnn_deit-t-p16_sfpn_isvit-w4a4_320px_coco60.py'
test_dataloader = dict(
    dataset=dict(
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        indices=_base_.num_learned))
# The 60 images alone: the file has more.
test_evaluator = dict(ann_file=None)
