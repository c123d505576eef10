"""Classifiers whose blocks run natively."""
import copy

import pytest
import timm
import torch

from isvit_det.classifiers.models import build_classifiers
from isvit_det.core.layers import (fit_weights_, observe, quantizers,
                                   set_precision_)
from isvit_det.core.settings import QuantConfig
from isvit_det.runtime import parts
from isvit_det.runtime.engine import attach_runtime_, describe_engine

MODELS = [('vit_tiny_patch16_224', 'blocks.1'),
          ('deit_tiny_distilled_patch16_224', 'blocks.0'),
          ('swin_tiny_patch4_window7_224', 'stages.3.blocks.1')]


@pytest.fixture(scope='module', params=MODELS, ids=lambda model: model[0])
def calibrated(request):
    """A classifier with the ranges of one image, and a block's name."""
    name, block = request.param
    torch.manual_seed(0)
    weights = timm.create_model(name, num_classes=3).state_dict()
    _, model = build_classifiers(name, weights,
                                 QuantConfig.from_dict(dict(bits='w8a8')),
                                 False)
    fit_weights_(model)
    with torch.no_grad(), observe(model):
        model(torch.randn(1, 3, 224, 224))
    set_precision_(model, True, True)
    attach_runtime_(model, 'native')
    return model, block


@torch.no_grad()
def test_blocks_run_natively_and_every_site_counts(calibrated, monkeypatch):
    model, block = calibrated
    ran = []
    prepare = parts.NativeParts.prepare

    def watch(self, name, *args):
        native = prepare(self, name, *args)
        ran.append((name, native is not None))
        return native

    monkeypatch.setattr(parts.NativeParts, 'prepare', watch)
    before = {name: q.num_calls for name, q in quantizers(model).items()}
    x = torch.randn(2, 3, 224, 224)
    logits = model(x)
    assert ran and all(is_native for _, is_native in ran)
    for name, quantizer in quantizers(model).items():
        assert quantizer.num_calls == before[name] + 1, name
    number = len(ran)
    hooked = model.backbone.get_submodule(block)
    handle = hooked.register_forward_hook(lambda *args: None)
    assert torch.allclose(model(x), logits, atol=.2)
    handle.remove()
    assert sum(is_native for _, is_native in ran[number:]) == number - 1


@torch.no_grad()
def test_tokens_are_those_of_the_simulation(calibrated):
    model, _ = calibrated
    assert describe_engine(model)['engine'] == 'native'
    x = torch.randn(2, 3, 224, 224)
    exact = copy.deepcopy(model).double().backbone.tokens(x.double()).x
    tokens = {}
    for engine in ('simulation', 'native'):
        model.runtime.engine = engine
        tokens[engine] = model.backbone.tokens(x).x
    # Codes at a boundary fall on either side, in float32 too.
    allowed = (tokens['simulation'] - exact).norm()
    assert allowed <= .05 * exact.norm()
    assert (tokens['native'] - exact).norm() <= 2 * allowed
