import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.naive_bayes import CategoricalNB

from kenspeckle import shortcuts
from kenspeckle.core import InvalidValueError
from kenspeckle.shortcuts import NUM_FOLDS, Traits, find_shortcuts

DATA = Path(__file__).parents[2] / "shared" / "data"

FILE_TRAITS = {
    "file size": "num_bytes",
    "file format": "format",
    "colour mode": "mode",
    "resolution": "height",
    "aspect ratio": "width",
    "JPEG quality": "quality",
    "camera": "camera",
}
CORNERS = {
    "top-left corner": (0, 0),
    "top-right corner": (0, 30),
    "bottom-left corner": (30, 0),
    "bottom-right corner": (30, 30),
}
NAMES = [*FILE_TRAITS, "mean colour", "border", *CORNERS]


def scenes(num_pictures, seed=0):
    """Smooth random pictures, ``uint8 (N, 32, 32, 3)``."""
    coarse = np.random.default_rng(seed).integers(0, 256, (num_pictures, 6, 6, 3)).astype(np.uint8)
    size = (32, 32)
    return np.stack([np.asarray(Image.fromarray(one).resize(size)) for one in coarse])


def traits_of(num_pictures, seed=0, **changed):
    generator = np.random.default_rng(seed)
    alike = np.full(num_pictures, 1)
    plain = {
        "num_bytes": generator.integers(2000, 9000, num_pictures),
        **dict.fromkeys(("height", "width"), alike.astype(np.int32)),
        "quality": np.full(num_pictures, -1, np.int16),
        **dict.fromkeys(("format", "mode"), alike),
        "camera": np.zeros(num_pictures, np.int64),
        "sketches": scenes(num_pictures, seed),
    }
    return Traits(**(plain | changed))


def found_in(traits, labels, groups=None, num_classes=None, seed=0):
    groups = np.arange(len(labels)) if groups is None else groups
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    found = find_shortcuts(traits, labels, groups, num_classes, seed)
    assert [shortcut.name for shortcut in found] == NAMES
    return {shortcut.name: shortcut for shortcut in found}


def suspicious(found):
    return [name for name, shortcut in found.items() if shortcut.suspicious]


def marked(sketches, labels, label, place, share, elsewhere=0.0, seed=0):
    """Paint a red mark of 2x2 sketch pixels into that share of a class, and of the others."""
    drawn = np.random.default_rng(seed).random(len(labels))
    chosen = np.where(labels == label, drawn < share, drawn < elsewhere)
    sketches = sketches.copy()
    top, left = place
    sketches[chosen, top : top + 2, left : left + 2] = (230, 20, 40)
    return sketches, chosen


LABELS = np.arange(600) % 3


class TestNothingPlanted:
    @pytest.mark.parametrize("seed", range(4))
    def test_nothing_is_suspicious(self, seed):
        found = found_in(traits_of(600, seed), LABELS, seed=seed)
        assert suspicious(found) == []
        for name in ("file size", "mean colour", "border", *CORNERS):
            shortcut = found[name]
            assert shortcut.tested
            assert abs(shortcut.accuracy.value - 1 / 3) < 0.08
            assert abs(shortcut.permuted - 1 / 3) < 0.08
            assert shortcut.chance == pytest.approx(1 / 3)
            assert (shortcut.given_away, shortcut.examples, shortcut.contrasts) == (None, (), ())

    def test_traits_that_are_alike_are_not_tested(self):
        found = found_in(traits_of(600), LABELS)
        for name in set(FILE_TRAITS) - {"file size"}:
            assert not found[name].tested
            assert found[name].words == "alike in all pictures"

    def test_blank_pictures(self):
        found = found_in(traits_of(60, sketches=np.zeros((60, 32, 32, 3), np.uint8)), LABELS[:60])
        assert [name for name, shortcut in found.items() if shortcut.tested] == ["file size"]

    def test_a_class_can_be_told_from_anywhere(self):
        sketches = scenes(600).astype(np.int64)
        sketches[LABELS == 1] += 70
        found = found_in(
            traits_of(600, sketches=np.clip(sketches, 0, 255).astype(np.uint8)), LABELS
        )
        assert found["top-left corner"].accuracy.low > 1 / 3 + 0.05
        assert found["top-left corner"].elsewhere > 1 / 3 + 0.05
        assert suspicious(found) == []


