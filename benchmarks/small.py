"""MMDetection's detectors with a Swin backbone, and small ones like them.

What is made small is size alone: depth, channels, queries, classes, tokens.
"""
import copy
import glob
import os
from typing import Any, Dict, Iterator, List, Sequence

import mmdet
import torch
from mmengine.config import Config

from isvit_det.core.errors import QuantError
from isvit_det.inputs.configs import load_config

EMBED_DIMS = 16
CHANNELS = 32
# Fixed in MMDetection: by the encoding of a box, and by the fusion of GLIP.
FULL_CHANNELS = 256
CLASSES = 3
QUERIES = 20
SCALE = (96, 80)
# What the strides of every detector divide.
PADDED = (128, 128)
WORDS = ('box', 'disc')
OF_TRAINING = ('train_cfg', 'dn_cfg', 'with_cp', 'num_cp', 'use_checkpoint',
               'convert_weights', 'pretrain_img_size', 'frozen_stages')


def swin_configs() -> Dict[str, Any]:
    """All configs of the installed MMDetection that have a Swin backbone.

    Returns:
        Config by name, such as ``'swin/retinanet_swin-t-p4-w7_fpn_1x_coco'``,
        in order.
    """
    root = os.path.join(mmdet.__path__[0], '.mim', 'configs')
    configs = {}
    for path in _files_about(root, 'Swin'):
        name = os.path.relpath(path, root)
        if '_base_/' in name:
            continue
        try:
            cfg = load_config(path, None)
        except QuantError:
            # Of a package that is not installed, or of a file that is not.
            continue
        if _has_swin(cfg.get('model')):
            configs[name[:-len('.py')]] = cfg
    return configs


def _files_about(root: str, word: str) -> List[str]:
    """Python files that have a word, or the name of one of these files."""
    texts = {}
    for path in glob.glob(f'{root}/**/*.py', recursive=True):
        with open(path, encoding='utf-8') as file:
            texts[path] = file.read()
    words, paths = {word}, set()
    while words:
        new = {
            path
            for path, text in texts.items()
            if path not in paths and any(word in text for word in words)
        }
        paths |= new
        words = {os.path.basename(path)[:-len('.py')] for path in new}
    return sorted(paths)


def _has_swin(model: Any) -> bool:
    if not isinstance(model, dict):
        return False
    kind = (model.get('backbone') or {}).get('type', '')
    return 'Swin' in (kind if isinstance(kind, str) else kind.__name__)


def shrink_(cfg: Config, words: str) -> None:
    """Make a config's model and its images small, in place.

    Args:
        cfg: of a detector with a Swin backbone.
        words: folder of a small language model, for those that read text.
    """
    model = cfg.model
    backbone = model.backbone
    depth = len(backbone.depths)
    backbone.update(
        embed_dims=EMBED_DIMS,
        depths=[1] * depth,
        num_heads=[1, 1, 2, 2, 2][:depth],
        window_size=4,
        drop_path_rate=.1,
        init_cfg=None)
    model.pop('init_cfg', None)
    channels = [EMBED_DIMS * 2**i for i in backbone.out_indices]
    wide = FULL_CHANNELS if _is_detr(model) or _is_glip(model) else CHANNELS
    for part in ('neck', 'bbox_head', 'panoptic_head', 'rpn_head'):
        for holder in _list(model.get(part)):
            _narrow_(holder, channels, wide)
    if model.get('roi_head'):
        _shrink_regions_(model.roi_head, wide)
    if _is_detr(model):
        _shrink_detr_(model)
    if model.get('panoptic_head'):
        _shrink_masks_(model.panoptic_head)
    for holder in _dicts(model):
        for key in ('num_classes', 'num_things_classes'):
            if key in holder:
                holder[key] = CLASSES
        if 'num_stuff_classes' in holder:
            holder['num_stuff_classes'] = CLASSES * (
                holder['num_stuff_classes'] > 0)
    if model.get('language_model'):
        model.language_model.name = words
        if _is_glip(model):
            model.bbox_head.update(lang_model_name=words, num_dyhead_blocks=1)
    for holder in _dicts(model.get('test_cfg') or {}):
        if 'nms_pre' in holder:
            holder['nms_pre'] = 50
        if 'score_thr' in holder:
            holder['score_thr'] = 0.
        for key in ('max_per_img', 'max_per_image'):
            if key in holder:
                holder[key] = QUERIES
    for transform in _dicts(cfg.test_dataloader):
        if 'scale' in transform:
            transform['scale'] = SCALE
        if 'size' in transform:
            transform['size'] = PADDED


