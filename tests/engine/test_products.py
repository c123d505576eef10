"""Products of activations are found where they run, and nothing else is."""
import mmcv._ext
import pytest
import torch
from mmcv.cnn import GeneralizedAttention, NonLocal2d
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.layers import ConditionalAttention, DynamicConv
from torch import nn
from torch.nn import functional as F

from isvit_det.core.layers import QuantMatMul
from isvit_det.core.settings import QuantConfig
from isvit_det.core.swap import quantized_version
from isvit_det.engine.products import watch_products


class Outer(nn.Module):
    """Holds a module, and multiplies nothing itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def found(inner, *args, method=None, **kwargs):
    """Names of what is found when a module runs inside of another."""
    model = Outer(inner).eval()
    with watch_products(model) as products:
        if method:
            getattr(model.inner, method)(*args, **kwargs)
        else:
            model(*args, **kwargs)
    return [n for n, m in model.named_modules() if m in products.multiplying]


class Calls(nn.Module):
    """Computes a function of its inputs and of its parameter."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(4, 4))
        self.register_buffer('index', torch.eye(4))

    def forward(self, *args):
        return self.function(self, *args)

    def predict(self, *args):
        return self.function(self, *args)


A, B = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
MAP, GRID = torch.randn(1, 4, 8, 8), torch.rand(1, 4, 4, 2)
# What is multiplied, by its name.
PRODUCTS = {
    'mm':
    lambda m, x: x[0] @ x[1],
    'bmm':
    lambda m, x: x @ x.transpose(1, 2),
    'addmm':
    lambda m, x: torch.addmm(m.table, x[0], x[1]),
    'baddbmm':
    lambda m, x: torch.baddbmm(x, x, x),
    'mv':
    lambda m, x: x[0] @ x[0, 0],
    'einsum':
    lambda m, x: torch.einsum('bij,bkj->bik', x, x),
    'convolution':
    lambda m, x: F.conv2d(x[None],
                          x.mean(0)[:, :2, None, None]),
    'conv1d':
    lambda m, x: F.conv1d(x, x[:, :, :1].expand(2, 4, 1)),
    'fused attention':
    lambda m, x: F.scaled_dot_product_attention(x, x, x),
    'sampled':
    lambda m, x: (F.grid_sample(MAP * x[0, 0, 0], GRID).flatten(2) * x[0].
                  reshape(1, 1, 16)).sum(-1),
    'sampled, stacked':
    lambda m, x: (torch.stack([F.grid_sample(MAP, GRID)] * 2, -2).flatten(-2) *
                  x.mean()[None]).sum(),
    'written into zeros':
    lambda m, x: _filled(x) @ x,
}
# What is not, or not by activations.
OTHERS = {
    'a parameter':
    lambda m, x: x @ m.table,
    'what comes of parameters':
    lambda m, x: x @ (m.table.flip(0) @ m.index).softmax(-1),
    'convolution by a parameter':
    lambda m, x: F.conv2d(MAP, m.table[..., None, None] * 2.),
    'parameters alone':
    lambda m, x: m.table @ m.index.T,
    'elementwise':
    lambda m, x: x * x.sigmoid(),
    'sampled and scaled':
    lambda m, x: F.grid_sample(MAP, GRID) * 3.,
    'sampled times a parameter':
    lambda m, x: F.grid_sample(MAP, GRID) * m.table
}


def _filled(x):
    out = x.new_zeros(x.shape)
    out[0] = x[0]
    return out


@pytest.mark.parametrize('name', PRODUCTS)
def test_a_product_is_found(name):
    assert found(Calls(PRODUCTS[name]), A.clone()) == ['inner']


@pytest.mark.parametrize('name', OTHERS)
def test_what_is_no_product_is_not(name):
    assert found(Calls(OTHERS[name]), A.clone()) == []


def test_a_product_outside_of_forward_belongs_to_its_module_too():
    assert found(Calls(PRODUCTS['mm']), A, method='predict') == ['inner']


def test_what_was_written_over_a_buffer_is_an_activation():

    def write(module, x):
        module.index.copy_(x[0])
        return x @ module.index

    assert found(Calls(write), A) == ['inner']


def test_quantized_layers_are_left_out():
    config = QuantConfig()
    layer = quantized_version(nn.Linear(4, 4), config)
    assert found(layer, A) == []
    assert found(QuantMatMul.of_query_key(config), A, B) == []


def test_what_mmcv_computes_unseen_by_torch_is_found(monkeypatch):
    """Its operator for GPUs, which stands in for the CPU's here."""

    def operator(value, *args, **kwargs):
        return value

    monkeypatch.setattr(mmcv._ext, 'ms_deform_attn_forward', operator)
    calls = Calls(lambda m, x: mmcv._ext.ms_deform_attn_forward(x, x))
    assert found(calls, A) == ['inner']
    assert mmcv._ext.ms_deform_attn_forward is operator


def deformable():
    shapes = torch.tensor([[4, 5], [2, 3]])
    return (MultiScaleDeformableAttention(8, 2, 2, 2),
            dict(
                query=torch.randn(26, 1, 8),
                value=torch.randn(26, 1, 8),
                reference_points=torch.rand(1, 26, 2, 2),
                spatial_shapes=shapes,
                level_start_index=torch.tensor([0, 20])))


MODULES = {
    'MultiScaleDeformableAttention':
    deformable,
    'ConditionalAttention':
    lambda: (ConditionalAttention(8, 2),
             dict(
                 query=torch.randn(1, 3, 8),
                 key=torch.randn(1, 3, 8),
                 query_pos=torch.randn(1, 3, 8))),
    'GeneralizedAttention':
    lambda: (GeneralizedAttention(16, num_heads=2),
             dict(x_input=torch.randn(1, 16, 6, 5))),
    'NonLocal2d':
    lambda: (NonLocal2d(8), dict(x=torch.randn(1, 8, 4, 4))),
    'DynamicConv':
    lambda: (DynamicConv(8, 4, 8, input_feat_shape=3),
             dict(
                 param_feature=torch.randn(3, 8),
                 input_feature=torch.randn(3, 8, 3, 3))),
    'MultiheadAttention':
    lambda: (nn.MultiheadAttention(8, 2),
             dict(
                 query=torch.randn(3, 1, 8),
                 key=torch.randn(3, 1, 8),
                 value=torch.randn(3, 1, 8))),
}


@pytest.mark.parametrize('name', MODULES)
def test_modules_of_mmdetection_that_multiply_are_found(name):
    torch.manual_seed(0)
    module, inputs = MODULES[name]()
    assert found(module, **inputs)[0] == 'inner'
