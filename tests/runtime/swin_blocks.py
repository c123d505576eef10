"""Calibrated Swin backbones for the tests of the runtime, and what the
simulation computes in one of their blocks."""
import copy

import torch
from mmdet.models.backbones.swin import SwinTransformer

from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.core.layers import fit_weights_, observe, set_precision_
from tests.backbones.laws import pair_up

SETTINGS = dict(embed_dims=32, depths=[2, 2], num_heads=[1, 2])
SETTINGS.update(strides=(4, 2), out_indices=(0, 1))


def draw_backbone(quant=None, size=(64, 100), **kwargs):
    """A Swin whose ranges are those of one image of ``size``."""
    torch.manual_seed(0)
    settings = {**SETTINGS, **kwargs}
    _, model = pair_up(
        SwinTransformer(**settings),
        QuantSwinTransformer(**settings, quant=quant or dict(bits='w4a4')))
    for stage in model.stages:
        for block in stage.blocks:
            torch.nn.init.normal_(block.attn.padding_value, std=.5)
            for layer in (block.attn.w_msa.qkv, ):
                if layer.offset is not None:
                    torch.nn.init.normal_(layer.offset, std=.2)
        if stage.downsample is not None:
            torch.nn.init.normal_(stage.downsample.reduction.offset, std=.2)
    fit_weights_(model)
    with observe(model):
        model(torch.randn(1, 3, *size))
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
