"""Dense heads are calibrated where they find objects."""
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from isvit_det.calibration.moments import ROWS_PER_CALL
from isvit_det.core.layers import QuantConv2d
from isvit_det.core.quantizers import UniformQuantizer
from isvit_det.core.settings import QuantConfig
from isvit_det.engine.locations import Locations


def rpn(**kwargs):
    """An RPN with objects where its first channel is above 1, quantized."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    anchors = dict(
        type='AnchorGenerator', scales=[4], ratios=[1.], strides=[4, 8])
    made = MODELS.build(
        dict(
            type='RPNHead',
            in_channels=4,
            feat_channels=4,
            anchor_generator=anchors,
            **kwargs)).eval()
    for module in list(made.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(module, name, QuantConv2d(child, QuantConfig()))
    with torch.no_grad():
        for conv in (made.rpn_conv, made.rpn_cls):
            conv.weight.zero_()
            conv.bias.zero_()
            middle = conv.kernel_size[0] // 2
            conv.weight[:, 0, middle, middle] = 10.
        made.rpn_cls.bias -= 100.
    return made


def maps(places):
    """Two levels, 30 x 40 and 15 x 20, the first one with objects."""
    levels = [torch.zeros(1, 4, 30, 40), torch.zeros(1, 4, 15, 20)]
    for place in places:
        levels[0][0, 0].view(-1)[place] = 1.5
    return levels


def test_most_locations_are_those_of_objects():
    model = rpn()
    places = [7, 333, 1100]
    with Locations(model) as found, torch.no_grad():
        found.start_image(5)
        model(maps(places))
    drawn = found.of_layer(model.rpn_conv, 5, (30, 40))
    assert len(drawn) == ROWS_PER_CALL and drawn.max() < 30 * 40
    share = sum((drawn == place).float().mean() for place in places)
    assert .7 < share < .9
    assert all((drawn == place).any() for place in places)
    # Without an object all are alike.
    others = found.of_layer(model.rpn_conv, 5, (15, 20))
    assert len(others.unique()) > 100
    assert found.of_layer(model.rpn_conv, 4, (30, 40)) is None
    assert found.of_layer(model.rpn_conv, 5, (30, 41)) is None
    stranger = QuantConv2d(nn.Conv2d(4, 4, 1), QuantConfig())
    assert found.of_layer(stranger, 5, (30, 40)) is None


def test_ranges_come_from_what_is_around_objects():
    model = rpn()
    quantizer = model.rpn_conv.input_quantizer
    everywhere = quantizer.new_observer()
    inputs = maps([41 * n for n in range(28)])
    # What no object is near to.
    inputs[0][:, 1:, :, 33:] = 50.
    for level in inputs:
        everywhere.update(level)
    with Locations(model) as found, torch.no_grad():
        found.start_image(0)
        model(inputs)
    there = found.observers[model.rpn_conv]
    assert far(there) < .4 * far(everywhere)
    found.fit_()
    expected = UniformQuantizer(4, 'act', quantizer.percentiles)
    expected.fit_(there)
    assert quantizer.is_fitted and quantizer.scale == expected.scale


def far(observer):
    """Share of the values that are 50."""
    values, counts = observer.samples()
    return ((values > 40) * counts).sum() / counts.sum()


def test_the_draw_of_an_image_is_the_same_each_time():
    model = rpn()
    drawn = []
    for before in ([], [3]):
        with Locations(model) as found, torch.no_grad():
            for image in before:
                found.start_image(image)
                model(maps([1]))
            found.start_image(8)
            model(maps([5, 9]))
        drawn.append(found.of_layer(model.rpn_cls, 8, (30, 40)))
    assert torch.equal(*drawn)


@pytest.mark.parametrize('kind', ['softmax', 'none'])
def test_heads_without_sigmoid_scores_are_left_alone(kind):
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    if kind == 'softmax':
        model = rpn(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False))
    with Locations(model) as found, torch.no_grad():
        found.start_image(0)
        model(maps([1])) if kind == 'softmax' else model(maps([1])[0])
    found.fit_()
    assert not found.layers
    for layer in model.modules():
        assert found.of_layer(layer, 0, (30, 40)) is None
