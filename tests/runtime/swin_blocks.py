"""Calibrated Swin backbones for the tests of the runtime, and what the
simulation computes in one of their blocks."""
import copy

import torch
from mmdet.models.backbones.swin import SwinTransformer

from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.core.layers import fit_weights_, observe, set_precision_
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
    fit_weights_(model)
    with observe(model):
        model(torch.randn(1, 3, 64, 100))
    set_precision_(model, True, True)
    return model


def simulate_block(block, x, size, dtype):
    """A block's output and the codes in it, by the names of a trace."""
    block = copy.deepcopy(block).to(dtype)
    msa, mlp = block.attn.w_msa, block.ffn.layers
    layout = block.attn.layout(size)
    places = dict(
        qkv_input=msa.qkv.input_quantizer,
        query=msa.query_key.left_quantizer,
        key=msa.query_key.right_quantizer,
        value=msa.attention_value.right_quantizer,
        attention=msa.attention_value.left_quantizer,
        proj_input=msa.proj.input_quantizer,
        fc1_input=mlp[0][0].input_quantizer,
        fc2_input=mlp[1].input_quantizer)
    found = {}
    for name, quantizer in places.items():

        def keep(module, args, output, name=name):
            found[name] = module.encode(args[0])
            if name == 'attention':
                found[name] = output

        quantizer.register_forward_hook(keep)
    with torch.no_grad():
        out = block(x.to(dtype), size)
    # Heads side by side, keys as rows.
    found['key'] = found['key'].transpose(-2, -1)
    for name in ('query', 'key', 'value'):
        found[name] = found[name].transpose(1, 2).flatten(2)
    # Only tokens inside of the map.
    for name in ('qkv_input', 'proj_input'):
        found[name] = layout.join(found[name])
    return out, found
