"""Findings on files: what cannot be decoded, what is misnamed, what was left out."""

from collections.abc import Iterator, Mapping, Sized

import numpy as np

from kenspeckle.checks import Subject
from kenspeckle.findings import Case, Exhibit, Finding
from kenspeckle.sources import Dataset

__all__ = ["broken_files", "file_findings", "ignored_files"]

# Which endings belong to a format, by Pillow's name of it.
_ENDINGS: Mapping[str, frozenset[str]] = {
    "JPEG": frozenset({"jpg", "jpeg", "jpe", "jfif"}),
    "PNG": frozenset({"png"}),
    "WEBP": frozenset({"webp"}),
    "GIF": frozenset({"gif"}),
    "BMP": frozenset({"bmp"}),
    "TIFF": frozenset({"tif", "tiff"}),
    "PPM": frozenset({"pbm", "pgm", "pnm", "ppm"}),
}
_UNUSUAL_MODES = frozenset({"1", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F"})


def broken_files(dataset: Dataset, broken: Mapping[int, str]) -> Finding | None:
    """Return the pictures that cannot be decoded, with the reason of each."""
    if not broken:
        return None
    cases = []
    for index, reason in sorted(broken.items()):
        item = dataset.items[index]
        label = None if item.label is None else dataset.classes[item.label]
        cases.append(Case((Exhibit(None, item.name, label, item.split),), reason))
    num, total = len(broken), len(dataset.items)
    return Finding(
        kind="broken-files",
        severity="error",
        title=f"{num:,} of {total:,} pictures cannot be used ({100 * num / total:.2g} %).",
        why="A picture that is replaced by a black one, or dropped in silence, changes what is "
        "learnt and what the numbers mean.",
        remedy="Repair, convert or remove these files; nothing was changed.",
        training="stops before the first epoch; with --on-bad skip it goes on without them, writes "
        "each with its reason to skipped.csv, and fails if they are more than --max-bad.",
        num_pictures=num,
        cases=tuple(cases),
    )


def ignored_files(dataset: Dataset) -> Finding | None:
    """Return the files that lie in the data and are no pictures of a class."""
    if not dataset.ignored:
        return None
    num = len(dataset.ignored)
    return Finding(
        kind="ignored-files",
        severity="note",
        title=f"{num:,} file{'s were' if num > 1 else ' was'} left out.",
        why="They lie in the data, but are no pictures of a class.",
        remedy="Nothing, unless one of them was meant to be learnt from.",
        training="leaves them out.",
        num_pictures=num,
        cases=tuple(Case((Exhibit(None, name),), reason) for name, reason in dataset.ignored),
    )


def file_findings(subject: Subject) -> Iterator[Finding]:
    """Yield what is odd about files that can be decoded."""
    survey = subject.survey
    traits, num_items = survey.traits, len(survey.sound)
    misnamed = []
    for index in range(num_items):
        name, format_ = subject.dataset.items[index].name, survey.formats[traits.format[index]]
        ending = name.rpartition(".")[2].lower() if "." in name else ""
        known = _ENDINGS.get(format_)
        if ending and known is not None and ending not in known and _is_ending(ending):
            misnamed.append(Case(subject.exhibits([index]), f"is {format_}"))
    if misnamed:
        yield Finding(
            kind="wrong-endings",
            severity="note",
            title=f"{_files(misnamed)} of another format than the name says.",
            why="Formats are told by content here, but other programs may refuse these files.",
            remedy="Rename them, if other programs are to read them.",
            training="reads them by their content.",
            num_pictures=len(misnamed),
            cases=tuple(misnamed),
        )
    animated = np.flatnonzero(survey.animated)
    if len(animated):
        yield Finding(
            kind="several-frames",
            severity="note",
            title=f"{_files(animated)} of several frames or pages.",
            why="Only one picture can be learnt from each.",
            remedy="Take the frames that matter out into files of their own.",
            training="takes the first frame.",
            num_pictures=len(animated),
            cases=tuple(Case(subject.exhibits([index])) for index in animated),
        )
    unusual = {code for code, mode in enumerate(survey.modes) if mode in _UNUSUAL_MODES}
    odd = np.flatnonzero(np.isin(traits.mode, list(unusual)))
    if 0 < len(odd) < num_items:
        yield Finding(
            kind="unusual-modes",
            severity="note",
            title=f"{_files(odd)} of an unusual pixel mode.",
            why="Two colours, 16 bits or print colours are converted, which can lose what matters.",
            remedy="Look at a few of them as the network sees them, below.",
            training="converts every picture to RGB of 8 bits, 16 bits scaled and not clipped.",
            num_pictures=len(odd),
            cases=tuple(
                Case(subject.exhibits([index]), f"mode {survey.modes[traits.mode[index]]}")
                for index in odd
            ),
        )


def _is_ending(word: str) -> bool:
    return any(word in endings for endings in _ENDINGS.values())


def _files(found: Sized) -> str:
    return f"{len(found):,} file{'s are' if len(found) != 1 else ' is'}"
