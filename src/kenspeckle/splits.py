"""Who learns and who is asked: the split into training, validation and test pictures.

A split that the data bring is kept. What they lack is cut out by class, so that each split has its
share of every class, and by group, so that pictures that belong together (twins, one patient, one
video) never stand on both sides. The choice hangs on the names and the seed alone, by a hash: it is
alike on every machine and in any order of the items.
"""

import csv
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import DataError, InvalidValueError
from kenspeckle.files import write_file
from kenspeckle.names import SPLITS, Split, listed, to_cell
from kenspeckle.sources import Dataset, Item

__all__ = ["assign", "place", "units", "with_groups", "write_split"]

Shares = Mapping[Split, float]


def assign(
    dataset: Dataset,
    validation: float,
    test: float,
    seed: int,
    together: NDArray[np.int64] | None = None,
) -> tuple[tuple[Split, ...], tuple[str, ...]]:
    """Return the split of every item, and what must be said about it.

    Args:
        dataset: with a split of its own for all items or for none. Where it has only training
            pictures, all parts are cut from them; where it lacks validation pictures, these are cut
            from the training pictures; a test part is not invented beside validation pictures.
        validation: share to validate on, above 0; of the training pictures when they are cut.
        test: share to test on; 0 makes no test part.
        seed: another seed, another choice.
        together: ``int64 (N,)``; items with equal numbers stay in one part, as groups do.

    Returns:
        Splits in the order of the items, and notices, one line each.

    Raises:
        InvalidValueError: a share is out of range, or `together` has another length.
        DataError: some items have a split and others none, or there is nothing to train on.
    """
    if not (validation > 0 and test >= 0 and validation + test < 1):
        raise InvalidValueError(
            "validation must be above 0, test at least 0 and their sum below 1; "
            f"got {validation} and {test}"
        )
    if together is not None and together.shape != (len(dataset.items),):
        raise InvalidValueError(
            f"together must have one number per item, {len(dataset.items):,}; got {together.shape}"
        )
    numbers = units(dataset.items, together)
    given = _given(dataset.items)
    notices = _straddling(dataset.items, numbers) if given else []
    if "validation" in given:
        if "test" not in given:
            notices.append("the data bring validation but no test pictures: there will be no test")
        return tuple(item.split or "train" for item in dataset.items), tuple(notices)
    shares: Shares = {"train": 1 - validation, "validation": validation}
    if not given and test > 0:
        shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    free = [i for i, item in enumerate(dataset.items) if item.split in (None, "train")]
    cut = _cut(dataset.items, free, numbers, shares, seed)
    parts = tuple(cut.get(i) or item.split or "train" for i, item in enumerate(dataset.items))
    notices += _thin_classes(dataset, free, parts, shares)
    return parts, tuple(notices)


def _given(items: Sequence[Item]) -> set[Split]:
    """Return the splits that the data bring; training pictures alone are no split."""
    counts = Counter(item.split for item in items)
    num_without = counts.pop(None, 0)
    if num_without and counts:
        raise DataError(
            f"all pictures need a split, or none; {num_without:,} of {len(items):,} have none"
        )
    given: set[Split] = {split for split in counts if split is not None}
    if not items or (given and "train" not in given):
        raise DataError(f"no training pictures; found {listed(sorted(given)) or 'no pictures'}")
    return set() if given == {"train"} else given


def units(items: Sequence[Item], together: NDArray[np.int64] | None) -> list[int]:
    """Return for each item the smallest index among those that it must stay with.

    Source: union-find with path halving (Tarjan and van Leeuwen, JACM 1984).
    """
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str | int, int] = {}  # groups are text, the numbers of `together` are not
    for i, item in enumerate(items):
        keys: list[str | int] = [] if item.group is None else [item.group]
        if together is not None:
            keys.append(int(together[i]))
        for key in keys:
            a, b = root(first.setdefault(key, i)), root(i)
            parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(items))]


def _straddling(items: Sequence[Item], units: Sequence[int]) -> list[str]:
    sides: dict[int, set[Split | None]] = {}
    for unit, item in zip(units, items, strict=True):
        sides.setdefault(unit, set()).add(item.split)
    count = sum(len(splits) > 1 for splits in sides.values())
    if not count:
        return []
    return [f"pictures that belong together lie across the given split, in {count:,} cases"]


@dataclass
class _Class:
    """A class while its pictures are dealt out.

    Attributes:
        targets: pictures that each part should get.
        have: pictures that each part has.
        units_left: units, single pictures or groups, that are still to be dealt.
        wanted: parts that must not stay empty, as far as the class has units.
    """

    targets: dict[Split, int]
    have: Counter[Split]
    units_left: int
    wanted: list[Split]

    def urgent(self, part: Split) -> bool:
        """Return whether `part` is empty and every unit left is needed for an empty part."""
        empty = [wanted for wanted in self.wanted if not self.have[wanted]]
        return part in empty and len(empty) >= self.units_left


def _cut(
    items: Sequence[Item], free: Sequence[int], units: Sequence[int], shares: Shares, seed: int
) -> dict[int, Split]:
    """Deal the items `free` out to the parts of `shares`; return the part of each.

    Groups go first, the largest before all, each to the part where it leaves the least sum of
    squared distances from the targets; single pictures fill up what is missing.
    """
    rank = {i: _rank(seed, items[i].name) for i in free}
    members: dict[int, list[int]] = {}
    for i in sorted(free, key=rank.__getitem__):
        members.setdefault(units[i], []).append(i)
    classes = _classes(items, members.values(), shares)
    cut: dict[int, Split] = {}
    groups = [group for group in members.values() if len(group) > 1]
    for group in sorted(groups, key=len, reverse=True):  # stable: ties stay in order of rank
        part = _deal(classes, Counter(items[i].label for i in group), shares)
        cut.update(dict.fromkeys(group, part))
    singles: dict[int | None, list[int]] = {}
    for group in members.values():
        if len(group) == 1:
            singles.setdefault(items[group[0]].label, []).append(group[0])
    for label, indices in singles.items():
        one = Counter([label])
        dealt = sorted((_deal(classes, one, shares) for _ in indices), key=SPLITS.index)
        cut.update(zip(indices, dealt, strict=True))
    return cut