class TestFileTraits:
    @pytest.mark.parametrize("name", FILE_TRAITS)
    def test_each_is_found(self, name):
        generator = np.random.default_rng(0)
        values = np.where(
            generator.random(600) < 0.9, 3 + 2 * LABELS, generator.integers(2, 9, 600)
        )
        traits = traits_of(600, **{FILE_TRAITS[name]: values.astype(np.int32)})
        found = found_in(traits, LABELS)
        also = {"resolution", "aspect ratio"} if name in {"resolution", "aspect ratio"} else {name}
        assert set(suspicious(found)) == also
        shortcut = found[name]
        assert shortcut.accuracy.low > 0.85
        assert np.mean(shortcut.recall) == pytest.approx(shortcut.accuracy.value)
        assert {int(LABELS[index]) for index in shortcut.examples} == {shortcut.given_away}
        assert shortcut.given_away not in LABELS[list(shortcut.contrasts)]
        assert set(values[list(shortcut.examples)]) == {3 + 2 * shortcut.given_away}

    def test_one_class_of_many_gives_itself_away(self):
        labels = np.arange(1000) % 20
        formats = (labels == 7).astype(np.int64)
        found = found_in(traits_of(1000, format=formats), labels)
        assert suspicious(found) == ["file format"]
        shortcut = found["file format"]
        assert shortcut.accuracy.value < 0.15
        assert shortcut.given_away == 7
        assert shortcut.recall[7] == 1

    def test_many_distinct_resolutions(self):
        generator = np.random.default_rng(0)
        height = generator.integers(100, 400, 600) + 300 * (LABELS == 2)
        width = generator.integers(100, 400, 600)
        found = found_in(traits_of(600, height=height, width=width), LABELS)
        assert found["resolution"].suspicious
        assert found["resolution"].given_away == 2

    def test_groups_do_not_vouch_for_themselves(self):
        # Every patient has a camera of his own; the camera tells nothing of a new patient.
        patients = np.arange(600) // 20
        labels = patients % 3
        traits = traits_of(600, camera=patients + 1)
        assert found_in(traits, labels)["camera"].suspicious
        shortcut = found_in(traits, labels, patients)["camera"]
        assert shortcut.accuracy.value < 0.5
        assert not shortcut.suspicious

    def test_interval_counts_groups(self):
        size = 1000 * LABELS + np.random.default_rng(0).integers(0, 2500, 600)
        alone = found_in(traits_of(600, num_bytes=size), LABELS)["file size"].accuracy
        groups = LABELS + 3 * (np.arange(600) // 30)  # ten pictures each, of one class
        together = found_in(traits_of(600, num_bytes=size), LABELS, groups)["file size"].accuracy
        assert together.high - together.low > 2 * (alone.high - alone.low)


class TestMarks:
    @pytest.mark.parametrize("name", CORNERS)
    @pytest.mark.parametrize(("share", "elsewhere"), [(1.0, 0.0), (0.8, 0.02)])
    def test_a_corner_mark_is_found(self, name, share, elsewhere):
        sketches, chosen = marked(scenes(600), LABELS, 1, CORNERS[name], share, elsewhere)
        found = found_in(traits_of(600, sketches=sketches), LABELS)
        assert suspicious(found) == [name]
        shortcut = found[name]
        assert shortcut.given_away == 1
        assert shortcut.accuracy.value > shortcut.elsewhere
        assert shortcut.recall[1] > 0.6
        assert LABELS[list(shortcut.examples)].tolist() == [1] * 6
        assert chosen[list(shortcut.examples)].all()
        assert not chosen[list(shortcut.contrasts)].any()

    def test_a_frame_is_found(self):
        sketches = scenes(600)
        framed = LABELS == 2
        sketches[framed, 0] = sketches[framed, -1] = 128
        found = found_in(traits_of(600, sketches=sketches), LABELS)
        assert "border" in suspicious(found)
        assert found["border"].given_away == 2

    def test_classes_that_are_colours(self):
        sketches = (scenes(600) // 4 + 60 * LABELS[:, None, None, None]).astype(np.uint8)
        found = found_in(traits_of(600, sketches=sketches), LABELS)
        assert suspicious(found) == ["mean colour"]

    def test_indices_are_those_of_the_data_set(self):
        # Unlabelled pictures come first, and more pictures than are used.
        labels = np.concatenate([np.full(500, -1), np.arange(7000) % 2])
        small = np.zeros((7500, 32, 32, 3), np.uint8)
        formats = np.where(labels == 1, 5, 4)
        found = found_in(traits_of(7500, sketches=small, format=formats), labels, num_classes=2)
        shortcut = found["file format"]
        assert shortcut.accuracy.value == 1
        assert (labels[list(shortcut.examples)] == shortcut.given_away).all()
        assert (labels[list(shortcut.contrasts)] == 1 - shortcut.given_away).all()


class TestFewAndMany:
    @pytest.mark.parametrize(
        "labels", [[], [0], [-1, -1], [0, 1, 2, 3], [0] * 9 + [1] * 4, [0] * 30, [0, 1, 0, 1]]
    )
    def test_too_few(self, labels):
        labels = np.array(labels, np.int64)
        traits = traits_of(5)
        traits = Traits(
            **{name: np.resize(a, (len(labels), *a.shape[1:])) for name, a in vars(traits).items()}
        )
        found = found_in(traits, labels, num_classes=4)
        for shortcut in found.values():
            assert not shortcut.tested
            assert not shortcut.suspicious
            assert shortcut.words.startswith("too few pictures")

    def test_few_groups_are_few_pictures(self):
        found = found_in(traits_of(60), LABELS[:60], groups=LABELS[:60])
        assert not any(shortcut.tested for shortcut in found.values())

    def test_ten_pictures(self):
        labels = np.arange(10) % 2
        found = found_in(traits_of(10, format=labels), labels)
        assert found["file format"].tested
        assert not found["top-left corner"].suspicious

    def test_classes_with_too_few_are_left_out(self):
        labels = np.concatenate([LABELS[:300], [3, 3, 4]])
        formats = np.where(labels == 1, 2, 1)
        shortcut = found_in(traits_of(303, format=formats), labels)["file format"]
        assert shortcut.chance == pytest.approx(1 / 3)
        assert np.isnan(shortcut.recall).tolist() == [False] * 3 + [True] * 2
        assert shortcut.given_away == 1

    def test_many_classes(self):
        labels = np.arange(1000) % 200
        found = found_in(traits_of(1000, camera=np.where(labels < 100, 1, 2)), labels)
        assert found["camera"].tested
        assert suspicious(found) == []

    @given(st.lists(st.integers(0, 9000), min_size=1, max_size=30))
    def test_cap(self, counts):
        counts = np.array(counts)
        cap = shortcuts._cap(counts)

        def used(most):
            return int(np.minimum(counts, most).sum())

        if counts.sum() <= 5000:
            assert cap == counts.max()
        else:
            assert used(cap) <= 5000 < used(cap + 1)

    def test_the_limit_spares_small_classes(self):
        labels = np.repeat([0, 1, 2], [9000, 3000, 40])
        sample = shortcuts._sample(labels, np.arange(len(labels)), 3, seed=0)
        np.testing.assert_array_equal(np.bincount(sample.labelings[0]), [2480, 2480, 40])


class TestProcedure:
    @given(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=30, max_size=80),
        st.integers(0, 99),
    )
    def test_groups_stay_within_a_fold(self, drawn, seed):
        labels, groups = np.array(drawn).T
        folds = shortcuts._folds(labels, groups, np.random.default_rng(seed))
        assert folds.min() >= 0
        assert folds.max() < NUM_FOLDS
        for group in np.unique(groups):
            assert len(np.unique(folds[groups == group])) == 1

    def test_folds_are_stratified(self):
        labels = np.repeat([0, 1, 2], [50, 23, 5])
        folds = shortcuts._folds(labels, np.arange(78), np.random.default_rng(0))
        for label, count in enumerate((50, 23, 5)):
            found = np.bincount(folds[labels == label], minlength=NUM_FOLDS)
            assert found.max() - found.min() <= 1
            assert found.sum() == count

    def test_bayes_is_naive_bayes_on_one_code(self):
        generator = np.random.default_rng(0)
        codes = (generator.integers(0, 4, 600) + LABELS) % 6
        sample = shortcuts._sample(LABELS, np.arange(600), 3, seed=0)
        own = shortcuts._bayes(codes, LABELS, sample).argmax(axis=1)
        for fold in range(NUM_FOLDS):
            held = sample.folds == fold
            other = CategoricalNB(alpha=0.2, fit_prior=False, min_categories=6)
            other.fit(codes[~held, None], LABELS[~held])
            np.testing.assert_array_equal(own[held], other.predict(codes[held, None]))

    def test_discriminant_is_that_of_scikit_learn(self):
        # Without shrinkage, and on features that are not collinear, the two agree exactly.
        sample = shortcuts._sample(LABELS, np.arange(600), 3, seed=0)
        grey = scenes(600)[:, :1, :1] // 2 + 40 * LABELS[:, None, None, None]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shortcuts, "_SHRINKAGE", 0.0)
            patch.setattr(shortcuts, "_basis", lambda x: x.reshape(len(x), -1) / 255)
            own = shortcuts._discriminant(grey, sample)[0].argmax(axis=1)
        x = grey.reshape(600, -1) / 255
        for fold in range(NUM_FOLDS):
            held = sample.folds == fold
            other = LinearDiscriminantAnalysis(solver="lsqr", priors=np.ones(3) / 3)
            other.fit(x[~held], LABELS[~held])
            np.testing.assert_array_equal(own[held], other.predict(x[held]))

    @given(st.lists(st.tuples(st.integers(-9, 9), st.booleans()), min_size=2, max_size=80))
    def test_sensitivity_keeps_its_specificity(self, drawn):
        leads = np.array([float(lead) for lead, _ in drawn])
        own = np.array([flag for _, flag in drawn])
        own[:2] = [True, False]
        plain, cautious = shortcuts._sensitivity(leads, own)
        thresholds = [t for t in leads[~own] if np.mean(leads[~own] > t) <= 0.05]
        assert plain == max(np.mean(leads[own] > t) for t in thresholds)
        assert cautious <= plain

    def test_same_seed_same_result(self):
        traits = traits_of(300)
        labels = LABELS[:300]
        first, second = (found_in(traits, labels, seed=3) for _ in range(2))
        for name, shortcut in first.items():
            assert repr(shortcut) == repr(second[name])

    def test_wrong_input(self):
        traits = traits_of(4)
        with pytest.raises(InvalidValueError, match=r"must be as many; got .*'labels': 3"):
            find_shortcuts(traits, np.zeros(3, np.int64), np.arange(4), 1, seed=0)
        with pytest.raises(InvalidValueError, match="labels must be below 2; got 2"):
            find_shortcuts(traits, np.array([0, 1, 2, 0]), np.arange(4), 2, seed=0)


@pytest.fixture(scope="module")
def photographs():
    """1,000 pictures of CIFAR-10 and their labels."""
    if not DATA.is_dir():
        pytest.skip("needs the pictures in shared/data")
    with zipfile.ZipFile(DATA / "cifar10-test.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")][::10]
        files = [archive.read(name) for name in names]
    sketches = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
    _, labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
    size = np.array([len(file) for file in files])
    return traits_of(len(names), num_bytes=size, sketches=sketches), labels


class TestPhotographs:
    def test_nothing_is_suspicious(self, photographs):
        assert suspicious(found_in(*photographs)) == []

    @pytest.mark.parametrize("name", ["top-left corner", "bottom-right corner"])
    def test_a_corner_mark_is_found(self, photographs, name):
        traits, labels = photographs
        sketches, _ = marked(traits.sketches, labels, 4, CORNERS[name], 0.8, 0.02)
        found = found_in(dataclasses.replace(traits, sketches=sketches), labels)
        assert suspicious(found) == [name]
        assert found[name].given_away == 4
