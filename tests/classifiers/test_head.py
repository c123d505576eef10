"""Quantized versions of timm's classifiers."""
import pytest
import timm
import torch

from isvit_det.classifiers.head import is_same_function
from isvit_det.classifiers.swin import quantize_swin
from isvit_det.classifiers.vit import quantize_vit
from isvit_det.core.layers import list_sites, observe
from isvit_det.core.settings import QuantConfig
from isvit_det.core.units import State
from tests.backbones.laws import check_calibrates, check_stage_two

SMALL_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
FORMS = [
    ('deit_tiny_patch16_224', SMALL_VIT),
    ('deit_tiny_distilled_patch16_224', SMALL_VIT),
    ('deit3_small_patch16_224', SMALL_VIT),
    ('vit_tiny_patch16_224', dict(SMALL_VIT, qkv_bias=False)),
    ('vit_medium_patch16_gap_256', SMALL_VIT),
    # Its last stage is one window, which timm does not shift.
    ('swin_tiny_patch4_window7_224',
     dict(
         img_size=64,
         patch_size=2,
         window_size=4,
         embed_dim=16,
         depths=(2, 2, 2, 2),
         num_heads=(1, 2, 2, 2))),
]


def build_pair(name, settings, **quant):
    """A small timm classifier with lively weights, float and quantized."""
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=7, **settings).eval()
    for param in source.parameters():
        param.data += torch.randn_like(param) * .1
    build = quantize_swin if name.startswith('swin') else quantize_vit
    return source, build(source, QuantConfig.from_dict(quant)).eval()


@pytest.mark.parametrize('name, settings', FORMS)
def test_the_quantized_classifier_computes_what_timm_computes(name, settings):
    source, model = build_pair(name, settings)
    size = (settings['img_size'], ) * 2
    assert is_same_function(source, model, size)
    x = torch.randn(3, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-4)
    source.patch_embed.proj.weight.data *= 1.1
    assert not is_same_function(source, model, size)


@pytest.mark.parametrize('name, settings', FORMS)
def test_items_of_the_head_run_alone(name, settings):
    _, model = build_pair(name, settings)
    x = torch.randn(2, 3, *(settings['img_size'], ) * 2)
    *_, unit = model.units()
    inputs, targets = [], []
    with torch.no_grad():
        for image in x.split(1):
            state = State(image, tuple(image.shape[-2:]))
            for before in model.units()[:-1]:
                state = before.forward(state)
            items = torch.zeros(1, dtype=torch.long)
            inputs.append(unit.gather(state, items))
            out = unit.forward(state)
            targets.append(unit.gather_target(out, state.size, items))
        found = unit.run(unit.collate(inputs))
        torch.testing.assert_close(found, torch.cat(targets))
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, settings', FORMS)
def test_stage_two_moves_no_code_head_included(name, settings):
    _, model = build_pair(name, settings)
    heads = [unit.pairs() for unit in model.units()][-1]
    assert len(heads) == (0 if 'distilled' in name else 1)
    x = torch.randn(1, 3, *(settings['img_size'], ) * 2, dtype=torch.double)
    check_stage_two(model.double(), x, 'backbone.')


@pytest.mark.parametrize('name, settings', FORMS)
def test_every_layer_is_quantized_and_runs(name, settings):
    _, model = build_pair(name, settings, bits='w3a5')
    sites = list_sites(model)
    layers = [
        n for n, m in model.named_modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    assert len([s for s in sites if s.role == 'weight']) == len(layers)
    assert any('head.linears' in s.name for s in sites)
    with observe(model):
        model(torch.randn(1, 3, *(settings['img_size'], ) * 2))
    model.load_state_dict(model.state_dict())
    assert all(s.bits == (3 if s.role == 'weight' else 5) for s in sites
               if 'patch_embed' not in s.name)


@pytest.mark.parametrize('name, settings', FORMS)
def test_it_calibrates(tmp_path, name, settings):
    source, model = build_pair(name, settings, bits='w8a8')
    size = (settings['img_size'], ) * 2
    images = [torch.randn(1, 3, *size) for _ in range(5)]
    check_calibrates(source, model, images, tmp_path, limit=.1, iters=3)
