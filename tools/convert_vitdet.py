#!/usr/bin/env python
"""Convert a ViTDet checkpoint of Detectron2 for a ViT config of configs/vit.

Every weight of the file is used and every weight of the config's model is
filled, or nothing is written. Weights keep their values, because the configs
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
import argparse
import importlib.util
import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor

if importlib.util.find_spec('isvit_det') is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet.registry import DATASETS, MODELS
from mmengine.registry import init_default_scope

from isvit_det.checkpoint import plain_metainfo, read_checkpoint
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.engine.configs import config_errors, load_config

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


def source_name(name: str) -> str:
    """Detectron2's name of one of our weights; '' if it has no such."""
    # Its convolutions hold their norm; mmcv's ConvModule holds both.
    name = name.replace('.conv.', '.').replace('.ln.', '.norm.')
    for pattern, make in NAMES:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return make(*match.groups(default=''))
    return ''


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 write the bytes of an array."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'_codecs.encode to {encoding}')
    return text.encode('latin1')


FLOATS = (np.float16, np.float32, np.float64)
# What rebuilds an array, whatever numpy calls it.
RECONSTRUCT = np.zeros(0).__reduce__()[0]
ALLOWED = {
    '_codecs.encode': _encode,
    'collections.OrderedDict': OrderedDict,
    'numpy.dtype': np.dtype,
    'numpy.ndarray': np.ndarray,
    'numpy.core.multiarray._reconstruct': RECONSTRUCT,
    'numpy._core.multiarray._reconstruct': RECONSTRUCT,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain containers, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if f'{module}.{name}' not in ALLOWED:
            raise pickle.UnpicklingError(f'{module}.{name}')
        return ALLOWED[f'{module}.{name}']


def read_pickle(path: Path) -> Any:
    """Content of a pickle of numpy arrays; nothing else in it is run.

    Raises:
        QuantError: if there is no such file, it is damaged, or holds more.
    """
    try:
        with open(path, 'rb') as file:
            return ArrayUnpickler(file, encoding='latin1').load()
    except pickle.UnpicklingError as error:
        raise QuantError(
            f'checkpoint: {path} holds more than numpy arrays ({error}) and '
            'is not read for safety, or is damaged; download it '
            'again.') from error
    # A damaged pickle raises anything.
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise QuantError(f'checkpoint: {path} cannot be read ({lines[0]}); '
                         'download it again.') from error


def read_source(path: Path) -> Dict[str, Tensor]:
    """Weights of a Detectron2 checkpoint in its own names.

    Args:
        path: a ``.pkl`` of numpy arrays, or a file of ``torch.save``.

    Raises:
        QuantError: if it cannot be read or holds anything but weights.
    """
    content = (read_pickle if path.suffix == '.pkl' else read_checkpoint)(path)
    if isinstance(content, dict):
        content = content.get('model', content)
    if not isinstance(content, dict):
        raise QuantError(f'checkpoint: {path} holds a '
                         f"{type(content).__name__}, expected a dict of "
                         "weights or one with such a 'model'.")
    state: Dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype in FLOATS:
            value = torch.tensor(value)
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise QuantError(f'checkpoint: {name!r} of {path} is no tensor; '
                             'give a dict of weights or one with such a '
                             "'model'.")
        state[name] = value.float()
    return state


def read_target(config: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """State dict of a config's model, and the metainfo of its data set."""
    cfg = load_config(config, None)
    with config_errors():
        init_default_scope(cfg.get('default_scope', 'mmdet'))
        dataset = cfg.test_dataloader.dataset
        metainfo = dict(
            DATASETS.get(dataset.type).METAINFO, **dataset.get('metainfo', {}))
        return MODELS.build(cfg.model).state_dict(), metainfo


def convert(source: Mapping[str, Tensor],
            target: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Give Detectron2's weights our names.

    Args:
        source: what ``read_source`` gave, extras aside.
        target: state dict of the model to fill, for names and shapes.

    Raises:
        QuantError: naming weights that are missing, left over, of another
            shape, or of a model that is no ViTDet.
    """
    names = {name: source_name(name) for name in target}
    foreign = [name for name, other in names.items() if not other]
    if foreign:
        raise QuantError(f'config: {len(foreign)} weights that ViTDet has '
                         f'not: {foreign[:5]}; give a float config of '
                         'configs/vit with a ViT.')
    needed = dict.fromkeys(names.values())
    missing = [name for name in needed if name not in source]
    unknown = [name for name in source if name not in needed]
    problems = [
        f'{len(found)} weights {what}: {found[:5]}'
        for what, found in (('missing', missing), ('unknown', unknown))
        if found
    ]
    for name, other in names.items():
        wanted = list(target[name].shape)
        if name == POSITIONS:
            wanted[1] += 1
        if other in source and list(source[other].shape) != wanted:
            problems.append(f'{other} is {tuple(source[other].shape)} '
                            f'instead of {tuple(wanted)}')
    if problems:
        raise QuantError(f'checkpoint: {"; ".join(problems[:7])}; give the '
                         "ViTDet that the config's model is.")
    state = {name: source[other] for name, other in names.items()}
    state[POSITIONS] = state[POSITIONS][:, 1:].clone()
    return state


def run(source: Path, out: Path, config: str) -> None:
    """Convert a file."""
    weights = read_source(source)
    extras = [name for name in weights if re.fullmatch(EXTRAS, name)]
    for name in extras:
        del weights[name]
    target, metainfo = read_target(config)
    state = convert(weights, target)
    kept = dict(
        state_dict=state, meta=dict(dataset_meta=plain_metainfo(metainfo)))
    write_atomically(out, lambda file: torch.save(kept, file))
    if extras:
        print(f'left out, since the config says it: {", ".join(extras)}')
    print(f'{out}: {len(state)} tensors, {out.stat().st_size / 1e6:.1f} MB')


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'source', type=Path, help='model_final_*.pkl, or a file of torch.save')
    parser.add_argument('out', type=Path, help='the file to write')
    parser.add_argument(
        '--config', required=True, help='the float config to fit')
    args = parser.parse_args(argv)
    try:
        run(args.source, args.out, args.config)
    except QuantError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
