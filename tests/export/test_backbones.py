"""Backbones in other engines, held against the simulation."""
import copy

import pytest
import torch

from isvit_det.export.backbones import write_backbone
from isvit_det.export.engines import load
from isvit_det.export.layers import Target
from isvit_det.export.proof import prove
from tests.export.written import ENGINES, FORMS, content, need_engines
from tests.runtime.blocks import TWO_STAGES, WINDOWED, draw_backbone, draw_vit

need_engines()
SIZE = (64, 100)


def check_outputs(model, loaded, size):
    """Hold the outputs for three images against the simulation in float64.

    Where rounding moves a code, all differs after it.
    """
    twin = copy.deepcopy(model).double()
    torch.manual_seed(1)
    errors = []
    for _ in range(3):
        x = torch.randn(1, 3, *size)
        found = loaded.run(dict(image=x.numpy()))
        with torch.no_grad():
            expected = twin(x.double())
        assert [one.shape for one in found
                ] == [tuple(other.shape) for other in expected]
        errors.append(
            max(
                float((torch.from_numpy(one) - other).norm() / other.norm())
                for one, other in zip(found, expected)))
    assert min(errors) < 1e-5 and max(errors) < .2, errors


@pytest.fixture(scope='module')
def swin():
    return draw_backbone(**TWO_STAGES)


@pytest.mark.parametrize('engine', ENGINES)
def test_a_swin_is_that_of_the_simulation(swin, engine):
    graph = write_backbone(swin, SIZE, Target(FORMS[engine]))
    file = content(graph)
    check_outputs(swin, load(engine, file, 1), SIZE)
    proof = prove(engine, file, graph.products)
    assert proof.in_float == []
    assert len(proof.integer) == 1 + 4 * 4 + 1


@pytest.mark.parametrize('engine', ENGINES)
def test_one_file_takes_images_of_any_size(swin, engine):
    graph = write_backbone(swin, None, Target(FORMS[engine]))
    loaded = load(engine, content(graph), 1)
    for size in (SIZE, (33, 61), (96, 64)):
        check_outputs(swin, loaded, size)


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize(
    'settings', [
        {},
        WINDOWED,
        dict(num_prefix_tokens=1, layer_scale=True),
    ],
    ids=str)
def test_a_vit_is_that_of_the_simulation(settings, engine):
    model = draw_vit(**settings)
    graph = write_backbone(model, (96, 112), Target(FORMS[engine]))
    file = content(graph)
    check_outputs(model, load(engine, file, 1), (96, 112))
    assert prove(engine, file, graph.products).in_float == []
