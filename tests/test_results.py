"""Values of a run on their way to JSON and back, and what is refused on the way."""

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from kenspeckle.core import Interval, InvalidValueError
from kenspeckle.results import (
    Averages,
    ClassCounts,
    ClassScores,
    DataSummary,
    Epoch,
    Mistake,
    ModelSummary,
    Report,
    Scores,
    TrainingSummary,
)

PNG = b"\x89PNG\r\n\x1a\n and so on"
JPEG = b"\xff\xd8\xff\xe0 and so on"
HALF = Interval(0.5, 0.1, 0.9)
NOTHING = Interval(math.nan, math.nan, math.nan)

SCORES = Scores(
    classes=("ant", "bee"),
    num_items=2,
    accuracy=HALF,
    top_k=None,
    top_k_accuracy=None,
    balanced_accuracy=HALF,
    precision=Averages(HALF, HALF),
    recall=Averages(HALF, HALF),
    f1=Averages(HALF, HALF),
    log_loss=Interval(1.5, 1.0, 2.0),
    expected_calibration_error=0.25,
    majority_class="ant",
    majority_accuracy=1.0,
    confusion=((1, 1), (0, 0)),
    per_class=(
        ClassScores("ant", 2, 1, HALF, HALF, HALF),
        ClassScores("bee", 0, 1, HALF, NOTHING, HALF),
    ),
)
REPORT = Report(
    title="insects.ken",
    created="2026-11-24T04:17:09+00:00",
    data=DataSummary(
        "insects", "insects/", (ClassCounts("ant", 8, 2, 2), ClassCounts("bee", 8, 0, 0))
    ),
    model=ModelSummary("cnn", 1234, (32, 48), 1.5),
    training=TrainingSummary(
        seconds=2.5,
        history=(Epoch(1, math.inf, 0.01, math.nan, 0.5, None, 2.0),),
        best_epoch=1,
        stopped_because="All 1 epochs are done.",
    ),
    validation=SCORES,
    test=None,
    mistakes=(
        Mistake(1, "a.jpg", 0, 1, 0.75, JPEG),
        Mistake(2, "b.jpg", 0, 1, 0.5),
        Mistake(3, "c.png", 1, 0, 0.5, PNG),
    ),
    recipe={"name": "x", "optimizer": {"lr": 0.01, "betas": None}},
    provenance={"seed": 0},
    command="ken train insects/",
)


def altered(path: tuple[Any, ...], value: object) -> dict[str, Any]:
    """Return the plain report with one entry set to another value."""
    plain = copy.deepcopy(REPORT.to_dict())
    *way, last = path
    place: Any = plain
    for step in way:
        place = place[step]
    place[last] = value
    return plain


def test_a_report_survives_json_with_its_pictures():
    text = json.dumps(REPORT.to_dict(), allow_nan=False)
    back = Report.from_dict(json.loads(text), REPORT.pictures())
    assert back.to_dict() == REPORT.to_dict()
    assert (
        back.pictures()
        == REPORT.pictures()
        == {
            "thumbnails/00.jpg": JPEG,
            "thumbnails/02.png": PNG,
        }
    )
    assert back.mistakes == REPORT.mistakes
    assert back.model == REPORT.model
    assert back.data == REPORT.data
    assert math.isnan(back.training.history[0].train_loss)


def test_scores_without_a_mean_cost_are_those_of_before():
    plain = SCORES.to_dict()
    del plain["mean_cost"]
    assert Scores.from_dict(plain).mean_cost is None
    costly = dataclasses.replace(SCORES, mean_cost=Interval(2.5, 0.0, 7.5))
    assert Scores.from_dict(costly.to_dict()).mean_cost == costly.mean_cost


def test_pictures_that_are_not_given_stay_away():
    back = Report.from_dict(REPORT.to_dict())
    assert [mistake.picture for mistake in back.mistakes] == [None, None, None]


def test_the_test_split_counts_where_there_is_one():
    assert REPORT.judged is REPORT.validation
    test = dataclasses.replace(SCORES, num_items=7)
    assert dataclasses.replace(REPORT, test=test).judged is test


def test_entries_with_a_default_may_be_missing():
    plain = REPORT.to_dict()
    del plain["next_commands"]
    assert Report.from_dict(plain).next_commands == ()


def test_an_entry_without_a_default_may_not():
    plain = REPORT.to_dict()
    del plain["data"]["location"]
    with pytest.raises(InvalidValueError, match=r"report\.data must have an entry 'location'"):
        Report.from_dict(plain)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("titel",), "x", r"no entry named 'report\.titel'; did you mean 'title'"),
        (("title",), 3, r"report\.title must be text; got 3"),
        (("title",), None, r"report\.title must be text; got None"),
        (("validation", "num_items"), True, r"validation\.num_items must be a whole number"),
        (("validation", "num_items"), 1.5, "must be a whole number; got 1.5"),
        (("validation", "accuracy", "low"), "0", r"accuracy\.low must be a number; got '0'"),
        (("validation", "accuracy", "low"), 10**400, "must be a number"),
        (("validation", "accuracy"), [], r"validation\.accuracy must be a table; got \[\]"),
        (("validation", "classes"), "ab", r"validation\.classes must be a list; got 'ab'"),
        (("validation", "classes"), ["ant"], "one entry for each of the 1 classes"),
        (("validation", "confusion", 0), [1], "one entry for each of the 2 classes"),
        (("validation", "confusion", 0, 0), None, r"confusion\[0\]\[0\] must be a whole number"),
        (("validation", "confusion", 0, 0), -1, "counts from 0 on"),
        (("model", "num_parameters"), 2**63, "must be a whole number"),
        (("model", "input_size"), [1, 2, 3], r"input_size must be 2 entries; got \[1, 2, 3\]"),
        (("mistakes", 0, "label"), 2, "mistakes must name classes from 0 to 1; got 2"),
        (("mistakes", 0, "predicted"), -1, "mistakes must name classes from 0 to 1"),
        (("mistakes", 0, "picture"), 5, "must be the name of a picture; got 5"),
        (("data", "classes", 0, "name"), "cow", "must have the same classes"),
        (("recipe",), [], r"report\.recipe must be a table"),
        (("provenance",), {"a": [[[[[[[[[1]]]]]]]]]}, "nested at most 8 deep"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path, value, text):
    with pytest.raises(InvalidValueError, match=text):
        Report.from_dict(altered(path, value))


def test_a_long_wrong_value_is_cut_in_the_message():
    with pytest.raises(InvalidValueError) as caught:
        Report.from_dict(altered(("recipe",), "x" * 10_000))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("picture", [b"GIF89a", b"", PNG + bytes(100_000)])
def test_a_picture_must_be_a_small_png_or_jpeg(picture):
    with pytest.raises(InvalidValueError, match="PNG or JPEG of at most 100,000 bytes"):
        Mistake(0, "a", 0, 1, 0.5, picture)
