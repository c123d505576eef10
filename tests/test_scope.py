"""isvit_det::FOLDER/NAME.py: our configs by name, as MMDetection's are."""
import warnings

import pytest
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import METRICS, TRANSFORMS, init_default_scope

from isvit_det.core.errors import QuantError
from isvit_det.inputs.configs import load_config
from isvit_det.registry import DATASETS, HOOKS, MODELS
from tests.engine.tiny import REPO

NAME = 'drawn/mask-rcnn_swin-mini_fpn_isvit-w4a4_drawn.py'


def test_a_name_is_the_file():
    expected = Config.fromfile(str(REPO / 'configs' / NAME))
    for found in (load_config(f'isvit_det::{NAME}',
                              None), get_config(f'isvit_det::{NAME}')):
        assert found.model.quant == expected.model.quant
        assert found.load_from.endswith('/mask-rcnn_swin-mini_fpn_drawn.pth')


def test_all_that_is_inherited_by_name_is_built(tmp_path, monkeypatch, caplog):
    """MMEngine then looks for types of no scope among ours, by our scope."""
    path = tmp_path / 'child.py'
    path.write_text(f"_base_ = 'isvit_det::{NAME}'\n"
                    "model = dict(quant=dict(bits='w3a3'))\n")
    cfg = Config.fromfile(str(path))
    init_default_scope('mmdet')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = MODELS.build(cfg.model)
        assert model.quant_config.bits == 'w3a3'
        dataset = dict(cfg.test_dataloader.dataset, lazy_init=True)
        for step in dataset['pipeline']:
            TRANSFORMS.build(dict(step, _scope_='isvit_det'))
        assert type(DATASETS.build(dataset)).__name__ == 'DrawnDataset'
        hook, = cfg.custom_hooks
        assert type(HOOKS.build(hook)).__name__ == 'SOSCalibrationHook'
        metric = dict(cfg.test_evaluator, ann_file=None)
        assert metric['_scope_'] == 'isvit_det'
        assert type(METRICS.build(metric)) is CocoMetric
    assert not caplog.records


def test_a_name_of_nothing_is_one_line():
    with pytest.raises(QuantError, match="no config 'drawn/no-such.py'"):
        load_config('isvit_det::drawn/no-such.py', None)
