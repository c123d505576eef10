"""Transforms, workers and detectors that fail name the image."""
import builtins
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader

from isvit_det.core.errors import QuantError
from isvit_det.engine.images import calibration_images
from isvit_det.inputs.data_errors import GuardedPipeline, guard_, read


class Failing(BaseTransform):
    """Raises, or drops the image, at pictures of a name."""
    NAME = 'FailingOfDataErrors'

    def __init__(self, kind, at='000002.png'):
        self.kind = kind
        self.at = at

    def transform(self, results):
        if not str(results.get('img_path')).endswith(self.at):
            return results
        if self.kind == 'drop':
            return None
        if self.kind == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == 'two':
            raise TwoArguments('one', 'two')
        if self.kind == 'lines':
            raise RuntimeError('first line\nsecond line')
        raise getattr(builtins, self.kind)('custom')


class TwoArguments(Exception):
    """An error that torch cannot make again from its message."""

    def __init__(self, one, two):
        super().__init__(f'{one} {two}')


TRANSFORMS.register_module(Failing.NAME, module=Failing)
KINDS = [
    'RuntimeError', 'IndexError', 'ZeroDivisionError', 'KeyError',
    'AssertionError', 'MemoryError', 'TypeError', 'two', 'lines', 'drop'
]


@pytest.fixture
def cfg(tiny):
    init_default_scope('mmdet')
    return Config.fromfile(tiny.config)


def insert(cfg, kind, place=1):
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline.insert(place, dict(type=Failing.NAME, kind=kind))
    return cfg


@pytest.mark.parametrize('kind', KINDS)
def test_any_error_of_a_transform_names_image_and_transform(kind, cfg, tiny):
    images = calibration_images(insert(cfg, kind), None, 6, 0)
    at = next(i for i, p in enumerate(images.paths())
              if p.name == '000002.png')
    with pytest.raises(QuantError) as caught:
        images.read(at)
    line = str(caught.value)
    assert str(tiny.data / 'train/000002.png') in line and 'Failing' in line
    assert '\n' not in line
    images.read(at - 1)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', ['RuntimeError', 'two', 'KeyError', 'drop'])
def test_workers_say_the_same(kind, workers, cfg, tiny):
    dataset = DATASETS.build(insert(cfg, kind).test_dataloader.dataset)
    guard_(dataset, may_skip=False)
    loader = DataLoader(
        dataset, num_workers=workers, collate_fn=pseudo_collate)
    with pytest.raises(QuantError) as caught:
        list(read(loader, 'test_dataloader'))
    line = str(caught.value)
    assert line.startswith(f'data set: image {tiny.data}/val/000002.png')
    assert 'Failing' in line and '\n' not in line


def test_a_killed_worker_is_one_line(cfg):
    dataset = DATASETS.build(insert(cfg, 'kill').test_dataloader.dataset)
    guard_(dataset, may_skip=False)
    loader = DataLoader(dataset, num_workers=1, collate_fn=pseudo_collate)
    with pytest.raises(QuantError) as caught:
        list(read(loader, 'test_dataloader'))
    line = str(caught.value)
    assert 'test_dataloader' in line and 'num_workers=0' in line
    assert 'memory' in line and '\n' not in line


def test_a_pipeline_that_is_guarded_does_what_it_did(cfg):
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    expected = dataset[0]
    guard_(dataset, may_skip=False)
    guarded = dataset.pipeline
    guard_(dataset, may_skip=False)
    assert dataset.pipeline is guarded and isinstance(guarded, Compose)
    dataset.pipeline = pickle.loads(pickle.dumps(guarded))
    found = dataset[0]
    assert torch.equal(found['inputs'], expected['inputs'])
    assert found['data_samples'].img_path == expected['data_samples'].img_path


def test_training_may_take_another_image_than_one_that_is_dropped():
    data = dict(img_path='x/000002.png')
    assert GuardedPipeline(Failing('drop'), may_skip=True)(dict(data)) is None
    with pytest.raises(QuantError, match='x/000002.png.*Failing drops it'):
        GuardedPipeline(Failing('drop'))(dict(data))


def test_objects_without_masks_are_named(cfg, tiny):
    data = dict(
        img_path='x.png',
        img_id=1,
        ori_shape=(4, 4),
        img=np.zeros((4, 4, 3), np.uint8),
        instances=[dict(bbox=[0, 0, 2, 2], bbox_label=0, ignore_flag=0)])
    step = TRANSFORMS.build(dict(type='mmdet.LoadAnnotations', with_mask=True))
    ann_file = str(tiny.data / 'annotations/instances_val.json')
    with pytest.raises(QuantError) as caught:
        GuardedPipeline(step, ann_file)(data)
    for word in ('x.png', "'segmentation'", ann_file, 'LoadAnnotations'):
        assert word in str(caught.value)


def test_a_detector_that_fails_on_an_image_names_it(cfg):

    class Model:

        def __init__(self, at):
            self.at = at

        def data_preprocessor(self, data, training):
            path = data['data_samples'][0].img_path
            if path.endswith(self.at):
                raise RuntimeError('preprocess')
            return dict(inputs=data['inputs'][0][None], path=path)

        def test_step(self, data):
            if data['data_samples'][0].img_path.endswith('000003.png'):
                raise ValueError('forward')

    images = calibration_images(cfg, None, 6, 0)
    with pytest.raises(
            QuantError,
            match='000002.png.*data_preprocessor.*'
            'RuntimeError: preprocess'):
        images.check(Model('000002.png'))
    images.check(Model('none'))
    with pytest.raises(QuantError, match='000003.png.*ValueError: forward'):
        with images.naming_failures(Model('none')):
            raise RuntimeError('what the calibration says')
