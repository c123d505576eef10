"""A kept float evaluation: taken over whole, or measured again."""
import json
import logging
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from torch import nn

from isvit_det.engine.float_metrics import FloatMetrics, sources_of

FOUND = dict(box_ap=.25, mask_ap=None, metrics=dict(mAP=.25, rate=1e-9))


@pytest.fixture
def metrics(tmp_path):
    annotations = tmp_path / 'annotations.json'
    annotations.write_text('{}')
    dataset = BaseDataset(str(annotations), lazy_init=True)
    metric = dict(type='CocoMetric', ann_file=str(annotations))
    runner = SimpleNamespace(
        cfg=Config(dict(model={}, test_dataloader={}, test_evaluator=metric)),
        logger=logging.getLogger('metrics'),
        test_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset)))
    return FloatMetrics(tmp_path, runner, sources_of(runner, nn.Linear(1, 1)))


def test_what_was_kept_is_taken_over(metrics, caplog):
    assert metrics.recall() is None
    metrics.keep(FOUND)
    assert metrics.recall() == FOUND
    metrics.key = 'other'
    assert metrics.recall() is None
    assert not caplog.messages


@pytest.mark.parametrize('change', [
    lambda text: '',
    lambda text: text[:-2],
    lambda text: text.replace('0.25', '0.75'),
    lambda text: text.replace('mAP', 'map'),
    lambda text: text.replace('null', '0'),
    lambda text: '[]',
    lambda text: '3',
    lambda text: '{}',
    lambda text: '[' * 100000,
    lambda text: json.dumps({
        **json.loads(text), 'checksum': None
    }),
    lambda text: json.dumps({
        **json.loads(text), 'found': [1]
    }),
    lambda text: b'\xff\xfe',
])
def test_what_was_changed_is_told_and_not_used(metrics, change, caplog):
    metrics.keep(FOUND)
    changed = change(metrics.path.read_text())
    if isinstance(changed, str):
        changed = changed.encode()
    metrics.path.write_bytes(changed)
    assert metrics.recall() is None
    line, = caplog.messages
    assert 'float_metrics.json is damaged' in line and '\n' not in line
    metrics.keep(FOUND)
    assert metrics.recall() == FOUND
