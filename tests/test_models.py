"""One suite for every network, and the layers they use against slow definitions."""

import dataclasses
import typing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from kenspeckle.config import (
    MODEL_CONFIGS,
    CnnConfig,
    EfficientNetLiteConfig,
    ModelConfig,
    ResNetConfig,
    SpeedConfig,
)
from kenspeckle.core import InvalidValueError
from kenspeckle.layers import reseed, whiten_
from kenspeckle.models import MODELS, build, cnn
from kenspeckle.models.cnn import map_size
from kenspeckle.models.speed import SMALLEST

CONFIGS: dict[str, ModelConfig] = {
    "cnn": CnnConfig(channels=(6, 8), hidden=(10,)),
    "cnn-average": CnnConfig(channels=(6, 8), hidden=(10, 9), pooling="average", dropout=0.3),
    "cnn-norm": CnnConfig(channels=(6,), hidden=(), batch_norm=True, kernel_size=5, stride=2),
    "cnn-no-pooling": CnnConfig(channels=(6,), hidden=(5,), pooling="none", padding=0),
    "resnet": ResNetConfig(channels=(6, 8), num_blocks=2, dropout=0.2),
    "resnet-one-stage": ResNetConfig(channels=(6,), num_blocks=1),
    "speed": SpeedConfig(channels=(6, 8, 10)),
    "efficientnet-lite": EfficientNetLiteConfig(),
}
NUM_CLASSES = 3
SIZES = [(16, 16), (17, 23), (31, 16)]

every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(config, size=(16, 16), seed=0):
    return build(config, NUM_CLASSES, size, seeded(seed))


def pictures(num_images, size=(16, 16)):
    return torch.randn(num_images, 3, *size, generator=seeded(9))


def test_every_family_is_here_and_is_tested():
    here = {config.family for config in CONFIGS.values()}
    assert set(MODELS) == set(MODEL_CONFIGS) == here | {"timm"}  # which tests/test_zoo.py tests


@every_model
@every_size
def test_shapes(config, size):
    model = made(config, size).eval()
    images = pictures(2, size)
    features = model.features(images)
    assert features.ndim == 4
    embedding = model.embed(features)
    assert embedding.shape == (2, model.get_submodule("classes").in_features)
    assert model(images).shape == (2, NUM_CLASSES)
    assert_array_equal(model(images).detach(), model.classify(embedding).detach())


@every_model
def test_gradient_reaches_every_trainable_parameter(config):
    model = made(config)
    model(pictures(8)).square().sum().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None or not p.grad.any()] == []


