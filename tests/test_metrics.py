"""Measures against their formulas, written out item by item, and against scikit-learn."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from kenspeckle import metrics
from kenspeckle.core import InvalidValueError

NUM_CLASSES = 4
pairs = st.lists(
    st.tuples(st.integers(0, NUM_CLASSES - 1), st.integers(0, NUM_CLASSES - 1)),
    min_size=1,
    max_size=30,
)
seeds = st.integers(0, 2**32 - 1)
fast = settings(max_examples=50, deadline=None)


def split(items: list[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    labels, predicted = np.array(items, dtype=np.int64).T
    return labels, predicted


def draw(
    seed: int, num_items: int, num_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(num_classes), size=num_items)
    return probabilities, generator.integers(num_classes, size=num_items)


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


@fast
@given(pairs)
def test_counts_equal_counting_one_by_one(items):
    labels, predicted = split(items)
    confusion = metrics.confusion_matrix(labels, predicted, NUM_CLASSES)
    for row in range(NUM_CLASSES):
        for column in range(NUM_CLASSES):
            assert confusion[row, column] == items.count((row, column))
    assert metrics.accuracy(labels, predicted) == sum(a == b for a, b in items) / len(items)


@fast
@given(pairs)
def test_per_class_measures_equal_their_formulas(items):
    labels, predicted = split(items)
    found = metrics.per_class(metrics.confusion_matrix(labels, predicted, NUM_CLASSES))
    for one in range(NUM_CLASSES):
        hits = sum(a == b == one for a, b in items)
        support = sum(a == one for a, _ in items)
        answers = sum(b == one for _, b in items)
        precision, recall = ratio(hits, answers), ratio(hits, support)
        assert_allclose(found.precision[one], precision)
        assert_allclose(found.recall[one], recall)
        assert_allclose(found.f1[one], ratio(2 * hits, support + answers))
        if hits:
            assert_allclose(found.f1[one], 2 / (1 / precision + 1 / recall))
        assert (found.support[one], found.num_predicted[one]) == (support, answers)


@fast
@given(pairs)
def test_rates_equal_per_class_of_the_confusion_matrix(items):
    labels, predicted = split(items)
    slow = metrics.per_class(metrics.confusion_matrix(labels, predicted, NUM_CLASSES))
    quick = metrics.rates(labels, predicted, NUM_CLASSES)
    for name in ("precision", "recall", "f1", "support", "num_predicted"):
        assert_array_equal(getattr(quick, name), getattr(slow, name))


@fast
@given(pairs)
def test_averages_leave_undefined_classes_out(items):
    labels, predicted = split(items)
    confusion = metrics.confusion_matrix(labels, predicted, NUM_CLASSES)
    found = metrics.per_class(confusion)
    recalls = [r for r in found.recall.tolist() if not math.isnan(r)]
    assert_allclose(metrics.macro(found.recall), sum(recalls) / len(recalls))
    assert_allclose(metrics.balanced_accuracy(confusion), sum(recalls) / len(recalls))
    # Weighing each class's recall by its items gives the accuracy back.
    assert_allclose(
        metrics.weighted(found.recall, found.support), metrics.accuracy(labels, predicted)
    )


def test_undefined_is_nan_and_a_class_never_predicted_has_an_f1_of_zero():
    confusion = np.array([[3, 0, 0], [2, 0, 0], [0, 0, 0]])
    found = metrics.per_class(confusion)
    assert_array_equal(found.recall, [1, 0, math.nan])
    assert_array_equal(found.precision, [0.6, math.nan, math.nan])
    assert_array_equal(found.f1, [0.75, 0, math.nan])
    assert math.isnan(metrics.macro(np.array([math.nan, math.nan])))


def test_without_items_nothing_is_known():
    none, rows = np.zeros(0, dtype=np.int64), np.zeros((0, 3))
    assert math.isnan(metrics.accuracy(none, none))
    assert math.isnan(metrics.top_k_accuracy(none, rows, 2))
    assert math.isnan(metrics.log_loss(none, rows))
    assert math.isnan(metrics.expected_calibration_error(rows, none))
    assert math.isnan(metrics.balanced_accuracy(np.zeros((3, 3), dtype=np.int64)))


@fast
@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_top_k_equals_sorting_each_row(seed, k, coarseness):
    probabilities, labels = draw(seed, 20, 5)
    probabilities = np.round(probabilities * coarseness)  # makes ties
    hits = 0
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        order = sorted(range(5), key=lambda index: (-row[index], index))
        hits += label in order[:k]
    assert metrics.top_k_accuracy(labels, probabilities, k) == hits / 20
    assert metrics.top_k_accuracy(labels, probabilities, 1) == metrics.accuracy(
        labels, probabilities.argmax(axis=1)
    )


@fast
@given(seeds)
def test_log_loss_equals_its_formula(seed):
    probabilities, labels = draw(seed, 15, 3)
    slow = [-math.log(row[label]) for row, label in zip(probabilities, labels, strict=True)]
    assert_allclose(metrics.log_loss(labels, probabilities), sum(slow) / 15, rtol=1e-6)


def test_one_certain_mistake_costs_a_finite_loss():
    loss = metrics.log_loss(np.array([1]), np.array([[1.0, 0.0]]))
    assert_allclose(loss, -math.log(np.finfo(np.float32).eps))


@fast
@given(seeds, st.integers(1, 40))
def test_calibration_error_equals_its_formula(seed, num_bins):
    probabilities, labels = draw(seed, 31, 3)
    items = sorted(
        (float(row.max()), bool(row.argmax() == label))
        for row, label in zip(probabilities, labels, strict=True)
    )
    sizes = [31 // num_bins + (index < 31 % num_bins) for index in range(num_bins)]
    expected, start = 0.0, 0
    for size in sizes:
        part = items[start : start + size]
        expected += abs(sum(c for c, _ in part) - sum(right for _, right in part)) / 31
        start += size
    found = metrics.expected_calibration_error(probabilities, labels, num_bins)
    assert_allclose(found, expected, atol=1e-12)


def test_calibration_error_does_not_depend_on_the_order_of_equal_confidences():
    probabilities = np.tile([0.75, 0.25], (40, 1))
    labels = np.repeat(np.array([0, 1]), [30, 10])
    for order in (np.arange(40), np.random.default_rng(0).permutation(40)):
        error = metrics.expected_calibration_error(probabilities[order], labels[order])
        assert_allclose(error, 0, atol=1e-12)


def test_measures_equal_those_of_scikit_learn():
    theirs: Any = pytest.importorskip("sklearn.metrics")
    probabilities, labels = draw(1, 300, 5)
    probabilities[:, 3] *= 1e-3  # class 3 is never predicted
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    labels[labels == 4] = 0  # class 4 has no items
    predicted = probabilities.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predicted, 5)
    ours = metrics.per_class(confusion)
    assert_array_equal(confusion, theirs.confusion_matrix(labels, predicted, labels=range(5)))
    options = {"labels": range(5), "zero_division": np.nan}
    every = theirs.precision_recall_fscore_support(labels, predicted, **options)
    for mine, other in zip(
        (ours.precision, ours.recall, ours.f1, ours.support), every, strict=True
    ):
        assert_allclose(mine, other)
    macro = theirs.precision_recall_fscore_support(labels, predicted, average="macro", **options)
    assert_allclose([metrics.macro(v) for v in (ours.precision, ours.recall, ours.f1)], macro[:3])
    weighted = theirs.precision_recall_fscore_support(
        labels, predicted, average="weighted", **options
    )
    assert_allclose(
        [metrics.weighted(v, ours.support) for v in (ours.precision, ours.recall, ours.f1)],
        weighted[:3],
    )
    known = {"labels": range(5)}
    assert_allclose(
        metrics.top_k_accuracy(labels, probabilities, 2),
        theirs.top_k_accuracy_score(labels, probabilities, k=2, **known),
    )
    assert_allclose(
        metrics.log_loss(labels, probabilities), theirs.log_loss(labels, probabilities, **known)
    )


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_equals_that_of_scikit_learn_with_an_absent_class():
    theirs: Any = pytest.importorskip("sklearn.metrics")
    labels, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 2, 1, 1, 0])
    ours = metrics.balanced_accuracy(metrics.confusion_matrix(labels, predicted, 3))
    assert_allclose(ours, theirs.balanced_accuracy_score(labels, predicted))


def test_wilson_covers_the_true_share_as_often_as_it_says():
    generator = np.random.default_rng(0)
    for trials in (10, 50, 400):
        intervals = [metrics.wilson(successes, trials) for successes in range(trials + 1)]
        low = np.array([interval.low for interval in intervals])
        high = np.array([interval.high for interval in intervals])
        shares = generator.uniform(0.02, 0.98, size=20_000)
        seen = generator.binomial(trials, shares)
        covered = np.mean((low[seen] <= shares) & (shares <= high[seen]))
        assert 0.93 < covered < 0.97


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_wilson_encloses_the_share_within_0_and_1(successes, trials):
    successes = min(successes, trials)
    found = metrics.wilson(successes, trials)
    assert 0 <= found.low <= found.value == successes / trials <= found.high <= 1
    assert found.high > found.low


def test_wilson_ends_solve_the_equation_that_defines_them():
    # The ends are the shares from which the one seen is 1.96 standard deviations away.
    found = metrics.wilson(7, 20)
    for end in (found.low, found.high):
        assert_allclose(abs(found.value - end) / math.sqrt(end * (1 - end) / 20), 1.959963984540054)


def test_intervals_of_nothing_are_undefined():
    for found in (metrics.wilson(0, 0), metrics.wilson_f1(0, 0)):
        assert math.isnan(found.value)
        assert math.isnan(found.low)
    assert math.isnan(metrics.share_interval(math.nan, 0.1, 10).value)


def test_f1_interval_covers_the_true_f1_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hit, miss = 0.17, 0.05  # of all items: of the class and found, one of the two only
    truth = 2 * hit / (2 * hit + miss)
    counts = generator.multinomial(100, [hit, miss, 1 - hit - miss], size=2000)
    intervals = [metrics.wilson_f1(int(hits), int(misses)) for hits, misses, _ in counts]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.93 < covered < 0.97
    assert_allclose(metrics.wilson_f1(8, 4).value, 16 / 20)


def test_share_interval_gives_wilsons_back_for_a_plain_share():
    expected = metrics.wilson(36, 40)
    found = metrics.share_interval(0.9, math.sqrt(0.9 * 0.1 / 40), 1000)
    assert_allclose((found.low, found.high), (expected.low, expected.high))
    without_errors = metrics.share_interval(1.0, 0.0, 40)
    assert without_errors == metrics.wilson(40, 40)


def test_bootstrap_of_a_mean_equals_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = metrics.bootstrap(np.mean, values, seed=1)
    half = 1.96 * values.std() / 20
    assert found.value == values.mean()
    assert_allclose((found.low, found.high), (found.value - half, found.value + half), atol=0.03)
    assert found == metrics.bootstrap(np.mean, values, seed=1)
    assert found != metrics.bootstrap(np.mean, values, seed=2)


def test_resamples_draw_the_same_items_from_all_arrays():
    numbers = np.arange(50)
    draws = metrics.resamples(
        lambda a, b: [np.abs(a + b).max(), a.mean()], numbers, -numbers, seed=0, num_resamples=20
    )
    assert draws.shape == (20, 2)
    assert_array_equal(draws[:, 0], 0)
    assert len(set(draws[:, 1])) > 10


def test_bootstrap_leaves_out_resamples_in_which_the_statistic_is_undefined():
    def recall(labels, predicted):
        return float(metrics.rates(labels, predicted, 2).recall[1])

    labels, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1])
    assert metrics.bootstrap(recall, labels, predicted, seed=0).low == 1
    assert math.isnan(metrics.bootstrap(recall, labels[:3], predicted[:3], seed=0).value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: metrics.accuracy(np.zeros(2, int), np.zeros(3, int)), "labels: 2, predicted: 3"),
        (lambda: metrics.confusion_matrix(np.array([3]), np.array([0]), 3), "from 0 to 2; got 3"),
        (lambda: metrics.confusion_matrix(np.array([0]), np.array([-1]), 3), "predicted must be"),
        (
            lambda: metrics.top_k_hits(np.array([0]), np.ones((1, 3)), 4),
            "1 to the 3 classes; got 4",
        ),
        (lambda: metrics.wilson(3, 2), "successes must be from 0 to the trials, 2; got 3"),
        (lambda: metrics.wilson_f1(-1, 2), "got -1"),
        (lambda: metrics.bootstrap(np.mean, np.zeros(0), seed=0), "at least one item"),
        (
            lambda: metrics.expected_calibration_error(np.ones((1, 1)), np.array([0]), 0),
            "num_bins must be at least 1; got 0",
        ),
    ],
)
def test_wrong_arguments_are_named(call, text):
    with pytest.raises(InvalidValueError, match=text):
        call()
