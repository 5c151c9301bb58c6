"""Manifests: tables that name pictures and their classes, as CSV, TSV or Parquet.

Columns, in any order and case; the first of each list that is there counts:

    the picture   `PATH_COLUMNS`, relative to the manifest's folder, or through a ZIP archive, as
                  ``flowers.zip/rose/1.jpg``; in Parquet also its bytes,
                  `BYTES_COLUMNS`, plain or as Hugging Face's struct of bytes and path
    its class     `LABEL_COLUMNS`
    optional      split (the words of `names.SPLIT_WORDS`), group

A label is a name: the number 1 is the class '1'.
"""

import csv
import io
import json
import math
import os
import re
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from kenspeckle.core import DataError, MissingExtraError, nearest, printable
from kenspeckle.files import read_file
from kenspeckle.names import SPLIT_WORDS, Split, class_name, from_cell, listed, split_of

__all__ = [
    "BYTES_COLUMNS",
    "LABEL_COLUMNS",
    "PATH_COLUMNS",
    "Manifest",
    "ParquetPictures",
    "Row",
    "archive_around",
    "read_manifest",
]

PATH_COLUMNS = ("path", "file", "filename", "image", "image_path")
BYTES_COLUMNS = ("bytes", "image")
LABEL_COLUMNS = ("label", "class", "category", "target")

