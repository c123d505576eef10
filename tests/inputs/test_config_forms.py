"""Classes, import paths and lists are what a text config would say."""
import copy
import json
import resource
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import mmdet
import pytest
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import PackDetInputs
from mmdet.models import MaskRCNN, SwinTransformer
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.model import PretrainedInit
from torch import nn

from isvit_det.commands import conversion
from isvit_det.commands.quantize_det import main
from isvit_det.core.errors import QuantError
from isvit_det.detector import quantized_detector
from isvit_det.engine.hook import SOSCalibrationHook
from isvit_det.inputs.config_forms import (as_python, class_of, name_types_,
                                           restore_tuples_)
from isvit_det.inputs.configs import (DETECTOR, HOOK, configure_hook_,
                                      load_config, quantize_config_)
from tests.processes import in_process


class Unregistered:
    pass


@pytest.mark.parametrize('given, name', [
    (SwinTransformer, 'mmdet.SwinTransformer'),
    (CocoDataset, 'mmdet.CocoDataset'),
    (PackDetInputs, 'mmdet.PackDetInputs'),
    (LoadImageFromFile, 'LoadImageFromFile'),
    (nn.LayerNorm, 'LN'),
    (PretrainedInit, 'Pretrained'),
    (quantized_detector, DETECTOR),
    (SOSCalibrationHook, HOOK),
    ('mmdet.models.backbones.SwinTransformer', 'mmdet.SwinTransformer'),
    ('isvit_det.engine.hook.SOSCalibrationHook', HOOK),
    (Unregistered, f'{__name__}.Unregistered'),
    ('SwinTransformer', 'SwinTransformer'),
    ('mmdet.SwinTransformer', 'mmdet.SwinTransformer'),
    ('no.such.Thing', 'no.such.Thing'),
])
def test_a_type_is_written_as_its_name(given, name):
    cfg = Config(dict(a=[dict(b=dict(type=given), type='B'), dict(a=1)]))
    name_types_(cfg)
    assert cfg.a[0].b.type == name and cfg.a[0].type == 'B'


class Own(BaseTransform):

    def __init__(self,
                 size: Tuple[int, int],
                 scales: Sequence[Union[int, Tuple]] = (),
                 border=(0, 0),
                 colors=((0, 0), ),
                 flips: Optional[List[str]] = None,
                 many: 'Union[Tuple[int, int], Sequence[Tuple[int, int]]]' = (
                     1, 2),
                 **kwargs: Any) -> None:
        pass


TRANSFORMS.register_module('OwnOfConfigForms', module=Own)


@pytest.mark.parametrize(
    'kind, given, expected',
    [
        ('Resize', dict(scale=[4, 5]), dict(scale=(4, 5))),
        ('mmdet.Resize', dict(scale=[4, 5]), dict(scale=(4, 5))),
        ('Resize', dict(scale_factor=[.5, .5]), dict(scale_factor=(.5, .5))),
        ('Pad', dict(size=[4, 5]), dict(size=(4, 5))),
        ('PackDetInputs', dict(meta_keys=['a']), dict(meta_keys=('a', ))),
        ('RandomChoiceResize', dict(scales=[[1, 2]]), dict(scales=[(1, 2)])),
        ('RandomResize', dict(scale=[1, 2]), dict(scale=(1, 2))),
        ('RandomResize', dict(scale=[[1, 2], [3, 4]]),
         dict(scale=[(1, 2), (3, 4)])),
        ('RandomCrop', dict(crop_size=[1, 2]), dict(crop_size=(1, 2))),
        # These are refused as tuples.
        ('RandomFlip', dict(prob=[.5, .5]), dict(prob=[.5, .5])),
        ('RandomFlip', dict(direction=['horizontal', 'vertical']),
         dict(direction=['horizontal', 'vertical'])),
        ('OwnOfConfigForms', dict(size=[1, 2]), dict(size=(1, 2))),
        ('OwnOfConfigForms', dict(scales=[[1, 2], 3]), dict(scales=[(1,
                                                                     2), 3])),
        ('OwnOfConfigForms', dict(border=[1, 2]), dict(border=(1, 2))),
        ('OwnOfConfigForms', dict(colors=[[1, 2]]), dict(colors=((1, 2), ))),
        ('OwnOfConfigForms', dict(flips=['a']), dict(flips=['a'])),
        ('OwnOfConfigForms', dict(many=[[1, 2]]), dict(many=[(1, 2)])),
        ('OwnOfConfigForms', dict(other=[1, 2]), dict(other=[1, 2])),
        ('NoSuchTransform', dict(scale=[1, 2]), dict(scale=[1, 2])),
    ])
