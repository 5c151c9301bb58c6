"""What names say: picture or not, hidden or not, which split and which class.

Everything here works on text alone, so a folder, an archive and a manifest follow the same rules:

    class/…/picture                 the class is the first folder, whatever lies deeper
    train/class/…/picture           with a training folder that holds class folders,
    validation/… and test/…         the first folder is the split
    wrapper/…                       one folder around either is looked through

A class is its name. Names are compared in Unicode's composed form (NFC), because macOS and others
spell the same word in two ways, and are sorted by code point, which is alike on every machine.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kenspeckle.core import DataError, nearest, printable

__all__ = [
    "LAYOUT",
    "PICTURE_SUFFIXES",
    "SPLITS",
    "SPLIT_WORDS",
    "Layout",
    "Place",
    "Split",
    "arrange",
    "class_name",
    "from_cell",
    "hidden_notice",
    "is_hidden",
    "is_picture",
    "listed",
    "settle_classes",
    "split_of",
    "to_cell",
]

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""The words for splits, as folders and in manifests; upper and lower case are alike."""

PICTURE_SUFFIXES = frozenset(
    {"bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm"}
    | {"tif", "tiff", "webp"}
)
"""Endings of files that are taken for pictures in folders and archives; case does not matter."""

LAYOUT = (
    "expected: a folder per class with its pictures, or train/, val/ and test/ with such folders"
)

_HIDDEN = frozenset({"__macosx", "@eadir", "desktop.ini", "thumbs.db"})


def listed(names: Iterable[str], num_shown: int = 3) -> str:
    """Return the first `num_shown` names in quotes, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], num_shown=2)
        "'a', 'b' and 1 more"
    """
    every = list(names)
    shown = ", ".join(f"'{printable(name)}'" for name in every[:num_shown])
    return shown + (f" and {len(every) - num_shown:,} more" if len(every) > num_shown else "")


_FORMULA = re.compile(r"[=+\-@\t\r]")
_ESCAPED = re.compile(r"'[=+\-@\t\r']")


def to_cell(text: str) -> str:
    """Return `text` as a cell of a table that no spreadsheet runs as a formula.

    A text that begins like a formula gets an apostrophe before it, as spreadsheets themselves mark
    text. `from_cell` takes it away again.

    Example:
        >>> to_cell("=1+1")
        "'=1+1"
    """
    return f"'{text}" if _FORMULA.match(text) or _ESCAPED.match(text) else text


def from_cell(cell: str) -> str:
    """Return the text that `to_cell` wrote."""
    return cell[1:] if _ESCAPED.match(cell) else cell


def is_hidden(part: str) -> bool:
    """Return whether a file or folder of this name is an operating system's, not the user's."""
    return part.startswith(".") or part.casefold() in _HIDDEN


def hidden_notice(hidden: Mapping[str, int]) -> list[str]:
    """Return at most one line that says what was ignored, from the number of each name."""
    if not hidden:
        return []
    counts = ", ".join(f"'{printable(name)}' ({hidden[name]:,})" for name in sorted(hidden)[:5])
    return [f"ignored hidden files and folders: {counts}{' …' if len(hidden) > 5 else ''}"]


def is_picture(name: str) -> bool:
    """Return whether the ending of `name` is one of `PICTURE_SUFFIXES`."""
    return name.rpartition(".")[2].lower() in PICTURE_SUFFIXES and "." in name


def split_of(word: str) -> Split | None:
    """Return the split that `word` stands for, or None.

    Example:
        >>> split_of("Training")
        'train'
    """
    return SPLIT_WORDS.get(word.strip().casefold())


def class_name(text: str) -> str:
    """Return `text` as the name of a class, in composed form (NFC).

    Raises:
        DataError: the name is not valid Unicode, so it cannot be written into a model file.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the name of a class must be valid UTF-8; got '{printable(text)}'; "
            "rename the folder, or save the manifest as UTF-8"
        ) from None
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one picture belongs.

    Attributes:
        name: the file's name, ``/`` between folders, as it was given.
        label: the name of its class.
        split: its split, or None when the layout has none.
    """

    name: str
    label: str
    split: Split | None


@dataclass(frozen=True)
class Layout:
    """What a tree of names means.

    Attributes:
        places: one per picture, sorted by name.
        notices: what was left out or decided, one line each.
        ignored: files that are no picture of a class, each with the reason.
    """

    places: tuple[Place, ...]
    notices: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...] = ()


