"""Metrics of MMDetection other than COCO's: shown as they measure."""
import copy
import importlib.util
import json

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.datasets import CocoPanopticDataset
from mmdet.evaluation import INSTANCE_OFFSET
from mmdet.registry import MODELS
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope

from isvit_det.commands.quantize_det import main
from isvit_det.datasets.drawing import CLASSES
from isvit_det.datasets.drawn import generate
from isvit_det.inputs.configs import load_config
from tests.engine.shrunk import MASK2FORMER, Shrunk, Source
from tests.engine.tiny import NUM_PICTURES


def outcome(capfd, folder):
    """The quantized row of the table that was printed, and the result."""
    # Metrics print tables as well.
    out = capfd.readouterr().out
    lines = out[out.rindex('| model'):].splitlines()
    cells = [[c.strip() for c in line[1:-1].split('|')] for line in lines[:4]]
    result = json.loads((folder / 'result.json').read_text())
    return dict(zip(cells[0], cells[3])), result['quantized']


@pytest.fixture
def quantize(tiny, tmp_path, capfd):
    """Run a changed config; its quantized row, and the result."""

    def run(change):
        changed = tiny.variant(tmp_path / 'changed.py', change)
        assert main([
            changed, tiny.checkpoint, '--method', 'minmax', '--calib-images',
            '2', '--no-float-eval', '--work-dir',
            str(tmp_path / 'work')
        ]) == 0
        return outcome(capfd, tmp_path / 'work')

    return run


@pytest.fixture(scope='module')
def expected(tiny, tmp_path_factory):
    """What COCO's evaluation says."""
    folder = tmp_path_factory.mktemp('coco')
    assert main([
        tiny.config, tiny.checkpoint, '--method', 'minmax', '--calib-images',
        '2', '--no-float-eval', '--work-dir',
        str(folder)
    ]) == 0
    return json.loads((folder / 'result.json').read_text())['quantized']


def test_pascal_voc(quantize):

    def change(cfg):
        cfg.test_evaluator = dict(type='VOCMetric', iou_thrs=[.5, .75])

    row, found = quantize(change)
    assert found['box_ap'] is None
    for name in ('mAP', 'AP50', 'AP75'):
        value = found['metrics'][f'pascal_voc/{name}']
        assert 0 < value < 1
        assert row[f'pascal_voc/{name}'] == f'{100 * value:.1f}'


def test_several_data_sets(quantize, expected, tiny):

    def change(cfg):
        one = copy.deepcopy(cfg.test_dataloader.dataset)
        two = copy.deepcopy(one)
        two.metainfo = dict(classes=tuple(CLASSES), palette=[])
        cfg.test_dataloader.dataset = dict(
            type='ConcatDataset', datasets=[one, two])
        cfg.test_evaluator = dict(
            type='MultiDatasetsEvaluator',
            metrics=2 * [cfg.test_evaluator],
            dataset_prefixes=['Aquarium', 'Raccoon'])

    row, found = quantize(change)
    assert found['box_ap'] is None and found['part'] is None
    for name, value in expected['metrics'].items():
        for folder in ('Aquarium', 'Raccoon'):
            assert found['metrics'][f'{folder}/{name}'] == value
    assert row['Raccoon/coco/bbox_mAP'] == f'{100 * expected["box_ap"]:.1f}'


def make_lvis(tiny, path):
    """The truth in the form of LVIS."""
    source = tiny.data / 'annotations/instances_val.json'
    content = json.loads(source.read_text())
    for image in content['images']:
        image.update(neg_category_ids=[], not_exhaustive_category_ids=[])
    for category in content['categories']:
        category.update(frequency='f', image_count=9, instance_count=9)
    for entry in content['annotations']:
        del entry['iscrowd']
    path.write_text(json.dumps(content))

    def change(cfg):
        cfg.test_evaluator.update(type='LVISMetric', ann_file=str(path))

    return change


@pytest.mark.skipif(
    importlib.util.find_spec('lvis') is None,
    reason='the package lvis is not installed')
def test_lvis(quantize, expected, tiny, tmp_path, monkeypatch):
    # Its release of 2020 uses a name that numpy has dropped.
    monkeypatch.setattr(np, 'float', float, raising=False)
    row, found = quantize(make_lvis(tiny, tmp_path / 'lvis.json'))
    assert found['box_ap'] == pytest.approx(expected['box_ap'], abs=.02)
    assert row['box AP'] == f'{100 * found["box_ap"]:.1f}'
    assert row['mask AP'] == f'{100 * found["mask_ap"]:.1f}'
    assert found['metrics']['lvis/bbox_APf'] == found['box_ap']
    assert 'lvis/bbox_APr' in found['gaps']


PANOPTIC = Source(
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_'
    'coco-panoptic.py', {
        **MASK2FORMER.options, 'model.test_cfg.object_mask_thr': 0.,
        'model.test_cfg.iou_thr': 0.
    })


