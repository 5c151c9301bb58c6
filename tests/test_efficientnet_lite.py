"""EfficientNet-Lite is the published architecture, and its padding is TensorFlow's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from kenspeckle.config import EfficientNetLiteConfig, ResNetConfig
from kenspeckle.core import InvalidValueError
from kenspeckle.models import build
from kenspeckle.models.efficientnet_lite import (
    EfficientNetLite,
    InvertedResidual,
    SameConv2d,
    StageSpec,
)

# Of the TensorFlow checkpoints, with their 1,000 classes.
NUM_PARAMETERS = {0: 4_652_008, 1: 5_416_680, 2: 6_092_072}


def on_paper(variant, num_classes=1000):
    """Return a network of shapes without weights."""
    with torch.device("meta"):
        return EfficientNetLite(EfficientNetLiteConfig(variant), num_classes, (224, 224)).eval()


def drawn(module, seed=0):
    """Fill a module's parameters at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


@pytest.mark.parametrize("variant", NUM_PARAMETERS)
def test_has_the_published_number_of_parameters(variant):
    assert sum(p.numel() for p in on_paper(variant).parameters()) == NUM_PARAMETERS[variant]


def test_stages_are_the_published_ones():
    # (kernel, stride, blocks, channels out) of variant 2, whose stages are wider and deeper.
    blocks = [module for module in on_paper(2).modules() if isinstance(module, InvertedResidual)]
    shapes = []
    for block in blocks:
        filters = block.depthwise[0]
        assert isinstance(filters, SameConv2d)
        narrow = block.project[0]
        assert isinstance(narrow, SameConv2d)
        shapes.append((filters.kernel_size[0], filters.stride[0], narrow.out_channels))
    assert shapes == [
        (3, 1, 16),
        *[(3, 2, 24), (3, 1, 24), (3, 1, 24)],
        *[(5, 2, 48), (5, 1, 48), (5, 1, 48)],
        *[(3, 2, 88), (3, 1, 88), (3, 1, 88), (3, 1, 88)],
        *[(5, 1, 120), (5, 1, 120), (5, 1, 120), (5, 1, 120)],
        *[(5, 2, 208), (5, 1, 208), (5, 1, 208), (5, 1, 208), (5, 1, 208)],
        (3, 1, 352),
    ]


@pytest.mark.parametrize("size", [(224, 224), (97, 131), (33, 64), (32, 32), (1, 5)])
def test_the_map_is_a_32nd_of_the_picture_rounded_up(size):
    features = on_paper(0).features(torch.empty(2, 3, *size, device="meta"))
    assert features.shape == (2, 1280, math.ceil(size[0] / 32), math.ceil(size[1] / 32))


@pytest.mark.parametrize(
    ("variant", "channels", "num_tail"), [(0, 80, 9), (1, 80, 11), (2, 88, 11)]
)
def test_the_tail_is_the_last_three_stages(variant, channels, num_tail):
    network = on_paper(variant)
    middle = network.middle(torch.empty(2, 3, 97, 224, device="meta"))
    assert middle.shape == (2, channels, math.ceil(97 / 16), 14)
    assert network.tail(middle).shape == (2, 1280, math.ceil(97 / 32), 7)
    assert len(network.tail_modules()) == num_tail


def test_features_are_the_tail_of_the_middle():
    config = EfficientNetLiteConfig()
    network = build(config, 3, (64, 64), torch.Generator().manual_seed(0)).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        middle = network.middle(images)
        before = middle.clone()
        wanted = network.features(images)
        assert_array_equal(network.tail(middle), wanted)
        for module in network.tail_modules():
            drawn(module)
        assert_array_equal(network.middle(images), before)  # none of them is before the cut
        assert not torch.equal(network.tail(middle), wanted)


@pytest.mark.parametrize("variant", NUM_PARAMETERS)
def test_stages_are_disjoint_and_hold_every_parameter(variant):
    network = on_paper(variant)
    held = [id(p) for stage in network.stages() for p in stage.parameters()]
    assert held == [id(p) for p in network.parameters()]
    assert len(set(held)) == len(held)
    assert network.stages()[0] is network.stem
    assert network.stages()[-1] is network.last_layer() is network.classes
    assert [*network.stages()[-len(network.tail_modules()) - 1 : -1]] == network.tail_modules()


def test_other_networks_are_one_stage_without_a_tail():
    network = build(ResNetConfig((4,)), 3, (8, 8), torch.Generator())
    assert network.stages() == [network]
    assert network.last_layer() is network.get_submodule("classes")
    assert not network.has_tail
    image = torch.zeros(1, 3, 8, 8)
    for ask in (lambda: network.middle(image), lambda: network.tail(image), network.tail_modules):
        with pytest.raises(InvalidValueError, match="one that has a tail; got a ResNet"):
            ask()


def slow_same_convolution(x, weight, stride):
    """Return TensorFlow's: windows end at the same place on both sides, or one pixel later."""
    num_out, num_in, kernel, _ = weight.shape
    height, width = (math.ceil(side / stride) for side in x.shape[1:])
    top, left = (
        max(0, (num - 1) * stride + kernel - side) // 2
        for num, side in zip((height, width), x.shape[1:], strict=True)
    )
    y = np.zeros((num_out, height, width))
    for o, i, j, c, u, v in np.ndindex(*y.shape, num_in, kernel, kernel):
        row, column = i * stride + u - top, j * stride + v - left
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            y[o, i, j] += weight[o, c, u, v] * x[c, row, column]
    return y


@given(
    kernel_size=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_padding_is_tensorflows(kernel_size, stride, size):
    layer = drawn(SameConv2d(2, 3, kernel_size, stride))
    x = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(1))
    wanted = slow_same_convolution(x[0].double().numpy(), layer.weight.detach().numpy(), stride)
    assert_allclose(layer(x)[0].detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "channels", "adds"), [(1, 4, True), (2, 4, False), (1, 5, False)]
)
def test_a_block_adds_what_came_in_where_the_shape_is_the_same(stride, channels, adds):
    block = drawn(InvertedResidual(4, StageSpec(1, 3, stride, 6, channels), stride)).eval()
    norm = block.project[-1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(3)
    x = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    wanted = x + 3 if adds else torch.full((2, channels, 6 // stride, 6 // stride), 3.0)
    assert_array_equal(block(x).detach(), wanted)


def test_dropout_acts_on_the_embedding_in_training_only():
    network = on_paper(0)
    network.dropout.p = 0.5
    features = torch.ones(1, 1280, 2, 2)
    assert_array_equal(network.embed(features), torch.ones(1, 1280))
    found = network.train().embed(features)
    assert sorted(set(found.flatten().tolist())) == [0, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": 3}, "variant must be 0, 1 or 2; got 3"),
        ({"variant": -1}, "variant must be 0, 1 or 2; got -1"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1; got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InvalidValueError, match=message):
        EfficientNetLiteConfig(**settings)