def _rank(seed: int, name: str) -> bytes:
    key = str(seed).encode()[:64]
    return hashlib.blake2b(name.encode(errors="surrogatepass"), key=key, digest_size=16).digest()


def _classes(
    items: Sequence[Item], groups: Iterable[Sequence[int]], shares: Shares
) -> dict[int | None, _Class]:
    num_pictures: Counter[int | None] = Counter()
    num_units: Counter[int | None] = Counter()
    for group in groups:
        labels = [items[i].label for i in group]
        num_pictures.update(labels)
        num_units.update(set(labels))
    return {
        label: _Class(
            _targets(count, shares), Counter(), num_units[label], list(shares)[: num_units[label]]
        )
        for label, count in num_pictures.items()
    }


def _targets(count: int, shares: Shares) -> dict[Split, int]:
    """Return whole numbers that sum to `count`, each within one of its share of it.

    Source: the method of largest remainders (Hare-Niemeyer); ties go to the earlier part.
    """
    targets = {part: math.floor(count * share) for part, share in shares.items()}
    by_remainder = sorted(shares, key=lambda part: targets[part] - count * shares[part])
    for part in by_remainder[: count - sum(targets.values())]:
        targets[part] += 1
    return targets


def _deal(
    classes: Mapping[int | None, _Class], counts: Mapping[int | None, int], shares: Shares
) -> Split:
    """Choose a part for a unit that holds `counts` pictures of each class, and book it."""

    def merit(part: Split) -> tuple[int, int]:
        urgency = sum(classes[label].urgent(part) for label in counts)
        lack = sum(
            count * (classes[label].targets[part] - classes[label].have[part])
            for label, count in counts.items()
        )
        return urgency, lack

    part = max(shares, key=merit)
    for label, count in counts.items():
        classes[label].have[part] += count
        classes[label].units_left -= 1
    return part


def _thin_classes(
    dataset: Dataset, free: Iterable[int], parts: Sequence[Split], shares: Shares
) -> list[str]:
    found = {(dataset.items[i].label, parts[i]) for i in free}
    labels = sorted({label for label, _ in found if label is not None})
    notices = []
    for part in shares:
        missing = [dataset.classes[label] for label in labels if (label, part) not in found]
        if missing:
            notices.append(
                f"no {part} pictures of {listed(missing)}: a class needs {len(shares)} pictures, "
                "or groups of them, to be in every part"
            )
    return notices


def with_groups(dataset: Dataset, pattern: str) -> Dataset:
    r"""Return the data set with the groups that `pattern` finds in the names of its pictures.

    Args:
        dataset: without groups of its own.
        pattern: a regular expression that is searched for in every name; pictures of which it finds
            the same text are of one group: the text in its parentheses, where it has any. Or
            ``folder``, which puts the pictures of each folder into one group.

    Raises:
        InvalidValueError: not a regular expression, or it tells no group apart: it finds nothing,
            or the same text in all names.
        DataError: the data have groups of their own.

    Example:
        >>> from kenspeckle.sources import open_dataset
        >>> with_groups(open_dataset("sample"), r"^\w+").items[0].group
        'train'
    """
    if any(item.group is not None for item in dataset.items):
        raise DataError(f"{dataset.location}: has a column group; --group cannot be used beside it")
    try:
        known = re.compile(r"^(?:.*(?=/))?" if pattern == "folder" else pattern)
    except re.error as error:
        raise InvalidValueError(
            f"--group must be 'folder' or a regular expression; got {pattern!r}: {error}"
        ) from error
    found = [_group(known.search(item.name)) for item in dataset.items]
    distinct = set(found)
    if distinct == {None} or len(distinct) == 1:
        what = "nothing" if None in distinct else f"the same text {found[0]!r}"
        raise InvalidValueError(
            f"--group {pattern!r} must tell groups apart; it finds {what} in all "
            f"{len(found):,} names, such as {listed([dataset.items[0].name])}"
        )
    items = [replace(item, group=group) for item, group in zip(dataset.items, found, strict=True)]
    return replace(dataset, items=tuple(items))


def _group(match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    return "\0".join(part or "" for part in match.groups()) if match.re.groups else match.group()


def write_split(path: Path, dataset: Dataset, parts: Sequence[Split]) -> None:
    """Write the split as CSV with the columns path, label, split and, where there are any, group.

    The result is a manifest that can be trained on again, with absolute paths, for pictures that
    are files or members of an archive. Parts of other sets stand with their names, as a record.

    Args:
        path: replaced when it exists.
        dataset: its items in order.
        parts: the split of each item.

    Raises:
        WriteError: the file cannot be written.
    """
    with_groups = any(item.group is not None for item in dataset.items)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "label", "split", *["group"] * with_groups])
    for index, (item, part) in enumerate(zip(dataset.items, parts, strict=True)):
        label = "" if item.label is None else to_cell(dataset.classes[item.label])
        group = [to_cell(item.group or "")] * with_groups
        writer.writerow([place(dataset, index), label, part, *group])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def place(dataset: Dataset, index: int) -> str:
    """Return where a picture is, as a cell of a manifest: its path, or else its name."""
    path = dataset.reader.path(index)
    return to_cell(dataset.items[index].name if path is None else str(path.absolute()))
