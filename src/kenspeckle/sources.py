"""What is on disk, as labelled items: folders, archives, manifests and sets known by name.

A data set is a list of names with classes and a reader for their content. It is read lazily and in
place: nothing is copied or extracted, and a broken picture stays an item until it is read.
"""

import difflib
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kenspeckle.archives import Archive
from kenspeckle.core import DataError, InvalidValueError, MissingPathError, nearest, printable
from kenspeckle.folders import scan
from kenspeckle.images import Limits
from kenspeckle.manifests import archive_around, read_manifest
from kenspeckle.names import (
    Layout,
    Place,
    Split,
    arrange,
    hidden_notice,
    is_hidden,
    is_picture,
    listed,
    settle_classes,
)
from kenspeckle.readers import ArrayReader, FileReader, ParquetReader, Reader, ZipReader
from kenspeckle.standard import (
    STANDARD_SETS,
    StandardSet,
    default_data_folder,
    load_sample,
    load_standard,
)

__all__ = ["Dataset", "Item", "find_pictures", "open_dataset"]

_MANIFESTS = (".csv", ".tsv", ".parquet")
_MAX_BYTES = Limits().max_bytes
_announce = logging.getLogger("kenspeckle").warning


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of a data set.

    Attributes:
        name: its path inside the data set, ``/`` between folders, as the user knows it.
        label: index into the data set's classes; None when unlabelled.
        split: the split that the data give it, or None.
        group: items of one group must stay in one split; None stands alone.
    """

    name: str
    label: int | None
    split: Split | None = None
    group: str | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled pictures.

    Attributes:
        name: short, for titles and file names.
        location: the absolute path of the folder or file, or the name of a set.
        classes: names of the classes; an item's label is an index into them.
        items: sorted by name in folders and archives, else in the order of the source.
        notices: what was left out or decided, one line each.
        reader: gives the content of item i.
        ignored: files that are no item, each with the reason.
    """

    name: str
    location: str
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    notices: tuple[str, ...]
    reader: Reader
    ignored: tuple[tuple[str, str], ...] = ()

    def subset(self, indices: Sequence[int]) -> "Dataset":
        """Return a data set of some of the items, with the same classes."""
        items = tuple(self.items[index] for index in indices)
        return replace(self, items=items, reader=self.reader.subset(indices))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels, ``int64 (N,)``; -1 where an item has none."""
        labels = np.array(
            [-1 if item.label is None else item.label for item in self.items], np.int64
        )
        labels.flags.writeable = False
        return labels


@dataclass(frozen=True)
class _Listing:
    """A source before its classes are settled; `classes` where their order is official."""

    places: Sequence[Place]
    reader: Reader
    notices: tuple[str, ...] = ()
    groups: Sequence[str | None] | None = None
    classes: tuple[str, ...] | None = None
    ignored: tuple[tuple[str, str], ...] = ()


def open_dataset(
    data: str | Path,
    *,
    max_bytes: int = _MAX_BYTES,
    label_column: str | None = None,
    data_dir: Path | None = None,
    offline: bool = False,
    notify: Callable[[str], None] = _announce,
    min_classes: int = 2,
) -> Dataset:
    """Find out what `data` holds; a path that exists goes before a set of that name.

    Args:
        data: a folder of class folders, or of train/, validation/ and test/ folders with such; a
            ZIP archive of either; a CSV, TSV or Parquet manifest; ``sample``; or the name of one of
            `standard.STANDARD_SETS`.
        max_bytes: largest picture file that is read.
        label_column: a manifest's column of classes, when it has a name of its own.
        data_dir: where standard sets are, or are put; `standard.default_data_folder` when None.
        offline: whether downloading a standard set is an error.
        notify: receives one line before a download starts.
        min_classes: fewer are refused.

    Raises:
        MissingPathError: neither a path nor a name that is known.
        InvalidValueError: `label_column` for something that has no columns.
        DataError: the data cannot be used as they stand.
        MissingExtraError: an optional dependency is missing.

    Example:
        >>> sample = open_dataset("sample")
        >>> len(sample.items), sample.classes[7]
        (12000, 'Sneaker')
    """
    path = Path(data)
    kind = _kind_of(path)
    if label_column is not None and kind != "manifest":
        raise InvalidValueError(
            f"label_column must be left out, except for a manifest ({', '.join(_MANIFESTS)}); "
            f"got {label_column!r}"
        )
    if kind == "folder":
        listing = _folder(path, max_bytes)
    elif kind == "archive":
        listing = _archive(path, max_bytes)
    elif kind == "manifest":
        listing = _manifest(path, max_bytes, label_column)
    elif str(data) == "sample":
        listing = _named(load_sample(), Path(), max_bytes)
    elif str(data) in STANDARD_SETS:
        folder = data_dir or default_data_folder()
        listing = _named(
            load_standard(str(data), folder, notify, offline=offline), folder, max_bytes
        )
    else:
        raise MissingPathError(
            f"'{printable(str(data))}': no such folder or file, and no set of that name; "
            f"{_suggestion(path)}"
        )
    return _dataset(path, kind, listing, min_classes)


def _kind_of(path: Path) -> str:
    """Return ``folder``, ``archive``, ``manifest``, or ``nothing`` when there is no such path."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in it
        return "nothing"
    except OSError as error:
        raise DataError(f"{printable(str(path))}: {error.strerror or error}") from error
    suffix = path.suffix.lower()
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode) and suffix == ".zip":
        return "archive"
    if stat.S_ISREG(mode) and suffix in _MANIFESTS:
        return "manifest"
    raise DataError(
        f"{printable(str(path))}: data must be a folder, a .zip or a {', '.join(_MANIFESTS)} "
        f"file; got {'another kind of file' if stat.S_ISREG(mode) else 'a pipe, socket or device'}"
    )


