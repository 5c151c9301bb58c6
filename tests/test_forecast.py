"""The learning curve is measured honestly and led on by the law that it is said to follow."""

import builtins
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kenspeckle import forecast as module
from kenspeckle.core import InvalidValueError, MissingExtraError
from kenspeckle.forecast import forecast, power_law

N = np.array([100.0, 200.0, 400.0, 800.0])


def blobs(num_pictures, num_classes=3, num_dimensions=40, distance=0.35, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_pictures) % num_classes
    centres = np.random.default_rng(99).normal(size=(num_classes, num_dimensions)) * distance
    features = centres[labels] + rng.normal(size=(num_pictures, num_dimensions))
    return features.astype(np.float32), labels


@pytest.fixture
def quick(monkeypatch):
    """Fewer repetitions; what is tested does not hang on their number."""
    monkeypatch.setattr(module, "_NUM_REPETITIONS", 2)
    monkeypatch.setattr(module, "_NUM_FOLDS", 3)
    monkeypatch.setattr(module, "_NUM_RESAMPLES", 30)


@pytest.mark.parametrize("c", module._EXPONENTS[[0, 4, 9]])
@pytest.mark.parametrize("a", [0.0, 0.1])
def test_a_power_law_is_led_on_exactly(a, c):
    errors = a + 0.2 * (N / 100) ** -c
    assert_allclose(power_law(errors, N, np.array([1600.0])), a + 0.2 * 16.0**-c, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_the_fit_is_the_best_of_all(errors):
    """No a, b of a fine grid with any c is better than what was chosen."""
    observed = np.array(errors)
    weights = N / N.sum()
    fitted = power_law(observed, N, N)
    loss = float(weights @ (fitted - observed) ** 2)
    a, b = (grid[..., None, None] for grid in np.meshgrid(*[np.linspace(0, 1, 21)] * 2))
    curves = a + b * (N / N[-1]) ** -module._EXPONENTS[:, None]
    assert loss <= ((curves - observed) ** 2 @ weights).min() + 1e-9


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_more_pictures_never_make_more_errors(errors):
    led = power_law(np.array(errors), N, np.array([800.0, 1600.0, 1e6]))
    assert (np.diff(led) <= 1e-12).all()
    assert (led >= 0).all()


def test_many_curves_are_fitted_at_once():
    errors = np.random.default_rng(0).random((2, 3, 4))
    together = power_law(errors, N, np.array([1600.0]))
    apart = [[power_law(row, N, np.array([1600.0])) for row in block] for block in errors]
    assert_allclose(together, apart)


def test_an_undefined_error_stays_undefined():
    errors = np.array([[0.5, 0.4, np.nan, 0.2], [0.5, 0.4, 0.3, 0.2]])
    assert_array_equal(np.isnan(power_law(errors, N, N)[:, 0]), [True, False])


@pytest.mark.usefixtures("quick")
def test_the_curve_has_an_eighth_to_all_of_the_training_pictures():
    features, labels = blobs(240)
    found = forecast(features, labels, np.arange(240), ["a", "b", "c"], seed=0)
    assert found is not None
    assert found.num_pictures == pytest.approx((20, 40, 80, 160), abs=3)
    assert found.accuracy[-1] > found.accuracy[0] + 0.05
    assert found.low < found.expected < found.high
    assert found.expected >= found.accuracy[-1] - 0.02
    assert all(0 <= deviation < 0.2 for deviation in found.deviation)


@pytest.mark.usefixtures("quick")
def test_classes_are_named_and_the_one_that_gains_most_is_first():
    rng = np.random.default_rng(0)
    features, labels = blobs(300, distance=2.0)
    hard = labels > 0  # two classes that are hard to tell apart, and one that is easy
    features[hard] = rng.normal(size=(hard.sum(), 40)) + 0.25 * np.where(labels[hard] == 1, 1, -1)[
        :, None
    ] * (np.arange(40) < 20)
    found = forecast(features, labels, np.arange(300), ["easy", "one", "other"], seed=0)
    assert found is not None
    assert {one.name for one in found.classes} == {"easy", "one", "other"}
    assert found.classes[-1].name == "easy"
    gains = [one.gain for one in found.classes]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.01
    assert all(one.low < one.gain < one.high for one in found.classes)


@pytest.mark.usefixtures("quick")
def test_twins_in_one_group_do_not_raise_the_curve():
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(100, 150)), 2, axis=0).astype(np.float32)
    labels = np.repeat(rng.integers(0, 2, 100), 2)
    together = forecast(features, labels, np.arange(200) // 2, ["a", "b"], seed=0)
    apart = forecast(features, labels, np.arange(200), ["a", "b"], seed=0)
    assert together is not None
    assert apart is not None
    assert together.accuracy[-1] < 0.62
    assert apart.accuracy[-1] > 0.7


@pytest.mark.usefixtures("quick")
def test_the_seed_decides():
    features, labels = blobs(200)
    one, same, other = (
        forecast(features, labels, np.arange(200), ["a", "b", "c"], seed) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


@pytest.mark.usefixtures("quick")
def test_a_large_set_is_sampled_and_led_on_to_twice_of_all(monkeypatch):
    features, labels = blobs(2000)
    monkeypatch.setattr(module, "_MAX_PICTURES", 240)
    sampled = forecast(features, labels, np.arange(2000), ["a", "b", "c"], seed=0)
    small = forecast(features[:240], labels[:240], np.arange(240), ["a", "b", "c"], seed=0)
    assert sampled is not None
    assert small is not None
    assert sampled.num_pictures[-1] == pytest.approx(160, abs=3)
    assert sampled.expected - sampled.accuracy[-1] > small.expected - small.accuracy[-1]


def test_a_sample_holds_whole_groups():
    groups = np.random.default_rng(0).integers(0, 100, 9000)
    chosen = module._sample(groups, np.random.default_rng(1))
    assert 4800 < len(chosen) <= 5000
    rest = np.setdiff1d(np.arange(9000), chosen)
    assert not set(groups[chosen]) & set(groups[rest])


def test_prefixes_are_stratified_and_nested():
    labels = np.array([0] * 40 + [1] * 8)
    pool = np.random.default_rng(0).permutation(48)
    previous: set[int] = set()
    for share in (1 / 8, 1 / 4, 1 / 2, 1.0):
        chosen = module._first(pool, labels, share)
        assert_array_equal(np.bincount(labels[chosen]), [40 * share, 8 * share])
        assert previous <= set(chosen.tolist())
        previous = set(chosen.tolist())


def test_too_few_pictures_give_none():
    features, labels = blobs(159)
    assert forecast(features, labels, np.arange(159), ["a", "b", "c"], seed=0) is None
    features, labels = blobs(200, num_classes=20)  # ten pictures a class
    assert forecast(features, labels, np.arange(200), [str(k) for k in range(20)], seed=0) is None
    assert forecast(features, labels * 0, np.arange(200), ["a"], seed=0) is None
    assert forecast(features[:0], labels[:0], labels[:0], [], seed=0) is None


@pytest.mark.usefixtures("quick")
def test_small_classes_are_left_out():
    features, labels = blobs(200)
    labels[:19] = 3
    found = forecast(features, labels, np.arange(200), ["a", "b", "c", "rare"], seed=0)
    assert found is not None
    assert {one.name for one in found.classes} == {"a", "b", "c"}


@pytest.mark.usefixtures("quick")
def test_a_class_in_one_group_cannot_be_learned_and_does_not_crash():
    features, labels = blobs(200)
    groups = np.where(labels == 2, 1000, np.arange(200))
    found = forecast(features, labels, groups, ["a", "b", "c"], seed=0)
    assert found is not None
    assert {one.name: one.recall for one in found.classes}["c"] == 0.0
    everything = forecast(features, labels, labels * 0, ["a", "b", "c"], seed=0)
    assert everything is None


@pytest.mark.usefixtures("quick")
def test_what_is_recognised_always_has_an_interval_too():
    features, labels = blobs(200, distance=20.0)
    found = forecast(features, labels, np.arange(200), ["a", "b", "c"], seed=0)
    assert found is not None
    assert found.accuracy == (1.0,) * 4
    assert 0.95 < found.low < found.expected == found.high == 1.0


def test_wrong_arguments_are_named():
    features, labels = blobs(200)
    with pytest.raises(InvalidValueError, match="must have the same length; got 200, 200 and 3"):
        forecast(features, labels, np.arange(3), ["a", "b", "c"], seed=0)
    with pytest.raises(InvalidValueError, match="labels must be from 0 to 1; got 0 to 2"):
        forecast(features, labels, np.arange(200), ["a", "b"], seed=0)


def test_a_missing_extra_is_named(monkeypatch):
    genuine = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "sklearn":
            raise ModuleNotFoundError(name)
        return genuine(name, *arguments, **options)

    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    features, labels = blobs(200)
    with pytest.raises(MissingExtraError, match=r"kenspeckle\[train\]"):
        forecast(features, labels, np.arange(200), ["a", "b", "c"], seed=0)
