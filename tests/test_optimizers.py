import itertools
import math
import typing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from kenspeckle.config import OptimizerConfig, ScheduleConfig
from kenspeckle.core import InvalidValueError
from kenspeckle.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    Ema,
    Muon,
    accumulate,
    clip,
    optimizer,
    orthogonalise,
    plain,
    schedule,
)


class Quadratic(nn.Module):
    """Half the squared distance of one matrix and one vector from their goals, unequally scaled."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.vector = nn.Parameter(torch.randn(3, generator=generator))
        self.scale = torch.tensor([1.0, 2.0, 0.5])

    def forward(self):
        return self.loss(self.matrix, self.vector)

    def loss(self, matrix, vector):
        return 0.5 * ((self.scale[:, None] * (matrix - 1) ** 2).sum() + (vector**2).sum())

    def gradients(self, matrix, vector):
        """The gradient by hand."""
        return self.scale.numpy().astype(float)[:, None] * (matrix - 1), vector


def paths(config, update_by_formula, num_steps=3):
    """The weights after each step, by the optimizer and by its published formula."""
    model = Quadratic()
    moved = optimizer(config, model)
    decays = (config.weight_decay, 0.0)
    weights = [p.detach().double().numpy().copy() for p in model.parameters()]
    states: list[dict[str, typing.Any]] = [{}, {}]
    found, wanted = [], []
    for number in range(1, num_steps + 1):
        plain(moved, model, 1)
        gradients = model.gradients(*weights)
        weights = [
            update_by_formula(w, g, decay, state, number)
            for w, g, decay, state in zip(weights, gradients, decays, states, strict=True)
        ]
        found += [p.detach().numpy().copy() for p in model.parameters()]
        wanted += weights
    return found, wanted


def assert_same_path(config, update_by_formula):
    found, wanted = paths(config, update_by_formula)
    for a, b in zip(found, wanted, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gd", "sgd"])
def test_gradient_descent(name):
    def update(w, g, decay, state, number):
        return w - 0.1 * (g + decay * w)

    assert_same_path(OptimizerConfig(name, lr=0.1, weight_decay=0.5), update)


@pytest.mark.parametrize(("momentum", "kept"), [(None, 0.9), (0.7, 0.7), (0.0, 0.0)])
@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_momentum(name, momentum, kept):
    def update(w, g, decay, state, number):
        g = g + decay * w
        v = state["v"] = kept * state.get("v", 0) + g
        return w - 0.1 * (g + kept * v if name == "nesterov" else v)

    config = OptimizerConfig(name, lr=0.1, weight_decay=0.5, momentum=momentum)
    assert_same_path(config, update)


@pytest.mark.parametrize(
    ("options", "alpha", "eps", "momentum"),
    [({}, 0.99, 1e-8, 0.0), ({"alpha": 0.5, "eps": 0.1, "momentum": 0.6}, 0.5, 0.1, 0.6)],
)
def test_rmsprop(options, alpha, eps, momentum):
    def update(w, g, decay, state, number):
        g = g + decay * w
        v = state["v"] = alpha * state.get("v", 0) + (1 - alpha) * g**2
        b = state["b"] = momentum * state.get("b", 0) + g / (np.sqrt(v) + eps)
        return w - 0.01 * b

    assert_same_path(OptimizerConfig("rmsprop", lr=0.01, weight_decay=0.5, **options), update)


@pytest.mark.parametrize(
    ("options", "betas", "eps"),
    [({}, (0.9, 0.999), 1e-8), ({"betas": (0.5, 0.8), "eps": 0.1}, (0.5, 0.8), 0.1)],
)
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam(name, options, betas, eps):
    def update(w, g, decay, state, number):
        if name == "adam":
            g = g + decay * w
        else:
            w = w - 0.01 * decay * w
        m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
        v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g**2
        m, v = m / (1 - betas[0] ** number), v / (1 - betas[1] ** number)
        return w - 0.01 * m / (np.sqrt(v) + eps)

    assert_same_path(OptimizerConfig(name, lr=0.01, weight_decay=0.5, **options), update)


def test_muon_moves_its_rest_by_adamw():
    # The only matrix is the last one: no hidden matrix is left.
    def update(w, g, decay, state, number):
        lr = 0.2 * Muon.REST_SHARE
        w = w - lr * decay * w
        m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
        v = state["v"] = 0.95 * state.get("v", 0) + 0.05 * g**2
        return w - lr * (m / (1 - 0.9**number)) / (np.sqrt(v / (1 - 0.95**number)) + 1e-10)

    assert_same_path(OptimizerConfig("muon", lr=0.2, weight_decay=0.5), update)


def newton_schulz(g):
    """The quintic iteration on the singular values."""
    left, values, right = np.linalg.svd(g, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_muon_moves_filters_by_the_orthogonal_part_of_their_momentum(momentum):
    kept = 0.6 if momentum is None else momentum
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(2, 5, 3)
    model = nn.Sequential(layer, nn.Linear(3, 2))
    moved = optimizer(OptimizerConfig("muon", lr=0.2, weight_decay=9.0, momentum=momentum), model)
    filters = layer.weight
    w = filters.detach().double().numpy().reshape(5, 18)
    v = np.zeros_like(w)
    for _ in range(3):
        g = torch.randn(filters.shape, generator=generator)
        filters.grad = g
        moved.step()
        flat = g.double().numpy().reshape(5, 18)
        v = kept * v + flat
        w = w * math.sqrt(5) / np.linalg.norm(w) - 0.2 * newton_schulz(flat + kept * v)
        assert_allclose(filters.detach().reshape(5, 18), w, rtol=1e-3, atol=1e-4)


def test_muon_takes_every_matrix_but_the_last_and_no_frozen_one():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Linear(4, 5), nn.Linear(5, 2)
    )
    model[0].weight.requires_grad_(False)
    groups = optimizer(OptimizerConfig("muon", weight_decay=0.1), model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [
        ["2.weight", "3.weight"],
        ["4.weight"],
        ["0.bias", "1.weight", "1.bias", "2.bias", "3.bias", "4.bias"],
    ]
    assert [group.get("weight_decay") for group in groups] == [None, 0.1, 0.0]


def test_muon_goes_on_from_its_saved_state():
    def run(num_steps, state=None, start=None):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        with torch.no_grad():
            for number, p in enumerate(model.parameters()):
                p.copy_(start[number] if start else torch.linspace(-1, 1, p.numel()).view(p.shape))
        moved = optimizer(OptimizerConfig("muon", lr=0.1), model)
        if state:
            moved.load_state_dict(state)
        x = torch.linspace(0, 1, 54).view(2, 3, 3, 3)
        for _ in range(num_steps):
            plain(moved, lambda: model(x).square().mean(), 2)
        return [p.detach().clone() for p in model.parameters()], moved.state_dict()

    whole, _ = run(4)
    half, state = run(2)
    resumed, _ = run(2, state, half)
    for a, b in zip(whole, resumed, strict=True):
        assert_array_equal(a, b)


def test_muon_returns_the_loss_of_a_closure_and_leaves_parameters_without_gradient():
    model = Quadratic()
    before = [p.detach().clone() for p in model.parameters()]
    moved = Muon([model.matrix], [model.vector], lr=0.1, momentum=0.6)
    assert moved.step(lambda: 2.5) == 2.5
    for p, old in zip(model.parameters(), before, strict=True):
        assert_array_equal(p.detach(), old)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (12, 12), (1, 9)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    small = torch.linspace(0.15, 1, min(shape))
    found = orthogonalise(left @ small.diag() @ right, num_steps=5)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # The singular vectors stay: what the map does to them is diagonal.
    assert_allclose(
        left.T @ found @ right.T, torch.diag((left.T @ found @ right.T).diag()), atol=1e-4
    )


def test_orthogonalise_of_nothing_is_nothing():
    assert_array_equal(orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_leaves_norms_and_biases_alone(name):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    moved = optimizer(OptimizerConfig(name, lr=0.1, weight_decay=0.5), model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    moved.step()
    shrunk = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert shrunk == {"0.weight", "3.weight"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lessens_a_loss_and_knows_its_initial_rate(name):
    model = Quadratic()
    moved = optimizer(OptimizerConfig(name, lr=0.05), model)
    assert [g["initial_lr"] for g in moved.param_groups] == [g["lr"] for g in moved.param_groups]
    first = plain(moved, model, 1)
    for _ in range(20):
        plain(moved, model, 1)
    assert model() < 0.9 * first


def test_the_list_is_the_configurations():
    assert set(OPTIMIZERS) == set(typing.get_args(typing.get_type_hints(OptimizerConfig)["name"]))
    assert set(SCHEDULES) == set(typing.get_args(typing.get_type_hints(ScheduleConfig)["name"]))


class TestSchedule:
    def factors(self, name, num_steps, warmup=0.0):
        factor = schedule(ScheduleConfig(name, warmup), num_steps)
        return [factor(step) for step in range(num_steps + 1)]

    def test_constant(self):
        assert self.factors("constant", 3) == [1, 1, 1, 1]

    def test_linear(self):
        assert_allclose(self.factors("linear", 4), [1, 0.75, 0.5, 0.25, 0])

    def test_cosine(self):
        wanted = [0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(7)]
        assert_allclose(self.factors("cosine", 6), wanted)

    def test_steps(self):
        assert_allclose(self.factors("steps", 8), [1] * 4 + [0.1] * 2 + [0.01] * 3)

    def test_steps_drop_at_shares_of_the_whole_run(self):
        assert_allclose(
            self.factors("steps", 8, 0.25), [1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]
        )

    def test_warmup_then_fall(self):
        wanted = [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 3 / 4, 1 / 2, 1 / 4, 0]
        assert_allclose(self.factors("linear", 8, 0.5), wanted)

    @given(
        name=st.sampled_from(sorted(SCHEDULES)),
        warmup=st.floats(0, 0.99),
        num_steps=st.integers(1, 30),
        step=st.integers(0, 100),
    )
    def test_factors_stay_between_zero_and_one(self, name, warmup, num_steps, step):
        assert 0 <= schedule(ScheduleConfig(name, warmup), num_steps)(step) <= 1


class Fit(nn.Module):
    """Linear regression on 12 items."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.zeros(3, 2))
        self.x = torch.randn(12, 3, generator=generator)
        self.y = torch.randn(12, 2, generator=generator)

    def loss_of(self, items):
        return lambda: (self.x[items] @ self.weight - self.y[items]).square().sum(1).mean()


