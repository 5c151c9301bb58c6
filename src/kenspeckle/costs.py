"""What each mistake costs, and the answer of least expected cost.

    read_costs(file, classes) → Costs
    decide(probabilities, costs) → the classes answered

Calibrated probabilities tell how often each class is the right one, so that the mean cost of every
answer can be computed before it is given, and the least is chosen. Where every mistake costs the
same, that is the most probable class.

Source: Elkan 2001, "The Foundations of Cost-Sensitive Learning", IJCAI, section 1.
"""

import csv
import functools
import io
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import InvalidValueError, nearest, printable
from kenspeckle.files import read_file
from kenspeckle.names import class_name, from_cell, listed

__all__ = ["Costs", "decide", "expected_costs", "read_costs"]

MAX_COST = 1e12  # beyond, the rounding of one float32 probability outweighs what others cost
TIE = 1e-9  # relative; far above the rounding of a sum, far below that of float32 probabilities

_MAX_FILE_BYTES = 64_000_000  # a matrix of a few thousand classes
_DELIMITERS = (",", ";", "\t")
_LIST_HEADER = ["true", "answered", "cost"]
_NUMBER = re.compile(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Costs:
    """What every answer costs, for every class that may be the right one, in one unit of any kind.

    A right answer may cost something too, but less than each wrong one of its row: otherwise it
    would pay never to give it.

    Attributes:
        matrix: K rows of K numbers from 0 to 10^12; ``matrix[true][answered]``, both in the order
            of the network's classes.

    Raises:
        InvalidValueError: the matrix is not square with at least two classes, holds another number,
            or has a wrong answer that costs no more than the right one.

    Example:
        >>> Costs(((0.0, 100.0), (1.0, 0.0))).dearest
        (0, 1)
    """

    matrix: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        widths = {len(self.matrix), *map(len, self.matrix)}
        if len(widths) > 1 or len(self.matrix) < 2:
            raise InvalidValueError(
                "costs must be a square matrix of at least two classes; got "
                f"{len(self.matrix)} rows with widths {sorted(set(map(len, self.matrix)))}"
            )
        fits = (self.array >= 0) & (self.array <= MAX_COST)  # so written, nan is refused too
        if not fits.all():
            true, answered = np.argwhere(~fits)[0]
            raise InvalidValueError(
                f"costs must be numbers from 0 to {MAX_COST:g}; got "
                f"{self.matrix[true][answered]!r} in row {true}, column {answered}"
            )
        for true, row in enumerate(self.array):
            answered = _cheap_mistake(row, true)
            if answered is not None:
                raise InvalidValueError(
                    "a right answer must cost less than a wrong one; got "
                    f"{row[true]:g} and {row[answered]:g} in row {true}, column {answered}"
                )

    @functools.cached_property
    def array(self) -> NDArray[np.float64]:
        """The matrix, ``float64 (K, K)``, not to be written to."""
        array = np.array(self.matrix, np.float64)
        array.setflags(write=False)
        return array

    @property
    def dearest(self) -> tuple[int, int]:
        """The right class and the answer of the mistake that costs most; the first of several."""
        mistakes = np.where(np.eye(len(self.matrix), dtype=bool), -1, self.array)
        true, answered = np.unravel_index(mistakes.argmax(), mistakes.shape)
        return int(true), int(answered)


def expected_costs(probabilities: Floats, costs: Costs) -> NDArray[np.float64]:
    """Return what each answer costs on average, ``float64 (N, K)``.

    Args:
        probabilities: ``(N, K)``, calibrated; each row sums to one.
        costs: of the same K classes.

    Raises:
        InvalidValueError: the number of classes differs.

    Example:
        >>> expected_costs(np.array([[0.25, 0.75]]), Costs(((0.0, 100.0), (1.0, 0.0))))
        array([[ 0.75, 25.  ]])
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != len(costs.matrix):
        raise InvalidValueError(
            f"probabilities must be (N, {len(costs.matrix)}), a column for each class that the "
            f"costs name; got {probabilities.shape}"
        )
    return probabilities.astype(np.float64) @ costs.array


def decide(probabilities: Floats, costs: Costs | None) -> NDArray[np.int64]:
    """Return the class to answer for each row, ``int64 (N,)``.

    It is the one of least expected cost; of several the most probable, and of those the first.

    Args:
        probabilities: ``(N, K)``, calibrated; each row sums to one.
        costs: of the same K classes; None takes the most probable class.

    Raises:
        InvalidValueError: the number of classes differs.

    Example:
        >>> decide(np.array([[0.25, 0.75]]), Costs(((0.0, 100.0), (1.0, 0.0))))
        array([0])
    """
    if costs is None:
        return np.asarray(probabilities.argmax(axis=1), np.int64)
    expected = expected_costs(probabilities, costs)
    least = expected <= expected.min(axis=1, keepdims=True) * (1 + TIE)
    return np.asarray(np.where(least, probabilities, -1).argmax(axis=1), np.int64)


def _cheap_mistake(row: NDArray[np.float64], true: int) -> int | None:
    """Return the first wrong answer that costs no more than the right one, if there is one."""
    return next((int(k) for k in np.flatnonzero(row <= row[true]) if k != true), None)


# Reading.


class _Dialect(csv.excel):
    """Commas, semicolons or tabs, and a space after them that does not count."""

    skipinitialspace = True
    strict = True


@dataclass(frozen=True)
class _Line:
    where: str
    cells: list[str]


def read_costs(path: Path, classes: tuple[str, ...]) -> Costs:
    """Read what mistakes cost from UTF-8 text in cells between commas, semicolons or tabs.

    Either a matrix: its first line is a cell of any content, then the classes as answers; every
    further line is the class that is right, then the costs. Each class stands once in both
    directions, in any order. Or a list of the mistakes that stand out, a line each below the line
    ``true,answered,cost``: other mistakes cost 1, and right answers nothing.

    Args:
        path: of the file.
        classes: names in the order of the network's outputs.

    Raises:
        MissingPathError: there is no such file.
        DataError: it is not an ordinary file, too large, or not readable.
        InvalidValueError: it is of neither form, names a class that is unknown, twice there or
            missing, holds what is no cost, or a wrong answer costs no more than the right one.
    """
    data = read_file(path, _MAX_FILE_BYTES)
    index_of = {name: index for index, name in enumerate(classes)}
    try:
        header, *lines = _lines(data, index_of)
        if _is_list(header.cells, index_of):
            return _from_list(lines, index_of)
        return _from_matrix(header, lines, index_of)
    except InvalidValueError as error:
        raise InvalidValueError(f"{printable(str(path))}: {error}") from error


def _lines(data: bytes, index_of: Mapping[str, int]) -> list[_Line]:
    """Return the lines that are not empty, cut at the delimiter that suits the first one best."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidValueError(
            f"costs must be UTF-8 text; {error}; save as 'CSV UTF-8'"
        ) from error
    reader = csv.reader(
        io.StringIO(text, newline=""), _Dialect, delimiter=_delimiter(text, index_of)
    )
    try:
        lines = [
            _Line(f"line {reader.line_num}", [from_cell(cell) for cell in record])
            for record in reader
            if any(record)
        ]
    except csv.Error as error:
        raise InvalidValueError(f"line {reader.line_num}: {error}") from error
    if len(lines) < 2:
        raise InvalidValueError(
            f"costs must be a line of names and lines of numbers below it; got {len(lines)}"
        )
    return lines


