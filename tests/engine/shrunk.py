"""Detectors of MMDetection's own configs, made small by options alone."""
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from isvit_det.datasets.drawn import generate
from isvit_det.inputs.configs import load_config
from tests.engine.tiny import NUM_PICTURES, annotate


class Source(NamedTuple):
    """A config's name, and options that make its detector small."""
    name: str
    options: Dict[str, Any]


class Shrunk(NamedTuple):
    """A detector with weights, and options that name its data as well."""
    name: str
    options: Dict[str, Any]
    checkpoint: str

    def words(self, checkpoint: Any = None) -> List[str]:
        """The command line, from the config on."""
        pairs = [
            f'{key}={value}'.replace(' ', '')
            for key, value in self.options.items()
        ]
        checkpoint = str(checkpoint or self.checkpoint)
        return [self.name, checkpoint, '--cfg-options', *pairs]


def under(prefix: str, options: Dict[str, Any]) -> Dict[str, Any]:
    return {f'{prefix}.{key}': value for key, value in options.items()}


SWIN = under(
    'model.backbone', {
        'embed_dims': 16,
        'depths': [1, 1, 1, 1],
        'num_heads': [1, 1, 2, 2],
        'window_size': 4
    })
FEW_BOXES = under('model.test_cfg', {
    'score_thr': 0.,
    'nms_pre': 50,
    'max_per_img': 20
})
ENCODER = {
    'num_layers': 1,
    'layer_cfg.self_attn_cfg.embed_dims': 32,
    'layer_cfg.ffn_cfg.embed_dims': 32,
    'layer_cfg.ffn_cfg.feedforward_channels': 48
}
DECODER = {
    **ENCODER, 'num_layers': 2,
    'layer_cfg.cross_attn_cfg.embed_dims': 32
}
RETINANET = Source(
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py', {
        **SWIN,
        **FEW_BOXES,
        'model.neck.in_channels': [32, 64, 128],
        'model.neck.out_channels': 16,
        'model.bbox_head.in_channels': 16,
        'model.bbox_head.feat_channels': 16,
        'model.bbox_head.stacked_convs': 1,
    })
MASK_RCNN = Source(
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', {
        **SWIN,
        'model.neck.in_channels': [16, 32, 64, 128],
        'model.neck.out_channels':
        16,
        'model.rpn_head.in_channels':
        16,
        'model.rpn_head.feat_channels':
        16,
        **under(
            'model.roi_head', {
                'bbox_roi_extractor.out_channels': 16,
                'bbox_head.in_channels': 16,
                'bbox_head.fc_out_channels': 32,
                'mask_roi_extractor.out_channels': 16,
                'mask_head.num_convs': 1,
                'mask_head.in_channels': 16,
                'mask_head.conv_out_channels': 16
            }),
        'model.test_cfg.rpn.nms_pre':
        50,
        'model.test_cfg.rpn.max_per_img':
        30,
        'model.test_cfg.rcnn.score_thr':
        0.,
        'model.test_cfg.rcnn.max_per_img':
        20,
    })
MASK2FORMER = Source(
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py', {
        **SWIN,
        **under(
            'model.panoptic_head', {
                'in_channels': [16, 32, 64, 128],
                'feat_channels': 32,
                'out_channels': 32,
                'num_queries': 10,
                'positional_encoding.num_feats': 16,
                'pixel_decoder.norm_cfg.num_groups': 4,
                'pixel_decoder.positional_encoding.num_feats': 16,
                **under('pixel_decoder.encoder', ENCODER),
                **under('transformer_decoder', DECODER)
            }),
        'model.test_cfg.max_per_image':
        10,
    })
DINO = Source(
    'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
    {
        **SWIN,
        # mmdet 3.3 computes the encoding of a box for 256 channels only.
        'model.neck.in_channels': [16, 32, 64, 128],
        'model.encoder.num_layers':
        1,
        'model.encoder.layer_cfg.ffn_cfg.feedforward_channels':
        48,
        'model.decoder.num_layers':
        2,
        'model.decoder.layer_cfg.ffn_cfg.feedforward_channels':
        48,
        'model.num_queries':
        20,
        'model.test_cfg.max_per_img':
        20,
    })
DYHEAD = Source(
    'mmdet::dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py', {
        **SWIN,
        **FEW_BOXES,
        'model.data_preprocessor.pad_size_divisor': 32,
        'model.neck.0.in_channels': [32, 64, 128],
        'model.neck.0.out_channels': 32,
        'model.neck.1.in_channels': 32,
        'model.neck.1.out_channels': 32,
        'model.neck.1.num_blocks': 1,
        'model.bbox_head.in_channels': 32,
        'model.bbox_head.feat_channels': 32,
    })


def draw_coco(folder: Path) -> Path:
    """Draw pictures in COCO's folders, with its classes and no objects."""
    generate(folder, NUM_PICTURES)
    categories = [
        dict(id=index + 1, name=name)
        for index, name in enumerate(CocoDataset.METAINFO['classes'])
    ]
    for split in NUM_PICTURES:
        (folder / f'{split}2017').symlink_to(folder / split)
        source = folder / f'annotations/instances_{split}.json'
        content = json.loads(source.read_text())
        content.update(annotations=[], categories=categories)
        source.with_name(f'instances_{split}2017.json').write_text(
            json.dumps(content))
    return folder


def make_shrunk(source: Source, data: Path, folder: Path) -> Shrunk:
    """Write a detector's random weights, and what they find as the truth."""
    truth = folder / 'instances_val2017.json'
    truth.write_text((data / f'annotations/{truth.name}').read_text())
    train = 'train_dataloader.dataset'
    if 'dataset' in load_config(source.name, None).train_dataloader.dataset:
        train += '.dataset'
    options = {
        **source.options,
        f'{train}.data_root': f'{data}/',
        'test_dataloader.dataset.data_root': f'{data}/',
        'test_dataloader.dataset.ann_file': truth,
        'test_dataloader.dataset.pipeline.1.scale': (96, 80),
        'test_dataloader.num_workers': 0,
        'test_dataloader.persistent_workers': False,
        'test_evaluator.ann_file': truth,
    }
    cfg = load_config(source.name, options)
    cfg.test_dataloader.dataset.ann_file = str(truth)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    model.init_weights()
    for value in model.parameters():
        value.data += .03 * torch.randn_like(value)
    annotate(model, cfg, truth)
    checkpoint = folder / 'float.pth'
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    return Shrunk(source.name, options, str(checkpoint))
