"""Training after the check: broken pictures stop it or are skipped, leaks are told."""

import csv
import json
import shutil

import pytest

from kenspeckle.core import DataError, InvalidValueError
from kenspeckle.reports import summary
from tests.test_fit import events_of, refused


def broken(folder, share):
    """Spoil a share of the pictures of a copy of the data, and remove them from another copy."""
    spoilt, clean = folder.with_name("spoilt"), folder.with_name("clean")
    for copy in (spoilt, clean):
        shutil.copytree(folder, copy)
    for path in sorted(folder.rglob("*.png"))[:: round(1 / share)]:
        name = path.relative_to(folder)
        (spoilt / name).write_bytes(path.read_bytes()[:100])
        (clean / name).unlink()
    return spoilt, clean


@pytest.mark.parametrize("share", [1 / 60, 0.05, 0.2])
def test_broken_pictures_stop_the_run_before_it_starts(tmp_path, folder, share):
    spoilt, _ = broken(folder, share)
    refused(tmp_path, spoilt, DataError, "--on-bad skip")


@pytest.mark.parametrize("share", [1 / 60, 0.05, 0.2])
def test_skipping_them_is_as_if_they_had_never_been(tmp_path, folder, share):
    spoilt, clean = broken(folder, share)
    one = events_of(spoilt, tmp_path / "one" / "m.ken", on_bad="skip")[-1]
    other = events_of(clean, tmp_path / "other" / "m.ken")[-1]
    assert one.report.test == other.report.test
    assert one.report.validation == other.report.validation
    key = "weights_sha256"
    assert one.report.provenance[key] == other.report.provenance[key]
    with (one.run_folder / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == round(60 * share)
    assert all("cut short" in row["reason"] for row in rows)


def test_too_many_are_not_skipped(tmp_path, folder):
    spoilt, _ = broken(folder, 0.2)
    refused(tmp_path, spoilt, DataError, "--max-bad", on_bad="skip", max_bad=0.1)


def test_leaks_are_told_with_the_accuracy_without_them(tmp_path, folder):
    data = tmp_path / "given"
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        for part in ["train"] if number % 3 else ["test", *["train"] * (number % 2)]:
            target = data / part / path.parent.name / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    report = events_of(data, tmp_path / "m.ken")[-1].report
    assert (report.test.num_items, report.test_without_leaks.num_items) == (20, 10)
    assert any("test pictures stand in the training" in text for text in report.data.findings)
    assert "10 of the 20 test pictures also stand" in summary(report)


def test_a_bound_without_skipping_has_no_effect_and_is_an_error(tmp_path, folder):
    refused(tmp_path, folder, InvalidValueError, "--max-bad has no effect", max_bad=0.1)


def test_labels_are_looked_at_in_small_sets_unless_told_not_to(tmp_path, folder, monkeypatch):
    run_folder = events_of(folder, tmp_path / "one" / "m.ken", labels=None)[-1].run_folder
    checks = json.loads((run_folder / "check.json").read_text())["checks"]
    assert "wrong labels" in {check["name"] for check in checks if check["ran"]}
    monkeypatch.setattr("kenspeckle.fit.MOST_PICTURES_ASKED", 59)
    run_folder = events_of(folder, tmp_path / "two" / "m.ken", labels=None)[-1].run_folder
    checks = json.loads((run_folder / "check.json").read_text())["checks"]
    assert "wrong labels" not in {check["name"] for check in checks if check["ran"]}
