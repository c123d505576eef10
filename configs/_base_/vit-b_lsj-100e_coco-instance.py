# ViTDet-B's training in Detectron2: large-scale jitter at 1024x1024, 100
# epochs of 64 images (25 of a set repeated 4 times), AdamW with learning rates
# that decay from layer to layer; norms and position embedding do not decay,
# nor do biases, as in mmdet's ViTDet. Detectron2 trains in mixed precision:
# --amp of mmdet's train.py.
_base_ = 'mmdet::common/lsj-100e_coco-instance.py'
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='Resize', scale={{_base_.image_size}}, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor'))
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
max_epochs = 25
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(
        type='MultiStepLR',
        begin=0,
        end=max_epochs,
        by_epoch=True,
        milestones=[22, 24],
        gamma=0.1)
]
# Of the embeddings, then of the 12 blocks. A parameter takes the longest key
# in its name and nothing else, so that some keys say both.
lr_mults = [0.7**(13 - layer) for layer in range(13)]
undecayed = [
    'norm1', 'norm2', 'attn.qkv.bias', 'attn.proj.bias', 'mlp.fc1.bias',
    'mlp.fc2.bias'
]
layer_decay = {
    'backbone.patch_embed': dict(lr_mult=lr_mults[0]),
    'backbone.patch_embed.proj.bias': dict(lr_mult=lr_mults[0], decay_mult=0.),
    'backbone.pos_embed': dict(lr_mult=lr_mults[0], decay_mult=0.),
    **{
        f'backbone.blocks.{block}.': dict(lr_mult=lr_mult)
        for block, lr_mult in enumerate(lr_mults[1:])
    },
    **{
        f'backbone.blocks.{block}.{name}': dict(
            lr_mult=lr_mult, decay_mult=0.)
        for block, lr_mult in enumerate(lr_mults[1:])
        for name in undecayed
    }
}
optim_wrapper = dict(
    type='OptimWrapper',
    paramwise_cfg=dict(
        norm_decay_mult=0., bias_decay_mult=0., custom_keys=layer_decay),
    optimizer=dict(
        _delete_=True,
        type='AdamW',
        lr=0.0001,
        betas=(0.9, 0.999),
        weight_decay=0.1))
