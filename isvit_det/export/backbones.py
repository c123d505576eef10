"""Whole backbones as graphs."""
import dataclasses
import math
from typing import Any, List, Optional, Tuple

import numpy as np
import torch

from isvit_det.backbones.layout import grid_size
from isvit_det.backbones.quant_vit import QuantVisionTransformer
from isvit_det.backbones.swin import QuantSwinTransformer
from isvit_det.backbones.vit_weights import PREFIX_TOKENS
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import QuantConv2d, is_calibrated
from isvit_det.export.blocks import Trace, Writer
from isvit_det.export.graph import Graph
from isvit_det.export.layers import Target, linear, quantize
from isvit_det.export.windows import INDICES, Integers, Sizes
from isvit_det.plans.block import plan_norm
from isvit_det.plans.layer import LayerPlan, Unsupported, plan_layer
from isvit_det.plans.swin import plan_merging, plan_swin_block
from isvit_det.plans.vit import plan_vit_block

# Name of the input, and of the outputs before their number.
IMAGE, MAP = 'image', 'map'
# (height, width) of images in pixels; None for any.
Shape = Optional[Tuple[int, int]]


def write_backbone(backbone: Any,
                   shape: Shape,
                   target: Target,
                   trace: Optional[Trace] = None) -> Graph:
    """Write a calibrated backbone as a graph.

    The input ``image`` is of float32, shape (1, 3, H, W), normalised as the
    detector's preprocessor does it; the outputs ``map0``, ``map1``, ... are
    what the backbone gives the neck.

    Args:
        backbone: a ``QuantSwinTransformer`` or ``QuantVisionTransformer``.
        shape: (H, W) of the images; None leaves it open.
        target: how products are written.
        trace: receives names of the bytes within the last block.

    Raises:
        QuantError: if the backbone is not calibrated or not supported, or
            cannot be written for all shapes.
    """
    check_calibrated(backbone)
    graph = Graph()
    writer = Writer(graph, target, trace)
    sides = ('height', 'width') if shape is None else shape
    channels = _patches_of(backbone).in_channels
    image = graph.add_input(IMAGE, (1, channels, *sides))
    write = _write_swin
    if isinstance(backbone, QuantVisionTransformer):
        write = _write_vit
    with torch.no_grad():
        maps = write(writer, backbone, image, shape)
    for index, (name, depth) in enumerate(maps):
        graph.add_output(f'{MAP}{index}', name,
                         (1, depth, f'height{index}', f'width{index}'))
    return graph


def check_calibrated(backbone: Any) -> None:
    """Raise unless a backbone is quantized and calibrated."""
    if not isinstance(backbone,
                      (QuantSwinTransformer, QuantVisionTransformer)):
        raise QuantError(f'backbone: a {type(backbone).__name__} is not '
                         'written; expected a quantized Swin, ViT or DeiT of '
                         'quantize_det or quantize_detector.')
    if not is_calibrated(backbone):
        raise QuantError('backbone: it is not calibrated; give the packed '
                         'file of quantize_det, or a model of '
                         'quantize_detector.')


def _patches_of(backbone: Any) -> QuantConv2d:
    embed = backbone.patch_embed
    return (embed.proj if isinstance(backbone, QuantVisionTransformer) else
            embed.projection)


def _plan(name: str, make: Any, module: Any) -> Any:
    """A module's plan; what cannot be described is the user's error."""
    try:
        return make(module)
    except Unsupported as error:
        raise QuantError(f'backbone.{name}: it cannot be written, since '
                         f'{error}.') from error


def _embed(writer: Writer, name: str, layer: QuantConv2d, image: str,
           shape: Shape) -> Tuple[str, Sizes]:
    """Tokens of the patches of an image, and the size of their map.

    Each patch is a row of inputs of a linear layer.
    """
    graph = writer.graph
    plan: LayerPlan = _plan(name, plan_layer, layer)
    height, width, channels = plan.weight.shape[1:]
    side = int(height)
    if not (height == width and tuple(layer.stride) == (side, side)
            and tuple(layer.dilation) == (1, 1)):
        raise QuantError(
            f'backbone.{name}: its patches are no squares side by '
            'side, and cannot be written.')
    plan = dataclasses.replace(plan, weight=plan.weight.flatten(1))
    image, size = _whole_patches(graph, image, shape, side)
    x = graph.add('SpaceToDepth', image, blocksize=side)
    x = graph.reshape(x, (1, side * side * channels, -1))
    x = graph.add('Transpose', x, perm=(0, 2, 1))
    codes = quantize(graph, x, plan.input)
    return linear(graph, name, codes, plan, writer.target), size


