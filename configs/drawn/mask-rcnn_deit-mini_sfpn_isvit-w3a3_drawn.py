_base_ = './mask-rcnn_deit-mini_sfpn_isvit-w4a4_drawn.py'
model = dict(quant=dict(bits='w3a3'))
