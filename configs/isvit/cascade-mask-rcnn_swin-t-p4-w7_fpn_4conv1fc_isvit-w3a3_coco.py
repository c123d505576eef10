_base_ = './cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc_isvit-w4a4_coco.py'
model = dict(quant=dict(bits='w3a3'))
