"""Wrong labels and strangers are found, and groups are kept on one side."""

import builtins
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kenspeckle import suspects
from kenspeckle.core import InvalidValueError, MissingExtraError
from kenspeckle.suspects import compact, label_suspects, out_of_fold, outliers


def clusters(num_pictures, num_classes, num_dimensions=32, distance=3.0, seed=0):
    """Return non-negative features around one centre a class, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_pictures)
    centres = np.abs(rng.normal(size=(num_classes, num_dimensions))) * distance
    noise = rng.normal(size=(num_pictures, num_dimensions))
    return np.abs(centres[labels] + noise).astype(np.float32), labels


def test_flipped_labels_come_first_and_their_class_is_suggested():
    features, truth = clusters(400, 4)
    labels = truth.copy()
    flipped = np.random.default_rng(1).permutation(400)[:20]
    labels[flipped] = (labels[flipped] + 1) % 4
    probabilities = out_of_fold(compact(features), labels, np.arange(400), 4, seed=0)
    found = label_suspects(probabilities, labels)
    assert np.isin(flipped, found.ranking[:40]).mean() >= 0.95
    assert np.mean(found.suggested[flipped] == truth[flipped]) >= 0.95
    assert 12 <= found.num_issues <= 28


def test_clean_labels_give_no_issues():
    features, labels = clusters(300, 3, distance=6.0)
    found = label_suspects(out_of_fold(features, labels, np.arange(300), 3, seed=0), labels)
    assert found.num_issues == 0


def test_the_ranking_is_that_of_the_probability_of_the_label():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    found = label_suspects(probabilities, np.array([0, 0, 1]))
    assert_array_equal(found.ranking, [1, 2, 0])
    assert_allclose(found.quality, [0.9, 0.2, 0.6])
    assert_array_equal(found.suggested, [0, 1, 1])


def test_issues_head_the_ranking():
    from cleanlab.filter import find_label_issues

    features, labels = clusters(300, 3, distance=0.7)
    probabilities = out_of_fold(features, labels, np.arange(300), 3, seed=0)
    found = label_suspects(probabilities, labels)
    mask = find_label_issues(labels, probabilities, filter_by="low_self_confidence", n_jobs=1)
    assert found.num_issues > 0
    assert set(found.ranking[: found.num_issues]) == set(np.flatnonzero(mask))


def test_a_picture_never_sees_its_group():
    """Labels are noise and pairs are equal: only who sees the twin does better than chance."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, 150), 2)
    features = np.repeat(rng.normal(size=(150, 200)), 2, axis=0).astype(np.float32)
    apart, together = (
        out_of_fold(features, labels, groups, 2, seed=0).argmax(axis=1) == labels
        for groups in (np.arange(300), np.arange(300) // 2)
    )
    assert together.mean() < 0.6
    assert apart.mean() > 0.75


def test_folds_hold_every_class():
    labels = clusters(200, 2)[1]
    folds = list(suspects._folds(labels, np.arange(200), 0, 5))
    shares = [labels[asked].mean() for _, asked in folds]
    assert_allclose(shares, labels.mean(), atol=0.03)
    assert_array_equal(np.sort(np.concatenate([asked for _, asked in folds])), np.arange(200))


def test_small_classes_are_left_alone():
    features, labels = clusters(100, 2)
    labels[0], labels[1:4] = 2, 3  # one picture, and three of one group
    groups = np.arange(100)
    groups[1:4] = 1
    probabilities = out_of_fold(features, labels, groups, 5, seed=0)
    assert_allclose(probabilities.sum(axis=1), 1)
    assert_array_equal(probabilities[np.arange(4), labels[:4]], 1.0)
    assert_array_equal(probabilities[4:, 4], 0.0)
    assert 0 not in label_suspects(probabilities, labels).ranking[:50]


@pytest.mark.parametrize(
    ("labels", "groups"),
    [([0, 1, 2], [0, 1, 2]), ([0, 0, 1, 1], [0, 0, 0, 0]), ([0, 0, 0], [0, 1, 2]), ([0], [0])],
)
def test_nothing_is_said_where_nothing_can_be_learned(labels, groups):
    features = np.eye(len(labels), dtype=np.float32)
    found = out_of_fold(features, np.array(labels), np.array(groups), 3, seed=0)
    assert_array_equal(found, np.eye(3)[labels])


def test_probabilities_are_calibrated():
    """Of the answers given with more than 0.5, as many are right as their mean says."""
    features, labels = clusters(1500, 3, distance=0.6)
    found = out_of_fold(features, labels, np.arange(1500), 3, seed=0)
    assert abs(found.max(axis=1).mean() - np.mean(found.argmax(axis=1) == labels)) < 0.03


def test_the_seed_decides():
    features, labels = clusters(100, 3)
    one, same, other = (
        out_of_fold(features, labels, np.arange(100), 3, seed=seed) for seed in (1, 1, 2)
    )
    assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_compact_features_keep_distances_of_roots():
    features = clusters(60, 3, num_dimensions=10)[0]
    features[:, 0] *= -1
    small = compact(features)
    even = np.sign(features) * np.sqrt(np.abs(features))
    assert small.shape == (60, 10)
    wanted = np.linalg.norm(even[:, None] - even[None], axis=2)
    assert_allclose(np.linalg.norm(small[:, None] - small[None], axis=2), wanted, atol=1e-4)


def test_compact_features_are_at_most_256_and_at_most_n():
    noise = np.random.default_rng(0).normal(size=(300, 260)).astype(np.float32)
    assert compact(noise).shape == (300, 256)
    assert compact(noise[:7]).shape == (7, 7)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 120), st.integers(1, 40), st.integers(0, 99))
