"""Checkpoint files: reading and checking float and packed ones, packing."""
import re
from pathlib import Path
from typing import Any, Dict, Mapping

import torch

from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.plain import plain, plain_metainfo
from isvit_det.core.weights import Weights, read_weights
from isvit_det.packed.header import HEADER, check_others
from isvit_det.packed.keys import CODES
from isvit_det.packed.state import pack_state

FORMAT = 'isvit_det.packed'
# Patterns of the names of weights in other projects, the projects, and what
# the user can do.
CONVERT = 'run python {} {{path}} OUT.pth --config CONFIG and give OUT.pth'
LAYOUTS = (
    (r'backbone\.layers\.\d+\.blocks\.', 'Swin-Transformer-Object-Detection, '
     'MMDetection 2', CONVERT.format('tools/convert_swin_od.py')),
    (r'backbone\.(net\.|simfp_\d)', "Detectron2's ViTDet",
     CONVERT.format('tools/convert_vitdet.py')),
    (r'(?:blocks|layers)\.\d+\..*attn\.qkv\.weight', 'a classifier or a '
     "backbone by itself, timm's", "give a detector's; tools/quantize_cls.py "
     "takes a classifier's, and a detector learns from a backbone's when its "
     "config names them in model.backbone.init_cfg"),
)


def packed_content(model: Any, provenance: Mapping[str, Any],
                   dataset_meta: Mapping[str, Any]) -> Dict[str, Any]:
    """What the packed checkpoint holds that ``save_packed`` would write."""
    others = dict(
        format=FORMAT,
        quant=plain(model.quant_config.to_dict()),
        provenance=plain(provenance),
        meta=dict(dataset_meta=plain_metainfo(dataset_meta)))
    return dict(
        others, state_dict=pack_state(model, model.quant_config, others))


def save_packed(model: Any, path: Path, provenance: Mapping[str, Any],
                dataset_meta: Mapping[str, Any]) -> None:
    """Write a packed checkpoint.

    Args:
        model: built by ``quantized_detector`` and calibrated.
        path: of the file.
        provenance: what the calibration used, in plain values.
        dataset_meta: metainfo of the data set, for MMDetection's inferencers.

    Raises:
        QuantError: if the file cannot be written; an existing one stays.
    """
    content = packed_content(model, provenance, dataset_meta)
    write_atomically(path, lambda file: torch.save(content, file))


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Read a float or packed checkpoint without running code it may hold.

    Returns:
        Its content, with the weights as ``'state_dict'``, whatever the file
        calls them, and ``'taken'``, a line that says which weights were used.
        A packed file has been verified.

    Raises:
        QuantError: if there is no such file, it is damaged, or holds no
            weights.
    """
    return verified(read_weights(path), path)


def verified(weights: Weights, path: Path) -> Dict[str, Any]:
    """Verify a file that has been read; its content as in ``read_checkpoint``.

    Raises:
        QuantError: if it is a packed file that was changed.
    """
    content = dict(weights.rest, state_dict=weights.state_dict)
    if is_packed(content):
        check_others(content)
    elif content.get('format') == FORMAT or _has_codes(content):
        raise QuantError(f'checkpoint: {path} says it is packed and has no '
                         'header; it was changed, make it again.')
    return dict(content, taken=weights.summary)


def refuse_other_layouts(state: Mapping[str, Any], path: Path) -> None:
    """Raise if the names of weights are those of another project.

    Args:
        state: of the file.
        path: of the file.
    """
    for pattern, whose, advice in LAYOUTS:
        if any(re.match(pattern, key) for key in state):
            raise QuantError(f'checkpoint: {path} has the names of {whose}; '
                             f'{advice.format(path=path)}.')


def is_packed(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's content is a packed one's."""
    state = content.get('state_dict')
    return isinstance(state, Mapping) and HEADER in state


def _has_codes(content: Mapping[str, Any]) -> bool:
    """Whether a content has packed codes."""
    return any(
        str(key).endswith(f'.{CODES}') for part in (content, *content.values())
        if isinstance(part, Mapping) for key in part)