def _is_detr(model: Any) -> bool:
    return 'encoder' in model


def _is_glip(model: Any) -> bool:
    return 'language_model' in model and 'encoder' not in model


def _list(value: Any) -> List[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _dicts(value: Any) -> Iterator[Any]:
    """All dicts in a config's value, itself included."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _dicts(item)


def _narrow_(holder: Any, channels: List[int], wide: int) -> None:
    """Make a neck or a head as narrow as may be, in place."""
    if 'in_channels' in holder:
        several = isinstance(holder.in_channels, (list, tuple))
        holder.in_channels = channels if several else wide
    for key in ('out_channels', 'feat_channels'):
        if key in holder:
            holder[key] = wide
    for key in ('stacked_convs', 'num_blocks', 'num_csp_blocks'):
        if holder.get(key):
            holder[key] = 1
    for inner in _dicts(holder):
        if 'num_groups' in inner:
            inner['num_groups'] = 4


def _shrink_regions_(roi_head: Any, wide: int) -> None:
    for key in ('bbox_roi_extractor', 'mask_roi_extractor'):
        for extractor in _list(roi_head.get(key)):
            extractor.out_channels = wide
    for head in _list(roi_head.bbox_head):
        head.update(in_channels=wide, fc_out_channels=wide)
    if roi_head.get('mask_head'):
        roi_head.mask_head.update(
            num_convs=1, in_channels=wide, conv_out_channels=wide)


def _shrink_detr_(model: Any) -> None:
    model.encoder.num_layers = 1
    model.decoder.num_layers = 2
    model.num_queries = QUERIES
    for holder in _dicts([model.encoder, model.decoder]):
        # Of the float model, which would ask for the package fairscale.
        if 'num_cp' in holder:
            holder['num_cp'] = 0
        if 'feedforward_channels' in holder:
            holder['feedforward_channels'] = CHANNELS
        if 'fusion_layer_cfg' in holder:
            holder['fusion_layer_cfg']['embed_dim'] = CHANNELS


def _shrink_masks_(head: Any) -> None:
    head.num_queries = QUERIES
    head.transformer_decoder.num_layers = 2
    for holder in _dicts(head):
        if 'num_feats' in holder:
            holder['num_feats'] = CHANNELS // 2
        if 'embed_dims' in holder:
            holder['embed_dims'] = CHANNELS
        if 'feedforward_channels' in holder:
            holder['feedforward_channels'] = CHANNELS
    if 'encoder' in head.pixel_decoder:
        head.pixel_decoder.encoder.num_layers = 1


def write_language_model(folder: str, known: Sequence[str] = WORDS) -> None:
    """Write a small random BERT and its tokenizer into a folder.

    Args:
        folder: made if it is not there.
        known: words that are one token each; others are spelt.

    Raises:
        ImportError: if the package transformers is not installed.
    """
    from transformers import BertConfig, BertModel, BertTokenizer
    os.makedirs(folder, exist_ok=True)
    letters = [chr(ord('a') + i) for i in range(26)]
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?']
    words += [*known, *letters, *(f'##{letter}' for letter in letters)]
    path = os.path.join(folder, 'vocab.txt')
    with open(path, 'w', encoding='utf-8') as file:
        file.write('\n'.join(words))
    BertTokenizer(path).save_pretrained(folder)
    torch.manual_seed(0)
    # GLIP's fusion takes this size alone.
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64)
    BertModel(config).save_pretrained(folder)


def same_as(cfg: Any) -> str:
    """What a small detector predicts by: equal for configs like each other."""
    model = copy.deepcopy(cfg.model)
    for holder in _dicts(model):
        for key in list(holder):
            if key.startswith('loss') or key in OF_TRAINING:
                del holder[key]
    return repr(sorted(model.to_dict().items()))
