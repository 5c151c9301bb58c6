"""A model is measured on labelled pictures whose classes match by name, whatever their order."""

import dataclasses

import pytest

from kenspeckle.core import DataError, MissingPathError, ModelFileError
from kenspeckle.judging import judge
from kenspeckle.prediction import load
from kenspeckle.sources import Item, open_dataset
from tests.conftest import CLASSES, make_folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """New pictures of the three colours, a few under a wrong name."""
    root = make_folder(tmp_path_factory.mktemp("fresh") / "data", 12)
    for index in range(4):
        (root / "red" / f"{index:03d}.png").replace(root / "blue" / f"moved-{index}.png")
    return root


def slow_accuracy(model_path, dataset):
    """Return the share of pictures whose answer is the name of their class."""
    model = load(model_path, num_threads=1)
    right = [
        model.predict(dataset.reader.read(i)).label == dataset.classes[label]
        for i, label in enumerate(dataset.labels)
    ]
    return sum(right) / len(right)


def test_scores_are_those_of_the_answers_one_by_one(model_path, fresh):
    dataset = open_dataset(fresh)
    scores = judge(model_path, dataset, "all")
    assert scores.classes == ("blue", "green", "red")
    assert scores.num_items == 36
    assert scores.accuracy.value == pytest.approx(slow_accuracy(model_path, dataset))
    assert 0.5 < scores.accuracy.value < 1
    assert [c.num_items for c in scores.per_class] == [16, 12, 8]


def test_classes_match_by_name_in_another_order(model_path, fresh):
    dataset = open_dataset(fresh)
    expected = judge(model_path, dataset, "all")
    order = ("red", "blue", "green")
    items = tuple(
        dataclasses.replace(item, label=order.index(dataset.classes[label]))
        for item, label in zip(dataset.items, dataset.labels, strict=True)
    )
    shuffled = dataclasses.replace(dataset, classes=order, items=items)
    assert judge(model_path, shuffled, "all") == expected


@pytest.mark.parametrize("names", [["red"], ["blue", "red"]])
def test_a_subset_of_the_classes_is_enough(model_path, tmp_path, names):
    data = make_folder(tmp_path / "some", 9, {name: CLASSES[name] for name in names})
    dataset = open_dataset(data, min_classes=1)
    scores = judge(model_path, dataset, "all")
    assert scores.classes == ("blue", "green", "red")
    assert {c.name: c.num_items for c in scores.per_class} == {
        name: 9 if name in names else 0 for name in CLASSES
    }
    assert scores.accuracy.value == pytest.approx(slow_accuracy(model_path, dataset))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_part_is_judged_alone(trained, split):
    dataset = open_dataset(trained.run_folder / "split.csv")
    scores = judge(trained.model_path, dataset, split)
    reported = getattr(trained.report, split, None)
    if reported:  # what the run itself measured on the same pictures
        assert scores.confusion == reported.confusion
        assert scores.accuracy == reported.accuracy
        assert scores.log_loss.value == pytest.approx(reported.log_loss.value, abs=1e-4)
    assert scores.num_items == sum(item.split == split for item in dataset.items)
    assert judge(trained.model_path, dataset, "all").num_items == len(dataset.items)


def test_pictures_without_a_label_are_passed_over(model_path, fresh):
    dataset = open_dataset(fresh)
    items = tuple(
        dataclasses.replace(item, label=None if index % 2 else item.label)
        for index, item in enumerate(dataset.items)
    )
    some = dataclasses.replace(dataset, items=items)
    assert judge(model_path, some, "all").num_items == 18
    none = dataclasses.replace(dataset, items=tuple(Item(i.name, None) for i in items))
    with pytest.raises(DataError, match="no labelled pictures in the part 'all'"):
        judge(model_path, none, "all")


def test_a_part_without_pictures_is_an_error(model_path, fresh):
    with pytest.raises(DataError, match="no labelled pictures in the part 'test'"):
        judge(model_path, open_dataset(fresh), "test")


def test_only_a_class_that_is_asked_for_must_be_known(model_path, tmp_path):
    make_folder(tmp_path / "data" / "train", 2, CLASSES | {"grean": (0, 0, 0)})
    make_folder(tmp_path / "data" / "test", 3)
    dataset = open_dataset(tmp_path / "data")
    assert judge(model_path, dataset, "test").num_items == 9
    for split in ("train", "all"):
        with pytest.raises(DataError, match=r"does not know .*'grean'.*did you mean 'green'"):
            judge(model_path, dataset, split)


def test_a_model_that_is_missing_or_none_is_refused(tmp_path, fresh):
    dataset = open_dataset(fresh)
    with pytest.raises(MissingPathError):
        judge(tmp_path / "none.ken", dataset, "all")
    (tmp_path / "text.ken").write_text("hello")
    with pytest.raises(ModelFileError):
        judge(tmp_path / "text.ken", dataset, "all")


def test_a_picture_that_cannot_be_decoded_is_named(model_path, tmp_path):
    data = make_folder(tmp_path / "data", 2)
    (data / "red" / "broken.png").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"red/broken\.png"):
        judge(model_path, open_dataset(data), "all")
