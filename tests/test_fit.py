"""From pictures to one model file: what is kept, what is written and when, what is refused."""

import csv
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kenspeckle
from kenspeckle import preparation
from kenspeckle.config import CnnConfig
from kenspeckle.core import (
    DataError,
    InvalidValueError,
    MissingPathError,
    TrainingError,
    WriteError,
)
from kenspeckle.files import PART_SUFFIX
from kenspeckle.fit import EpochDone, Notice, Options, Stage, fit, train
from kenspeckle.images import Limits
from kenspeckle.modelfile import read
from kenspeckle.pixels import Cache, StreamedPixels
from kenspeckle.prediction import load, verify
from kenspeckle.recipes import named
from kenspeckle.results import Report
from kenspeckle.settings import from_dict, to_dict, with_settings
from kenspeckle.sources import open_dataset
from tests.conftest import CLASSES, make_folder, picture, png, quick_recipe, run
from tests.test_determinism import prepared_from
from tests.test_files import POSIX, full_disk  # noqa: F401 - a fixture


def events_of(data, out, *changes, stop=None, watch=None, **options):
    """Return every event of a run."""
    options = {"labels": False, "run_folder": out.parent / "run"} | options
    options = {"cache": Cache(out.parent / "cache")} | options
    stop = stop or threading.Event()
    events = []
    for event in fit(open_dataset(data), quick_recipe(*changes), out, Options(**options), stop):
        events.append(event)
        if watch:
            watch(event)
    return events


# A run with a split of its own, in place of an older model.


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The events of a run on train/, val/ and test/ folders that share a picture."""
    root = tmp_path_factory.mktemp("given")
    for seed, (split, count) in enumerate({"train": 10, "val": 4, "test": 5}.items()):
        for name, (red, green, blue) in CLASSES.items():
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = picture((red, green, blue), 100 * seed + index)
                (folder / f"{index}.png").write_bytes(png(pixels))
    twin = (root / "data/train/red/0.png").read_bytes()
    (root / "data/test/red/0.png").write_bytes(twin)
    (root / "m.ken").write_bytes(b"old")
    return events_of(root / "data", root / "m.ken", "epochs=3", overwrite=True)


@pytest.fixture(scope="module")
def finished(given):
    return given[-1]


def test_events_come_in_order(given):
    words = [e.name if isinstance(e, Stage) else type(e).__name__ for e in given]
    assert [word for word, _ in itertools.groupby(words)] == [
        *["looking at every picture", "comparing pictures", "looking for shortcuts"],
        *["reading pictures", "Notice"],
        *["training", "EpochDone"] * 3,
        *["evaluating and saving", "Finished"],
    ]
    plan = [event for event in given if isinstance(event, Notice)][-1]
    assert str(plan).startswith("note: 30 train, 12 validation, 15 test pictures of 3 classes; ")
    assert "cnn at 16x16, 3 epochs on cpu" in plan.text
    reading = next(event for event in given if isinstance(event, Stage))
    assert reading.total == 57


def test_a_given_split_is_kept(finished):
    counts = {c.name: (c.train, c.validation, c.test) for c in finished.report.data.classes}
    assert counts == dict.fromkeys(CLASSES, (10, 4, 5))
    with (finished.run_folder / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    folders = {"train": "train", "validation": "val", "test": "test"}
    assert len(rows) == 57
    assert all(f"/{folders[row['split']]}/{row['label']}/" in row["path"] for row in rows)


def test_pictures_on_both_sides_of_a_given_split_are_said(given, finished):
    said = [event.text for event in given if isinstance(event, Notice)]
    assert any("lie across the given split, in 1 cases" in text for text in said)
    assert set(finished.report.data.notices) < set(said)


def test_the_run_folder_holds_everything(finished):
    folder, report = finished.run_folder, finished.report
    names = {"best.safetensors", "log.jsonl", "recipe.json", "report.html", "report.json"}
    assert {path.name for path in folder.iterdir()} == names | {
        "split.csv",
        *("check.html", "check.json", "findings.csv"),
    }
    recipe = from_dict(json.loads((folder / "recipe.json").read_bytes()))
    assert recipe == quick_recipe("epochs=3")
    assert report.recipe == to_dict(recipe)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == [vars(epoch) for epoch in report.training.history]
    assert json.loads((folder / "report.json").read_bytes()) == report.to_dict()
    best = (folder / "best.safetensors").read_bytes()
    assert hashlib.sha256(best).hexdigest() == report.provenance["weights_sha256"]
    page = finished.report_path.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "m.ken" in page


def test_the_old_model_is_replaced_by_one_that_says_how_it_was_made(finished):
    file = read(finished.model_path, ("model.onnx", "weights.safetensors", "report.json"))
    manifest, report = file.manifest, finished.report
    assert manifest.classes == ("blue", "green", "red")
    assert manifest.provenance == report.provenance
    assert manifest.provenance["num_pictures"] == {"train": 30, "validation": 12, "test": 15}
    assert manifest.provenance["seed"] == 0
    assert len(manifest.provenance["data_fingerprint"]) == 64
    assert manifest.recipe == report.recipe
    weights = file.members["weights.safetensors"]
    assert weights == (finished.run_folder / "best.safetensors").read_bytes()
    inside = Report.from_dict(file.json("report.json"))
    assert inside.test == report.test
    assert inside.training.history == report.training.history
    assert report.model.file_size_bytes == finished.model_path.stat().st_size
    assert manifest.backbone["num_parameters"] == report.model.num_parameters > 0
    assert all(difference.agrees for difference in verify(finished.model_path))


def test_the_test_pictures_are_measured_once_with_what_is_shipped(finished):
    model = load(finished.model_path, num_threads=1)
    data = finished.model_path.parent / "data" / "test"
    paths = sorted(data.rglob("*.png"))
    right = [model.predict(path).label == path.parent.name for path in paths]
    assert finished.report.test.num_items == len(paths)
    assert finished.report.test.accuracy.value == pytest.approx(np.mean(right))
    assert finished.report.judged is finished.report.test


def test_the_result_as_json(finished):
    plain = json.loads(json.dumps(finished.to_dict()))
    assert plain["model"] == str(finished.model_path)
    assert plain["run_folder"] == str(finished.run_folder)
    assert plain["report_page"] == str(finished.run_folder / "report.html")
    assert plain["interrupted"] is False
    assert plain["report"] == finished.report.to_dict()


# Odd data.


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A run on grey pictures at a long format, without test, and `dark` not in validation."""
    root = tmp_path_factory.mktemp("odd")
    levels = {"dark": 20, "light": 230, "middle": 120}
    for split, count in {"train": 8, "val": 4}.items():
        for name, level in levels.items():
            if (split, name) != ("val", "dark"):
                folder = root / "data" / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    # The last validation picture is of another class: a mistake for the report.
                    level_here = 20 if (split, index) == ("val", 3) else level
                    grey = np.clip(picture((level_here,) * 3, index)[:, :, 0], 0, 255)
                    Image.fromarray(grey).save(folder / f"{index}.png")
    return run(root / "data", root / "odd.ken", "size=12x20", "epochs=6", thumbnails=False)


