"""Convert a checkpoint of Swin-Transformer-Object-Detection, MMDetection 2.

That is Microsoft's release of Mask R-CNN and Cascade Mask R-CNN with a Swin,
for the configs of configs/swin and for MMDetection's own Swin configs. Every
weight of the file is used and every weight of the config's model is filled,
or nothing is written. Neck and heads keep their names and values, and so do
most values of the backbone, because the configs agree with the release in
all that gives them a meaning.

What is more than a change of names:

* A patch merging of the original puts the four neighbours one after the
  other, each with all its channels: upper left, lower left, upper right,
  lower right. MMDetection puts the channels one after the other, each with
  its four neighbours: upper left, upper right, lower left, lower right. The
  weights of its norm and its reduction change places accordingly.
* The positions of a window's tokens to each other are not read but computed,
  by MMDetection's model.

MMDetection 2 has the classes in the file; they must be the config's.
"""
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from torch import Tensor

from isvit_det.checkpoint import read_checkpoint
from isvit_det.commands import parsers
from isvit_det.commands.conversion import (as_floats, check_foreign,
                                           check_weights, drop_extras_,
                                           read_target, run_converter,
                                           save_float, source_name)
from isvit_det.core.errors import QuantError
from isvit_det.core.weights import check_values

# What both models derive from their settings; attn_mask is of classifiers.
EXTRAS = (r'backbone\.layers\.\d+\.blocks\.\d+\.'
          r'(attn\.relative_position_index|attn_mask)')
DERIVED = '.attn.w_msa.relative_position_index'
BLOCK = r'backbone\.stages\.(\d+)\.blocks\.(\d+)\.'
THEIRS = 'backbone.layers.{}.blocks.{}.'

# Our names, and what makes the original's of their parts.
NAMES: List[Tuple[str, Callable[..., str]]] = [
    (r'backbone\.patch_embed\.projection\.(.+)',
     'backbone.patch_embed.proj.{}'.format),
    (r'backbone\.(patch_embed\.norm\..+|norm\d\..+)', 'backbone.{}'.format),
    (BLOCK + r'(norm[12]\..+)', (THEIRS + '{}').format),
    (BLOCK + r'attn\.w_msa\.(.+)', (THEIRS + 'attn.{}').format),
    (BLOCK + r'ffn\.layers\.0\.0\.(.+)', (THEIRS + 'mlp.fc1.{}').format),
    (BLOCK + r'ffn\.layers\.1\.(.+)', (THEIRS + 'mlp.fc2.{}').format),
    (r'backbone\.stages\.(\d+\.downsample\..+)', 'backbone.layers.{}'.format),
    (r'((?:neck|rpn_head|roi_head)\..+)', '{}'.format),
]


def reorder_merging(x: Tensor) -> Tensor:
    """Weights of a patch merging in MMDetection's order of its inputs.

    Args:
        x: shape (..., 4 * C): by column, row and channel of the neighbours.

    Returns:
        Of the same shape: by channel, row and column.
    """
    return x.unflatten(-1, (2, 2, -1)).transpose(-1, -3).flatten(-3)


def convert(source: Mapping[str, Tensor],
            target: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Give the original's weights our names.

    Args:
        source: weights of the file, extras aside.
        target: state dict of the model to fill, for names, shapes and what
            it derives.

    Raises:
        QuantError: naming weights that are missing, left over, of another
            shape or of no finite numbers, or of a model that the release has
            not.
    """
    names = {
        name: source_name(name, NAMES)
        for name in target if not name.endswith(DERIVED)
    }
    check_foreign(
        names, 'the release',
        'give a float config of configs/swin, or one of MMDetection with a '
        'Swin')
    shapes = {other: target[name].shape for name, other in names.items()}
    check_weights(source, shapes, "give the detector that the config's is")
    check_values(source, {
        other: target[name]
        for name, other in names.items()
    })
    state = dict(target)
    for name, other in names.items():
        value = source[other].to(target[name].dtype)
        state[name] = (
            reorder_merging(value) if '.downsample.' in name else value)
    return state


def check_classes(meta: Any, metainfo: Mapping[str, Any]) -> None:
    """Raise if a file names other classes than a config's data set has.

    Args:
        meta: what MMDetection 2 saved beside the weights.
        metainfo: of the data set.
    """
    classes = meta.get('CLASSES') if isinstance(meta, dict) else None
    if not isinstance(classes, (list, tuple)):
        return
    if list(classes) != list(metainfo.get('classes', ())):
        raise QuantError(
            f'checkpoint: its {len(classes)} classes, {list(classes)[:3]} and '
            "so on, are not the config's; give the config of the same data "
            'set.')


def convert_file(source: Path, out: Path, config: str) -> None:
    """Convert a file."""
    content = read_checkpoint(source)
    print(content['taken'])
    weights = as_floats(content['state_dict'])
    extras = drop_extras_(weights, EXTRAS)
    target, metainfo = read_target(config)
    state = convert(weights, target)
    check_classes(content.get('meta'), metainfo)
    if extras:
        print(f'left out, since the model derives it: {", ".join(extras)}')
    save_float(out, state, metainfo)


def main(argv: Optional[List[str]] = None) -> int:
    return run_converter(convert_file,
                         parsers.convert_swin_od().parse_args(argv))