class TestUpdates:
    def test_plain_steps_along_the_gradient_and_returns_the_loss(self):
        model = Fit()
        loss = plain(torch.optim.SGD(model.parameters(), lr=0.1), model.loss_of(slice(12)), 12)
        gradient = 2 * model.x.T @ -model.y / 12
        assert_allclose(model.weight.detach(), -0.1 * gradient, rtol=1e-5, atol=1e-7)
        assert_allclose(loss, model.y.square().sum(1).mean(), rtol=1e-6)
        assert not loss.requires_grad

    @pytest.mark.parametrize("update", [plain, clip(1e9), accumulate(12)])
    def test_gradients_of_earlier_steps_are_forgotten(self, update):
        model = Fit()
        model.weight.grad = torch.full((3, 2), 100.0)
        update(torch.optim.SGD(model.parameters(), lr=0.1), model.loss_of(slice(12)), 12)
        gradient = 2 * model.x.T @ -model.y / 12
        assert_allclose(model.weight.detach(), -0.1 * gradient, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(("max_norm", "wanted"), [(0.01, 0.01), (1e9, None)])
    def test_clip_shortens_long_gradients_only(self, max_norm, wanted):
        model = Fit()
        clip(max_norm)(torch.optim.SGD(model.parameters(), lr=1.0), model.loss_of(slice(12)), 12)
        whole = (2 * model.x.T @ -model.y / 12).norm()
        assert_allclose(model.weight.detach().norm(), wanted or whole, rtol=1e-4)

    @given(cuts=st.lists(st.integers(1, 11), unique=True, max_size=5))
    def test_accumulated_batches_are_the_whole_set_in_one_batch(self, cuts):
        edges = [0, *sorted(cuts), 12]
        batches = [slice(*pair) for pair in itertools.pairwise(edges)]
        one, other = Fit(), Fit()
        descent = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (one, other)]
        update = accumulate(12)
        for _ in range(2):
            plain(descent[0], one.loss_of(slice(12)), 12)
            before = other.weight.detach().clone()
            for batch in batches:
                assert_array_equal(other.weight.detach(), before)  # not before all were seen
                update(descent[1], other.loss_of(batch), batch.stop - batch.start)
            assert_allclose(other.weight.detach(), one.weight.detach(), rtol=1e-4, atol=1e-6)

    def test_accumulate_returns_the_loss_of_the_batch(self):
        model = Fit()
        descent = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = accumulate(12)(descent, model.loss_of(slice(4)), 4)
        assert_allclose(loss, model.y[:4].square().sum(1).mean(), rtol=1e-6)
        assert not loss.requires_grad

    def test_accumulate_clips_the_sum(self):
        model = Fit()
        descent = torch.optim.SGD(model.parameters(), lr=1.0)
        update = accumulate(12, max_norm=0.01)
        for start in (0, 6):
            update(descent, model.loss_of(slice(start, start + 6)), 6)
        assert_allclose(model.weight.detach().norm(), 0.01, rtol=1e-4)

    def test_accumulate_refuses_batches_that_do_not_add_up(self):
        model = Fit()
        update = accumulate(10)
        descent = torch.optim.SGD(model.parameters(), lr=0.1)
        update(descent, model.loss_of(slice(6)), 6)
        with pytest.raises(InvalidValueError, match="add up to the 10 items of a step; got 12"):
            update(descent, model.loss_of(slice(6, 12)), 6)


