"""Convert a ViTDet checkpoint of Detectron2 for a ViT config of configs/vit.

Every weight of the file is used, but for what the config states (pixel means
and anchors), and every weight of the config's model is filled, or nothing is
written. Weights keep their values, because the configs
agree with Detectron2 (projects/ViTDet) in all that gives them a meaning: RGB
images with ImageNet's mean and deviation, padded with zeros to 1024x1024; a
position embedding that is resized bicubically without antialiasing; windows
padded after the norm; anchors centred on the corners of their cells (offset
0), of ratios 0.5, 1, 2 in this order, each with its deltas dx, dy, dw, dh;
RoI features flattened as (C, H, W); the 80 classes first, background last.

What is more than a change of names:

* The position embedding begins with the class token's, which is dropped.
* A cascade of Detectron2 has one mask head, MMDetection's has one per stage
  and averages their masks: each gets the same weights.
* A cascade of MMDetection averages its stages' logits, Detectron2 their
  probabilities; and MMDetection resizes images with OpenCV, Detectron2 with
  PIL. AP is therefore not exactly the published one.
"""
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Tuple, Union

from torch import Tensor

from isvit_det.checkpoint import read_checkpoint
from isvit_det.commands import parsers
from isvit_det.commands.conversion import (as_floats, check_foreign,
                                           check_weights, drop_extras_,
                                           read_target, run_converter,
                                           save_float, source_name)
from isvit_det.core.weights import check_values

# Buffers of Detectron2 that the config has as settings.
EXTRAS = (r'pixel_mean|pixel_std|'
          r'proposal_generator\.anchor_generator\.cell_anchors\.\d+')
POSITIONS = 'backbone.pos_embed'
# Where the 1x1 convolution of a pyramid level stands behind the layers that
# resize the map; the 3x3 one follows it.
LATERAL = (4, 1, 0, 1)
RPN = 'proposal_generator.rpn_head'
ROI = 'roi_heads'


def _level(level: str, layer: Union[int, str], rest: str) -> str:
    return f'backbone.simfp_{int(level) + 2}.{layer}.{rest}'


# Our names, and what makes Detectron2's of their parts.
NAMES: List[Tuple[str, Callable[..., str]]] = [
    (r'backbone\.(pos_embed|patch_embed\..+|blocks\..+)',
     'backbone.net.{}'.format),
    (r'neck\.resize\.(\d)\.(\d)\.(.+)', _level),
    (r'neck\.lateral_convs\.(\d)\.(.+)',
     lambda level, rest: _level(level, LATERAL[int(level)], rest)),
    (r'neck\.fpn_convs\.(\d)\.(.+)',
     lambda level, rest: _level(level, LATERAL[int(level)] + 1, rest)),
    (r'rpn_head\.rpn_conv\.(.+)', (RPN + '.conv.conv{}').format),
    (r'rpn_head\.rpn_cls\.(.+)', (RPN + '.objectness_logits.{}').format),
    (r'rpn_head\.rpn_reg\.(.+)', (RPN + '.anchor_deltas.{}').format),
    (r'roi_head\.bbox_head\.(\d\.)?shared_convs\.(\d)\.(.+)',
     lambda stage, i, rest: f'{ROI}.box_head.{stage}conv{int(i) + 1}.{rest}'),
    (r'roi_head\.bbox_head\.(\d\.)?shared_fcs\.(\d)\.(.+)',
     lambda stage, i, rest: f'{ROI}.box_head.{stage}fc{int(i) + 1}.{rest}'),
    (r'roi_head\.bbox_head\.(\d\.)?fc_cls\.(.+)',
     (ROI + '.box_predictor.{}cls_score.{}').format),
    (r'roi_head\.bbox_head\.(\d\.)?fc_reg\.(.+)',
     (ROI + '.box_predictor.{}bbox_pred.{}').format),
    (r'roi_head\.mask_head\.(?:\d\.)?convs\.(\d)\.(.+)',
     lambda i, rest: f'{ROI}.mask_head.mask_fcn{int(i) + 1}.{rest}'),
    (r'roi_head\.mask_head\.(?:\d\.)?upsample\.(.+)',
     (ROI + '.mask_head.deconv.{}').format),
    (r'roi_head\.mask_head\.(?:\d\.)?conv_logits\.(.+)',
     (ROI + '.mask_head.predictor.{}').format),
]


def detectron2_name(name: str) -> str:
    """Detectron2's name of one of our weights; '' if it has none."""
    # Its convolutions hold their norm; mmcv's ConvModule holds both.
    name = name.replace('.conv.', '.').replace('.ln.', '.norm.')
    return source_name(name, NAMES)


def convert(source: Mapping[str, Tensor],
            target: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Give Detectron2's weights our names.

    Args:
        source: of the file, extras aside.
        target: state dict of the model to fill, for names and shapes.

    Raises:
        QuantError: naming weights that are missing, left over, of another
            shape or of no finite numbers, or of a model that is no ViTDet.
    """
    names = {name: detectron2_name(name) for name in target}
    check_foreign(names, 'ViTDet',
                  'give a float config of configs/vit with a ViT')
    shapes = {other: list(target[name].shape) for name, other in names.items()}
    shapes[names[POSITIONS]][1] += 1
    check_weights(source, shapes, "give the ViTDet that the config's model is")
    check_values(source, {
        other: target[name]
        for name, other in names.items()
    })
    state = {name: source[other] for name, other in names.items()}
    state[POSITIONS] = state[POSITIONS][:, 1:].clone()
    return state


def convert_file(source: Path, out: Path, config: str) -> None:
    """Convert a file."""
    content = read_checkpoint(source)
    print(content['taken'])
    weights = as_floats(content['state_dict'])
    extras = drop_extras_(weights, EXTRAS)
    target, metainfo = read_target(config)
    state = convert(weights, target)
    if extras:
        print(f'left out, since the config says it: {", ".join(extras)}')
    save_float(out, state, metainfo)


def main(argv: Optional[List[str]] = None) -> int:
    return run_converter(convert_file,
                         parsers.convert_vitdet().parse_args(argv))
