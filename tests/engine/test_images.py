"""Calibration images: the draw, wrappers, and what is refused."""
import json
import shutil

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from isvit_det.core.distributed import interleave
from isvit_det.core.errors import QuantError
from isvit_det.engine import images
from isvit_det.engine.images import calibration_images
from isvit_det.inputs.datasets import evaluation_paths, refuse_overlap, unwrap


@pytest.fixture
def cfg(tiny):
    init_default_scope('mmdet')
    return Config.fromfile(tiny.config)


def draw(cfg, num=6, seed=0, dataset=None):
    return calibration_images(cfg, dataset, num, seed)


def test_images_are_drawn_by_seed_without_replacement(cfg):
    assert draw(cfg, 4).ids() == draw(cfg, 4).ids()
    assert len(set(draw(cfg, 4).ids())) == 4
    drawn = {tuple(draw(cfg, 4, seed).ids()) for seed in range(8)}
    assert len(drawn) > 4
    assert sorted(draw(cfg, 6).ids()) == [1, 2, 3, 4, 5, 6]


def test_fewer_images_than_asked_for_are_all_used(cfg):
    images = draw(cfg, 1000)
    assert len(images) == 6 and images.asked == 1000


def test_they_come_from_the_train_split_through_the_test_pipeline(cfg, tiny):
    images = draw(cfg)
    assert {path.parent for path in images.paths()} == {tiny.data / 'train'}
    assert sorted(images.names())[0] == '000001.png'
    model = MODELS.build(cfg.model).eval()
    first, again = (list(images.tensors(model, False)) for _ in range(2))
    for batch, tensor, repeated in zip(images.batches(), first, again):
        assert not batch['data_samples'][0].get('flip', False)
        assert tensor.shape[0] == 1
        assert tensor.shape[2] % 32 == tensor.shape[3] % 32 == 0
        assert torch.equal(tensor, repeated)
        expected = model.data_preprocessor(batch, False)['inputs']
        assert torch.equal(tensor, expected)


def test_mirror_images_follow_and_are_padded_as_they_are(cfg):
    images = draw(cfg)
    model = MODELS.build(cfg.model).eval()
    found = list(images.tensors(model, True))
    assert len(found) == 2 * len(images) == 12
    for batch, image, mirrored in zip(images.batches(), found, found[6:]):
        height, width = batch['data_samples'][0].img_shape
        assert torch.equal(mirrored[..., :height, :width].flip(-1),
                           image[..., :height, :width])
        for padded in (image, mirrored):
            assert (padded[..., height:, :] == 0).all()
            assert (padded[..., width:] == 0).all()


def test_several_processes_see_the_same_mirror_images(cfg, monkeypatch):
    drawn = draw(cfg, 5)
    model = MODELS.build(cfg.model).eval()
    alone = list(drawn.tensors(model, True))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(
            images,
            'own_indices',
            lambda count, rank=rank: range(rank, count, 2))
        parts.append(list(drawn.tensors(model, True)))
    together = interleave(parts)
    assert len(together) == len(alone) == 10
    assert all(map(torch.equal, together, alone))


def test_wrappers_are_unwrapped_and_an_image_counts_once(cfg):
    base = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset',
        times=3,
        dataset=dict(
            type='ConcatDataset',
            datasets=[
                dict(
                    type='ClassBalancedDataset',
                    oversample_thr=.5,
                    dataset=base),
                dict(type='MultiImageMixDataset', dataset=base, pipeline=[]),
            ]))
    assert sorted(draw(cfg, 100).ids()) == [1, 2, 3, 4, 5, 6]


def test_a_set_given_by_the_hook_is_used_as_it_is(cfg):
    dataset = dict(cfg.test_dataloader.dataset, indices=2)
    images = draw(cfg, 9, dataset=dataset)
    assert len(images) == 2
    assert images.paths()[0].parent.name == 'val'


def test_built_wrappers_are_unwrapped(cfg):
    base = dict(cfg.test_dataloader.dataset)
    wrapped = DATASETS.build(
        dict(
            type='RepeatDataset',
            times=2,
            dataset=dict(type='ConcatDataset', datasets=[base, base])))
    assert len(unwrap(wrapped)) == 2
    assert len(evaluation_paths(wrapped)) == 8


def test_an_empty_set_is_refused(cfg, tiny, tmp_path):
    path = tiny.data / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    empty = tmp_path / 'empty.json'
    empty.write_text(json.dumps(dict(content, images=[], annotations=[])))
    cfg.train_dataloader.dataset.ann_file = str(empty)
    with pytest.raises(QuantError, match='calibration set: it is empty'):
        draw(cfg)


def test_missing_annotations_are_named(cfg):
    cfg.train_dataloader.dataset.ann_file = 'annotations/none.json'
    with pytest.raises(QuantError, match='none.json.* does not exist'):
        draw(cfg)


def test_a_config_without_training_split_is_refused(cfg):
    cfg.train_dataloader = None
    with pytest.raises(QuantError, match='train_dataloader'):
        draw(cfg)


def pictures(folder, *contents):
    folder.mkdir()
    paths = []
    for index, content in enumerate(contents):
        paths.append(folder / f'{index}.png')
        paths[-1].write_bytes(content)
    return paths


def test_different_images_of_one_size_are_allowed(tmp_path):
    train = pictures(tmp_path / 'train', b'one', b'four')
    val = pictures(tmp_path / 'val', b'two', b'five')
    assert len(set(refuse_overlap(train, val))) == 2


def test_the_same_path_is_refused_however_it_is_written(tmp_path):
    train = pictures(tmp_path / 'train', b'one')
    (tmp_path / 'link').symlink_to(tmp_path / 'train')
    for path in (tmp_path / 'link/0.png', tmp_path / 'train/../train/0.png'):
        with pytest.raises(QuantError, match='is the evaluation image'):
            refuse_overlap(train, [path])


def test_the_same_content_under_another_name_is_refused(tmp_path):
    train = pictures(tmp_path / 'train', b'one', b'two')
    copied = tmp_path / 'copied.png'
    shutil.copy(train[1], copied)
    with pytest.raises(QuantError, match='1.png is the evaluation image'):
        refuse_overlap(train, [*pictures(tmp_path / 'val', b'six'), copied])


def test_a_missing_image_is_named(tmp_path):
    train = pictures(tmp_path / 'train', b'one')
    for pair in ((train, [tmp_path / 'x.png']), ([tmp_path / 'x.png'], train)):
        with pytest.raises(QuantError, match='x.png cannot be read'):
            refuse_overlap(*pair)
