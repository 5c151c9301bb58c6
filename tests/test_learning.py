"""A run keeps its best epoch, says what it measured, and obeys every setting."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kenspeckle.config import MODEL_CONFIGS
from kenspeckle.core import Normalisation, Pixels, Stage, TrainingError
from kenspeckle.layers import Whitening, normalise, reseed, whiten_
from kenspeckle.learning import EpochDone, Task, learn, logits_of
from kenspeckle.losses import LOSSES
from kenspeckle.models import build
from kenspeckle.optimizers import OPTIMIZERS
from kenspeckle.pixels import CachedPixels, permutation
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings
from tests.conftest import CLASSES, picture

CPU = torch.device("cpu")
TINY = {
    "cnn": ["channels=4", "hidden=8"],
    "resnet": ["model=resnet", "channels=4", "num_blocks=1"],
    "speed": ["model=speed", "channels=6,6,6", "logit_scale=1"],
}


def a_task(num_train=(8, 8, 8), num_validation=6, size=(12, 12)):
    """Return three colours to learn, in memory."""
    images: list[Pixels] = []
    labels, validation = [], []
    for label, colour in enumerate(CLASSES.values()):
        for index in range(num_train[label] + num_validation):
            if index >= num_train[label]:
                validation.append(len(images))
            images.append(picture(colour, 1000 * label + index, size))
            labels.append(label)
    everything = np.arange(len(images))
    return Task(
        store=CachedPixels(np.stack(images), np.zeros((len(images), 16), np.uint8)),
        labels=np.array(labels, np.int64),
        train=np.setdiff1d(everything, validation),
        validation=np.array(validation, np.int64),
        num_classes=len(CLASSES),
        normalisation=Normalisation(),
    )


def a_recipe(*changes):
    """Return the tiniest recipe, changed."""
    base = ["channels=4", "hidden=8", "batch_size=8", "epochs=3", "lr=0.2"]
    return with_settings(with_settings(named("seed-cnn"), base), changes)


def a_network(task, recipe):
    generator = torch.Generator().manual_seed(recipe.seed)
    network = build(recipe.model, task.num_classes, task.store.images.shape[1:3], generator)
    if any(isinstance(module, Whitening) for module in network.modules()):
        whiten_(network, inputs_of(task, task.train))
    return network


def inputs_of(task, items):
    norm = task.normalisation
    return normalise(torch.from_numpy(task.store.gather(items)), norm.mean, norm.deviation)


def flat(network):
    """Return all parameters as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


def learnt(network, task, recipe, *, device=CPU, watch=None, stop=None, keep=None):
    """Run `learn` to its end; `watch` sees every event."""
    running = learn(
        network, task, recipe, stop=stop or threading.Event(), keep=keep or (lambda _: None)
    )
    while True:
        try:
            event = next(running)
        except StopIteration as end:
            return end.value
        if watch:
            watch(event)