def test_without_test_pictures_there_is_no_test(odd):
    assert odd.report.test is None
    assert odd.report.judged is odd.report.validation
    assert any("there will be no test" in notice for notice in odd.report.data.notices)
    assert [c.test for c in odd.report.data.classes] == [0, 0, 0]


def test_a_class_may_be_missing_from_validation(odd):
    support = {c.name: c.num_items for c in odd.report.validation.per_class}
    assert support == {"dark": 0, "light": 4, "middle": 4}
    assert {c.name: c.train for c in odd.report.data.classes} == dict.fromkeys(support, 8)
    answer = load(odd.model_path).predict(np.full((9, 9), 10, np.uint8))
    assert dict(answer.ranking).keys() == support.keys()


def test_the_size_is_height_by_width(odd):
    model = load(odd.model_path)
    assert model.manifest.geometry.size == (12, 20)
    assert odd.report.model.input_size == (12, 20)
    assert model.prepare(np.zeros((50, 50), np.uint8)).shape == (12, 20, 3)


def test_thumbnails_are_left_out_when_told(odd):
    assert odd.report.mistakes
    assert all(mistake.picture is None for mistake in odd.report.mistakes)
    members = read(odd.model_path, ()).manifest.members
    assert not [name for name in members if name.startswith("thumbnails/")]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run on a manifest of 30 numbers, whose pictures are 16-bit and all above 8-bit white."""
    root = tmp_path_factory.mktemp("many")
    rows = [("path", "label")]
    for label in range(30):
        for index in range(6):
            noise = np.random.default_rng([label, index]).integers(0, 300, (8, 8))
            grey = (1000 + 2000 * label + noise).astype(np.uint16)
            Image.fromarray(grey).save(root / f"{label}-{index}.png")
            rows.append((f"{label}-{index}.png", str(label)))
    with (root / "numbers.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    changes = ["size=8", "optimizer=adam", "lr=0.02", "epochs=10", "loss=mse"]
    return run(root / "numbers.csv", root / "numbers.ken", *changes)


def test_thirty_classes_named_by_numbers(many):
    report = many.report
    assert set(report.validation.classes) == {str(label) for label in range(30)}
    assert len(report.test.confusion) == 30
    assert report.test.top_k == 5
    assert {(c.train, c.validation, c.test) for c in report.data.classes} == {(4, 1, 1)}


def test_sixteen_bits_are_not_clipped(many):
    """Clipped at 255 every picture would be white, and one guess as good as any."""
    assert many.report.test.top_k_accuracy.value > 2 * 5 / 30


def test_mistakes_are_kept_with_their_pictures(many):
    report = many.report
    assert 0 < len(report.mistakes) <= 24
    for mistake in report.mistakes:
        assert mistake.picture
        assert report.validation.classes[mistake.label] == mistake.name.split("-")[0]
        assert mistake.predicted != mistake.label
    kept = read(many.model_path, ("thumbnails/",)).members
    assert kept == report.pictures()


def test_the_python_call_takes_settings_and_two_pictures_a_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_folder(tmp_path / "two", 2)
    settings = {"epochs": 1, "channels": (4,), "hidden": [8], "momentum": None, "flip": True}
    finished = kenspeckle.train("two", "seed-cnn", size=(16, 12), **settings)
    assert finished.model_path == Path("two.ken")
    assert finished.run_folder.parent == Path("runs")
    assert {(c.train, c.validation, c.test) for c in finished.report.data.classes} == {(1, 1, 0)}
    assert finished.report.test is None
    recipe = from_dict(finished.report.recipe)
    assert recipe.name == "seed-cnn"
    assert (recipe.training.epochs, recipe.pixels.size) == (1, (16, 12))
    assert recipe.model == CnnConfig(channels=(4,), hidden=(8,))
    assert recipe.augmentation.flip
    assert recipe.optimizer.momentum is None
    answer = kenspeckle.load("two.ken").predict(next(data.rglob("*.png")))
    assert answer.label in CLASSES


def test_interrupted_in_the_first_epoch_the_model_is_whole(tmp_path):
    stop = threading.Event()

    def watch(event):
        if isinstance(event, Stage) and event.name == "training":
            stop.set()

    data = make_folder(tmp_path / "data", 6)
    events = events_of(data, tmp_path / "m.ken", "epochs=9", stop=stop, watch=watch)
    assert sum(isinstance(event, EpochDone) for event in events) == 1
    assert events[-1].interrupted
    assert events[-1].to_dict()["interrupted"] is True
    assert events[-1].report.training.stopped_because == "interrupted in epoch 1"
    assert all(difference.agrees for difference in verify(tmp_path / "m.ken"))


# A disk that is full when the model is written.


def assert_only_the_model_is_missing(run_folder, model_path):
    assert model_path.read_bytes() == b"old"
    assert list(model_path.parent.glob(f".*{PART_SUFFIX}")) == []
    assert (run_folder / "report.html").exists()  # the model is written last


def test_a_model_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    model_path = tmp_path / "out" / "m.ken"
    model_path.parent.mkdir()
    model_path.write_bytes(b"old")
    rename = os.replace

    def full(source, target, **options):
        if Path(target) == model_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target, **options)

    monkeypatch.setattr("os.replace", full)
    options = {"run_folder": tmp_path / "run", "cache": Cache(tmp_path / "c"), "overwrite": True}
    with pytest.raises(WriteError, match=r"m\.ken: could not be written: No space left.*MB free"):
        events_of(make_folder(tmp_path / "data", 6), model_path, "epochs=1", **options)
    assert_only_the_model_is_missing(tmp_path / "run", model_path)


@POSIX
def test_a_full_disk_leaves_the_old_model(tmp_path, full_disk):  # noqa: F811 - the fixture
    model_path = full_disk / "m.ken"
    model_path.write_bytes(b"old")
    (full_disk / "filler").write_bytes(b"x" * 1_000_000)
    options = {"run_folder": tmp_path / "run", "cache": Cache(tmp_path / "c"), "overwrite": True}
    with pytest.raises(WriteError, match=r"m\.ken: could not be written: No space left.*MB free"):
        events_of(make_folder(tmp_path / "data", 6), model_path, "epochs=1", **options)
    assert_only_the_model_is_missing(tmp_path / "run", model_path)


# What is refused before anything is trained or written.


def refused(tmp_path, data, error, match, *changes, out="m.ken", **options):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    elsewhere = tmp_path.parent / f"{tmp_path.name}-cache"
    with pytest.raises(error, match=match):
        events_of(data, tmp_path / out, *changes, **{"cache": Cache(elsewhere)} | options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_folder_that_is_in_use_is_refused(tmp_path, folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("mine")
    refused(tmp_path, folder, InvalidValueError, "--run-folder must be new or empty")
    refused(
        tmp_path,
        folder,
        InvalidValueError,
        "--run-folder must be new or empty",
        run_folder=tmp_path / "run" / "log.jsonl",
    )


def test_a_model_path_that_will_not_do_is_refused(tmp_path, folder, monkeypatch):
    (tmp_path / "m.ken").write_text("mine")
    (tmp_path / "folder.ken").mkdir()
    refused(tmp_path, folder, InvalidValueError, "exists already.*--force")
    refused(tmp_path, folder, InvalidValueError, r"--out must end in \.ken", out="m.onnx")
    refused(tmp_path, folder, InvalidValueError, "exists already", out="folder.ken", overwrite=True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused(tmp_path, folder, InvalidValueError, "can be written.*cannot", out="new/m.ken")


def test_a_device_that_is_unknown_is_refused(tmp_path, folder):
    refused(tmp_path, folder, InvalidValueError, "no device named", device="gpu")


@pytest.mark.parametrize(
    ("settings", "words"), [({"epoch": 3}, "epochs"), ({"lr": -1}, "lr must be above 0")]
)
def test_a_setting_that_is_wrong_is_refused(folder, settings, words):
    with pytest.raises(InvalidValueError, match=words):
        train(folder, **settings)
    with pytest.raises(InvalidValueError, match="did you mean 'seed-cnn'"):
        train(folder, "seed-cn")


def test_data_that_are_not_there_are_refused():
    with pytest.raises(MissingPathError, match="nowhere"):
        train("nowhere")


def test_too_few_pictures_are_refused(tmp_path):
    data = make_folder(tmp_path / "data", 1)
    refused(tmp_path, data, DataError, "3 pictures are too few to train and validate")


def test_a_network_that_does_not_fit_the_pictures_is_refused(tmp_path, folder):
    with pytest.raises(InvalidValueError, match="at least one pixel"):
        events_of(folder, tmp_path / "m.ken", "size=4", "channels=4,4,4,4")
    assert not (tmp_path / "m.ken").exists()


def test_the_limits_of_the_options_are_kept(tmp_path, folder):
    limits = Limits(max_pixels=100)
    refused(tmp_path, folder, DataError, "60 of 60 pictures cannot be used", limits=limits)


def test_a_diverging_run_leaves_no_model(tmp_path, folder):
    with pytest.raises(TrainingError, match="--set lr="):
        events_of(folder, tmp_path / "m.ken", "lr=1e30")
    assert not (tmp_path / "m.ken").exists()


# Preparation.


@pytest.mark.parametrize(
    ("sizes", "side"),
    [([(20, 24)], 20), ([(300, 200)], 64), ([(5, 40)], 8), ([(30, 31), (45, 90), (47, 46)], 44)],
)
def test_the_size_is_derived_from_the_pictures(tmp_path, sizes, side):
    for label in range(2):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for index in range(6):
            pixels = picture((90 * label, 50, 50), index, sizes[index % len(sizes)])
            (tmp_path / "data" / str(label) / f"{index}.png").write_bytes(png(pixels))
    recipe = quick_recipe("size=none")
    prepared = prepared_from(tmp_path / "data", recipe, Cache(tmp_path / "cache"))
    assert prepared.geometry.size == (side, side)


def test_the_normalisation_is_that_of_the_training_pictures(tmp_path, folder):
    recipe = quick_recipe("mean=none", "deviation=none")
    prepared = prepared_from(folder, recipe, Cache(tmp_path / "cache"))
    levels = prepared.task.store.gather(prepared.task.train).reshape(-1, 3) / 255
    np.testing.assert_allclose(prepared.task.normalisation.mean, levels.mean(0), atol=1e-4)
    np.testing.assert_allclose(prepared.task.normalisation.deviation, levels.std(0), atol=1e-4)


@pytest.mark.parametrize(("model", "num_gathered"), [("cnn", None), ("speed", 7)])
def test_whitening_takes_a_bounded_number_of_pictures(
    tmp_path, folder, monkeypatch, model, num_gathered
):
    cache = Cache(tmp_path, limit_bytes=0)
    recipe = with_settings(named("speed"), ["size=16", f"model={model}"])
    prepared = prepared_from(folder, recipe, cache)
    gathered = []
    gather = StreamedPixels.gather

    def watched(store, indices):
        gathered.append(len(indices))
        return gather(store, indices)

    monkeypatch.setattr(StreamedPixels, "gather", watched)
    monkeypatch.setattr(preparation, "MAX_WHITENED_PIXELS", 7 * 16 * 16)
    preparation.network_for(prepared, recipe)
    assert gathered == ([num_gathered] if num_gathered else [])


def test_pictures_without_a_label_are_refused(tmp_path, folder):
    dataset = open_dataset(folder)
    items = (dataclasses.replace(dataset.items[0], label=None), *dataset.items[1:])
    unlabelled = dataclasses.replace(dataset, items=items)
    options = Options(run_folder=tmp_path / "run")
    with pytest.raises(DataError, match="without a label"):
        list(fit(unlabelled, quick_recipe(), tmp_path / "m.ken", options, threading.Event()))