def _suggestion(path: Path) -> str:
    try:
        around = os.listdir(path.parent)  # noqa: PTH208 - names, not paths
    except (OSError, ValueError):
        around = []
    near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, around)]
    return nearest(str(path), near or ["sample", *STANDARD_SETS])


def _dataset(path: Path, kind: str, listing: _Listing, min_classes: int) -> Dataset:
    location = str(path) if kind == "nothing" else str(path.resolve())
    counts = Counter((place.label, place.split) for place in listing.places)
    try:
        names, notices = settle_classes(counts, min_classes)
    except DataError as error:
        raise _located(path, error, listing.notices) from error
    if kind != "nothing" and str(path) in ("sample", *STANDARD_SETS):
        notices = (*notices, f"'{path}' is read from here, and not as the set of that name")
    classes = listing.classes or names
    label_of = {name: label for label, name in enumerate(classes)}
    groups = listing.groups or [None] * len(listing.places)
    items = tuple(
        Item(place.name, label_of[place.label], place.split, group)
        for place, group in zip(listing.places, groups, strict=True)
    )
    name = Path(location).name if kind == "folder" else Path(location).stem
    return Dataset(
        printable(name) or "data",
        location,
        classes,
        items,
        (*listing.notices, *notices),
        listing.reader,
        listing.ignored,
    )


def _located(path: Path, error: DataError, notices: Iterable[str]) -> DataError:
    return DataError("; ".join([f"{printable(str(path))}: {error}", *notices]))


def _named(found: StandardSet, folder: Path, max_bytes: int) -> _Listing:
    places: list[Place] = []
    arrays: list[NDArray[np.uint8]] = []
    for split, part in found.parts.items():
        labels = [found.classes[label] for label in part.labels]
        if isinstance(part.pictures, tuple):
            names = [path.relative_to(folder).as_posix() for path in part.pictures]
        else:
            names = [f"{split}/{index:05d}" for index in range(len(part.pictures))]
            arrays += list(part.pictures)
        places += map(Place, names, labels, [split] * len(names))
    reader: Reader = ArrayReader(arrays)
    if not arrays:
        reader = FileReader(folder, [place.name for place in places], max_bytes)
    return _Listing(places, reader, classes=found.classes)


