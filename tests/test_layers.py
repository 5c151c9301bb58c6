import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn import functional as F

from kenspeckle.core import InvalidValueError
from kenspeckle.layers import (
    DiracConv2d,
    Dropout,
    Whitening,
    initialise,
    normalise,
    reseed,
    whiten_,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photographs(num_images=40, side=12, seed=0):
    """Inputs whose neighbouring pixels resemble each other, as in photographs."""
    noise = torch.randn(num_images, 3, side + 4, side + 4, generator=seeded(seed))
    return F.avg_pool2d(noise, 5, stride=1) * torch.tensor([3.0, 2.0, 1.0])[:, None, None]


@given(
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    deviation=st.tuples(*[st.floats(0.01, 1)] * 3),
    size=st.tuples(*[st.integers(1, 5)] * 3),
)
def test_normalise_is_the_formula(mean, deviation, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    inputs = normalise(torch.from_numpy(pixels), mean, deviation)
    wanted = ((pixels / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    assert inputs.dtype == torch.float32
    assert_allclose(inputs.numpy(), wanted, rtol=1e-5, atol=1e-4)


def test_normalise_keeps_the_channels_last_in_memory():
    inputs = normalise(torch.zeros(2, 4, 6, 3, dtype=torch.uint8), (0.5,) * 3, (0.5,) * 3)
    assert inputs.stride() == (4 * 6 * 3, 1, 6 * 3, 3)


def test_normalise_takes_pictures_that_are_not_contiguous():
    pixels = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).view(2, 4, 6, 3)
    wanted = normalise(pixels.flip(2).contiguous(), (0.5,) * 3, (0.5,) * 3)
    found = normalise(pixels.transpose(1, 2).flip(1).transpose(1, 2), (0.5,) * 3, (0.5,) * 3)
    assert_array_equal(found.numpy(), wanted.numpy())


class TestDropout:
    def test_drops_the_stated_share_and_scales_the_others(self):
        dropped = Dropout(0.3)(torch.ones(100, 200))
        assert_allclose(dropped.unique(), [0, 1 / 0.7], rtol=1e-6)
        assert abs((dropped == 0).float().mean() - 0.3) < 0.02

    def test_does_nothing_in_evaluation(self):
        x = torch.rand(3, 4, generator=seeded())
        assert_array_equal(Dropout(0.9).eval()(x), x)

    def test_the_gradient_passes_where_the_value_does(self):
        x = torch.ones(50, 50, requires_grad=True)
        dropped = Dropout(0.5)(x)
        dropped.sum().backward()
        assert x.grad is not None
        assert_array_equal(x.grad, dropped.detach())

    def test_masks_change_from_call_to_call_and_return_with_the_seed(self):
        layer, x = Dropout(0.5), torch.ones(8, 8)
        layer.reseed(5)
        first, second = layer(x), layer(x)
        layer.reseed(5)
        assert not torch.equal(first, second)
        assert_array_equal(layer(x), first)
        assert_array_equal(layer(x), second)

    def test_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        Dropout(0.5)(torch.ones(8))
        assert_array_equal(torch.get_rng_state(), before)

    def test_a_used_layer_can_be_copied(self):
        layer, x = Dropout(0.5), torch.ones(8, 8)
        layer(x)
        assert_array_equal(copy.deepcopy(layer)(x), layer(x))


def test_reseed_depends_on_seed_epoch_and_place():
    def masks(seed, epoch):
        model = nn.ModuleList([Dropout(0.5), nn.Sequential(Dropout(0.5))])
        reseed(model, seed, epoch)
        return tuple(str(layer(torch.ones(64)).tolist()) for layer in model)

    assert masks(1, 2) == masks(1, 2)
    every = [mask for pair in [(0, 0), (0, 1), (1, 0), (1, 1)] for mask in masks(*pair)]
    assert len(set(every)) == len(every)


class TestInitialise:
    @pytest.mark.parametrize(
        ("layer", "fan_in"), [(nn.Conv2d(8, 50, 3), 72), (nn.Linear(300, 20), 300)]
    )
    def test_weights_and_biases_are_uniform_within_the_fan_in(self, layer, fan_in):
        initialise(layer, seeded())
        bound = fan_in**-0.5
        weights = layer.weight.detach().flatten().numpy()
        assert abs(weights).max() <= bound
        counts = np.histogram(weights, bins=10, range=(-bound, bound))[0]
        assert_allclose(counts / counts.sum(), 0.1, atol=0.02)
        assert 0.5 * bound < layer.bias.detach().abs().max() <= bound

    def test_is_torchs_own_distribution(self):
        # Torch draws from its global generator only; borrow it, in a known state, and give it back.
        state = torch.get_rng_state()
        torch.set_rng_state(seeded().get_state())
        theirs = nn.Conv2d(16, 64, 3)
        ours = nn.Conv2d(16, 64, 3)
        initialise(ours, seeded())
        torch.set_rng_state(state)
        for name in ("weight", "bias"):
            a, b = getattr(ours, name).detach(), getattr(theirs, name).detach()
            assert_allclose(a.abs().max(), b.abs().max(), rtol=0.1)
            assert_allclose(a.std(), b.std(), rtol=0.2)

    def test_batch_norm_starts_as_the_identity(self):
        norm = nn.BatchNorm2d(4)
        for tensor in norm.state_dict().values():
            tensor.fill_(7)
        initialise(norm, seeded())
        assert {name: t.tolist() for name, t in norm.state_dict().items()} == {
            "weight": [1.0] * 4,
            "bias": [0.0] * 4,
            "running_mean": [0.0] * 4,
            "running_var": [1.0] * 4,
            "num_batches_tracked": 0,
        }

    def test_follows_the_generator_and_no_other(self):
        def weights(seed):
            model = nn.Sequential(nn.Conv2d(3, 4, 3), DiracConv2d(4, 8), Whitening())
            initialise(model, seeded(seed))
            return torch.cat([t.detach().flatten() for t in model.state_dict().values()])

        before = torch.get_rng_state()
        state_free = weights(3)
        torch.set_rng_state(before)
        assert_array_equal(weights(3), state_free)
        assert not torch.equal(weights(4), state_free)

    def test_names_a_layer_that_nothing_sets(self):
        model = nn.Sequential(nn.ReLU(), nn.PReLU())
        with pytest.raises(InvalidValueError, match=r"the layer '1' .* got a PReLU; give it"):
            initialise(model, seeded())


@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 4), (4, 9), (6, 3)])
def test_dirac_convolution_passes_its_input_through(in_channels, out_channels):
    layer = DiracConv2d(in_channels, out_channels)
    initialise(layer, seeded())
    x = torch.randn(2, in_channels, 5, 6, generator=seeded(1))
    y = layer(x)
    shared = min(in_channels, out_channels)
    assert_allclose(y[:, :shared].detach(), x[:, :shared], atol=1e-6)
    assert (y[:, shared:] != 0).all()


