import csv
import io
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kenspeckle.core import DataError, InvalidValueError, WriteError
from kenspeckle.names import Split
from kenspeckle.readers import ArrayReader
from kenspeckle.sources import Dataset, Item, open_dataset
from kenspeckle.splits import assign, write_split


def dataset_of(items: list[Item], num_classes: int = 3) -> Dataset:
    classes = tuple(f"class {label}" for label in range(num_classes))
    return Dataset("made", "made", classes, tuple(items), (), ArrayReader([]))


def made(*counts: int, split: Split | None = None, prefix: str = "") -> list[Item]:
    """Items of one class for each count."""
    return [
        Item(f"{prefix}{label}/{index}.jpg", label, split)
        for label, count in enumerate(counts)
        for index in range(count)
    ]


def counts_of(dataset: Dataset, parts: tuple[Split, ...]) -> dict[int, tuple[int, int, int]]:
    """Numbers of train, validation and test pictures of each class."""
    found = Counter(zip(dataset.labels.tolist(), parts, strict=True))
    return {
        label: (found[label, "train"], found[label, "validation"], found[label, "test"])
        for label in sorted(set(dataset.labels.tolist()))
    }


class TestShares:
    def test_default_shares(self):
        dataset = dataset_of(made(100, 20, 40))
        parts, notices = assign(dataset, 0.15, 0.15, seed=0)
        assert counts_of(dataset, parts) == {0: (70, 15, 15), 1: (14, 3, 3), 2: (28, 6, 6)}
        assert notices == ()

    @settings(deadline=None, max_examples=200)
    @given(
        counts=st.lists(st.integers(3, 60), min_size=1, max_size=4),
        validation=st.floats(0.01, 0.49),
        test=st.floats(0.01, 0.49),
        seed=st.integers(0, 9),
    )
    def test_every_class_gets_its_share_within_one(self, counts, validation, test, seed):
        dataset = dataset_of(made(*counts), len(counts))
        parts, notices = assign(dataset, validation, test, seed)
        assert notices == ()
        shares = (1 - validation - test, validation, test)
        for label, found in counts_of(dataset, parts).items():
            assert min(found) >= 1
            assert sum(found) == counts[label]
            for number, share in zip(found, shares, strict=True):
                lifted = any(
                    n == 1 and counts[label] * s < 1 for n, s in zip(found, shares, strict=True)
                )
                assert abs(number - counts[label] * share) < (2.5 if lifted else 1 + 1e-9)

    @pytest.mark.parametrize(
        ("count", "expected", "notice"),
        [
            (1, (1, 0, 0), "no validation pictures of 'class 1'"),
            (2, (1, 1, 0), "no test pictures of 'class 1': a class needs 3 pictures, or groups"),
            (3, (1, 1, 1), None),
            (4, (2, 1, 1), None),
        ],
    )
    def test_classes_with_few_pictures(self, count, expected, notice):
        dataset = dataset_of(made(50, count))
        parts, notices = assign(dataset, 0.15, 0.15, seed=1)
        assert counts_of(dataset, parts)[1] == expected
        assert (notices == ()) if notice is None else any(notice in line for line in notices)

    def test_without_a_test_part(self):
        dataset = dataset_of(made(20, 2))
        parts, notices = assign(dataset, 0.2, 0.0, seed=0)
        assert counts_of(dataset, parts) == {0: (16, 4, 0), 1: (1, 1, 0)}
        assert notices == ()

    @pytest.mark.parametrize(("validation", "test"), [(0, 0.1), (0.5, 0.5), (-0.1, 0), (0.1, -0.1)])
    def test_shares_out_of_range(self, validation, test):
        with pytest.raises(InvalidValueError, match="validation must be above 0, test at least 0"):
            assign(dataset_of(made(9)), validation, test, seed=0)

    def test_no_pictures(self):
        with pytest.raises(DataError, match="no training pictures; found no pictures"):
            assign(dataset_of([]), 0.1, 0.1, seed=0)


