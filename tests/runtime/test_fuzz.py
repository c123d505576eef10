"""The fuzzer's first cases, and that it finds what is wrong."""
import random
import sys

import pytest
import torch

from benchmarks import fuzz
from benchmarks.fuzz_layers import Mismatch
from isvit_det.runtime import blocks, native


@pytest.mark.parametrize('seed', range(24))
def test_kernels_agree_on_random_shapes(seed):
    assert fuzz.run_case(seed) in ('product', 'linear', 'convolution',
                                   'Swin block', 'ViT block', 'patch merging',
                                   'refused')


@pytest.mark.parametrize('check', set(fuzz.CHECKS))
def test_a_wrong_correction_is_found(check, monkeypatch):
    seeds = (
        seed for seed in range(1000)
        if random.Random(seed).choice(fuzz.CHECKS) is check)
    right = native.product_structure

    def wrong(weights):
        weights.correction[0] += 1000
        return right(weights)

    monkeypatch.setattr(native, 'product_structure', wrong)
    monkeypatch.setattr(blocks, 'product_structure', wrong)
    with pytest.raises(Mismatch, match='expected'):
        for _ in range(3):
            fuzz.run_case(next(seeds))


def test_a_case_is_repeated_by_its_seed(monkeypatch):
    drawn = []

    def check(draw, isas):
        drawn.append((draw.random(), torch.rand(1)))

    monkeypatch.setattr(fuzz, 'CHECKS', (check, ))
    before = torch.get_rng_state()
    fuzz.run_case(5)
    fuzz.run_case(5)
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failing_seed_is_named(monkeypatch):

    def fail(draw, isas):
        raise Mismatch('product 1x1x1: 3 at (0, 0), expected 4')

    monkeypatch.setattr(fuzz, 'CHECKS', (fail, ))
    monkeypatch.setattr(sys, 'argv', ['fuzz', '--first', '7'])
    with pytest.raises(fuzz.QuantError, match='expected 4; .* --seed 7'):
        fuzz.main()


def test_what_was_compared_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['fuzz', '--seed', '3'])
    fuzz.main()
    out = capsys.readouterr().out
    assert 'seeds 3 to 3 on ' in out and 'PORTABLE: all equal (1 ' in out
