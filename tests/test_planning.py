"""Times are read and written, and a route fits into the time that there is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kenspeckle.config import CnnConfig
from kenspeckle.core import InvalidValueError
from kenspeckle.models import build
from kenspeckle.planning import (
    FEW_EPOCHS,
    GOOD_EPOCHS,
    MOST_EPOCHS,
    SIDES,
    Job,
    Speeds,
    duration_words,
    final_seconds,
    first_seconds,
    measure_speeds,
    plan_route,
    planned,
    seconds_of,
    tail_seconds,
    training_seconds,
)

CPU = torch.device("cpu")
FLOWERS = Job(3022, 647, 648, side=160, typical=128.0, reading=1e-3, num_classes=5)
LAPTOP = Speeds(side=128, forward=2e-3, training=9e-3)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("30", 30),
        ("5m", 300),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1.5m", 90),
        ("7M", 420),
    ],
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 minutes", "-5m", "5m30", "h", "1m1h", "nan"])
def test_what_is_no_time_is_refused(text):
    if text == "5m30":
        assert seconds_of(text) == 330  # the last unit may be left out
        return
    with pytest.raises(InvalidValueError, match="such as 30s, 5m or 1h30m"):
        seconds_of(text)


@pytest.mark.parametrize("text", ["0s", "4s", "200h"])
def test_a_time_out_of_range_is_refused(text):
    with pytest.raises(InvalidValueError, match="from 5s to 168h"):
        seconds_of(text)


@given(st.integers(5, 7 * 24 * 3600))
def test_a_time_in_words_is_read_back(seconds):
    assert seconds_of(duration_words(seconds)) == seconds


def jobs():
    return st.builds(
        lambda n, k, side, reading: Job(n, n // k + 1, n // k, side, side / 2, reading, k),
        st.integers(10, 200_000),
        st.integers(3, 9),
        st.sampled_from(SIDES[2:]),
        st.floats(1e-4, 2e-2),
    )


def speeds():
    return st.builds(
        lambda forward, ratio: Speeds(128, forward, forward * ratio),
        st.floats(1e-4, 2e-2),
        st.floats(2, 12),
    )


@given(jobs(), speeds(), st.floats(10, 100_000), st.booleans())
def test_a_route_fits_into_its_time_or_is_refused(job, speeds, seconds, has_tail):
    try:
        route = plan_route(job, speeds, seconds, has_tail)
    except InvalidValueError:
        assert first_seconds(job, speeds, SIDES[0]) > seconds
        return
    assert route.side in SIDES
    assert route.side <= job.side
    assert route.first == first_seconds(job, speeds, route.side) <= seconds
    assert has_tail or route.tail == 0
    assert 0 <= route.full_epochs <= MOST_EPOCHS
    spent = route.first + route.tail
    if route.tail and not route.full_epochs:
        assert spent + final_seconds(job, speeds, route.side) < seconds
    assert (route.needed > 0) == (route.full_epochs == 0)


@given(jobs(), speeds(), st.floats(100, 10_000))
def test_more_time_never_means_smaller_pictures_where_everything_is_trained(job, speeds, seconds):
    try:
        less = plan_route(job, speeds, seconds, True)
    except InvalidValueError:
        return
    more = plan_route(job, speeds, 2 * seconds, True)
    if less.full_epochs >= GOOD_EPOCHS:
        assert more.side >= less.side
        assert more.full_epochs >= GOOD_EPOCHS


def test_the_ladder_grows_with_the_time():
    half, one, five, twenty = (
        plan_route(FLOWERS, LAPTOP, seconds, True) for seconds in (27, 56, 290, 1180)
    )
    assert (half.full_epochs, half.tail) == (0, 0)
    assert one.full_epochs == 0
    assert five.full_epochs >= FEW_EPOCHS
    assert twenty.full_epochs >= GOOD_EPOCHS
    assert twenty.side > five.side
    assert 0 < twenty.tail < 0.2 * 1180


def test_a_time_that_is_too_short_is_refused_with_the_least():
    with pytest.raises(InvalidValueError, match=r"4,317 pictures takes about \d+s more"):
        plan_route(FLOWERS, LAPTOP, 8.0, True)


def test_the_seconds_of_a_tail_grow_with_its_epochs():
    first, second = (tail_seconds(FLOWERS, LAPTOP, 128, epochs) for epochs in (1, 11))
    assert second > first > 0


def test_speeds_are_measured_and_scale_with_the_pixels():
    network = build(CnnConfig(channels=(4,)), 3, (16, 16), torch.Generator())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = measure_speeds(network, 16, CPU, choose_threads=True)
    assert found.forward > 0
    assert found.training > 0
    assert found.forward_at(32) == pytest.approx(4 * found.forward)
    assert found.training_at(8) == pytest.approx(found.training / 4)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert training_seconds(network, (16, 16), 4, CPU) > 0


def test_a_planned_run_takes_what_it_does_not_choose():
    found = planned(["seed=7", "size=96", "validation=0.2"], time="2m")
    assert found.recipe.seed == 7
    assert found.recipe.pixels.size == (96, 96)
    assert found.pinned == {"seed", "pixels.size", "split.validation"}
    assert found.seconds == 120
    assert planned([]).seconds is None


@pytest.mark.parametrize("word", ["lr=0.1", "epochs=3", "model=resnet", "imbalance=weights"])
def test_a_planned_run_refuses_what_it_chooses(word):
    with pytest.raises(InvalidValueError, match="has no effect without a recipe"):
        planned([word])


def test_a_backbone_without_weights_is_refused():
    with pytest.raises(InvalidValueError, match="no effect with --weights none"):
        planned([], backbone="efficientnet-lite0", weights="none")
    with pytest.raises(InvalidValueError, match="did you mean 'efficientnet-lite0'"):
        planned([], backbone="efficientnet-lite00")


def test_a_graph_that_is_known_need_not_be_exported():
    known = replace(FLOWERS, exported=frozenset({96}))
    seconds = [first_seconds(job, LAPTOP, 96) for job in (FLOWERS, known)]
    assert seconds[0] > seconds[1] + 2
    assert first_seconds(known, LAPTOP, 128) == first_seconds(FLOWERS, LAPTOP, 128)
