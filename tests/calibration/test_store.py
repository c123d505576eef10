"""The activation store: budget, spilling, freeing."""
import pytest
import torch

from isvit_det.calibration.store import ActivationPool, ActivationStore
from isvit_det.core.errors import QuantError


def test_tensors_beyond_the_budget_lie_on_the_disk_and_read_back(tmp_path):
    pool = ActivationPool(tmp_path / 'spilled', 1e-6 * 1.5)
    store = ActivationStore(pool)
    tensors = [torch.randn(1, 25, 10) for _ in range(4)]
    for tensor in tensors:
        store.append(tensor)
    assert pool.used == 1000
    assert len(list(tmp_path.glob('spilled/*'))) == 3
    assert all(torch.equal(store[i], t) for i, t in enumerate(tensors))
    store.drop(0)
    store.drop(1)
    assert pool.used == 0
    assert len(list(tmp_path.glob('spilled/*'))) == 2
    assert torch.equal(store[3], tensors[3])
    store.close()
    assert not list(tmp_path.glob('spilled/*'))


def test_dtype_and_layout_survive_the_disk(tmp_path):
    store = ActivationStore(ActivationPool(tmp_path, 0))
    tensor = torch.randn(6, 4, dtype=torch.float64).t()
    store.append(tensor)
    assert store[0].dtype == torch.float64
    assert torch.equal(store[0], tensor)


def test_stores_of_one_pool_share_the_budget(tmp_path):
    pool = ActivationPool(tmp_path, 1e-6)
    one, two = ActivationStore(pool), ActivationStore(pool)
    one.append(torch.zeros(200))
    two.append(torch.ones(200))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(two[0], torch.ones(200))


def test_default_budget_is_part_of_what_is_available(tmp_path):
    assert 1e6 < ActivationPool(tmp_path).budget < 1e14


@pytest.mark.parametrize('budget', [-1, float('inf'), float('nan'), 1e300])
def test_a_budget_that_is_none_is_refused(tmp_path, budget):
    with pytest.raises(QuantError) as error:
        ActivationPool(tmp_path, budget)
    assert f'store_gb: {budget!r}' in str(error.value)


def test_a_disk_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    store = ActivationStore(ActivationPool(tmp_path / 'file', 0))
    with pytest.raises(QuantError, match='store_gb'):
        store.append(torch.zeros(1))