class TestChoice:
    @settings(deadline=None, max_examples=50)
    @given(order=st.permutations(range(30)), seed=st.integers(0, 3))
    def test_the_order_of_the_items_is_nothing(self, order, seed):
        items = [
            Item(f"{i % 3}/{i}.jpg", i % 3, group=f"g{i // 2}" if i % 5 == 0 else None)
            for i in range(30)
        ]
        expected = dict(zip(items, assign(dataset_of(items), 0.2, 0.2, seed)[0], strict=True))
        shuffled = [items[i] for i in order]
        found = dict(zip(shuffled, assign(dataset_of(shuffled), 0.2, 0.2, seed)[0], strict=True))
        assert found == expected

    def test_the_seed_is_something(self):
        dataset = dataset_of(made(100, 100))
        choices = {assign(dataset, 0.15, 0.15, seed)[0] for seed in range(10)}
        assert len(choices) == 10

    def test_the_choice_is_the_same_on_every_machine(self):
        parts, _ = assign(dataset_of(made(6, 6)), 0.2, 0.2, seed=0)
        assert "".join(part[0] + part[1] for part in parts) == "trtrvatrtrtetrtrtetrtrva"

    def test_every_picture_is_tested_under_some_seed(self):
        dataset = dataset_of(made(20, 20))
        tested = Counter(
            index
            for seed in range(200)
            for index, part in enumerate(assign(dataset, 0.15, 0.15, seed)[0])
            if part == "test"
        )
        assert len(tested) == 40
        assert max(tested.values()) < 60  # 30 are expected, and 60 are 6 deviations away