_MAX_TEXT_BYTES = 500_000_000
_MAX_ROW_GROUP_BYTES = 2_000_000_000
_KEPT_BYTES = 500_000_000  # of row groups in memory; one larger than this is kept alone
_NUM_SHOWN = 5
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a manifest.

    Attributes:
        where: "line 7" of a text file, or "row 7", counted from 0, of a Parquet file.
        name: the picture's path as the manifest writes it; its row where it has none.
        label: the name of its class.
        split: its split, or None when the manifest has no such column.
        group: the name of its group, or None.
    """

    where: str
    name: str
    label: str
    split: Split | None
    group: str | None


@dataclass(frozen=True)
class Manifest:
    """What a manifest holds.

    Attributes:
        rows: one per picture, in the manifest's order.
        pictures: the bytes of row i, or None where rows name files.
        notices: what was left out, one line each.
    """

    rows: tuple[Row, ...]
    pictures: "ParquetPictures | None"
    notices: tuple[str, ...]


@dataclass(frozen=True)
class _Table:
    """The columns that are read by lower-case name, and the names of all; rows by their place."""

    columns: Mapping[str, Sequence[object]]
    found: Sequence[str]
    where: Sequence[str]
    pictures: "ParquetPictures | None" = None


def read_manifest(path: Path, label_column: str | None = None) -> Manifest:
    """Read the manifest at `path`; its ending tells the format.

    Args:
        path: a ``.csv``, ``.tsv`` or ``.parquet`` file.
        label_column: the column that holds the classes, when it has a name of its own.

    Raises:
        DataError: a column is missing, a row is malformed, names no file, or contradicts another.
        MissingExtraError: Parquet without pyarrow.
        MissingPathError: there is no such file.
    """
    suffix = path.suffix.lower()
    wanted = {*PATH_COLUMNS, *LABEL_COLUMNS, "split", "group", (label_column or "").strip().lower()}
    try:
        if suffix == ".parquet":
            table = _parquet(path, wanted)
        else:
            table = _text(path, "\t" if suffix == ".tsv" else ",")
        return _manifest(table, path.parent, label_column)
    except DataError as error:
        where = f"{printable(str(path))}: "
        raise DataError(where + str(error).removeprefix(where)) from error


def _manifest(table: _Table, folder: Path, label_column: str | None) -> Manifest:
    label_at = _label_column(table, label_column)
    path_at = _first(table.columns, PATH_COLUMNS)
    if table.pictures is None and path_at is None:
        raise DataError(_no_column("the picture's path", table.found, PATH_COLUMNS))
    if not table.where:
        raise DataError("no rows; expected a line per picture below the names of the columns")
    used = {label_at, path_at, "split", "group"}
    notices = []
    if extra := sorted(set(table.found) - used):
        notices.append(f"ignored columns: {listed(extra)}")
    names, labels = _names(table, path_at), _labels(table.columns[label_at], table.where)
    cells = zip(table.where, names, labels, _splits(table), _groups(table), strict=True)
    rows = [Row(*row) for row in cells]
    if table.pictures is None:
        _check_files(rows, folder)
        rows, repeated = _without_repeats(rows)
        notices += [f"rows that repeat another are counted once ({repeated:,})"] * bool(repeated)
    return Manifest(tuple(rows), table.pictures, tuple(notices))


def _first(columns: Iterable[str], accepted: Sequence[str]) -> str | None:
    return next((name for name in accepted if name in columns), None)


def _no_column(what: str, columns: Iterable[str], accepted: Sequence[str]) -> str:
    found = listed(columns, num_shown=20) or "none"
    return f"no column for {what}; found {found}; accepted: {', '.join(accepted)}"


def _label_column(table: _Table, wanted: str | None) -> str:
    if wanted is not None:
        column = wanted.strip().lower()
        if column not in table.columns:
            raise DataError(f"no column '{printable(wanted)}'; {nearest(column, table.found)}")
        return column
    found = _first(table.columns, LABEL_COLUMNS)
    if found is None:
        raise DataError(_no_column("the class", table.found, LABEL_COLUMNS))
    return found


def _names(table: _Table, path_at: str | None) -> list[str]:
    named = table.columns[path_at] if path_at else ()
    names = [value.removeprefix("./") if isinstance(value, str) else "" for value in named]
    if table.pictures is None:
        for where, name in zip(table.where, names, strict=True):
            if not name:
                raise DataError(f"{where}: the picture's path is empty")
        return names
    if all(names) and len(set(names)) == len(table.where):
        return names
    return [where.replace(" ", "-") for where in table.where]


def _labels(values: Sequence[object], where: Sequence[str]) -> Iterator[str]:
    # Text that is a number in every row is a column of numbers, as a spreadsheet writes it.
    numeric = all(isinstance(v, str) and _NUMBER.fullmatch(v) for v in values)
    for place, value in zip(where, values, strict=True):
        try:
            yield _label(value, numeric)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None


def _label(value: object, numeric: bool) -> str:
    if numeric and isinstance(value, str) and not value.lstrip("+-").isdigit():
        value = float(value)
    if isinstance(value, float) and not math.isnan(value):  # NaN is an empty cell
        if not value.is_integer():
            raise DataError(
                f"the label must be a class; got the number {value!r}; regression is not offered, "
                "so give classes names, such as 'low' and 'high'"
            )
        value = int(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return class_name(value)
    if value is None or isinstance(value, str | float):
        raise DataError("the label is empty")
    raise DataError(f"the label must be text or a whole number; got {type(value).__name__}")


def _splits(table: _Table) -> list[Split | None]:
    if "split" not in table.columns:
        return [None] * len(table.where)
    pairs = zip(table.where, table.columns["split"], strict=True)
    return [_split(place, value) for place, value in pairs]


def _split(place: str, value: object) -> Split:
    split = split_of(value) if isinstance(value, str) else None
    if split is None:
        raise DataError(f"{place}: split must be one of {', '.join(SPLIT_WORDS)}; got {value!r}")
    return split


def _groups(table: _Table) -> list[str | None]:
    values = table.columns.get("group", [None] * len(table.where))
    return [None if value is None or value == "" else str(value) for value in values]


def _check_files(rows: Iterable[Row], folder: Path) -> None:
    missing = [row for row in rows if not _is_there(folder / row.name)]
    if missing:
        shown = ", ".join(f"{r.where} '{printable(r.name)}'" for r in missing[:_NUM_SHOWN])
        hint = "; paths are written with '/'" if any("\\" in row.name for row in missing) else ""
        raise DataError(
            f"{len(missing):,} of its pictures are not there as files, relative to "
            f"'{printable(str(folder))}': {shown}{' …' if len(missing) > _NUM_SHOWN else ''}{hint}"
        )


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False


def _is_there(path: Path) -> bool:
    return _is_file(path) or archive_around(path) is not None


def archive_around(path: Path) -> tuple[Path, str] | None:
    """Return the archive that a path leads through and the member in it, or None.

    Example:
        >>> archive_around(Path("no/such.zip/rose/1.jpg")) is None
        True
    """
    for parent in path.parents:
        if parent.suffix.lower() == ".zip" and _is_file(parent):
            return parent, path.relative_to(parent).as_posix()
    return None


def _without_repeats(rows: Iterable[Row]) -> tuple[list[Row], int]:
    first: dict[str, Row] = {}
    repeated = 0
    for row in rows:
        other = first.setdefault(os.path.normpath(row.name), row)
        if other is row:
            continue
        if replace(row, where=other.where, name=other.name) != other:
            raise DataError(
                f"{other.where} and {row.where} say different things of '{printable(row.name)}': "
                f"'{printable(other.label)}' ({other.split or 'no split'}) and "
                f"'{printable(row.label)}' ({row.split or 'no split'})"
            )
        repeated += 1
    return list(first.values()), repeated


def _text(path: Path, delimiter: str) -> _Table:
    # Bytes that are not UTF-8 survive as surrogates: file names may hold them, classes may not.
    text = read_file(path, _MAX_TEXT_BYTES).decode("utf-8-sig", errors="surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[list[str]] = []
    where = []
    try:
        for record in reader:
            if record:
                records.append(record)
                where.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"line {reader.line_num}: {error}") from error
    if not records:
        raise DataError("empty; expected the names of the columns in its first line")
    header = _header(records.pop(0))
    where.pop(0)
    for place, record in zip(where, records, strict=True):
        if len(record) != len(header):
            raise DataError(f"{place}: {len(record)} fields; the first line has {len(header)}")
    cells = ([from_cell(cell) for cell in record] for record in records)
    columns = list(zip(*cells, strict=True)) or [()] * len(header)
    return _Table(dict(zip(header, columns, strict=True)), header, where)


def _header(names: Iterable[str]) -> list[str]:
    header = [name.strip().lower() for name in names]
    if any(not name.isprintable() for name in header):
        raise DataError("not UTF-8 text; save it as 'CSV UTF-8'")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"two columns are named {listed(twice)}")
    return header


def _parquet(path: Path, wanted: Set[str]) -> _Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("reading Parquet files", "parquet") from error
    try:
        state = path.stat()
        file = pa.parquet.ParquetFile(path)
        schema = file.schema_arrow
        names = dict(zip(_header(schema.names), schema.names, strict=True))
        binary = {key for key, name in names.items() if _holds_bytes(schema.field(name).type)}
        plain = {key: name for key, name in names.items() if key in wanted - binary}
        columns: dict[str, list[object]] = {key: [] for key in plain}
        for batch in file.iter_batches(columns=list(plain.values())):
            for key, name in plain.items():
                columns[key] += batch.column(name).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"not a Parquet file that can be read: {error}") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    words = _class_labels(schema.metadata or {})
    columns = {key: _in_words(values, words.get(key)) for key, values in columns.items()}
    where = [f"row {index}" for index in range(file.metadata.num_rows)]
    at = _first(binary, BYTES_COLUMNS)
    if at is None:
        return _Table(columns, list(names), where)
    token = f"{state.st_size}-{state.st_mtime_ns}-{state.st_ino}"
    found = [key for key in names if key != at]
    return _Table(columns, found, where, ParquetPictures(file, names[at], token))


def _holds_bytes(kind: Any) -> bool:  # noqa: ANN401 - pyarrow has no types
    import pyarrow as pa

    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names behind whole-number columns that Hugging Face `datasets` wrote.

    Source: https://huggingface.co/docs/datasets/about_dataset_features
    """
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            key.strip().lower(): [str(word) for word in feature["names"]]
            for key, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):  # not in their form
        return {}


