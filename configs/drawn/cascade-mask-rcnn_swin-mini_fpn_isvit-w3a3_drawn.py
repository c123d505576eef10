_base_ = './cascade-mask-rcnn_swin-mini_fpn_isvit-w4a4_drawn.py'
model = dict(quant=dict(bits='w3a3'))