class TestGroups:
    @settings(deadline=None, max_examples=200)
    @given(data=st.data())
    def test_never_apart(self, data):
        num = data.draw(st.integers(1, 40))
        groups = data.draw(
            st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=num, max_size=num)
        )
        twins = data.draw(st.lists(st.integers(0, 30), min_size=num, max_size=num))
        labels = data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
        items = [
            Item(f"{i}.jpg", label, group=group)
            for i, (label, group) in enumerate(zip(labels, groups, strict=True))
        ]
        parts, _ = assign(dataset_of(items), 0.2, 0.2, 0, np.array(twins))
        sides = defaultdict(set)
        for part, group, twin in zip(parts, groups, twins, strict=True):
            sides["twin", twin].add(part)
            if group is not None:
                sides["group", group].add(part)
        assert all(len(side) == 1 for side in sides.values())

    def test_chains_of_groups_and_twins(self):
        items = [
            Item(f"{i}.jpg", 0, group=g) for i, g in enumerate(["a", None, "b", "b", None, None])
        ]
        together = np.array([0, 0, 0, 1, 1, 2])  # a-1-b by number 0, b-b by group, 3-4 by number 1
        parts, _ = assign(dataset_of(items), 0.3, 0.0, 0, together)
        assert len(set(parts[:5])) == 1

    @settings(deadline=None, max_examples=100)
    @given(
        sizes=st.lists(st.integers(1, 9), min_size=3, max_size=12),
        seed=st.integers(0, 5),
    )
    def test_three_groups_are_enough_for_every_part(self, sizes, seed):
        items = [
            Item(f"{label}/{group}-{i}.jpg", label, group=f"{label}-{group}")
            for label in range(2)
            for group, size in enumerate(sizes)
            for i in range(size)
        ]
        dataset = dataset_of(items, 2)
        parts, notices = assign(dataset, 0.15, 0.15, seed)
        assert notices == ()
        for found in counts_of(dataset, parts).values():
            assert min(found) >= 1

    def test_shares_are_reached_as_well_as_groups_allow(self):
        items = [
            Item(f"{label}/{i}.jpg", label, group=f"{label}-{i // 4}")
            for label in range(2)
            for i in range(200)
        ]
        dataset = dataset_of(items, 2)
        parts, _ = assign(dataset, 0.15, 0.15, seed=0)
        for found in counts_of(dataset, parts).values():
            np.testing.assert_allclose(found, (140, 30, 30), atol=4)

    def test_groups_that_span_classes(self):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 600)
        items = [Item(f"{i}.jpg", int(label), group=str(i // 6)) for i, label in enumerate(labels)]
        dataset = dataset_of(items)
        parts, _ = assign(dataset, 0.15, 0.15, seed=0)
        for label, found in counts_of(dataset, parts).items():
            count = np.sum(labels == label)
            np.testing.assert_allclose(
                found, count * np.array([0.7, 0.15, 0.15]), atol=0.05 * count
            )

    def test_one_number_per_item(self):
        with pytest.raises(InvalidValueError, match=r"one number per item, 9; got \(3,\)"):
            assign(dataset_of(made(9)), 0.1, 0.1, 0, np.zeros(3, np.int64))


class TestGivenSplits:
    def test_train_and_test_get_a_validation_part_from_train(self):
        items = made(40, 20, split="train", prefix="train/") + made(
            5, 5, split="test", prefix="test/"
        )
        dataset = dataset_of(items)
        parts, notices = assign(dataset, 0.1, 0.3, seed=0)
        assert counts_of(dataset, parts) == {0: (36, 4, 5), 1: (18, 2, 5)}
        assert set(parts[60:]) == {"test"}
        assert notices == ()

    def test_no_test_part_is_invented(self):
        items = made(9, split="train", prefix="t/") + made(3, split="validation", prefix="v/")
        parts, notices = assign(dataset_of(items), 0.1, 0.3, seed=0)
        assert parts == ("train",) * 9 + ("validation",) * 3
        assert notices == ("the data bring validation but no test pictures: there will be no test",)

    def test_all_three_are_kept(self):
        given: tuple[Split, ...] = ("test", "train", "validation")
        items = [Item(f"{i}", 0, split) for i, split in enumerate(given)]
        assert assign(dataset_of(items), 0.1, 0.3, seed=0) == (given, ())

    def test_training_pictures_alone_are_no_split(self):
        free = assign(dataset_of(made(40)), 0.2, 0.2, seed=0)
        assert assign(dataset_of(made(40, split="train")), 0.2, 0.2, seed=0) == free

    def test_groups_across_the_given_split_are_said(self):
        items = [Item("a", 0, "train", "g"), Item("b", 0, "test", "g"), *made(9, split="train")]
        _, notices = assign(dataset_of(items), 0.1, 0.1, seed=0)
        assert notices == ("pictures that belong together lie across the given split, in 1 cases",)

    def test_a_split_for_some(self):
        with pytest.raises(
            DataError, match="all pictures need a split, or none; 9 of 12 have none"
        ):
            assign(dataset_of(made(9) + made(3, split="train")), 0.1, 0.1, seed=0)

    def test_nothing_to_train_on(self):
        with pytest.raises(DataError, match="no training pictures; found 'test'"):
            assign(dataset_of(made(9, split="test")), 0.1, 0.1, seed=0)


class TestWriteSplit:
    def test_a_folder_becomes_a_manifest_with_the_same_content(self, tmp_path):
        names = [
            "cat/a b.jpg",
            'cat/🌻,"q".jpg',
            "dog/two\nlines\r.jpg",
            "dog/=1+1.jpg",
            "dog/caf\udce9.jpg",
        ]
        for name in names:
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode(errors="surrogateescape"))
        dataset = open_dataset(tmp_path / "set")
        parts, _ = assign(dataset, 0.3, 0.3, seed=0)
        write_split(tmp_path / "runs" / "split.csv", dataset, parts)
        again = open_dataset(tmp_path / "runs" / "split.csv")
        assert again.classes == dataset.classes
        assert tuple(item.split for item in again.items) == parts
        assert again.labels.tolist() == dataset.labels.tolist()
        for index in range(len(names)):
            assert again.reader.read(index) == dataset.reader.read(index)
        assert assign(again, 0.3, 0.3, seed=5)[0] == parts

    def test_groups_are_written(self, tmp_path):
        items = [Item("a.jpg", 0, group="g 1"), Item("b.jpg", 1)]
        write_split(tmp_path / "split.csv", dataset_of(items), ("train", "test"))
        assert (tmp_path / "split.csv").read_text() == (
            "path,label,split,group\na.jpg,class 0,train,g 1\nb.jpg,class 1,test,\n"
        )

    @pytest.mark.parametrize("name", ["=cmd|'/c calc'!A0", "+1", "-1", "@x", "\tx"])
    def test_names_are_no_formulas(self, tmp_path, name):
        write_split(tmp_path / "split.csv", dataset_of([Item(name, 0)]), ("train",))
        text = (tmp_path / "split.csv").read_bytes().decode()
        assert list(csv.reader(io.StringIO(text)))[1][0] == f"'{name}"

    def test_a_file_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(WriteError):
            write_split(tmp_path / "file" / "split.csv", dataset_of(made(1)), ("train",))


DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not DATA.exists(), reason="needs the shared data")
def test_flowers():
    dataset = open_dataset(DATA / "flowers.zip")
    parts, notices = assign(dataset, 0.15, 0.15, seed=0)
    assert notices == ()
    sizes = np.bincount(dataset.labels)
    for label, found in counts_of(dataset, parts).items():
        np.testing.assert_allclose(found, sizes[label] * np.array([0.7, 0.15, 0.15]), atol=1)
