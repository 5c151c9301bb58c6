"""Temperature scaling against known temperatures, brute force and the awkward cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from kenspeckle.calibration import TEMPERATURE_RANGE, fit_temperature, softmax
from kenspeckle.core import InvalidValueError
from kenspeckle.metrics import expected_calibration_error, log_loss


def calibrated(
    seed: int, num_items: int, num_classes: int = 10, margin: float = 5.0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return logits whose softmax is the distribution that the labels are drawn from."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, size=(num_items, num_classes))
    logits[np.arange(num_items), generator.integers(num_classes, size=num_items)] += margin
    steps = softmax(logits).cumsum(axis=1)
    labels = (steps > generator.uniform(size=(num_items, 1))).argmax(axis=1)
    return logits, labels


def smoothed_loss(logits, labels, temperature):
    share = 1 / (len(labels) + 2)
    scaled = logits / temperature
    logs = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
    own = np.take_along_axis(logs, labels[:, None], axis=1)[:, 0]
    return float(np.mean(-(1 - share) * own - share * logs.mean(axis=1)))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature):
    logits, labels = calibrated(0, 5000)
    assert_allclose(fit_temperature(logits * temperature, labels), temperature, rtol=0.06)


def test_it_mends_overconfidence_on_fresh_items_and_never_changes_an_answer():
    logits, labels = calibrated(0, 2000)
    fresh, fresh_labels = calibrated(1, 5000)
    temperature = fit_temperature(logits * 3, labels)
    before, after = softmax(fresh * 3), softmax(fresh * 3, temperature)
    assert expected_calibration_error(before, fresh_labels) > 0.1
    assert expected_calibration_error(after, fresh_labels) < 0.02
    assert log_loss(fresh_labels, after) < log_loss(fresh_labels, before)
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 50), st.integers(2, 6), st.integers(1, 60))
def test_no_temperature_of_a_fine_grid_has_a_lower_loss(seed, scale, num_classes, num_items):
    logits, labels = calibrated(seed, num_items, num_classes)
    logits *= scale
    best = smoothed_loss(logits, labels, fit_temperature(logits, labels))
    grid = np.geomspace(*TEMPERATURE_RANGE, 100)
    least = min(smoothed_loss(logits, labels, temperature) for temperature in grid)
    assert best <= least + 1e-7 * max(1, abs(least))


def test_all_right_does_not_give_certainty():
    logits = np.eye(10)[np.arange(50) % 10] * 4
    labels = np.arange(50) % 10
    temperature = fit_temperature(logits, labels)
    least = softmax(logits, temperature).max(axis=1).min()
    # One pseudo-item in 52, shared by ten classes, is what 50 right answers leave open.
    assert_allclose(least, 1 - 0.9 / 52, atol=1e-6)


def test_all_wrong_gives_the_most_even_probabilities_that_are_allowed():
    logits = np.eye(4)[np.arange(40) % 4] * 4
    assert fit_temperature(logits, (np.arange(40) + 1) % 4) == TEMPERATURE_RANGE[1]


def test_one_class_only_and_one_item_only_give_a_temperature_within_range():
    logits, _ = calibrated(0, 30, 3)
    for rows in (30, 1):
        temperature = fit_temperature(logits[:rows], np.zeros(rows, dtype=np.int64))
        assert TEMPERATURE_RANGE[0] <= temperature <= TEMPERATURE_RANGE[1]


def test_equal_logits_leave_the_temperature_at_one():
    assert fit_temperature(np.full((5, 3), 7.0), np.array([0, 1, 2, 0, 1])) == 1


def test_float32_logits_of_any_size_are_fine():
    logits, labels = calibrated(0, 200)
    huge = (logits * 1e30).astype(np.float32)
    assert fit_temperature(huge, labels) == TEMPERATURE_RANGE[1]
    assert_allclose(softmax(huge).sum(axis=1), 1)


def test_adding_a_constant_to_a_row_changes_nothing():
    logits, labels = calibrated(0, 100)
    shift = np.random.default_rng(1).normal(0, 100, size=(100, 1))
    assert_allclose(fit_temperature(logits + shift, labels), fit_temperature(logits, labels))
    assert_allclose(softmax(logits + shift), softmax(logits), rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: softmax(np.array([[0.0], [np.nan]])), "1 rows with NaN or infinity.*row 1"),
        (lambda: softmax(np.zeros((1, 2)), 0.0), "temperature must be above 0 and finite; got 0.0"),
        (lambda: fit_temperature(np.array([[np.inf, 0]]), np.array([0])), "must be finite"),
        (lambda: fit_temperature(np.zeros((0, 3)), np.zeros(0, int)), "at least one item"),
        (lambda: fit_temperature(np.zeros((2, 3)), np.zeros(1, int)), r"got \(2, 3\) and \(1,\)"),
        (lambda: fit_temperature(np.zeros((1, 3)), np.array([3])), "from 0 to 2; got 3 to 3"),
    ],
)
def test_wrong_arguments_are_named(call, text):
    with pytest.raises(InvalidValueError, match=text):
        call()
