"""The loop makes the steps that it says, and stops, casts and chooses devices as documented."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kenspeckle import learning, training
from kenspeckle.core import InvalidValueError
from kenspeckle.losses import cross_entropy
from kenspeckle.optimizers import plain
from kenspeckle.training import EarlyStopping, autocast, choose_device, train
from tests.test_learning import a_network, a_recipe, a_task, flat, learnt


def linear(seed=0):
    """Return a linear classifier of 4 numbers into 3 classes."""
    model = nn.Linear(4, 3)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def some_batches(num=3, size=5):
    chance = np.random.default_rng(1)
    for _ in range(num):
        inputs = torch.from_numpy(chance.normal(size=(size, 4)).astype(np.float32))
        yield inputs, torch.from_numpy(chance.integers(3, size=size))


def two_groups(model):
    """Return an optimizer whose groups have rates of 1 and 0.25."""
    groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.25}]
    optimizer = torch.optim.SGD(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def test_every_step_is_yielded_when_it_was_made_and_is_the_formulas():
    model, by_hand = linear(), linear()
    steps = train(
        model,
        some_batches(),
        cross_entropy,
        two_groups(model),
        update=plain,
        rate=lambda number: 0.1 / (1 + number),
        start=7,
    )
    made = 0
    for step, (inputs, labels) in zip(steps, some_batches(), strict=True):
        factor = 0.1 / (1 + 7 + made)
        logits = by_hand(inputs)
        losses = logits.logsumexp(1) - logits[torch.arange(5), labels]
        by_hand.zero_grad()
        losses.mean().backward()
        with torch.no_grad():
            by_hand.weight -= 1.0 * factor * by_hand.weight.grad
            by_hand.bias -= 0.25 * factor * by_hand.bias.grad
        assert step.number == 7 + made
        assert step.num_items == 5
        assert step.rate == pytest.approx(factor)
        assert not step.loss.requires_grad
        torch.testing.assert_close(step.loss, losses.mean().detach())
        torch.testing.assert_close(model.weight, by_hand.weight)  # moved already, and not further
        torch.testing.assert_close(model.bias, by_hand.bias)
        made += 1
    assert made == 3


def test_training_mode_is_on():
    model = nn.Sequential(linear()).eval()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "initial_lr": 0.0}], lr=0.0)
    (_,) = train(model, some_batches(1), cross_entropy, optimizer, update=plain, rate=lambda _: 1.0)
    assert model.training


def test_without_batches_there_is_no_step():
    model = linear()
    steps = train(model, [], cross_entropy, two_groups(model), update=plain, rate=lambda _: 1.0)
    assert list(steps) == []


@pytest.mark.parametrize(
    ("cuda", "mps", "wanted"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device(monkeypatch, cuda, mps, wanted):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert choose_device("auto") == torch.device(wanted)
    assert choose_device(wanted) == torch.device(wanted)
    assert choose_device("cpu") == torch.device("cpu")


def test_a_device_that_is_unknown_or_absent_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(InvalidValueError, match="no device named 'cudda'; did you mean 'cuda'"):
        choose_device("cudda")
    with pytest.raises(InvalidValueError, match="'cuda' is not on this machine; here: cpu, mps"):
        choose_device("cuda")


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_cpu_computes_in_float32(precision):
    with autocast(torch.device("cpu"), precision):
        assert linear()(torch.zeros(1, 4)).dtype == torch.float32


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_only_auto_takes_bfloat16_where_the_device_has_it(monkeypatch, precision, native):
    taken = []
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda emulated: native or emulated)
    monkeypatch.setattr("torch.autocast", lambda kind, dtype, **_: taken.append((kind, dtype)))
    autocast(torch.device("cuda"), precision)
    expected = [("cuda", torch.bfloat16)] if native and precision == "auto" else []
    assert taken == expected


def test_mixed_precision_follows_the_weights_within_an_epoch(monkeypatch):
    """With torch's cache of cast weights, every step after the first would use old ones."""
    real = torch.autocast

    def on_the_cpu(_, **options):
        return real("cpu", **options)

    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda emulated: True)
    monkeypatch.setattr("torch.autocast", on_the_cpu)
    monkeypatch.setattr(
        learning,
        "autocast",
        lambda _, precision: training.autocast(torch.device("cuda"), precision),
    )
    task = a_task()
    recipe = a_recipe("epochs=1", "batch_size=4", "lr=0.1")
    start = flat(a_network(task, recipe))
    weights = []
    for precision in ("float32", "auto"):
        recipe = a_recipe("epochs=1", "batch_size=4", "lr=0.1", f"precision={precision}")
        network = a_network(task, recipe)
        learnt(network, task, recipe)
        weights.append(flat(network))
    moved = (weights[0] - start).norm()
    gap = (weights[1] - weights[0]).norm()
    assert moved > 0.1
    assert 0 < gap < 0.05 * moved


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 4))
def test_early_stopping_equals_its_slow_definition(values, patience):
    stopping = EarlyStopping(patience)
    for index, value in enumerate(values):
        better = stopping.improved(value)
        assert better == (value > max(values[:index], default=-1))
        first_best = values.index(max(values[: index + 1]))
        assert stopping.exhausted == (0 < patience <= index - first_best)
        assert stopping.best == max(values[: index + 1])


def test_a_value_that_is_not_a_number_never_is_the_best():
    stopping = EarlyStopping(1)
    assert not stopping.improved(float("nan"))
    assert stopping.improved(0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_cuda_run_learns_what_a_cpu_run_learns(precision):
    device = choose_device("cuda")
    task = a_task()
    recipe = a_recipe("epochs=3", f"precision={precision}")
    network = a_network(task, recipe).to(device)
    found = learnt(network, task, recipe, device=device)
    expected = learnt(a_network(task, recipe), task, recipe)
    assert next(network.parameters()).device.type == device.type
    assert max(epoch.validation_accuracy for epoch in found.history) > 0.8
    ours, theirs = ([epoch.train_loss for epoch in run.history] for run in (found, expected))
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_cuda_epoch_moves_the_weights_as_a_cpu_epoch_does(precision):
    device = choose_device("cuda")
    task = a_task()
    recipe = a_recipe("epochs=1", "batch_size=4", f"precision={precision}")
    on_cpu, on_cuda = (a_network(task, recipe) for _ in range(2))
    start = flat(on_cpu)
    learnt(on_cpu, task, recipe)
    learnt(on_cuda.to(device), task, recipe, device=device)
    gap = (flat(on_cuda.cpu()) - flat(on_cpu)).norm()
    assert gap < 0.1 * (flat(on_cpu) - start).norm()
