import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from kenspeckle.config import LossConfig
from kenspeckle.core import InvalidValueError
from kenspeckle.losses import (
    LOSSES,
    balanced_weights,
    binary_cross_entropy,
    cross_entropy,
    focal,
    mixed_cross_entropy,
    objective,
    squared_error,
)

NUM_CLASSES = 4
logit = st.floats(-8, 8, width=32)
row = st.lists(logit, min_size=NUM_CLASSES, max_size=NUM_CLASSES)
batch = st.lists(st.tuples(row, st.integers(0, NUM_CLASSES - 1)), min_size=1, max_size=3)


def tensors(items):
    logits, labels = zip(*items, strict=True)
    return torch.tensor(logits), torch.tensor(labels)


def probabilities(logits):
    powers = [math.exp(z) for z in logits]
    return [power / sum(powers) for power in powers]


def logistic(z):
    return 1 / (1 + math.exp(-z))


@given(batch, st.sampled_from([0.0, 0.1, 0.5]))
def test_cross_entropy(items, smoothing):
    def slow(logits, label):
        targets = [smoothing / NUM_CLASSES + (1 - smoothing) * (k == label) for k in range(4)]
        return -sum(t * math.log(p) for t, p in zip(targets, probabilities(logits), strict=True))

    logits, labels = tensors(items)
    found = cross_entropy(logits, labels, label_smoothing=smoothing)
    assert_allclose(found, [slow(*item) for item in items], rtol=1e-4, atol=1e-5)


@given(batch)
def test_squared_error_is_on_the_raw_outputs(items):
    def slow(logits, label):
        return sum((z - (k == label)) ** 2 for k, z in enumerate(logits)) / NUM_CLASSES

    found = squared_error(*tensors(items))
    assert_allclose(found, [slow(*item) for item in items], rtol=1e-5, atol=1e-6)


@given(batch, st.sampled_from([0.0, 0.5, 2.0, 3.0]))
def test_focal(items, gamma):
    def slow(logits, label):
        p = probabilities(logits)[label]
        return -((1 - p) ** gamma) * math.log(p)

    logits, labels = tensors(items)
    found = focal(logits, labels, gamma=gamma)
    assert_allclose(found, [slow(*item) for item in items], rtol=1e-3, atol=1e-6)


@given(batch)
def test_binary_cross_entropy(items):
    def slow(logits, label):
        answers = [logistic(z) if k == label else 1 - logistic(z) for k, z in enumerate(logits)]
        return -sum(math.log(answer) for answer in answers) / NUM_CLASSES

    found = binary_cross_entropy(*tensors(items))
    assert_allclose(found, [slow(*item) for item in items], rtol=1e-4, atol=1e-6)


def test_focal_without_focus_is_cross_entropy():
    logits, labels = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([0])
    assert_allclose(focal(logits, labels, gamma=0.0), cross_entropy(logits, labels))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("height", [0.0, 1.0, 100.0, 1e4])
def test_losses_and_gradients_are_finite_at_extreme_outputs(name, height):
    logits = torch.tensor([[height, -height, 0.0], [-height, height, 0.0]], requires_grad=True)
    losses = LOSSES[name](logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_the_label_is_certain(gamma):
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    focal(logits, torch.tensor([0]), gamma=gamma).sum().backward()
    assert logits.grad is not None
    assert_allclose(logits.grad, [[0.0, 0.0]], atol=1e-30)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any))
def test_balanced_weights_give_every_class_the_same_share_and_average_to_one(counts):
    weights = balanced_weights(counts)
    shares = [float(w) * n for w, n in zip(weights, counts, strict=True) if n]
    assert_allclose(shares, shares[0], rtol=1e-5)
    assert_allclose(sum(shares) / sum(counts), 1, rtol=1e-5)
    assert all(w == 0 for w, n in zip(weights, counts, strict=True) if not n)


def test_balanced_weights_need_a_picture():
    with pytest.raises(InvalidValueError, match=r"above 0 for at least one class; got \[0, 0\]"):
        balanced_weights([0, 0])


LOGITS = torch.tensor([[0.5, -1.0], [2.0, 0.3], [0.0, 1.0], [-1.0, 0.0]])
LABELS = torch.tensor([0, 0, 0, 1])


@pytest.mark.parametrize("name", LOSSES)
def test_objective_is_the_named_loss(name):
    found = objective(LossConfig(name=name))(LOGITS, LABELS)
    assert_allclose(found, LOSSES[name](LOGITS, LABELS))


@pytest.mark.parametrize("name", LOSSES)
def test_objective_weighs_each_item_by_its_class(name):
    found = objective(LossConfig(name=name), [3, 1])(LOGITS, LABELS)
    weights = torch.tensor([2 / 3, 2 / 3, 2 / 3, 2])
    assert_allclose(found, LOSSES[name](LOGITS, LABELS) * weights, rtol=1e-6)


def test_objective_passes_the_settings_on():
    smooth = objective(LossConfig(label_smoothing=0.3))(LOGITS, LABELS)
    assert_allclose(smooth, cross_entropy(LOGITS, LABELS, label_smoothing=0.3))
    sharp = objective(LossConfig(name="focal", gamma=5.0))(LOGITS, LABELS)
    assert_allclose(sharp, focal(LOGITS, LABELS, gamma=5.0))
    assert not torch.allclose(sharp, focal(LOGITS, LABELS))


def test_mixed_cross_entropy_of_whole_targets_is_the_cross_entropy():
    targets = torch.nn.functional.one_hot(LABELS, LOGITS.shape[1]).to(LOGITS.dtype)
    for smoothing in (0.0, 0.2):
        found = mixed_cross_entropy(LOGITS, targets, smoothing)
        assert_allclose(found, cross_entropy(LOGITS, LABELS, smoothing), rtol=1e-5)


def test_mixed_cross_entropy_is_linear_in_its_targets():
    first, second = (
        torch.nn.functional.one_hot(labels, LOGITS.shape[1]).to(LOGITS.dtype)
        for labels in (LABELS, (LABELS + 1) % LOGITS.shape[1])
    )
    blend = mixed_cross_entropy(LOGITS, 0.3 * first + 0.7 * second, 0.1)
    parts = [mixed_cross_entropy(LOGITS, targets, 0.1) for targets in (first, second)]
    assert_allclose(blend, 0.3 * parts[0] + 0.7 * parts[1], rtol=1e-5)


def test_mixed_cross_entropy_weighs_by_the_mean_weight_of_the_classes():
    weights = torch.arange(1.0, LOGITS.shape[1] + 1)
    targets = torch.nn.functional.one_hot(LABELS, LOGITS.shape[1]).to(LOGITS.dtype)
    found = mixed_cross_entropy(LOGITS, targets, 0.0, weights)
    assert_allclose(found, cross_entropy(LOGITS, LABELS) * weights[LABELS], rtol=1e-5)