def _in_words(values: list[object], words: Sequence[str] | None) -> list[object]:
    if words is None:
        return values
    by_number: dict[object, object] = {-1: None, **dict(enumerate(words))}  # -1 is "no label"
    return [by_number.get(v, v) if isinstance(v, int) else v for v in values]


class ParquetPictures:
    """The column of a Parquet file that holds pictures; `read` may be called from several threads.

    Rows are cheap in their order: the row group around one is decoded and kept.
    """

    def __init__(self, file: Any, column: str, token: str) -> None:  # noqa: ANN401 - pyarrow's file
        """Store what is read later; `token` changes when the file does."""
        self._file = file
        self._column = column
        self._token = token
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self._starts = list(accumulate(groups, initial=0))
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """Return the picture of row number `row`, encoded.

        Raises:
            DataError: the cell is empty, its row group is too large, or the file is damaged.
        """
        group = bisect_right(self._starts, row) - 1
        with self._lock:
            value = self._row_group(group)[row - self._starts[group]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise DataError("the cell of the picture is empty")
        return cast("bytes", data)

    def stamp(self, row: int) -> str:
        """Return a token that changes whenever the file does."""
        return f"{self._token}-{row}"

    def _row_group(self, group: int) -> Any:  # noqa: ANN401 - a pyarrow array
        import pyarrow as pa

        if group not in self._kept:
            size = self._file.metadata.row_group(group).total_byte_size
            if size > _MAX_ROW_GROUP_BYTES:
                raise DataError(
                    f"row group {group} has {size:,} bytes; at most {_MAX_ROW_GROUP_BYTES:,}; "
                    "write the file with fewer rows in a group"
                )
            try:
                table = self._file.read_row_group(group, columns=[self._column])
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"row group {group} cannot be read: {error}") from error
            self._kept[group] = table.column(self._column)
        self._kept.move_to_end(group)
        while len(self._kept) > 1 and sum(c.nbytes for c in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[group]