def test_neighbour_distances_equal_the_definition(num_pictures, num_groups, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_pictures, 5)).astype(np.float32)
    groups = rng.integers(0, num_groups, num_pictures)
    k = min(50, max(1, num_pictures // 20))
    wanted = []
    for i in range(num_pictures):
        cosines = [
            float(features[i] @ features[j] / np.prod(np.linalg.norm(features[[i, j]], axis=1)))
            if groups[i] != groups[j]
            else -1.0
            for j in range(num_pictures)
        ]
        wanted.append(1 - sorted(cosines, reverse=True)[k - 1])
    assert_allclose(suspects._neighbour_distances(features, groups, 0), wanted, atol=1e-5)


def test_blocks_and_samples_change_little(monkeypatch):
    features = clusters(900, 3)[0]
    whole = suspects._neighbour_distances(features, np.arange(900), 0)
    monkeypatch.setattr(suspects, "_BLOCK_PICTURES", 7)
    assert_allclose(suspects._neighbour_distances(features, np.arange(900), 0), whole, atol=1e-6)
    monkeypatch.setattr(suspects, "_MAX_REFERENCES", 300)
    sampled = suspects._neighbour_distances(features, np.arange(900), 0)
    assert np.corrcoef(whole, sampled)[0, 1] > 0.9


@pytest.mark.parametrize("with_labels", [True, False])
def test_strangers_are_found_even_when_they_are_alike(with_labels):
    features, labels = clusters(1000, 1)
    strangers = clusters(20, 1, seed=5)[0]
    mixed = np.concatenate([features, strangers])
    given_labels = np.zeros(1020, np.int64) if with_labels else None
    found = outliers(mixed, given_labels, np.arange(1020), seed=0)
    assert set(found.ranking[:20]) == set(range(1000, 1020))
    assert 20 <= found.num_outliers <= 30
    assert outliers(features, labels, np.arange(1000), seed=0).num_outliers <= 10


def test_a_rare_class_is_no_crowd_of_outliers():
    features, labels = clusters(1000, 1)
    rare = clusters(30, 1, seed=5)[0]
    mixed, both = np.concatenate([features, rare]), np.append(labels, np.ones(30, np.int64))
    found = outliers(mixed, both, np.arange(1030), seed=0)
    blind = outliers(mixed, None, np.arange(1030), seed=0)
    assert np.sum(found.ranking[: found.num_outliers] >= 1000) <= 3
    assert np.sum(blind.ranking[: blind.num_outliers] >= 1000) == 30


def test_copies_of_an_outlier_do_not_hide_it():
    """At k = 1 a copy would be the nearest neighbour."""
    features = clusters(30, 1)[0]
    stranger = np.repeat(clusters(1, 1, seed=5)[0], 2, axis=0)
    mixed = np.concatenate([features, stranger])
    groups = np.append(np.arange(30), [99, 99])
    assert set(outliers(mixed, None, groups, seed=0).ranking[:2]) == {30, 31}
    assert not {30, 31} & set(outliers(mixed, None, np.arange(32), seed=0).ranking[:2])


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_outliers_of_hardly_any_pictures(num_pictures):
    groups = np.arange(num_pictures)
    found = outliers(np.ones((num_pictures, 3), np.float32), groups, groups, seed=0)
    assert found.num_outliers == 0
    assert_array_equal(np.sort(found.ranking), groups)


def test_black_pictures_with_zero_features_are_finite():
    found = outliers(np.zeros((30, 4), np.float32), None, np.arange(30), seed=0)
    assert np.isfinite(found.score).all()


def test_wrong_arguments_are_named():
    features, labels = clusters(20, 2)
    with pytest.raises(InvalidValueError, match="groups must have one row per picture, 20; got 3"):
        out_of_fold(features, labels, np.arange(3), 2, seed=0)
    with pytest.raises(InvalidValueError, match="labels must be from 0 to 0; got 1"):
        out_of_fold(features, labels, np.arange(20), 1, seed=0)
    with pytest.raises(InvalidValueError, match="num_folds must be at least 2; got 1"):
        out_of_fold(features, labels, np.arange(20), 2, seed=0, num_folds=1)
    with pytest.raises(InvalidValueError, match="at least two classes; got 1"):
        label_suspects(np.ones((20, 1)), np.zeros(20, np.int64))
    with pytest.raises(InvalidValueError, match="labels must have one row per picture, 20"):
        outliers(features, labels[:3], np.arange(20), seed=0)


def test_a_missing_extra_is_named(monkeypatch):
    genuine = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] in {"cleanlab", "sklearn"}:
            raise ModuleNotFoundError(name)
        return genuine(name, *arguments, **options)

    for name in [name for name in sys.modules if name.startswith(("cleanlab", "sklearn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    features, labels = clusters(20, 2)
    with pytest.raises(MissingExtraError, match=r"kenspeckle\[check\]"):
        label_suspects(np.full((20, 2), 0.5), labels)
    with pytest.raises(MissingExtraError, match=r"kenspeckle\[train\]"):
        compact(features)
    with pytest.raises(MissingExtraError, match=r"kenspeckle\[train\]"):
        out_of_fold(features, labels, np.arange(20), 2, seed=0)


@pytest.mark.slow
def test_five_thousand_pictures_take_ten_seconds():
    features, labels = clusters(5000, 10, num_dimensions=1280)
    begun = time.perf_counter()
    out_of_fold(compact(features), labels, np.arange(5000), 10, seed=0)
    assert time.perf_counter() - begun < 10
