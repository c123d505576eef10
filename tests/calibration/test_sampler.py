"""What a reconstruction's minibatch holds."""
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from isvit_det.calibration.reconstruct import ItemSampler
from isvit_det.calibration.store import ActivationPool, ActivationStore
from isvit_det.core.settings import SOSConfig
from isvit_det.core.units import State, Unit

SIZES = [(4, 5), (10, 10), (2, 3), (10, 10), (6, 6)]


class Items(NamedTuple):
    tokens: Tensor


class TokenUnit(Unit):
    """Its tokens are (image, position)."""

    def num_items(self, size):
        return size[0] * size[1]

    def gather(self, state: State, items: Tensor) -> Items:
        return Items(state.x[0, items])

    def gather_target(self, state: State, size, items: Tensor) -> Tensor:
        return state.x[0, items]


def draws(tmp_path, unit_batch, unit_rows, images=None, **sos):
    """Twenty draws: (image, position) of each item."""
    pool = ActivationPool(tmp_path)
    store = ActivationStore(pool)
    for image, (height, width) in enumerate(SIZES):
        position = torch.arange(height * width)
        store.append(
            torch.stack([torch.full_like(position, image), position], 1)[None])
    unit = TokenUnit('unit', nn.Linear(1, 1), unit_batch, unit_rows)
    sampler = ItemSampler(
        unit,
        store,
        SIZES,
        store,
        SOSConfig(**sos),
        torch.Generator().manual_seed(0),
        images=images)
    found = []
    for _ in range(20):
        items, target, _ = sampler.draw()
        assert torch.equal(items.tokens, target)
        found.append(items.tokens)
    return found


def per_image(draw):
    """Items by image."""
    images = draw[:, 0].tolist()
    return {image: images.count(image) for image in images}


def test_items_come_from_all_images_in_proportion(tmp_path):
    found = draws(tmp_path, 50, 0)
    assert all(len(draw) == 50 for draw in found)
    counts = per_image(torch.cat(found))
    assert counts[1] > counts[4] > counts[2] > 0
    assert len(draws(tmp_path, 50, 0, batch=7)[0]) == 7


@pytest.mark.parametrize(
    'batch, sos, images, rows',
    [
        # Images have 52 items in the mean.
        (160, {}, 3, 8),
        (20, {}, 1, 8),
        (1, {}, 1, 1),
        (160, dict(items_per_image=5), 3, 5),
        (160, dict(batch=16), 2, 8),
        (160, dict(batch=4), 1, 4),
    ])
def test_some_items_of_a_few_images_where_they_share_work(
        tmp_path, batch, sos, images, rows):
    found = draws(tmp_path, batch, 8, **sos)
    seen = set()
    for draw in found:
        assert len(per_image(draw)) == images
        for image, count in per_image(draw).items():
            height, width = SIZES[image]
            assert count == min(rows, height * width)
            seen.add(image)
        assert len(draw.unique(dim=0)) == len(draw)
    assert seen == set(range(len(SIZES)))


@pytest.mark.parametrize('unit_rows', [0, 8])
@pytest.mark.parametrize('items', ['unit', 'image'])
def test_all_items_of_the_images_given_and_no_others(tmp_path, unit_rows,
                                                     items):
    found = torch.cat(
        draws(tmp_path, 400, unit_rows, images=[1, 4], items=items))
    for image in (1, 4):
        height, width = SIZES[image]
        seen = found[found[:, 0] == image, 1].unique()
        assert len(seen) > .5 * height * width
    assert found[:, 0].unique().tolist() == [1, 4]


@pytest.mark.parametrize('batch', [0, 1, 3, 9])
def test_whole_images(tmp_path, batch):
    for draw in draws(tmp_path, 50, 8, items='image', batch=batch):
        counts = per_image(draw)
        assert len(counts) == min(batch or 1, len(SIZES))
        for image, count in counts.items():
            assert count == SIZES[image][0] * SIZES[image][1]
