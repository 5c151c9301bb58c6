"""What a check leaves on disk: the page, the findings as JSON and CSV, and a manifest to edit."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path

from kenspeckle import checkpage
from kenspeckle.core import InvalidValueError, printable
from kenspeckle.files import write_file
from kenspeckle.findings import Case, Health
from kenspeckle.health import Examined, thumbnails
from kenspeckle.images import Limits
from kenspeckle.names import to_cell
from kenspeckle.sources import Dataset
from kenspeckle.splits import place

__all__ = [
    "check_fixes",
    "write_findings",
    "write_fixes",
    "write_health",
    "write_skipped",
]


_DOUBTS = ("conflicting-labels", "label-suspects", "outliers", "leaks-into-test")
"""Findings whose pictures are marked, the most urgent first."""


def check_fixes(path: Path, dataset: Dataset) -> None:
    """Refuse what cannot work, before hours are spent on looking.

    Args:
        path: of the manifest to write.
        dataset: whose pictures it is to name.

    Raises:
        InvalidValueError: it exists, is no CSV, or no manifest can name these pictures.
    """
    if path.suffix.lower() != ".csv":
        raise InvalidValueError(f"--write-fixes must end in .csv; got '{printable(str(path))}'")
    if path.exists():
        raise InvalidValueError(
            f"{printable(str(path))} exists already; choose another file, so that no edit is lost"
        )
    if dataset.reader.path(0) is None:
        raise InvalidValueError(
            "--write-fixes needs pictures that are files or members of a ZIP archive, since a "
            "manifest names them by their paths"
        )


def write_fixes(path: Path, examined: Examined) -> int:
    """Write a manifest of every sound picture, the doubtful ones first.

    The columns path, label, split and group are read by training. Change a label, or delete a row
    to leave a picture out; nothing else needs to be touched. The columns after them say why.

    Args:
        path: of the CSV file.
        examined: a data set whose pictures have paths.

    Returns:
        The number of doubtful pictures.

    Raises:
        WriteError: the file cannot be written.
    """
    dataset = examined.subject.dataset
    doubts = _doubts(examined.health)
    with_split = any(item.split is not None for item in dataset.items)
    with_group = any(item.group is not None for item in dataset.items)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    columns = ["path", "label", *["split"] * with_split, *["group"] * with_group]
    writer.writerow([*columns, "suggested", "score", "doubt", "reason"])
    rest = [index for index in range(len(dataset.items)) if index not in doubts]
    for index in (*doubts, *rest):
        item = dataset.items[index]
        label = "" if item.label is None else dataset.classes[item.label]
        kind, case = doubts.get(index, ("", Case(())))
        others = [exhibit.name for exhibit in case.pictures if exhibit.index != index]
        reason = "; ".join(filter(None, [case.words, *others]))
        row = [
            place(dataset, index),
            to_cell(label),
            *[item.split or ""] * with_split,
            *[to_cell(item.group or "")] * with_group,
            to_cell(case.suggested or ""),
            "" if case.score is None else f"{case.score:.4f}",
            kind,
            to_cell(reason),
        ]
        writer.writerow(row)
    write_file(path, text.getvalue().encode(errors="surrogateescape"))
    return len(doubts)


def _doubts(health: Health) -> dict[int, tuple[str, Case]]:
    """Return the doubtful pictures with the first reason for each."""
    found: dict[int, tuple[str, Case]] = {}
    by_kind = {finding.kind: finding for finding in health.findings}
    for kind in _DOUBTS:
        for case in by_kind[kind].cases if kind in by_kind else ():
            for exhibit in case.pictures:
                if exhibit.index is not None:
                    found.setdefault(exhibit.index, (kind, case))
    return found


def write_findings(path: Path, health: Health) -> None:
    """Write every picture of every finding as one line of a CSV file.

    Args:
        path: of the CSV file; replaced when it exists.
        health: what was found.

    Raises:
        WriteError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(
        ["finding", "severity", "case", "picture", "label", "split", "suggested", "score", "words"]
    )
    for finding in health.findings:
        for number, case in enumerate(finding.cases, start=1):
            score = "" if case.score is None else f"{case.score:.4f}"
            for exhibit in case.pictures:
                cells = [exhibit.name, exhibit.label or "", exhibit.split or ""]
                words = [case.suggested or "", score, case.words]
                row = [finding.kind, finding.severity, str(number), *cells, *words]
                writer.writerow([to_cell(cell) for cell in row])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def write_health(folder: Path, examined: Examined, limits: Limits) -> None:
    """Write ``check.html``, ``check.json`` and ``findings.csv``.

    Args:
        folder: made when needed.
        examined: a data set after its check.
        limits: what pictures are refused.

    Raises:
        DataError: a picture has changed and cannot be read any more.
        MissingExtraError: Jinja2 or matplotlib is not installed.
        WriteError: a file cannot be written.
    """
    health = examined.health
    pictures = thumbnails(examined.subject.dataset, checkpage.wanted(health), limits)
    write_file(folder / "check.html", checkpage.render(health, pictures).encode())
    text = json.dumps(health.to_dict(), indent=1, allow_nan=False)
    write_file(folder / "check.json", text.encode())
    write_findings(folder / "findings.csv", health)


def write_skipped(path: Path, dataset: Dataset, broken: Mapping[int, str]) -> None:
    """Write the pictures that are left out, each with the reason, as CSV.

    Args:
        path: of the CSV file; replaced when it exists.
        dataset: all pictures.
        broken: reason by index.

    Raises:
        WriteError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "reason"])
    for index, reason in sorted(broken.items()):
        writer.writerow([to_cell(dataset.items[index].name), to_cell(reason)])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))