def test_lists_are_tuples_where_a_class_says_so(kind, given, expected):
    node: Dict[str, Any] = dict(steps=[dict(given, type=kind)])
    restore_tuples_(node)
    assert node == dict(steps=[dict(expected, type=kind)])


def run(config, tiny, work_dir):
    argv = ['--method', 'minmax', '--work-dir', str(work_dir)]
    return main([str(config), tiny.checkpoint, *argv])


def results(work_dir):
    found = json.loads((work_dir / 'result.json').read_text())
    return found['float']['metrics'], found['quantized']['metrics']


PURE = '''
from mmengine.config import read_base
from mmdet.models import MaskRCNN
from mmdet.models.backbones import SwinTransformer
from isvit_det.datasets.drawn import DrawnDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.evaluation import CocoMetric
from mmcv.transforms import LoadImageFromFile
from mmengine.hooks import EMAHook, IterTimerHook
from mmengine.runner.loops import TestLoop
from isvit_det.engine.hook import SOSCalibrationHook
with read_base():
    from .base import *
model.update(type=MaskRCNN)
model['backbone'].update(type=SwinTransformer)
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader['dataset']['type'] = DrawnDataset
    for step in loader['dataset']['pipeline']:
        step['type'] = {
            'LoadImageFromFile': LoadImageFromFile,
            'LoadAnnotations': LoadAnnotations, 'Resize': Resize,
            'PackDetInputs': PackDetInputs}.get(step['type'], step['type'])
test_evaluator.update(type=CocoMetric)
test_cfg.update(type=TestLoop)
default_hooks['timer'].update(type=IterTimerHook)
custom_hooks = [dict(type=SOSCalibrationHook, sos=dict(num_images=2))]
del loader, step
'''


