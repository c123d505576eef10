_base_ = './mask-rcnn_deit-b-p16_sfpn_isvit-w4a4_coco.py'
model = dict(quant=dict(bits='w6a6'))
