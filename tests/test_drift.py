import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chi2_contingency, fisher_exact

from kenspeckle.core import InvalidValueError
from kenspeckle.drift import _auroc, _matched, class_share_shift, feature_drift

DATA = Path(__file__).parents[2] / "shared" / "data"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the pictures in shared/data")


def listed(counts_by_part):
    """Labels and parts for ``{part: counts per class}``."""
    labels = [np.repeat(np.arange(len(counts)), counts) for counts in counts_by_part.values()]
    parts = [part for part, counts in counts_by_part.items() for _ in range(int(np.sum(counts)))]
    return np.concatenate(labels), parts


class TestClassShares:
    def test_a_shift_is_named(self):
        labels, parts = listed({"train": [600, 300, 100], "test": [50, 100, 50]})
        (shift,) = class_share_shift(labels, parts, 3)
        assert (shift.other, shift.label, shift.flagged) == ("test", 0, True)
        assert (shift.share, shift.share_in_other) == (0.6, 0.25)
        assert shift.distance == pytest.approx(0.35)
        assert shift.p_value == pytest.approx(0.0001)

    @pytest.mark.parametrize("counts", [([70, 30], [20, 20]), ([60, 30, 40], [20, 25, 12])])
    def test_p_value_is_that_of_chi_square(self, counts):
        labels, parts = listed(dict(zip(("train", "test"), counts, strict=True)))
        (shift,) = class_share_shift(labels, parts, len(counts[0]))
        expected = chi2_contingency(counts, correction=False).pvalue
        assert shift.p_value == pytest.approx(expected, rel=0.35, abs=0.004)

    def test_p_value_of_small_counts_is_exact(self):
        labels, parts = listed({"train": [9, 3], "test": [1, 5]})
        (shift,) = class_share_shift(labels, parts, 2)
        assert shift.p_value == pytest.approx(fisher_exact([[9, 3], [1, 5]]).pvalue, abs=0.01)

    def test_a_sure_but_trifling_shift_is_not_flagged(self):
        labels, parts = listed({"train": [50_000, 50_000], "test": [51_000, 49_000]})
        (shift,) = class_share_shift(labels, parts, 2)
        assert shift.p_value < 0.001
        assert not shift.flagged

    def test_stratified_splits_are_never_flagged(self):
        generator = np.random.default_rng(0)
        for _ in range(50):
            counts = generator.integers(5, 400, 6)
            labels, parts = listed({"train": counts * 3 // 4, "test": counts - counts * 3 // 4})
            assert not class_share_shift(labels, parts, 6)[0].flagged

    def test_random_splits_are_hardly_ever_flagged(self):
        generator = np.random.default_rng(1)
        labels = generator.integers(0, 10, 3000)
        flags = [
            class_share_shift(labels, generator.choice(["train", "test"], 3000).tolist(), 10)
            for _ in range(20)
        ]
        assert not any(shift.flagged for (shift,) in flags)

    def test_parts_and_pictures_that_do_not_count(self):
        labels = np.array([0, 0, -1, 1, 0, 1, -1])
        parts = ["train", "train", "train", None, "test", "train", "validation"]
        (shift,) = class_share_shift(labels, parts, 3)
        assert (shift.other, shift.share_in_other, shift.flagged) == ("test", 1.0, False)
        assert shift.share == pytest.approx(2 / 3)

    def test_nothing_to_compare(self):
        assert class_share_shift(np.zeros(0, np.int64), [], 0) == ()
        assert class_share_shift(np.zeros(3, np.int64), ["test"] * 3, 1) == ()
        assert class_share_shift(np.zeros(3, np.int64), ["train"] * 3, 1) == ()
        assert class_share_shift(np.full(3, -1), ["train", "test", "test"], 1) == ()

    def test_wrong_input(self):
        with pytest.raises(InvalidValueError, match=r"same length; got \[2, 1\]"):
            class_share_shift(np.zeros(1, np.int64), ["train", "test"], 1)
        with pytest.raises(InvalidValueError, match="labels must be below 2; got 2"):
            class_share_shift(np.array([2]), ["train"], 2)

    @needs_data
    def test_pneumonia(self):
        with zipfile.ZipFile(DATA / "pneumonia.zip") as archive:
            names = [name.split("/") for name in archive.namelist() if name.endswith(".png")]
        labels = np.array([int(label == "pneumonia") for _, label, _ in names])
        test, validation = class_share_shift(labels, [part for part, _, _ in names], 2)
        assert (test.other, test.flagged) == ("test", True)
        assert test.distance == pytest.approx(0.117, abs=0.001)
        assert not validation.flagged


def features_of(num_pictures, seed=0, num_features=12):
    return np.random.default_rng(seed).normal(size=(num_pictures, num_features))


class TestFeatureDrift:
    def test_random_splits_are_not_flagged(self):
        features, labels = features_of(600), np.repeat([0, 1, 2], 200)
        features[:, 0] += 2 * labels
        for seed in range(20):
            generator = np.random.default_rng(seed)
            parts = generator.choice(["train", "test"], 600, p=[0.7, 0.3]).tolist()
            (drift,) = feature_drift(features, labels, parts, np.arange(600), seed)
            assert drift.tested
            assert not drift.flagged

    def test_a_shifted_part_is_flagged_and_shown(self):
        features = features_of(600)
        parts = ["train"] * 300 + ["test"] * 200 + ["validation"] * 100
        features[300:500, 3] += 1.5
        found = feature_drift(features, np.zeros(600, np.int64), parts, np.arange(600), 0)
        assert [(drift.other, drift.flagged) for drift in found] == [
            ("test", True),
            ("validation", False),
        ]
        drift = found[0]
        # Two normal distributions 1.5 apart: the area is that of the standard normal below 1.06.
        assert drift.auroc.low < 0.855 < drift.auroc.high
        assert drift.num_pictures == 200
        assert all(300 <= index < 500 for index in drift.typical_of_other)
        assert all(index < 300 for index in drift.typical)
        assert features[list(drift.typical_of_other), 3].min() > 1.5
        assert features[list(drift.typical), 3].max() < 0

    def test_other_shares_of_the_classes_are_no_drift(self):
        labels, parts = listed({"train": [400, 100], "test": [50, 300]})
        features = features_of(850)
        features[:, 0] += 3 * labels
        (drift,) = feature_drift(features, labels, parts, np.arange(850), 0)
        assert drift.num_pictures == 150
        assert not drift.flagged

    def test_other_groups_are_no_drift(self):
        # Ten pictures of each of 60 patients; a patient is in one part.
        patients = np.repeat(np.arange(60), 10)
        features = np.repeat(features_of(60, num_features=40), 10, axis=0)
        features += 0.1 * features_of(600, 1, num_features=40)
        parts = np.where(patients % 2 == 0, "train", "test").tolist()
        labels = np.zeros(600, np.int64)
        (alone,) = feature_drift(features, labels, parts, np.arange(600), 0)
        (together,) = feature_drift(features, labels, parts, patients, 0)
        assert alone.flagged
        assert not together.flagged

    def test_too_few_are_not_tested(self):
        labels, parts = listed({"train": [300, 0], "test": [5, 60]})
        (drift,) = feature_drift(features_of(365), labels, parts, np.arange(365), 0)
        assert not drift.tested
        assert not drift.flagged
        few = feature_drift(features_of(2), np.full(2, -1), ["train", "test"], np.arange(2), 0)
        assert [drift.tested for drift in few] == [False]
        assert feature_drift(features_of(2), np.zeros(2, int), ["test"] * 2, np.arange(2), 0) == ()

    def test_constant_features(self):
        labels, parts = listed({"train": [60], "test": [40]})
        (drift,) = feature_drift(np.ones((100, 3)), labels, parts, np.arange(100), 0)
        assert drift.auroc.value == pytest.approx(0.5, abs=0.05)
        assert not drift.flagged

    def test_wrong_input(self):
        with pytest.raises(InvalidValueError, match="must have the same length"):
            feature_drift(features_of(3), np.zeros(3, int), ["train"] * 3, np.arange(2), 0)

    @needs_data
    def test_brighter_photographs(self):
        with zipfile.ZipFile(DATA / "cifar10-test.zip") as archive:
            names = [name for name in archive.namelist() if name.endswith(".png")][::16]
            pictures = [Image.open(io.BytesIO(archive.read(name))) for name in names]
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        _, labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
        is_test = np.random.default_rng(0).random(len(names)) < 0.4
        parts = np.where(is_test, "test", "train").tolist()
        for factor, flagged in ((1.0, False), (1.2, True)):
            changed = pixels.astype(np.float64)
            changed[is_test] = np.clip(factor * changed[is_test], 0, 255).astype(np.uint8)
            small = changed.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(len(names), -1)
            (drift,) = feature_drift(small, labels, parts, np.arange(len(names)), 0)
            assert drift.flagged == flagged


class TestParts:
    @settings(max_examples=60)
    @given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
    def test_auroc_counts_pairs(self, drawn):
        scores = np.array([float(score) for score, _ in drawn])
        positive = np.array([flag for _, flag in drawn])
        if positive.all() or not positive.any():
            positive[0] = not positive[0]
        pairs = [
            1.0 if one > other else 0.5 if one == other else 0.0
            for one in scores[positive]
            for other in scores[~positive]
        ]
        auroc = _auroc(scores, positive, np.arange(len(scores)))
        assert auroc.value == pytest.approx(np.mean(pairs))
        assert auroc.low <= auroc.value <= auroc.high

    def test_interval_of_the_auroc_covers(self):
        covered = 0
        for seed in range(200):
            generator = np.random.default_rng(seed)
            positive = np.arange(120) < 50
            scores = generator.normal(size=120) + positive  # one apart: 0.7602
            interval = _auroc(scores, positive, np.arange(120))
            covered += interval.low < 0.7602 < interval.high
        assert 182 <= covered <= 198

    def test_interval_of_the_auroc_is_wider_for_groups(self):
        positive = np.tile([True] * 5 + [False] * 5, 12)
        scores = np.repeat(np.random.default_rng(0).normal(size=24), 5) + positive
        alone = _auroc(scores, positive, np.arange(120))
        together = _auroc(scores, positive, np.arange(120) // 5)
        assert together.high - together.low > 1.5 * (alone.high - alone.low)

    @settings(max_examples=60)
    @given(
        st.lists(st.tuples(st.integers(-1, 3), st.sampled_from(["train", "test", ""])), min_size=1)
    )
    def test_matching_takes_as_many_of_each_class(self, drawn):
        labels = np.array([label for label, _ in drawn])
        parts = np.array([part for _, part in drawn])
        sides = parts == "train", parts == "test"
        chosen = _matched(labels, *sides, generator=np.random.default_rng(0))
        assert len(set(chosen.tolist())) == len(chosen)
        for label in range(-1, 4):
            fewest = min(int(np.sum(side & (labels == label))) for side in sides)
            for side in sides:
                assert np.sum(side[chosen] & (labels[chosen] == label)) == fewest

    def test_matching_keeps_within_the_limit(self):
        labels, parts = listed({"train": [9000, 300, 40], "test": [4000, 500, 40]})
        is_train = np.array(parts) == "train"
        chosen = _matched(labels, is_train, ~is_train, generator=np.random.default_rng(0))
        assert len(chosen) <= 5000
        np.testing.assert_array_equal(np.bincount(labels[chosen]), [4608, 344, 46])
