"""Scores against the measures they are made of, their intervals, and the awkward splits."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from kenspeckle import metrics
from kenspeckle.core import Interval, InvalidValueError
from kenspeckle.costs import Costs, decide
from kenspeckle.evaluation import evaluate, worst_mistakes
from kenspeckle.results import Scores

CLASSES = ("ant", "bee", "cow")


def draw(
    seed: int, num_items: int, num_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return distributions whose top is right about two times in three, and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(num_classes, size=num_items)
    probabilities = generator.dirichlet(np.ones(num_classes), size=num_items)
    probabilities[np.arange(num_items), labels] += 0.4
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def certain(predicted: list[int], num_classes: int = 3) -> NDArray[np.float64]:
    return np.eye(num_classes)[predicted]


def ordered(interval: Interval) -> bool:
    return 0 <= interval.low <= interval.value <= interval.high <= 1


def test_scores_are_the_measures_of_the_same_answers():
    probabilities, labels = draw(0, 200, 7)
    names = tuple("abcdefg")
    scores = evaluate(probabilities, labels, names)
    predicted = probabilities.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predicted, 7)
    found = metrics.per_class(confusion)
    assert scores.num_items == 200
    assert scores.confusion == tuple(map(tuple, confusion.tolist()))
    assert scores.accuracy == metrics.wilson(int((labels == predicted).sum()), 200)
    assert scores.top_k == 5
    assert scores.top_k_accuracy is not None
    assert scores.top_k_accuracy.value == metrics.top_k_accuracy(labels, probabilities, 5)
    assert_allclose(scores.balanced_accuracy.value, metrics.balanced_accuracy(confusion))
    assert scores.recall.macro == scores.balanced_accuracy
    assert scores.recall.weighted == scores.accuracy
    for average, values in ((scores.precision, found.precision), (scores.f1, found.f1)):
        assert_allclose(average.macro.value, metrics.macro(values))
        assert_allclose(average.weighted.value, metrics.weighted(values, found.support))
        assert ordered(average.macro)
        assert ordered(average.weighted)
    assert scores.log_loss.value == metrics.log_loss(labels, probabilities)
    assert scores.log_loss.low < scores.log_loss.value < scores.log_loss.high
    assert scores.expected_calibration_error == metrics.expected_calibration_error(
        probabilities, labels
    )
    assert scores.majority_class == names[np.bincount(labels).argmax()]
    assert scores.majority_accuracy == np.bincount(labels).max() / 200
    for index, one in enumerate(scores.per_class):
        assert (one.name, one.num_items) == (names[index], found.support[index])
        assert_allclose(one.precision.value, found.precision[index])
        assert_allclose(one.recall.value, found.recall[index])
        assert_allclose(one.f1.value, found.f1[index])


def test_the_seed_alone_decides_the_intervals():
    probabilities, labels = draw(0, 60, 3)
    assert evaluate(probabilities, labels, CLASSES, 1) == evaluate(
        probabilities, labels, CLASSES, 1
    )
    assert evaluate(probabilities, labels, CLASSES, 1) != evaluate(
        probabilities, labels, CLASSES, 2
    )


def test_all_right_leaves_room_for_errors_not_seen():
    scores = evaluate(certain([0, 1, 2] * 10), np.array([0, 1, 2] * 10), CLASSES)
    for interval in (scores.accuracy, scores.balanced_accuracy, scores.f1.macro):
        assert interval.value == interval.high == 1
        assert 0.85 < interval.low < 0.95
    assert scores.log_loss.value == 0


def test_a_rare_class_widens_what_is_said_of_all_classes_alike():
    labels = np.repeat([0, 1, 2], [100, 100, 2])
    scores = evaluate(certain(labels.tolist()), labels, CLASSES)
    assert scores.f1.weighted == scores.accuracy == metrics.wilson(202, 202)
    # 202 pictures of these classes tell no more of the mean recall than 9 / (1/100 + 1/100 + 1/2).
    assert scores.balanced_accuracy == scores.f1.macro
    assert_allclose(scores.balanced_accuracy.low, metrics.wilson(9 / 0.52, 9 / 0.52).low)


def test_all_wrong():
    scores = evaluate(certain([1, 2, 0] * 10), np.array([0, 1, 2] * 10), CLASSES)
    for interval in (scores.accuracy, scores.balanced_accuracy, scores.precision.macro):
        assert interval.value == interval.low == 0
        assert 0.05 < interval.high < 0.15
    assert scores.expected_calibration_error == 1


def test_one_picture():
    scores = evaluate(certain([1]), np.array([1]), CLASSES)
    assert scores.accuracy.value == 1
    assert scores.accuracy.low < 0.25
    assert math.isnan(scores.per_class[0].recall.value)
    assert_allclose(scores.f1.macro.value, 1)


def test_a_class_without_pictures_is_undefined_and_left_out_of_averages():
    labels = np.array([0, 0, 1, 1])
    scores = evaluate(certain([0, 0, 1, 2]), labels, CLASSES)
    absent = scores.per_class[2]
    assert (absent.num_items, absent.num_predicted) == (0, 1)
    assert math.isnan(absent.recall.value)
    assert absent.precision.value == 0
    assert scores.balanced_accuracy.value == 0.75
    never = evaluate(certain([0, 0, 1, 1]), labels, CLASSES).per_class[2]
    assert math.isnan(never.f1.value)


def test_two_classes_have_no_top_k():
    scores = evaluate(certain([0, 1], 2), np.array([0, 0]), ("no", "yes"))
    assert scores.top_k is None
    assert scores.top_k_accuracy is None


def test_float32_probabilities_are_taken():
    probabilities, labels = draw(0, 50, 3)
    rough = evaluate(probabilities.astype(np.float32), labels, CLASSES)
    assert rough.accuracy == evaluate(probabilities, labels, CLASSES).accuracy
    json.dumps(rough.to_dict(), allow_nan=False)


@pytest.mark.parametrize("only", [False, True])
def test_scores_survive_json(only):
    probabilities, labels = draw(0, 40, 3)
    plain = evaluate(probabilities, np.zeros_like(labels) if only else labels, CLASSES).to_dict()
    text = json.dumps(plain, allow_nan=False)
    assert Scores.from_dict(json.loads(text)).to_dict() == plain
    undefined = {"value": None, "low": None, "high": None}
    assert (plain["per_class"][2]["recall"] == undefined) is only


@pytest.mark.parametrize(
    ("probabilities", "labels", "text"),
    [
        ([[math.nan, 0, 1], [1, 0, 0]], [0, 1], "1 rows with NaN or infinity, the first is row 0"),
        ([[1, 0, 0], [5, -3, 2]], [0, 1], "row 1 sums to 4 with a minimum of -3"),
        ([[2, -0.5, -0.5]], [0], "pass softmax"),
        ([[0.5, 0.5]], [0], r"got \(1, 2\) and 3 classes"),
        ([[1, 0, 0]], [3], "labels must be from 0 to 2; got 3"),
        ([[1, 0, 0]], [0, 1], "same length"),
        (np.zeros((0, 3)), [], "at least one entry; got none"),
    ],
)
def test_wrong_input_is_named(probabilities, labels, text):
    with pytest.raises(InvalidValueError, match=text):
        evaluate(np.array(probabilities, dtype=float), np.array(labels, dtype=np.int64), CLASSES)


def test_worst_mistakes_are_the_most_confident_errors_in_order():
    probabilities = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0, 0.2, 0.8], [0.7, 0, 0.3]])
    found = worst_mistakes(probabilities, np.array([0, 1, 1, 2]), ("a", "b", "c", "d"))
    assert [(m.index, m.name, m.label, m.predicted) for m in found] == [
        (2, "c", 1, 2),
        (3, "d", 2, 0),
        (1, "b", 1, 0),
    ]
    assert_allclose([m.probability for m in found], [0.8, 0.7, 0.6])
    assert worst_mistakes(probabilities, np.array([0, 1, 1, 2]), tuple("abcd"), num=1) == found[:1]


def test_without_mistakes_there_are_none_to_show():
    assert worst_mistakes(certain([0, 1]), np.array([0, 1]), ("a", "b")) == ()


def test_mistakes_need_a_name_for_each_picture():
    with pytest.raises(InvalidValueError, match="got 2, 2 and 1"):
        worst_mistakes(certain([0, 1]), np.array([0, 1]), ("a",))


# Costs.

CAREFUL = Costs(((0.0, 1.0, 20.0), (1.0, 0.0, 1.0), (2.0, 1.0, 0.5)))


def test_scores_with_costs_are_those_of_the_answers_that_cost_least():
    probabilities, labels = draw(0, 150, 3)
    usual, scores = (evaluate(probabilities, labels, CLASSES, 5, c) for c in (None, CAREFUL))
    predicted = decide(probabilities, CAREFUL)
    assert np.any(predicted != probabilities.argmax(axis=1))
    # The same answers, given with certainty, have the same scores.
    certainly = evaluate(certain(predicted.tolist()), labels, CLASSES, 5)
    for name in ("accuracy", "precision", "recall", "f1", "confusion", "per_class"):
        assert getattr(scores, name) == getattr(certainly, name)
    for name in ("top_k_accuracy", "log_loss", "expected_calibration_error", "majority_accuracy"):
        assert getattr(scores, name) == getattr(usual, name)
    assert usual.mean_cost is None
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores


@settings(max_examples=5)  # each draws thousands of resamples
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_the_mean_cost_is_that_of_the_answers(seed, num_items):
    probabilities, labels = draw(seed, num_items, 3)
    scores = evaluate(probabilities, labels, CLASSES, costs=CAREFUL)
    predicted = decide(probabilities, CAREFUL)
    paid = [CAREFUL.matrix[t][a] for t, a in zip(labels, predicted, strict=True)]
    assert scores.mean_cost is not None
    assert_allclose(scores.mean_cost.value, sum(paid) / num_items)
    assert min(paid) <= scores.mean_cost.low <= scores.mean_cost.high <= max(paid)


def test_the_interval_of_the_mean_cost_is_the_bootstraps():
    probabilities, labels = draw(3, 400, 3)
    mean_cost = evaluate(probabilities, labels, CLASSES, costs=CAREFUL).mean_cost
    assert mean_cost is not None
    paid = CAREFUL.array[labels, decide(probabilities, CAREFUL)]
    half = 1.96 * paid.std() / 20
    assert_allclose(
        [mean_cost.low, mean_cost.high], paid.mean() + np.array([-half, half]), rtol=0.1
    )


def test_costs_of_other_classes_are_refused():
    probabilities, labels = draw(0, 5, 3)
    other = Costs(((0.0, 1.0), (1.0, 0.0)))
    with pytest.raises(InvalidValueError, match="a column for each class that the costs name"):
        evaluate(probabilities, labels, CLASSES, costs=other)
    with pytest.raises(InvalidValueError, match="a column for each class that the costs name"):
        worst_mistakes(probabilities, labels, tuple("abcde"), costs=other)


@given(st.integers(0, 2**32), st.integers(0, 30), st.booleans())
def test_worst_mistakes_are_the_dearest_then_the_most_probable(seed, num, with_costs):
    probabilities, labels = draw(seed, 25, 3)
    costs = CAREFUL if with_costs else None
    predicted = decide(probabilities, costs)
    names = tuple(f"{index}.png" for index in range(25))
    slow = sorted(
        (index for index in range(25) if predicted[index] != labels[index]),
        key=lambda i: (
            -CAREFUL.matrix[labels[i]][predicted[i]] if with_costs else 0,
            -probabilities[i, predicted[i]],
        ),
    )[:num]
    found = worst_mistakes(probabilities, labels, names, num, costs)
    assert [(m.index, m.name) for m in found] == [(i, names[i]) for i in slow]
    assert [m.predicted for m in found] == [predicted[i] for i in slow]
    assert [m.probability for m in found] == [probabilities[i, predicted[i]] for i in slow]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("num_items", "right"), [(60, 0.97), (150, 0.9), (400, 0.6)])
def test_intervals_of_averages_cover_the_truth_as_often_as_they_say(num_items, right):
    generator = np.random.default_rng(0)
    num_classes, trials = 4, 300
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    cells = np.full((num_classes, num_classes), (1 - right) / (num_classes - 1))
    np.fill_diagonal(cells, right)
    cells *= shares[:, None]
    truth: Any = metrics.per_class(np.round(cells * 10**9).astype(np.int64))
    expected = {
        "balanced_accuracy": metrics.macro(truth.recall),
        "precision": metrics.macro(truth.precision),
        "f1": metrics.macro(truth.f1),
    }
    covered = dict.fromkeys(expected, 0)
    for _ in range(trials):
        drawn = generator.choice(num_classes**2, size=num_items, p=cells.ravel() / cells.sum())
        labels, predicted = np.divmod(drawn, num_classes)
        scores = evaluate(np.eye(num_classes)[predicted], labels, tuple("abcd"))
        found = {
            "balanced_accuracy": scores.balanced_accuracy,
            "precision": scores.precision.macro,
            "f1": scores.f1.macro,
        }
        for name, interval in found.items():
            covered[name] += interval.low <= expected[name] <= interval.high
    for name, times in covered.items():
        assert 0.92 <= times / trials <= 0.985, name  # 0.95, less or more two standard errors
