"""Work directories of finished runs, made without a model."""
import json

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from isvit_det.evaluation.predictions import PredictionFile
from isvit_det.report.layer_file import (LAYERS, NUM_BINS, LayerFile,
                                         LayerRecord, SiteRecord)

HEIGHT, WIDTH = 60, 80
SITES = [
    dict(
        name='backbone.norm',
        bits=4,
        granularity='tensor',
        role='act',
        kind='UniformQuantizer',
        num_calls=3),
    dict(
        name='roi_head.fc',
        bits=4,
        granularity='channel',
        role='weight',
        kind='UniformQuantizer',
        num_calls=0)
]


def make_truth(folder, classes, num_images=4, num_objects=3, masks=True):
    """Pictures, and their annotations in ``truth.json``; the annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(num_images):
        name = f'{number:03}.png'
        pixels = random.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        cv2.imwrite(str(folder / name), pixels)
        images.append(
            dict(id=number + 1, file_name=name, height=HEIGHT, width=WIDTH))
        for place in range(num_objects):
            box = [4 + 22 * place, 6 + 9 * number, 18, 16]
            one = dict(
                id=len(annotations) + 1,
                image_id=number + 1,
                category_id=10 + (number * num_objects + place) % len(classes),
                bbox=box,
                area=box[2] * box[3],
                iscrowd=0)
            if masks:
                one['segmentation'] = [[
                    box[0], box[1], box[0] + box[2], box[1], box[0] + box[2],
                    box[1] + box[3], box[0], box[1] + box[3]
                ]]
            annotations.append(one)
    content = dict(
        images=images,
        annotations=annotations,
        categories=[
            dict(id=10 + label, name=name)
            for label, name in enumerate(classes)
        ])
    (folder / 'truth.json').write_text(json.dumps(content))
    return content


def detections(annotations, move=0, drop=0, score=.9):
    """What finds all annotated objects but the first ones, moved a little."""
    return [
        dict(
            box=[
                one['bbox'][0] + move, one['bbox'][1],
                one['bbox'][0] + one['bbox'][2] + move,
                one['bbox'][1] + one['bbox'][3]
            ],
            label=one['category_id'] - 10,
            score=score - .01 * place) for place, one in enumerate(annotations)
    ][drop:]


def write_predictions(work_dir, name, folder, found, masks=True, key='key'):
    """Keep predictions as a run does.

    Args:
        work_dir: of the run.
        name: of the model.
        folder: of the pictures.
        found: detections by id of the image.
        masks: whether they have masks: their boxes.
        key: of the predictions.
    """
    file = PredictionFile(work_dir / 'predictions', name, key)
    file.start()
    for image, each in found.items():
        instances = dict(
            bboxes=torch.tensor([one['box'] for one in each],
                                dtype=torch.float32).reshape(-1, 4),
            scores=torch.tensor([float(one['score']) for one in each]),
            labels=torch.tensor([one['label'] for one in each],
                                dtype=torch.long))
        if masks:
            maps = torch.zeros(len(each), HEIGHT, WIDTH, dtype=torch.bool)
            for place, one in enumerate(each):
                left, top, right, low = (max(0, int(x)) for x in one['box'])
                maps[place, top:low, left:right] = True
            instances['masks'] = maps
        file.add([
            dict(
                img_id=image,
                img_path=str(folder / f'{image - 1:03}.png'),
                ori_shape=(HEIGHT, WIDTH),
                pred_instances=instances)
        ])
    file.finish({})
    file.settle()


def make_result(folder, classes, ann_file='truth.json', **changes):
    """The content of ``result.json``."""

    def figures(ap):
        return dict(
            box_ap=ap,
            mask_ap=ap,
            metrics={
                'coco/bbox_mAP': ap,
                'coco/bbox_mAP_50': ap
            },
            part=None,
            fractions=['coco/bbox_mAP', 'coco/bbox_mAP_50'],
            gaps=[],
            images=4,
            detections=9,
            split=False)

    engine = dict(
        engine='simulation',
        kernels=None,
        reason='it was asked for',
        native_layers=0,
        simulated={'roi_head.fc': ''},
        unfused={})
    result = dict(
        format_version=1,
        config='tiny.py',
        bits='w4a4',
        scope='detector',
        method='isvit',
        lr=1e-4,
        iters=3,
        float=dict(
            figures(.61),
            peak_memory=dict(host=1e9),
            seconds=3.,
            seconds_per_image=.1,
            predictions=dict(name='float', key='key')),
        quantized=figures(.57),
        engine=engine,
        seconds_per_image=.2,
        predictions=dict(name='quantized', key='key'),
        also_evaluated=[],
        backbone_error=.01,
        bytes=dict(float=4e6, packed=6e5),
        seconds=dict(
            float_evaluation=3., calibration=9., quantized_evaluation=4.),
        peak_memory=dict(host=2e9),
        units=[
            dict(
                name=f'stages.{place}',
                errors=dict(before_stage_1=.1, after_stage_3=.01 * place),
                seconds=1.5,
                num_iters=3,
                resumed=place == 1) for place in range(3)
        ],
        sites=SITES,
        hooks_left_out=[],
        float_modules=[dict(name='head.scale', type='Conv2d')],
        float_layers={'head.never': 'no prediction runs it'},
        notes=[],
        command=['quantize_det', 'tiny.py', '--work-dir', 'a folder'],
        packed=str(folder / 'packed.pth'),
        truth=[
            dict(
                metric='CocoMetric',
                coco=True,
                split=False,
                ann_file=ann_file and str(folder / ann_file),
                classes=list(classes),
                cat_ids=[10 + label for label in range(len(classes))])
        ],
        provenance=dict(
            versions=dict(torch='2'),
            quant=dict(weight_bits=4),
            sos=dict(lr=1e-4, iters=3),
            seed=0,
            images_used=5,
            float_checkpoint='float.pth'))
    return {**result, **changes}


def make_layers():
    """Statistics of three layers, one of which stays in float."""
    counts = np.arange(NUM_BINS)
    acts = SiteRecord('input', 'TableQuantizer', 4, False, -1., 1., 5, 100,
                      np.linspace(-.8, .8, 16), counts)
    attention = SiteRecord('left', 'ShiftUniformLog2Quantizer', 4, True, 0.,
                           24., 1, 50, 2.**-np.arange(16.), counts)
    values = SiteRecord('right', 'UniformQuantizer', 8, False, -1., 1., 0, 50,
                        np.linspace(-1, 1, 256), counts)
    return LayerFile(
        4, 'key', 'simulation', dict(backbone=.1, roi_head=.05, all=.2), [
            LayerRecord('backbone.fc', 'backbone', 'linear', 4, 1000, 1e6, .02,
                        .01, [acts], counts, np.arange(16)),
            LayerRecord('backbone.attention_value', 'backbone', 'matmul', None,
                        0, 2e6, .03, .03, [attention, values]),
            LayerRecord('roi_head.up', 'roi_head', 'conv', 32, 500, 1e6)
        ])


def make_run(folder,
             classes=('cat', 'dog'),
             masks=True,
             num_images=4,
             found=None,
             name='result.json',
             **changes):
    """A work directory with all that a run leaves; its path.

    Args:
        folder: of the data and of the work directory.
        classes: names by label.
        masks: whether there are masks.
        num_images: with three objects each.
        found: detections of the quantized model by id of the image; default:
            all objects but one, moved a little.
        name: of the file of figures.
        changes: other entries of the file of figures.
    """
    content = make_truth(folder, classes, num_images, masks=masks)
    of_image = {
        image['id']: [
            one for one in content['annotations']
            if one['image_id'] == image['id']
        ]
        for image in content['images']
    }
    work_dir = folder / 'run'
    before = {key: detections(each) for key, each in of_image.items()}
    after = found if found is not None else {
        key: detections(each, move=key, drop=key == 2, score=.8)
        for key, each in of_image.items()
    }
    write_predictions(work_dir, 'float', folder, before, masks)
    write_predictions(work_dir, 'quantized', folder, after, masks)
    make_layers().save(work_dir / LAYERS)
    result = make_result(folder, classes, **changes)
    (work_dir / name).write_text(json.dumps(result))
    return work_dir


def encoded_square(left, top, size):
    """The mask of a square."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order='F')
    pixels[top:top + size, left:left + size] = 1
    return coco_mask.encode(pixels)
