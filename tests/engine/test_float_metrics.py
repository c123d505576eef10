"""A kept float evaluation: taken over whole, or measured again."""
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from torch import nn

from isvit_det.engine.float_metrics import FloatMetrics, sources_of

MODEL = nn.Linear(1, 1)
FOUND = dict(box_ap=.25, mask_ap=None, metrics=dict(mAP=.25, rate=1e-9))


@pytest.fixture
def metrics(tmp_path):
    annotations = tmp_path / 'annotations.json'
    annotations.write_text(json.dumps(dict(metainfo={}, data_list=[{}])))
    dataset = BaseDataset(str(annotations), data_prefix={})
    metric = dict(type='CocoMetric', ann_file=str(annotations))
    return metrics_of(tmp_path, dataset, metric)


def metrics_of(tmp_path, dataset, metric):
    runner = SimpleNamespace(
        cfg=Config(dict(model={}, test_dataloader={}, test_evaluator=metric)),
        logger=logging.getLogger('metrics'),
        test_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset)))
    return FloatMetrics(tmp_path, runner, sources_of(runner, MODEL))


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


class Pictures(BaseDataset):
    """Two pictures, each with a mask beside it."""

    def load_data_list(self):
        folder = Path(self.data_root)
        return [
            dict(
                img_path=str(folder / f'{name}.png'),
                seg_map_path=str(folder / f'{name}_mask.png'),
                text='two words\0',
                instances=[dict(bbox=(folder / 'box.txt').read_text())])
            for name in ('a', 'b')
        ]


def touch(path, content):
    path.parent.mkdir(exist_ok=True, parents=True)
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize('name', [
    'b.png', 'b_mask.png', 'box.txt', 'panoptic/deep/1.png', 'more.txt',
    'hierarchy.json'
])  # yapf: disable
def test_all_that_is_read_is_of_the_key(tmp_path, name):
    """Whatever lies beside the annotation file."""
    names = ('a.png', 'b.png', 'a_mask.png', 'b_mask.png', 'box.txt',
             'panoptic/deep/1.png', 'more.txt', 'hierarchy.json', 'out/1')
    for one in names:
        touch(tmp_path / one, 'x')

    def key():
        dataset = Pictures(data_root=str(tmp_path), data_prefix={})
        dataset.hierarchy_file = str(tmp_path / 'hierarchy.json')
        metric = dict(
            type='Own',
            seg_prefix=str(tmp_path / 'panoptic'),
            parts=[dict(file=str(tmp_path / 'more.txt'))],
            outfile_prefix=str(tmp_path / 'out'))
        return metrics_of(tmp_path, dataset, metric).key

    first = key()
    touch(tmp_path / 'out/1', 'z')
    assert key() == first
    touch(tmp_path / name, 'y')
    assert key() != first