def _manifest(path: Path, max_bytes: int, label_column: str | None) -> _Listing:
    manifest = read_manifest(path, label_column)
    places = [Place(row.name, row.label, row.split) for row in manifest.rows]
    names = [row.name for row in manifest.rows]
    reader: Reader
    if manifest.pictures is not None:
        reader = ParquetReader(manifest.pictures, range(len(names)), names, max_bytes)
    elif archive_around(path.parent / names[0]):
        reader = _members(path, names, max_bytes)
    else:
        reader = FileReader(path.parent, names, max_bytes)
    return _Listing(places, reader, manifest.notices, [row.group for row in manifest.rows])


def _members(path: Path, names: Sequence[str], max_bytes: int) -> ZipReader:
    """Return a reader of pictures that a manifest names as members of one archive."""
    around = [archive_around(path.parent / name) for name in names]
    whole = around[0]
    if whole is None or any(place is None or place[0] != whole[0] for place in around):
        raise DataError(
            f"{printable(str(path))}: all pictures must be files, or all members of one archive"
        )
    archive = Archive(whole[0])
    number = {member.name: index for index, member in enumerate(archive.members)}
    inside = [place[1] for place in around if place is not None]
    if missing := [name for name in inside if name not in number]:
        raise DataError(
            f"{printable(str(path))}: {len(missing):,} pictures are not in "
            f"{printable(str(whole[0]))}: {listed(missing)}"
        )
    return ZipReader(archive, [number[name] for name in inside], max_bytes)


def _archive(path: Path, max_bytes: int) -> _Listing:
    archive = Archive(path)
    hidden: Counter[str] = Counter()
    by_name: dict[str, int] = {}
    for index, member in enumerate(archive.members):
        secret = next((part for part in member.name.split("/") if is_hidden(part)), None)
        if secret is None:
            by_name[member.name] = index
        else:
            hidden[secret] += 1
    folders = [f for f in archive.folders if not any(map(is_hidden, f.split("/")))]
    layout = _layout(path, by_name, folders, hidden_notice(hidden))
    members = [by_name[place.name] for place in layout.places]
    reader = ZipReader(archive, members, max_bytes)
    return _Listing(layout.places, reader, layout.notices, ignored=layout.ignored)


def _folder(path: Path, max_bytes: int) -> _Listing:
    tree = scan(path)
    layout = _layout(path, tree.files, tree.folders, tree.notices())
    reader = FileReader(path, [place.name for place in layout.places], max_bytes)
    ignored = (*layout.ignored, *tree.ignored())
    return _Listing(layout.places, reader, layout.notices, ignored=ignored)


def _layout(path: Path, files: Iterable[str], folders: Iterable[str], notices: list[str]) -> Layout:
    try:
        layout = arrange(files, folders)
    except DataError as error:
        raise _located(path, error, notices) from error
    return replace(layout, notices=(*notices, *layout.notices))


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """Return the picture files that `paths` name: files as they are, folders with all inside.

    Args:
        paths: files, whatever their ending, and folders, whose pictures are sorted by name.

    Raises:
        MissingPathError: there is no such path.
        DataError: a folder has no pictures, or cannot be listed.
    """
    pictures: list[Path] = []
    for path in paths:
        if path.is_dir():
            tree = scan(path)
            inside = [path / name for name in sorted(tree.files) if is_picture(name)]
            if not inside:
                raise _located(path, DataError("no pictures in this folder"), tree.notices())
            pictures += inside
        elif path.exists() or path.is_symlink():
            pictures.append(path)
        else:
            raise MissingPathError(
                f"'{printable(str(path))}': no such file or folder; {_suggestion(path)}"
            )
    return pictures