@pytest.fixture(scope='module')
def plain(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp('plain')

    def change(cfg):
        cfg.custom_hooks = [dict(type=HOOK, sos=dict(num_images=2))]

    config = tiny.variant(folder / 'plain.py', change)
    assert run(config, tiny, folder / 'work') == 0
    return config, results(folder / 'work')


def run_tool(*argv):
    """MMDetection's test, as its command line is."""
    tool = str(Path(mmdet.__file__).parent / '.mim/tools/test.py')
    sys.argv[:] = [tool, *argv]
    runpy.run_path(tool, run_name='__main__')
    return 0


@pytest.mark.slow
def test_classes_run_as_names_and_what_is_left_loads_again(
        tiny, plain, tmp_path):
    shutil.copy(tiny.config, tmp_path / 'base.py')
    pure = tmp_path / 'pure.py'
    pure.write_text(PURE)
    assert run(pure, tiny, tmp_path / 'work') == 0
    assert results(tmp_path / 'work') == plain[1]
    status, printed = in_process(run_tool, str(tmp_path / 'work/pure.py'),
                                 str(tmp_path / 'work/packed.pth'),
                                 '--work-dir', str(tmp_path / 'again'))
    assert status == 0, printed[-2000:]
    expected = plain[1][1]['coco/bbox_mAP']
    assert f'coco/bbox_mAP: {expected:.4f}' in printed


@pytest.mark.parametrize('suffix', ['json', 'yaml'])
def test_a_config_without_tuples_runs_as_one_with(tiny, plain, tmp_path,
                                                  suffix):
    config = tmp_path / f'lists.{suffix}'
    Config.fromfile(plain[0]).dump(str(config))
    assert run(config, tiny, tmp_path / 'work') == 0
    assert results(tmp_path / 'work') == plain[1]
    left = Config.fromfile(str(tmp_path / 'work/lists.py'))
    assert isinstance(left.test_dataloader.dataset.pipeline[1].scale, tuple)


def test_a_list_of_an_option_is_a_tuple_too(tiny):
    key = 'test_dataloader.dataset.pipeline.1.scale'
    cfg = load_config(tiny.config, {key: [96, 80]})
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (96, 80)


def test_our_own_classes_are_known_by_a_config_of_classes():
    cfg = Config(
        dict(
            model=dict(
                type=quantized_detector,
                base=MaskRCNN,
                backbone=dict(type='isvit_det.QuantSwinTransformer')),
            custom_hooks=[dict(type=SOSCalibrationHook, sos=dict(seed=3))]))
    name_types_(cfg)
    quantize_config_(cfg, dict(bits='w3a3'))
    configure_hook_(cfg, dict(num_images=7))
    assert cfg.model.type == DETECTOR and cfg.model.base == 'mmdet.MaskRCNN'
    hook, = cfg.custom_hooks
    assert hook.sos == dict(seed=3, num_images=7)


def test_the_builder_takes_a_class_as_base(tiny):
    cfg = load_config(tiny.config, None)
    quantize_config_(cfg, {})
    settings = dict(cfg.model, base=MaskRCNN)
    settings.pop('type')
    assert type(quantized_detector(**settings)) is MaskRCNN


def test_a_converter_reads_a_data_set_given_as_class(tiny, tmp_path):
    shutil.copy(tiny.config, tmp_path / 'base.py')
    (tmp_path / 'pure.py').write_text(PURE)
    state, meta = conversion.read_target(str(tmp_path / 'pure.py'))
    assert len(state) > 100 and len(meta['classes']) == 10


@pytest.mark.parametrize('text', [
    '_base_ = "./self.py"',
    'a = [][3]',
    'a = 1 / 0',
    'raise RuntimeError("custom")',
    'from mmdet.models import NoSuchDetector\nmodel = dict(type='
    'NoSuchDetector)',
    'from mmengine.config import read_base\nwith read_base():\n'
    '    from .nowhere import *',
])
def test_a_config_that_raises_anything_is_one_line(text, tmp_path):
    path = tmp_path / 'self.py'
    path.write_text(text)
    with pytest.raises(QuantError, match='config: '):
        load_config(str(path), None)


@pytest.mark.parametrize('name, module', [
    ('LoadImageFromFile', 'mmcv.transforms.loading'),
    ('CocoDataset', 'mmdet.datasets.coco'),
    ('SwinTransformer', 'mmdet.models.backbones.swin'),
    ('AnchorGenerator', 'mmdet.models.task_modules'),
    ('CocoMetric', 'mmdet.evaluation.metrics.coco_metric'),
    ('DefaultSampler', 'mmengine.dataset.sampler'),
    ('EMAHook', 'mmengine.hooks.ema_hook'),
    ('isvit_det.SOSCalibrationHook', 'isvit_det.engine.hook'),
])
def test_a_name_of_any_registry_leads_to_its_class(name, module):
    found = class_of(name)
    assert found.__name__ == name.split('.')[-1]
    assert found.__module__.startswith(module)


def test_a_name_of_none_leads_nowhere():
    assert class_of('NoSuchThing') is None


def test_what_is_left_of_a_config_is_whole(tiny, tmp_path):
    """Otherwise a run that was killed could not go on in its folder."""
    cfg = copy.deepcopy(as_python(load_config(tiny.config, None)))
    path = tmp_path / 'x.py'
    cfg.dump(path)
    whole = path.read_bytes()
    assert Config.fromfile(path)._cfg_dict == cfg._cfg_dict
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, hard))
    try:
        for place in (path, tmp_path / 'new.py'):
            with pytest.raises(QuantError, match='could not be written'):
                cfg.dump(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ['x.py']