def _delimiter(text: str, index_of: Mapping[str, int]) -> str:
    def likeness(delimiter: str) -> tuple[bool, int]:
        # Not strict: quotes look odd between the wrong delimiters.
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, _Dialect, delimiter=delimiter, strict=False)
        cells = next(filter(any, reader), [])
        return _is_list(cells, index_of) or len(cells) == len(index_of) + 1, len(cells)

    try:
        return max(_DELIMITERS, key=likeness)
    except csv.Error as error:
        raise InvalidValueError(f"the first line must be the names of classes: {error}") from error


def _is_list(cells: list[str], index_of: Mapping[str, int]) -> bool:
    words = [cell.strip().lower() for cell in cells]
    return words == _LIST_HEADER and set(cells[1:]) != set(index_of)


def _from_matrix(header: _Line, lines: list[_Line], index_of: Mapping[str, int]) -> Costs:
    names = tuple(index_of)
    columns: list[int] = []
    for cell in header.cells[1:]:
        columns.append(_class_at(cell, header.where, index_of, columns))
    _require_all(columns, f"{header.where}: ", "column", names)
    rows: dict[int, tuple[float, ...]] = {}
    for line in lines:
        _require_width(line, len(header.cells))
        true = _class_at(line.cells[0], line.where, index_of, rows)
        cells = dict(zip(columns, line.cells[1:], strict=True))
        row = [_cost(cells[k], line.where, name) for k, name in enumerate(names)]
        _require_dearer_mistakes(np.array(row), true, line.where, names)
        rows[true] = tuple(row)
    _require_all(rows, "", "line", names)
    return Costs(tuple(row for _, row in sorted(rows.items())))