class TestWhitening:
    def whitened(self, images):
        layer = Whitening()
        initialise(layer, seeded())
        whiten_(nn.Sequential(nn.ReLU(), layer), images)
        return layer

    def test_responses_are_uncorrelated_with_unit_power(self):
        images = 100 * photographs()  # so that eps is nothing beside them
        responses = self.whitened(images)(images)[:, :12].detach()
        flat = responses.transpose(0, 1).flatten(1)
        assert_allclose(flat @ flat.T / flat.shape[1], np.eye(12), atol=2e-3)

    def test_filters_come_with_both_signs(self):
        weight = self.whitened(photographs()).weight
        assert weight.shape == (24, 3, 2, 2)
        assert_array_equal(weight[:12], -weight[12:])
        first = weight[:12].flatten(1)
        assert (first.gather(1, first.abs().argmax(1, keepdim=True)) > 0).all()  # not LAPACK's whim

    def test_equals_the_closed_form_over_a_loop_of_patches(self):
        images = photographs(3, 4)
        patches = [
            image[:, top : top + 2, left : left + 2].flatten().double()
            for image in images
            for top in range(3)
            for left in range(3)
        ]
        power = torch.stack([torch.outer(patch, patch) for patch in patches]).mean(0)
        values, vectors = np.linalg.eigh(power.numpy())
        weight = self.whitened(images).weight[:12].flatten(1).double().numpy()
        wanted = (vectors / np.sqrt(values + Whitening.eps)).T
        signs = np.sign((weight * wanted).sum(1, keepdims=True))
        assert_allclose(weight, signs * wanted, rtol=1e-3, atol=1e-3)

    def test_batches_of_pictures_add_up(self):
        images = photographs(300, 4)
        order = torch.randperm(300, generator=seeded())
        one, other = self.whitened(images).weight, self.whitened(images[order]).weight
        assert_allclose(one, other, atol=1e-3)

    def test_constant_pictures_stay_finite(self):
        weight = self.whitened(torch.zeros(2, 3, 4, 4)).weight
        assert torch.isfinite(weight).all()

    def test_only_the_bias_is_trained(self):
        layer = self.whitened(photographs())
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        assert set(layer.state_dict()) == {"weight", "bias"}
        assert_array_equal(layer.bias.detach(), torch.zeros(24))
