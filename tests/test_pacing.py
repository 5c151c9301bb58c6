"""A schedule comes to its end by the deadline, and without one a step is a step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kenspeckle.pacing import NUM_MEASURED, Pace


def steps_until_over(pace, seconds_per_step, validation_seconds=0.0, limit=10_000):
    """Run a schedule against a made-up clock; return the steps made and the time at the end."""
    now = number = 0
    while not pace.over and number < limit:
        if number % pace.steps_per_epoch == 0:
            pace.start(now)
        now += seconds_per_step(number)
        pace.step_done(now)
        number += 1
        if number % pace.steps_per_epoch == 0 or pace.over:
            now += validation_seconds
            pace.validation_seconds = validation_seconds
    return number, now


@given(st.integers(1, 300), st.integers(1, 50))
def test_without_a_deadline_the_position_is_the_steps_number(num_steps, per_epoch):
    pace = Pace(num_steps, per_epoch)
    for number in range(num_steps):
        assert pace.position == number
        assert not pace.over
        pace.step_done(float(number * number))
    assert pace.over


@given(st.integers(20, 400), st.floats(0.01, 5), st.floats(1.0, 20.0))
def test_with_time_to_spare_no_step_is_left_out(num_steps, seconds, spare):
    pace = Pace(num_steps, 10, deadline=num_steps * seconds * (1 + spare))
    assert steps_until_over(pace, lambda _: seconds)[0] == num_steps


@given(st.integers(60, 400), st.floats(0.01, 5), st.floats(0.2, 0.95), st.floats(0, 3))
def test_a_schedule_that_would_take_too_long_ends_by_the_deadline(
    num_steps, seconds, share, validation
):
    deadline = num_steps * seconds * share + validation * (num_steps / 20 + 1)
    pace = Pace(num_steps, 20, deadline, validation)
    _, end = steps_until_over(pace, lambda _: seconds, validation)
    assert end <= deadline + 2 * seconds + validation + 1e-6
    assert end >= 0.8 * deadline - (NUM_MEASURED + 2) * seconds - 2 * validation


def test_a_machine_that_slows_down_is_noticed():
    pace = Pace(1000, 50, deadline=100.0)
    number, end = steps_until_over(pace, lambda n: 0.1 if n < 300 else 0.4)
    assert 300 < number < 600
    assert 90 < end < 101


def test_a_deadline_that_has_passed_ends_it_at_once():
    pace = Pace(1000, 50, deadline=0.0)
    assert steps_until_over(pace, lambda _: 1.0)[0] == NUM_MEASURED


def test_the_position_never_goes_back_nor_beyond_what_is_needed():
    pace = Pace(100, 10, deadline=30.0)
    before = -1.0
    now = 0.0
    while not pace.over:
        assert pace.position > before
        before = pace.position
        now += 1.0
        pace.step_done(now)
    assert pace.position == pytest.approx(100, abs=5)


def test_the_epochs_left_follow_from_the_pace():
    pace = Pace(100, 10, deadline=50.0)
    assert pace.num_epochs_left == 10
    for second in range(1, 11):
        pace.step_done(float(second))
    assert pace.num_epochs_left == math.ceil(40 / 10)