def run(*changes, task=None, **options):
    """Return a network, trained, and how it went."""
    task = task or a_task()
    recipe = a_recipe(*changes)
    network = a_network(task, recipe)
    return network, learnt(network, task, recipe, **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What is measured.


def slow_run(task, recipe):
    """Train by plain SGD with every number's definition written out; return weights, measures."""
    network = a_network(task, recipe)
    labels = torch.from_numpy(task.labels)
    weights, epochs = [], []
    for epoch in range(recipe.training.epochs):
        network.train()
        reseed(network, recipe.seed, epoch)
        order = task.train[permutation(len(task.train), recipe.seed, epoch)]
        losses, hits = [], []
        for start in range(0, len(order), recipe.training.batch_size):
            items = order[start : start + recipe.training.batch_size]
            levels = torch.from_numpy(task.store.images[items]).permute(0, 3, 1, 2) / 255
            logits = network((levels - 0.5) / 0.5)
            each = -torch.log_softmax(logits, 1)[torch.arange(len(items)), labels[items]]
            network.zero_grad()
            each.mean().backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.sub_(recipe.optimizer.lr * parameter.grad)
            losses += each.tolist()
            hits += (logits.argmax(1) == labels[items]).tolist()
        with torch.no_grad():
            logits = network.eval()(inputs_of(task, task.validation))
        truth = labels[task.validation]
        right = logits.argmax(1) == truth
        surprise = -torch.log_softmax(logits.double(), 1)[torch.arange(len(truth)), truth]
        epochs.append(
            {
                "train_loss": np.mean(losses),
                "train_accuracy": np.mean(hits),
                "validation_loss": float(surprise.mean()),
                "validation_accuracy": float(right.double().mean()),
            }
        )
        weights.append(flat(network))
    return weights, epochs


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_every_measure_equals_a_slow_recomputation(dropout):
    changes = ["batch_size=5", "lr=0.05", "epochs=4", "seed=3", f"dropout={dropout}"]
    task, recipe = a_task(), a_recipe(*changes)
    network = a_network(task, recipe)
    learned = learnt(network, task, recipe)
    weights, expected = slow_run(task, recipe)
    assert [epoch.number for epoch in learned.history] == [1, 2, 3, 4]
    for epoch, measures in zip(learned.history, expected, strict=True):
        found = {name: getattr(epoch, name) for name in measures}
        assert found == pytest.approx(measures, abs=1e-5)
        assert epoch.learning_rate == pytest.approx(0.05)
        assert epoch.seconds > 0
    best = weights[learned.best_epoch - 1]
    torch.testing.assert_close(flat(network), best, atol=1e-5, rtol=1e-4)


def test_logits_of_is_the_network_in_evaluation_mode():
    task, recipe = a_task(), a_recipe("dropout=0.5")
    network = a_network(task, recipe)
    network.train()
    found = logits_of(network, task, task.validation, CPU)
    with torch.no_grad():
        expected = network.eval()(inputs_of(task, task.validation))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert logits_of(network, task, task.validation[:0], CPU).shape == (0, 3)


def test_events_come_in_order_and_count_every_step():
    events: list[Stage | EpochDone] = []
    run("epochs=2", "batch_size=8", watch=events.append)
    assert [type(event) for event in events] == [*[Stage] * 3, EpochDone] * 2
    stages = [event for event in events if isinstance(event, Stage)]
    assert [(stage.done, stage.total) for stage in stages] == [(n, 6) for n in range(1, 7)]
    assert all(stage.detail.startswith("loss ") for stage in stages)
    ends = [event for event in events if isinstance(event, EpochDone)]
    assert [end.epoch.number for end in ends] == [1, 2]
    assert str(ends[0]).startswith("epoch 1/2  train loss ")
    assert ("(best)" in str(ends[1])) == ends[1].best


# The best epoch.


@pytest.mark.parametrize("decay", ["0", "0.5"])
def test_the_best_epochs_weights_are_kept_and_restored(decay):
    task, kept = a_task(), []
    changes = ("epochs=6", f"ema_decay={decay}")
    network, learned = run(*changes, task=task, keep=lambda state: kept.append(dict(state)))
    accuracies = [epoch.validation_accuracy for epoch in learned.history]
    assert learned.best_epoch == 1 + accuracies.index(max(accuracies)) < 6  # earliest of equals
    assert len(kept) == sum(
        value > max(accuracies[:i], default=-1) for i, value in enumerate(accuracies)
    )
    assert same(network.state_dict(), kept[-1])
    np.testing.assert_array_equal(
        logits_of(network, task, task.validation, CPU), learned.validation_logits
    )
    # The run that ends there has the same weights.
    shorter, _ = run(*changes, f"epochs={learned.best_epoch}", task=task)
    assert same(network.state_dict(), shorter.state_dict())
    assert learned.stopped_because == "all 6 epochs are done"
    assert not learned.interrupted


@pytest.mark.parametrize("optimizer", ["sgd", "gd"])
def test_averaged_weights_follow_their_formula(optimizer):
    """One update a move: gradient descent moves once an epoch, whatever the batch size."""
    task, recipe = a_task(), a_recipe("ema_decay=0.6", "epochs=3", f"optimizer={optimizer}")
    network = a_network(task, recipe)
    before, average, count, averages = flat(network), flat(network), 0, []

    def watch(event):
        nonlocal average, count, before
        now = flat(network)
        if isinstance(event, EpochDone):
            averages.append(average)
        elif not torch.equal(now, before):
            decay = min(0.6, (1 + count) / (10 + count))
            average, count, before = decay * average + (1 - decay) * now, count + 1, now

    learned = learnt(network, task, recipe, watch=watch)
    assert count == (3 if optimizer == "gd" else 9)
    torch.testing.assert_close(flat(network), averages[learned.best_epoch - 1])


def test_patience_stops():
    _, learned = run("epochs=50", "patience=2")
    assert len(learned.history) == learned.best_epoch + 2
    assert learned.stopped_because == "no better validation accuracy in 2 epochs"
    assert not learned.interrupted


# Interruption.


def test_interrupted_in_the_first_epoch_there_is_a_result():
    task, stop = a_task(), threading.Event()
    kept: list[dict[str, torch.Tensor]] = []
    network, learned = run(task=task, stop=stop, watch=lambda _: stop.set(), keep=kept.append)
    assert learned.interrupted
    assert learned.stopped_because == "interrupted in epoch 1"
    assert len(learned.history) == learned.best_epoch == 1
    assert len(kept) == 1
    assert np.isfinite(learned.validation_logits).all()
    start = a_network(task, a_recipe())
    assert not torch.equal(flat(network), flat(start))  # one step was made, and no more
    one_step, _ = run("epochs=1", task=dataclasses.replace(task, train=first_batch(task)))
    torch.testing.assert_close(flat(network), flat(one_step))


def first_batch(task):
    """Return the items of the first batch, in an order that makes them the whole first epoch."""
    chosen = task.train[permutation(len(task.train), 0, 0)][:8]
    return chosen[np.argsort(permutation(len(chosen), 0, 0))]


def test_interrupted_later_the_best_is_kept():
    task, stop = a_task(), threading.Event()

    def watch(event):
        if isinstance(event, Stage) and event.done == 7:  # the first of the third epoch
            stop.set()

    network, learned = run("epochs=9", task=task, stop=stop, watch=watch)
    assert learned.stopped_because == "interrupted in epoch 3"
    assert learned.interrupted
    assert len(learned.history) == 2
    two, _ = run("epochs=2", task=task)
    assert same(network.state_dict(), two.state_dict())


def test_interrupted_between_epochs():
    stop = threading.Event()

    def watch(event):
        if isinstance(event, EpochDone):
            stop.set()

    _, learned = run("epochs=9", stop=stop, watch=watch)
    assert (learned.stopped_because, len(learned.history)) == ("interrupted in epoch 1", 1)


# A loss that is no number.


def test_a_diverging_loss_names_the_remedy():
    with pytest.raises(TrainingError, match=r"at step \d+ \(learning rate 1e\+30\).*--set lr=1e\+"):
        run("lr=1e30")


def test_outputs_that_are_not_finite_are_found_after_the_last_step():
    with pytest.raises(TrainingError, match=r"not finite after epoch 1; try a lower learning rate"):
        run("optimizer=gd", "batch_size=64", "lr=1e38")


# Gradient descent.


@pytest.mark.parametrize("hidden", ["", "8"])
def test_gradient_descent_takes_one_step_an_epoch_along_the_whole_sets_gradient(hidden):
    task = a_task()
    changes = ["optimizer=gd", f"hidden={hidden}", "lr=0.3", "batch_size=7", "epochs=3"]
    network, learned = run(*changes, task=task)
    by_hand, weights = a_network(task, a_recipe(*changes)), []
    labels = torch.from_numpy(task.labels[task.train])
    for epoch in learned.history:
        loss = F.cross_entropy(by_hand(inputs_of(task, task.train)), labels)
        assert epoch.train_loss == pytest.approx(loss.item(), abs=1e-5)
        by_hand.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter.sub_(0.3 * parameter.grad)
        weights.append(flat(by_hand))
    best = weights[learned.best_epoch - 1]
    torch.testing.assert_close(flat(network), best, atol=1e-6, rtol=1e-4)


def test_gradient_descent_does_not_depend_on_the_batch_size():
    changes = ["optimizer=gd", "ema_decay=0.5", "clip_norm=0.01", "schedule=cosine"]
    few, _ = run(*changes, "batch_size=5")
    all_at_once, _ = run(*changes, "batch_size=24")
    torch.testing.assert_close(flat(few), flat(all_at_once))


def test_the_schedule_reaches_every_step():
    _, learned = run("epochs=4", "batch_size=12", "lr=0.1", "schedule=linear")
    rates = [epoch.learning_rate for epoch in learned.history]  # of the 2nd, 4th, 6th, 8th of 8
    assert rates == pytest.approx([0.1 * (1 - done / 8) for done in (1, 3, 5, 7)])


# Everything learns.

RATES = {  # that suit a toy set: 3 epochs of 8 steps, or 12 of gradient descent
    "gd": 0.3,
    "sgd": 0.2,
    "momentum": 0.05,
    "nesterov": 0.05,
    "rmsprop": 0.005,
    "adam": 0.02,
    "adamw": 0.02,
    "muon": 0.1,
}


@pytest.fixture(scope="module")
def colours():
    return a_task(num_validation=10)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_everything_learns(colours, optimizer, loss, family):
    epochs = 12 if optimizer == "gd" else 4
    changes = [f"optimizer={optimizer}", f"lr={RATES[optimizer]}", f"loss={loss}"]
    changes += [f"epochs={epochs}", "patience=4", *TINY[family]]
    _, learned = run(*changes, task=colours)
    right = learned.validation_logits.argmax(1) == colours.labels[colours.validation]
    assert right.mean() > 0.6  # chance is a third


def test_a_deep_network_learns_in_more_steps(colours):
    # The running statistics of 50 layers, one upon the other, take a hundred steps to settle.
    family = "efficientnet-lite"
    assert set(TINY) == set(MODEL_CONFIGS) - {family, "timm"}  # which starts from a file
    words = [f"model={family}", "optimizer=adam", "lr=0.02", "epochs=30", "patience=30"]
    _, learned = run(*words, task=colours)
    right = learned.validation_logits.argmax(1) == colours.labels[colours.validation]
    assert right.mean() > 0.6  # chance is a third