def _from_list(lines: list[_Line], index_of: Mapping[str, int]) -> Costs:
    names = tuple(index_of)
    stated: dict[tuple[int, int], float] = {}
    last: dict[int, str] = {}
    for line in lines:
        _require_width(line, len(_LIST_HEADER))
        true, answered = (_class_at(cell, line.where, index_of) for cell in line.cells[:2])
        if (true, answered) in stated:
            raise InvalidValueError(
                f"{line.where}: a mistake must stand once; got '{printable(names[true])}' answered "
                f"'{printable(names[answered])}' a second time"
            )
        stated[true, answered] = _cost(line.cells[2], line.where, names[answered])
        last[true] = line.where
    matrix = 1 - np.eye(len(names))
    matrix[tuple(zip(*stated, strict=True))] = list(stated.values())
    for true, where in last.items():
        _require_dearer_mistakes(matrix[true], true, where, names)
    return Costs(tuple(map(tuple, matrix.tolist())))


def _class_at(
    cell: str, where: str, index_of: Mapping[str, int], taken: Collection[int] = ()
) -> int:
    name = class_name(cell)
    if name not in index_of:
        raise InvalidValueError(
            f"{where}: a name must be that of a class of the model; got '{printable(name)}'; "
            f"{nearest(name, index_of)}"
        )
    if index_of[name] in taken:
        raise InvalidValueError(
            f"{where}: a class must stand once in each direction; got '{printable(name)}' a second "
            "time"
        )
    return index_of[name]


def _cost(cell: str, where: str, answered: str) -> float:
    number = float(cell) if _NUMBER.fullmatch(cell.strip()) else math.nan
    if not number <= MAX_COST:
        raise InvalidValueError(
            f"{where}: the cost of answering '{printable(answered)}' must be a number from 0 to "
            f"{MAX_COST:g}, with a decimal point; got {cell[:40]!r}"
        )
    return number


def _require_width(line: _Line, width: int) -> None:
    if len(line.cells) != width:
        raise InvalidValueError(
            f"{line.where}: a line must have {width} cells, as the first one; got {len(line.cells)}"
        )


def _require_all(found: Collection[int], where: str, what: str, names: tuple[str, ...]) -> None:
    if missing := [name for index, name in enumerate(names) if index not in found]:
        raise InvalidValueError(
            f"{where}costs must have a {what} for every class; got none for {listed(missing)}"
        )


def _require_dearer_mistakes(
    row: NDArray[np.float64], true: int, where: str, names: tuple[str, ...]
) -> None:
    answered = _cheap_mistake(row, true)
    if answered is not None:
        right = printable(names[true])
        raise InvalidValueError(
            f"{where}: a right answer must cost less than a wrong one; got {row[true]:g} for "
            f"'{right}' answered '{right}' and {row[answered]:g} for '{right}' answered "
            f"'{printable(names[answered])}'; raise the cost of the mistake"
        )