def draw_panoptic(folder, options):
    """Pictures whose panoptic truth is what random weights find."""
    generate(folder, NUM_PICTURES)
    cfg = load_config(PANOPTIC.name, options)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    model.init_weights()
    # Without the step that loads the truth.
    steps = cfg.test_dataloader.dataset.pipeline
    load = Compose([steps[0], steps[1], steps[3]])
    meta = CocoPanopticDataset.METAINFO
    categories = [
        dict(id=label + 1, name=name, isthing=name in meta['thing_classes'])
        for label, name in enumerate(meta['classes'])
    ]
    for split in NUM_PICTURES:
        path = folder / f'annotations/panoptic_{split}2017.json'
        maps = folder / f'annotations/panoptic_{split}2017'
        maps.mkdir()
        (folder / f'{split}2017').symlink_to(folder / split)
        source = folder / f'annotations/instances_{split}.json'
        images = json.loads(source.read_text())['images']
        annotations = []
        for image in images:
            picture = str(folder / split / image['file_name'])
            batch = pseudo_collate([load(dict(img_path=picture, img_id=0))])
            with torch.no_grad():
                found = model.test_step(batch)[0]
            labels = found.pred_panoptic_seg.sem_seg[0].numpy()
            # There is a thing and some stuff in any case.
            labels[:8, :8], labels[8:16, :8] = 0, 100
            segments = []
            for value in np.unique(labels):
                if value % INSTANCE_OFFSET < len(categories):
                    segments.append(
                        dict(
                            id=len(segments) + 1,
                            category_id=int(value % INSTANCE_OFFSET) + 1,
                            iscrowd=0,
                            bbox=[0, 0, 9, 9],
                            area=int((labels == value).sum())))
                    labels[labels == value] = -len(segments)
            picture = np.zeros((*labels.shape, 3), np.uint8)
            picture[..., 2] = np.maximum(-labels, 0)
            name = image['file_name']
            assert cv2.imwrite(str(maps / name), picture)
            annotations.append(
                dict(
                    image_id=image['id'],
                    file_name=name,
                    segments_info=segments))
        path.write_text(
            json.dumps(
                dict(
                    images=images,
                    annotations=annotations,
                    categories=categories)))
    # Its other metric counts boxes and masks of the things.
    things = [category for category in categories if category['isthing']]
    (folder / 'annotations/instances_val2017.json').write_text(
        json.dumps(dict(images=images, annotations=[], categories=things)))
    torch.save(dict(state_dict=model.state_dict()), folder / 'float.pth')
    return folder


@pytest.mark.skipif(
    importlib.util.find_spec('panopticapi') is None,
    reason='the package panopticapi is not installed')
def test_panoptic_quality(tmp_path, capfd):
    data = tmp_path / 'data'
    options = {
        **PANOPTIC.options, 'train_dataloader.dataset.data_root': f'{data}/',
        'test_dataloader.dataset.data_root': f'{data}/',
        'test_dataloader.dataset.pipeline.1.scale': (96, 80),
        'test_dataloader.num_workers': 0,
        'test_dataloader.persistent_workers': False,
        'test_evaluator.0.ann_file':
        f'{data}/annotations/panoptic_val2017.json',
        'test_evaluator.0.seg_prefix': f'{data}/annotations/panoptic_val2017/',
        'test_evaluator.1.ann_file':
        f'{data}/annotations/instances_val2017.json'
    }
    draw_panoptic(data, options)
    words = Shrunk(PANOPTIC.name, options, str(data / 'float.pth')).words()
    assert main([
        *words, '--method', 'minmax', '--bits', 'w8a8', '--calib-images', '2',
        '--work-dir',
        str(tmp_path / 'work')
    ]) == 0
    row, found = outcome(capfd, tmp_path / 'work')
    value = found['metrics']['coco_panoptic/PQ']
    assert 1 < value <= 100 and found['box_ap'] is None
    assert 'coco/bbox_mAP' in found['gaps'] and row['box AP'] == '-'
    assert row['coco_panoptic/PQ'] == f'{value:.4g}'


@pytest.mark.parametrize('kind, package', [
    ('LVISMetric', 'lvis'),
    ('CocoPanopticMetric', 'panopticapi'),
    ('CityScapesMetric', 'cityscapesscripts'),
])
def test_a_missing_package_is_named(tiny, tmp_path, capfd, monkeypatch, kind,
                                    package):
    metrics = importlib.import_module('mmdet.evaluation.metrics')
    for module, name, value in (('lvis_metric', 'lvis', None),
                                ('coco_panoptic_metric', 'panopticapi',
                                 None), ('cityscapes_metric',
                                         'HAS_CITYSCAPESAPI', False)):
        monkeypatch.setattr(getattr(metrics, module), name, value)

    def change(cfg):
        cfg.test_evaluator = dict(type=kind)
        if package == 'cityscapesscripts':
            cfg.test_evaluator.outfile_prefix = str(tmp_path / 'out')

    changed = tiny.variant(tmp_path / 'changed.py', change)
    assert main(
        [changed, tiny.checkpoint, '--work-dir',
         str(tmp_path / 'work')]) == 2
    line, = (
        line for line in capfd.readouterr().err.splitlines()
        if line.startswith('error: '))
    assert package in line