def arrange(files: Iterable[str], folders: Iterable[str] = ()) -> Layout:
    """Read classes and splits off the names of files.

    Args:
        files: names of files, ``/`` between folders, none of them hidden.
        folders: names of folders, so that those without files are seen too.

    Raises:
        DataError: no picture lies in a class folder, a split is there twice, or split folders have
            no training folder with class folders beside them.
    """
    names = sorted(files)
    pictures = [tuple(name.split("/")) for name in names if is_picture(name)]
    others = [name for name in names if not is_picture(name)]
    notices = []
    if others:
        notices.append(
            f"ignored {_files(len(others))} without a picture's ending: {listed(others)}"
        )
    start = _wrapper_depth(pictures)
    if start:
        wrapper = next(p[0] for p in pictures if len(p) > 1)
        notices.append(f"looked through the folder '{printable(wrapper)}' around the classes")
    splits = _split_folders(pictures, start)
    if splits:
        notices.append(_split_notice(pictures, start, splits))
    inside = [p for p in pictures if _class_part(p, start, splits) is not None]
    if not inside:
        found = _files(len(names)) + (f": {listed(names)}" if names else "")
        raise DataError(f"no pictures in class folders; found {found}; {LAYOUT}")
    at = start + bool(splits)
    used = {p[at] for p in inside}
    outside = sorted("/".join(p) for p in set(pictures) - set(inside))
    if outside:
        notices.append(f"ignored {_files(len(outside))} outside class folders: {listed(outside)}")
    tree = [name.split("/") for name in [*others, *(f"{folder}/" for folder in folders)]]
    seen = {part for p in tree if (part := _class_part(p, start, splits)) is not None}
    if empty := sorted(seen - used):
        notices.append(f"left out {listed(empty)}: no pictures there")
    if deep := next((p for p in inside if len(p) > at + 2), None):
        notices.append(
            f"folders inside class folders belong to the class: '{printable('/'.join(deep))}' "
            f"is of class '{printable(deep[at])}'"
        )
    labels = {part: class_name(part) for part in used}
    places = (Place("/".join(p), labels[p[at]], splits.get(p[start])) for p in inside)
    ignored = [(name, "no picture's ending") for name in others]
    ignored += [(name, "outside class folders") for name in outside]
    return Layout(tuple(places), tuple(notices), tuple(ignored))


def _files(count: int) -> str:
    return f"{count:,} file" + ("" if count == 1 else "s")


def _wrapper_depth(pictures: Sequence[tuple[str, ...]]) -> int:
    tops = {p[0] for p in pictures if len(p) > 1}
    return int(len(tops) == 1 and all(len(p) != 2 for p in pictures))  # 2 would be class/picture


def _split_folders(pictures: Sequence[tuple[str, ...]], start: int) -> dict[str, Split]:
    """Return the folders that are splits; empty when the first folders are classes."""
    tops = {p[start] for p in pictures if len(p) > start + 1}
    with_classes = {p[start] for p in pictures if len(p) > start + 2}
    found = {top: split for top in sorted(tops) if (split := split_of(top))}
    if not any(split == "train" and top in with_classes for top, split in found.items()):
        if found and len(found) == len(tops):
            raise DataError(
                f"{listed(found)}: these folders name splits, but there is no training folder with "
                f"class folders in it; {LAYOUT}"
            )
        return {}
    for split, count in Counter(found.values()).items():
        if count > 1:
            twice = listed(top for top, word in found.items() if word == split)
            raise DataError(f"{twice}: only one folder may hold the {split} pictures; merge them")
    return found


def _class_part(parts: Sequence[str], start: int, splits: Mapping[str, Split]) -> str | None:
    """Return the folder that names the class of a path, or None outside class folders."""
    at = start + bool(splits)
    if len(parts) < at + 2 or (splits and parts[start] not in splits):
        return None
    return parts[at]


def _split_notice(
    pictures: Sequence[tuple[str, ...]], start: int, splits: Mapping[str, Split]
) -> str:
    counts = Counter(p[start] for p in pictures if len(p) > start + 2)
    parts = (f"'{printable(top)}' is {splits[top]} ({counts[top]:,})" for top in splits)
    return "the split is taken from the folders: " + ", ".join(parts)


def settle_classes(
    labelled: Mapping[tuple[str, Split | None], int], min_classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes, sorted by code point, and notices about them.

    Args:
        labelled: number of pictures of each (class, split).
        min_classes: fewer are refused.

    Raises:
        DataError: too few classes, or one that the training pictures lack.
    """
    by_split: dict[Split | None, set[str]] = {}
    for label, split in labelled:
        by_split.setdefault(split, set()).add(label)
    classes = tuple(sorted(set().union(*by_split.values())))
    trained = by_split.get("train", set(classes))
    notices = []
    for split in ("validation", "test"):
        present = by_split.get(split)
        if present is None:
            continue
        if unknown := sorted(present - trained):
            raise DataError(
                f"class '{printable(unknown[0])}' is in the {split} pictures but not in the "
                f"training pictures; {nearest(unknown[0], sorted(trained))}"
            )
        if missing := sorted(trained - present):
            notices.append(f"no {split} pictures of {listed(missing)}")
    if len(classes) < min_classes:
        count = f"only {listed(classes)}" if classes else "none"
        raise DataError(f"at least {min_classes} classes are needed; found {count}; {LAYOUT}")
    return classes, (*notices, *_alike(classes))


def _alike(classes: Sequence[str]) -> list[str]:
    seen: dict[str, str] = {}
    notices = []
    for name in classes:
        twin = seen.setdefault(" ".join(name.casefold().split()), name)
        if twin != name:
            notices.append(
                f"classes '{printable(twin)}' and '{printable(name)}' differ only in case or spaces"
            )
    return notices