def _whole_patches(graph: Graph, image: str, shape: Shape,
                   side: int) -> Tuple[str, Sizes]:
    """Fill an image up with zeros to whole patches; and their numbers."""
    if shape is not None:
        size = grid_size(shape, (side, side))
        missing = [count * side - length for count, length in zip(size, shape)]
        if not any(missing):
            return image, size
        amounts = graph.constant([0] * 6 + missing, np.int64)
        return graph.add('Pad', image, amounts), size
    with graph.scope(INDICES):
        return _computed_patches(graph, image, side)


def _computed_patches(graph: Graph, image: str,
                      side: int) -> Tuple[str, Sizes]:
    """``_whole_patches`` of an image of a size that is not known."""
    ints = Integers(graph)
    sides = ints('Shape', image)
    lengths = [ints('Gather', sides, axis) for axis in (2, 3)]
    rows, columns = (ints.ceil(length, side) for length in lengths)
    added = [
        graph.reshape(ints('Sub', ints('Mul', count, side), length), [1])
        for count, length in zip((rows, columns), lengths)
    ]
    amounts = graph.add(
        'Concat', graph.constant([0] * 6, np.int64), *added, axis=0)
    return graph.add('Pad', image, amounts), (rows, columns)


def _write_swin(writer: Writer, backbone: Any, image: str,
                shape: Shape) -> List[Tuple[str, int]]:
    """The outputs of a Swin, and their channels."""
    graph, embed = writer.graph, backbone.patch_embed
    x, size = _embed(writer, 'patch_embed.projection', embed.projection, image,
                     shape)
    if embed.norm is not None:
        x = writer.norm(x, _plan('patch_embed.norm', plan_norm, embed.norm))
    if backbone.use_abs_pos_embed:
        positions = backbone.absolute_pos_embed
        if shape is None or math.prod(size) != positions.shape[1]:
            raise QuantError('--shape: the position embedding of the backbone '
                             f'is for {positions.shape[1]} patches; give a '
                             'shape with as many.')
        x = graph.add('Add', x, graph.constant(positions))
    outputs = []
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage.blocks):
            with graph.scope(f'stages.{i}.blocks.{j}') as name:
                x = writer.block(x, _plan(name, plan_swin_block, block), size)
        if i in backbone.out_indices:
            normed = writer.norm(
                x, _plan(f'norm{i}', plan_norm, getattr(backbone, f'norm{i}')))
            channels = backbone.num_features[i]
            outputs.append((writer.map_of(normed, size, channels), channels))
        if stage.downsample is not None:
            with graph.scope(f'stages.{i}.downsample') as name:
                x, size = writer.merging(
                    x, _plan(name, plan_merging, stage.downsample), size)
    return outputs


def _write_vit(writer: Writer, backbone: Any, image: str,
               shape: Shape) -> List[Tuple[str, int]]:
    """The one output of a ViT, and its channels."""
    graph, prefix = writer.graph, backbone.num_prefix_tokens
    if shape is None:
        raise QuantError('--shape: the position embedding of a ViT is '
                         'interpolated to the size of the images, which has '
                         'to be known; give HxW.')
    x, size = _embed(writer, 'patch_embed.proj', backbone.patch_embed.proj,
                     image, shape)
    if prefix:
        tokens = [
            graph.constant(getattr(backbone, name))
            for name in PREFIX_TOKENS[:prefix]
        ]
        x = graph.add('Concat', *tokens, x, axis=1)
    x = graph.add('Add', x, graph.constant(backbone.positions(size)))
    for index, block in enumerate(backbone.blocks):
        with graph.scope(f'blocks.{index}') as name:
            x = writer.block(x, _plan(name, plan_vit_block, block), size)
    if backbone.has_final_norm:
        x = writer.norm(x, _plan('norm', plan_norm, backbone.norm))
    if prefix:
        x = graph.add('Slice', x, graph.constant([prefix], np.int64),
                      graph.constant([np.iinfo(np.int64).max], np.int64),
                      graph.constant([1], np.int64))  # yapf: disable
    channels = backbone.embed_dims
    return [(writer.map_of(x, size, channels), channels)]