@every_model
def test_weights_follow_the_generator(config):
    one, same, other = made(config), made(config), made(config, seed=1)
    for name, tensor in one.state_dict().items():
        assert_array_equal(tensor, same.state_dict()[name])
    assert any(not torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


@every_model
def test_building_and_training_leave_the_global_generator_alone(config):
    before = torch.get_rng_state()
    made(config).train()(pictures(4)).sum().backward()
    assert_array_equal(torch.get_rng_state(), before)


@every_model
def test_training_mode_is_reproducible_after_reseeding(config):
    model, images = made(config).train(), pictures(4)
    reseed(model, 3, 5)
    first = model(images).detach()
    reseed(model, 3, 5)
    assert_array_equal(model(images).detach(), first)


@every_model
@every_size
def test_answers_do_not_depend_on_the_batch(config, size):
    model, images = made(config, size).eval(), pictures(5, size)
    with torch.no_grad():
        together = model(images)
        apart = torch.cat([model(images[:2]), model(images[2:3]), model(images[3:])])
    assert_allclose(apart, together, rtol=1e-4, atol=1e-5)


@every_model
def test_state_survives_a_round_trip(config):
    model, twin = made(config), made(config, seed=1)
    whiten_(model, pictures(4))
    model.train()(pictures(8))  # moves running statistics
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_array_equal(twin.eval()(pictures(3)), model.eval()(pictures(3)))


@every_model
def test_filters_lie_channels_last(config):
    filters = [p for p in made(config).parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)


@every_model
def test_linear_on_average_tells_the_truth(config):
    model = made(config, (24, 24)).eval()  # leaves more than one pixel, whose average is trivial
    with torch.no_grad():
        features = model.features(pictures(4, (24, 24)))
        average = features.mean((2, 3))
        embedding = model.embed(features)
        is_average = embedding.shape == average.shape and torch.allclose(embedding, average)
        assert model.linear_on_average == is_average
        double = model.classify(2 * embedding) - model.classify(embedding)
        single = model.classify(embedding) - model.classify(torch.zeros_like(embedding))
        assert_allclose(double, single, rtol=1e-3, atol=1e-5)


@every_model
def test_learns_four_pictures_by_heart(config):
    model, images, labels = made(config).train(), pictures(4), torch.tensor([0, 1, 2, 0])
    whiten_(model, images)
    descent = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        descent.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6  # chance is 1.1


def test_a_network_has_a_class():
    with pytest.raises(InvalidValueError, match="num_classes must be at least 1; got 0"):
        build(CnnConfig(), 0, (32, 32), seeded())


class TestReferenceNetwork:
    def test_is_the_textbooks_at_32(self):
        model = build(CnnConfig(), 10, (32, 32), seeded())
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
            "convolutions.0.0.weight": (32, 3, 3, 3),
            "convolutions.0.0.bias": (32,),
            "convolutions.1.0.weight": (64, 32, 3, 3),
            "convolutions.1.0.bias": (64,),
            "hidden.0.0.weight": (128, 64 * 8 * 8),
            "hidden.0.0.bias": (128,),
            "classes.weight": (10, 128),
            "classes.bias": (10,),
        }

    def test_is_the_textbooks_function(self):
        model = build(CnnConfig(), 10, (16, 20), seeded()).eval()
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        x = images = pictures(2, (16, 20))
        f = nn.functional
        for number in (0, 1):
            layer = f"convolutions.{number}.0"
            x = f.relu(f.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=1))
            x = f.max_pool2d(x, 2)
        x = f.relu(f.linear(x.flatten(1), weights["hidden.0.0.weight"], weights["hidden.0.0.bias"]))
        x = f.linear(x, weights["classes.weight"], weights["classes.bias"])
        assert_allclose(model(images).detach(), x, rtol=1e-4, atol=1e-5)

    def test_every_setting_has_an_effect(self):
        base = CnnConfig(channels=(4, 6), hidden=(8,))
        others = {
            "channels": (4, 7),
            "kernel_size": 5,
            "stride": 2,
            "padding": 0,
            "pooling": "average",
            "pool_size": 3,
            "hidden": (9,),
            "dropout": 0.5,
            "batch_norm": True,
        }
        assert set(others) == {field.name for field in dataclasses.fields(base)}
        images = pictures(4, (24, 24))
        plain = build(base, 3, (24, 24), seeded())(images)
        for name, value in others.items():
            changed = dataclasses.replace(base, **typing.cast("typing.Any", {name: value}))
            assert not torch.equal(build(changed, 3, (24, 24), seeded())(images), plain), name


def slow_convolution(x, weight, bias, stride, padding):
    """y[o, i, j] = b[o] + sum over c, u, v of w[o, c, u, v] x[c, i s + u - p, j s + v - p]."""
    num_out, num_in, kernel, _ = weight.shape
    _, height, width = x.shape
    rows = (height + 2 * padding - kernel) // stride + 1
    columns = (width + 2 * padding - kernel) // stride + 1
    y = np.zeros((num_out, rows, columns))
    for o, i, j in np.ndindex(y.shape):
        y[o, i, j] = bias[o]
        for c, u, v in np.ndindex(num_in, kernel, kernel):
            row, column = i * stride + u - padding, j * stride + v - padding
            if 0 <= row < height and 0 <= column < width:
                y[o, i, j] += weight[o, c, u, v] * x[c, row, column]
    return y


