"""The overflow proof against the codes that are worst for it."""
import pytest
import torch

from isvit_det.runtime.overflow import HIGH, LOW, MAX_GROUPS, split_runs


def draw(outputs, segments, inputs, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        -2**(bits - 1),
        2**(bits - 1), (outputs, segments, inputs),
        generator=generator)


def lane_sums(weight, runs, codes):
    """Every partial sum of every lane of all runs, for one row of codes."""
    products = weight * codes
    for run in runs:
        part = products[:, run.segment:run.segment + run.segments,
                        4 * run.first:4 * (run.first + run.groups)]
        pairs = part.reshape(len(weight), -1, 2, 2).sum(-1)
        yield pairs.cumsum(1)


def covered(runs, segments, groups):
    counts = torch.zeros(segments, groups, dtype=torch.int)
    for run in runs:
        counts[run.segment:run.segment + run.segments,
               run.first:run.first + run.groups] += 1
    return counts


@pytest.mark.parametrize('segments, inputs', [(1, 4), (1, 1500), (3, 192),
                                              (7, 28), (3, 1200)])
@pytest.mark.parametrize('bits, top', [(2, 3), (4, 15), (4, 255), (6, 63),
                                       (6, 255), (8, 15), (8, 127)])
def test_no_codes_leave_the_lanes(segments, inputs, bits, top):
    weight = draw(5, segments, inputs, bits)
    runs = split_runs(weight, top)
    assert (covered(runs, segments, inputs // 4) == 1).all()
    assert all(run.segments * run.groups <= MAX_GROUPS for run in runs)
    # Worst for output n: the largest code wherever its weights have one sign.
    for n in range(len(weight)):
        for worst in (weight[n] > 0, weight[n] < 0):
            for sums in lane_sums(weight, runs, top * worst):
                assert LOW <= sums.min() and sums.max() <= HIGH


def test_weights_of_one_sign_are_the_worst_case():
    weight = torch.full((1, 1, 4000), 7)
    runs = split_runs(weight, 15)
    # 15 * (7 + 7) for every pair: 156 of them fit 32767.
    assert runs[0].groups == HIGH // (15 * 14) == 156
    weight = torch.full((1, 1, 4000), -8)
    assert split_runs(weight, 15)[0].groups == -LOW // (15 * 16) == 136


def test_a_run_ends_only_where_it_must():
    weight = draw(3, 1, 4000, 6)
    top = 255
    runs = split_runs(weight, top)
    assert len(runs) > 1
    for run in runs[:-1]:
        longer = [run._replace(groups=run.groups + 1)]
        extremes = [
            sums for n in range(len(weight))
            for worst in (weight[n] > 0, weight[n] < 0)
            for sums in lane_sums(weight, longer, top * worst)
        ]
        assert any(s.max() > HIGH or s.min() < LOW for s in extremes)


def test_a_pair_of_products_may_be_too_much():
    # Two weights of one sign that meet in a pair.
    weight = torch.zeros(1, 1, 8, dtype=torch.long)
    weight[0, 0, 4:6] = 64
    assert split_runs(weight, 255) is not None
    weight[0, 0, 4:6] = 65
    assert split_runs(weight, 255) is None
    # The same weights in different pairs.
    weight[0, 0, 4:8] = torch.tensor([65, 0, 65, 0])
    assert split_runs(weight, 255) is not None