class TestEma:
    def test_is_the_recursion_with_a_rising_decay(self):
        model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(5.0)
        ema, average = Ema(model, 0.25), 5.0
        for number, weight in enumerate([1.0, -2.0, 3.0, 0.5]):
            with torch.no_grad():
                model.weight.fill_(weight)
            ema.update(model)
            decay = min(0.25, (1 + number) / (10 + number))
            average = decay * average + (1 - decay) * weight
            assert_allclose(ema.weights()["weight"], [[average]], rtol=1e-5)

    def test_averages_statistics_and_copies_counters(self):
        model = nn.BatchNorm2d(2)
        ema = Ema(model, 0.5)
        model(torch.full((4, 2, 1, 1), 10.0))
        ema.update(model)
        weights = ema.weights()
        assert_allclose(weights["running_mean"], 0.9 * model.state_dict()["running_mean"])
        assert weights["num_batches_tracked"] == 1

    def test_constant_weights_stay_exactly(self):
        model = nn.Linear(5, 5)
        ema = Ema(model, 0.9)
        for _ in range(5):
            ema.update(model)
        for name, tensor in ema.weights().items():
            assert_array_equal(tensor, model.state_dict()[name])

    def test_weights_load_and_do_not_follow_later_updates(self):
        model = nn.Linear(2, 2)
        ema = Ema(model, 0.5)
        weights = ema.weights()
        kept = weights["weight"].clone()
        with torch.no_grad():
            model.weight.add_(1)
        ema.update(model)
        assert_array_equal(weights["weight"], kept)
        model.load_state_dict(weights)
        assert_array_equal(model.weight.detach(), kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_decay_from_the_last_stage_to_the_first(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    config = OptimizerConfig(name, lr=0.8, weight_decay=0.1)
    groups = optimizer(config, model, list(model), 0.5).param_groups
    plain_groups = optimizer(config, model).param_groups
    plain_rates = {p: group["lr"] for group in plain_groups for p in group["params"]}
    found = {p: group["initial_lr"] for group in groups for p in group["params"]}
    assert found.keys() == plain_rates.keys()
    for depth, layer in enumerate(model):
        for parameter in layer.parameters():
            assert found[parameter] == pytest.approx(plain_rates[parameter] * 0.5 ** (2 - depth))
    decays = {p: group.get("weight_decay") for group in groups for p in group["params"]}
    wanted = {p: group.get("weight_decay") for group in plain_groups for p in group["params"]}
    assert decays == wanted


def test_a_schedule_may_be_asked_between_two_steps():
    factor = schedule(ScheduleConfig("linear"), 10)
    assert factor(2.5) == pytest.approx(0.75)
