"""Calibrated backbones for the tests of the runtime, and what the simulation
computes in one of their blocks."""
import copy

import torch
from mmdet.models.backbones.swin import SwinBlock, SwinTransformer

from isvit_det.backbones.quant_vit import QuantVisionTransformer
from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.backbones.vit import VisionTransformer
from isvit_det.core.layers import fit_weights_, observe, set_precision_
from isvit_det.core.mixed import set_bits_
from isvit_det.plans.layer import InputCodes
from isvit_det.plans.swin import plan_swin_block
from isvit_det.plans.vit import plan_vit_block
from isvit_det.runtime.blocks import NativeBlock
from tests.backbones.laws import pair_up

ONE_STAGE = dict(
    embed_dims=32, depths=[2], num_heads=[2], strides=(4, ), out_indices=(0, ))
TWO_STAGES = dict(
    embed_dims=32,
    depths=[2, 2],
    num_heads=[1, 2],
    strides=(4, 2),
    out_indices=(0, 1))


def draw_backbone(quant=None, shift=0., **kwargs):
    """A Swin whose ranges are those of one image.

    What the norms and the queries, keys and values are, is shifted, and so
    are the zero points.
    """
    torch.manual_seed(0)
    settings = {**ONE_STAGE, **kwargs}
    quant = {'bits': 'w4a4', **(quant or {})}
    _, model = pair_up(
        SwinTransformer(**settings),
        QuantSwinTransformer(**settings, quant=quant))
    for stage in model.stages:
        for block in stage.blocks:
            torch.nn.init.normal_(block.attn.padding_value, std=.5)
            qkv = block.attn.w_msa.qkv
            if qkv.offset is not None:
                torch.nn.init.normal_(qkv.offset, std=.2)
            for norm in (block.norm1, block.norm2):
                norm.bias.data += shift
            if shift:
                # Far beyond what the shifted norm makes of its outputs.
                qkv.bias.data += 20 * shift
            block.attn.padding_value += shift
        if stage.downsample is not None:
            torch.nn.init.normal_(stage.downsample.reduction.offset, std=.2)
    return calibrate_(model, (64, 100))


def calibrate_(model, size):
    """Give a backbone the ranges of one image of a size."""
    set_bits_(model, model.quant_config)
    fit_weights_(model)
    with observe(model):
        model(torch.randn(1, 3, *size))
    set_precision_(model, True, True)
    return model


WINDOWED = dict(window_size=4, global_blocks=[1], rel_pos_size=6)


def draw_vit(quant=None, size=(96, 112), **kwargs):
    """A ViT whose ranges are those of one image."""
    torch.manual_seed(0)
    arch = dict(embed_dims=32, depth=2, num_heads=2)
    settings = dict(
        arch=arch, pretrain_img_size=64, final_norm=False, **kwargs)
    quant = {'bits': 'w4a4', **(quant or {})}
    _, model = pair_up(
        VisionTransformer(**settings),
        QuantVisionTransformer(**settings, quant=quant))
    for block in model.blocks:
        torch.nn.init.normal_(block.padding_value, std=.5)
    return calibrate_(model, size)


def native_block(block, isa):
    """A block of Swin or ViT on some kernels."""
    plan = plan_swin_block if isinstance(block, SwinBlock) else plan_vit_block
    return NativeBlock(plan(block), isa)


def simulate_block(block, x, size, dtype):
    """A block's output and the codes in it, or their entries, by the names of
    a trace."""
    block = copy.deepcopy(block).to(dtype)
    if isinstance(block, SwinBlock):
        attn, layout = block.attn.w_msa, block.attn.layout(size)
        fc1, fc2 = block.ffn.layers[0][0], block.ffn.layers[1]
    else:
        attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
        layout = block.layout(size) if block.window_size else None
    places = dict(
        qkv_input=attn.qkv.input_quantizer,
        query=attn.query_key.left_quantizer,
        key=attn.query_key.right_quantizer,
        value=attn.attention_value.right_quantizer,
        attention=attn.attention_value.left_quantizer,
        proj_input=attn.proj.input_quantizer,
        fc1_input=fc1.input_quantizer,
        fc2_input=fc2.input_quantizer)
    codes = {}
    for name, quantizer in places.items():

        def keep(module, args, output, name=name):
            codes[name] = output
            if name != 'attention':
                stored = InputCodes.of(module).stored(module.encode(args[0]))
                codes[name] = stored.to(dtype)

        quantizer.register_forward_hook(keep)
    with torch.no_grad():
        out = block(x.to(dtype), size)
    # Heads side by side, keys as rows.
    codes['key'] = codes['key'].transpose(-2, -1)
    for name in ('query', 'key', 'value'):
        codes[name] = codes[name].transpose(1, 2).flatten(2)
    # Only tokens inside of the map.
    if layout is not None:
        for name in ('qkv_input', 'proj_input'):
            codes[name] = layout.join(codes[name])
    return out, codes