def slow_pooling(x, size, reduce):
    """Of each window of `size` by `size` pixels, side by side, one number."""
    channels, height, width = x.shape
    y = np.zeros((channels, height // size, width // size))
    for c, i, j in np.ndindex(y.shape):
        window = [x[c, i * size + u, j * size + v] for u in range(size) for v in range(size)]
        y[c, i, j] = reduce(window)
    return y


def slow_linear(x, weight, bias):
    """y[o] = b[o] + sum over i of w[o, i] x[i]."""
    return [
        b + sum(w * v for w, v in zip(row, x, strict=True))
        for row, b in zip(weight, bias, strict=True)
    ]


def arrays(module):
    return [p.detach().double().numpy() for p in module.parameters()]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the layout is oneDNN's")
@pytest.mark.parametrize("pooling", ["max", "average", "none"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (17, 23)])
def test_the_layout_of_training_changes_no_gradient(pooling, batch_norm, size, monkeypatch):
    config = CnnConfig((4, 6), pooling=pooling, batch_norm=batch_norm, hidden=(5,))
    images, gradients = pictures(4, size), []
    for has_onednn in (True, False):
        monkeypatch.setattr(cnn, "_has_onednn", lambda _, answer=has_onednn: answer)
        model = build(config, 3, size, seeded()).train()
        model(images).square().sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(found) == len(list(model.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
    scale = float(gradients[1].abs().max())
    assert_allclose(gradients[0] / scale, gradients[1] / scale, atol=1e-5)


# What follows a convolution; a window's side is a setting only where there is a window.
POOLINGS = st.sampled_from(
    [(kind, side) for kind in ("max", "average") for side in (1, 2, 3)] + [("none", 2)]
)
MEANS = {"max": max, "average": lambda window: sum(window) / len(window)}


@settings(max_examples=40, deadline=None)
@given(
    kernel_size=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    pooling=POOLINGS,
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
)
def test_layers_equal_their_definitions(kernel_size, stride, padding, pooling, size):
    kind, pool_size = pooling
    config = CnnConfig((2,), kernel_size, stride, padding, kind, pool_size, hidden=(3,))
    try:
        height, width = map_size(config, size)
    except InvalidValueError:
        return  # nothing is left of the map; see TestImpossibleSizes
    model, images = made(config, size).eval(), pictures(1, size)

    x = images[0].double().numpy()
    weight, bias = arrays(model.get_submodule("convolutions.0.0"))
    x = slow_convolution(x, weight, bias, stride, padding)
    x = np.maximum(x, 0)
    if kind != "none":
        x = slow_pooling(x, pool_size, MEANS[kind])
    assert x.shape == (2, height, width)
    assert_allclose(model.features(images)[0].detach(), x, rtol=1e-4, atol=1e-5)

    hidden = np.maximum(slow_linear(x.reshape(-1), *arrays(model.get_submodule("hidden.0.0"))), 0)
    assert_allclose(model.embed(model.features(images))[0].detach(), hidden, rtol=1e-4, atol=1e-5)
    logits = slow_linear(hidden, *arrays(model.get_submodule("classes")))
    assert_allclose(model(images)[0].detach(), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_maximum_before_rectifier_is_rectifier_before_maximum(batch_norm):
    config = CnnConfig(channels=(7,), batch_norm=batch_norm)
    model, images = made(config).train(), pictures(5)
    stage = typing.cast("nn.Sequential", model.get_submodule("convolutions.0"))
    *first, pooling, rectifier = stage
    if batch_norm:  # also where the norm turns the order of values round
        nn.init.normal_(next(first[-1].parameters()), generator=seeded(1))
    x = nn.Sequential(*first)(images)
    assert isinstance(pooling, nn.MaxPool2d)
    wanted = pooling(nn.functional.relu(x))
    assert_array_equal(stage(images).detach(), wanted.detach())
    assert_array_equal(rectifier(pooling(x)).detach(), wanted.detach())


class TestImpossibleSizes:
    @pytest.mark.parametrize(
        ("config", "size", "message"),
        [
            (
                CnnConfig(padding=0, pooling="none", channels=(4, 4, 4)),
                (20, 4),
                "convolution 2 of 3 .* a map of 18 x 2 pixels for kernel_size 3 and padding 0; ",
            ),
            (
                CnnConfig(channels=(4, 4, 4)),
                (32, 7),
                "pooling after convolution 3 of 3 .* got a map of 8 x 1 pixels for pool_size 2; ",
            ),
            (
                SpeedConfig(),
                (8, 32),
                r"pictures for the model 'speed' must have at least 9 x 9 pixels.* got 8 x 32",
            ),
        ],
    )
    def test_are_refused_by_layer_size_and_setting(self, config, size, message):
        with pytest.raises(InvalidValueError, match=message):
            made(config, size)

    def test_are_refused_before_weights_are_made(self):
        # The fully connected layer alone would take a petabyte.
        config = CnnConfig(channels=(4, 10**9), kernel_size=40, padding=0, hidden=(10**6,))
        with pytest.raises(InvalidValueError, match="convolution 1 of 2"):
            made(config, (32, 32))

    @given(
        config=st.builds(
            lambda kernel_size, stride, padding, pooling: CnnConfig(
                (2, 2), kernel_size, stride, padding, pooling[0], pooling[1], ()
            ),
            kernel_size=st.integers(1, 6),
            stride=st.integers(1, 3),
            padding=st.integers(0, 3),
            pooling=POOLINGS,
        ),
        size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    )
    @settings(deadline=None)
    def test_the_size_that_is_foretold_is_the_one_that_comes(self, config, size):
        # Pooling pads nothing, so a window that fits nowhere fails in torch too.
        stages: list[nn.Module] = []
        for in_channels in (3, 2):
            layer = nn.Conv2d(
                in_channels, 2, config.kernel_size, config.stride, config.padding, device="meta"
            )
            stages.append(layer)
            if config.pooling != "none":
                stages.append(nn.MaxPool2d(config.pool_size))
        network = nn.Sequential(*stages)
        images = torch.empty(1, 3, *size, device="meta")
        try:
            foretold = map_size(config, size)
        except InvalidValueError:
            with pytest.raises(RuntimeError):
                network(images)
        else:
            assert network(images).shape[2:] == foretold

    def test_the_smallest_picture_works(self):
        model = made(SpeedConfig(channels=(4, 4, 4)), (SMALLEST, SMALLEST)).eval()
        assert model(pictures(2, (SMALLEST, SMALLEST))).shape == (2, NUM_CLASSES)


class TestSpeedNet:
    def test_logits_are_scaled(self):
        plain, scaled = (
            made(SpeedConfig((4, 4, 4), logit_scale=scale)).eval() for scale in (1.0, 0.25)
        )
        images = pictures(2)
        assert_allclose(scaled(images).detach(), plain(images).detach() / 4, rtol=1e-5)

    def test_whitening_and_scales_of_norms_are_frozen(self):
        model = made(CONFIGS["speed"])
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert len(norms) == 6
        assert trained.isdisjoint({f"{name}.weight" for name in norms} | {"whitening.weight"})
        assert trained > {f"{name}.bias" for name in norms} | {"whitening.bias"}

    def test_embedding_is_the_maximum_of_each_channel(self):
        model = made(CONFIGS["speed"], (40, 24)).eval()
        features = model.features(pictures(2, (40, 24)))
        assert_array_equal(model.embed(features).detach(), features.amax((2, 3)).detach())


class TestResNet:
    def test_every_stage_but_the_first_halves_the_map(self):
        config = ResNetConfig(channels=(4, 5, 6), num_blocks=2)
        features = made(config, (32, 20)).features(pictures(2, (32, 20)))
        assert features.shape == (2, 6, 8, 5)
        assert len(made(config).get_submodule("blocks")) == 6

    def test_a_block_whose_change_is_zero_passes_its_input(self):
        block = made(ResNetConfig(channels=(4,), num_blocks=1)).get_submodule("blocks.0").eval()
        nn.init.zeros_(block.get_submodule("change.3").weight)
        x = torch.rand(2, 4, 5, 5, generator=seeded())
        assert_array_equal(block(x).detach(), x)

    def test_pictures_of_one_pixel_work(self):
        assert made(ResNetConfig(channels=(4, 4)), (1, 1)).eval()(pictures(2, (1, 1))).shape == (
            2,
            3,
        )
