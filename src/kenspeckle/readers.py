"""The content of pictures, wherever they lie: files, an archive, a Parquet file, or memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kenspeckle.archives import Archive
from kenspeckle.core import DataError, MissingPathError, printable
from kenspeckle.files import read_file
from kenspeckle.manifests import ParquetPictures

__all__ = ["ArrayReader", "FileReader", "ParquetReader", "Reader", "ZipReader"]


class Reader(Protocol):
    """The content of items, by index; safe to use from several threads."""

    def read(self, index: int) -> bytes | NDArray[Any]:
        """Return an encoded picture, or its pixels as `images.prepare` takes them.

        Raises:
            DataError: it cannot be read; names the item.
        """
        ...

    def stamp(self, index: int) -> str:
        """Return a cheap token that changes whenever the content may have changed."""
        ...

    def path(self, index: int) -> Path | None:
        """Return a path that a manifest may name the item by, or None when there is none."""
        ...

    def subset(self, indices: Sequence[int]) -> "Reader":
        """Return a reader of some of the items."""
        ...


@dataclass(frozen=True, eq=False)
class FileReader:
    """Pictures that are files.

    Attributes:
        root: the folder that names are relative to.
        names: paths, ``/`` between folders.
        max_bytes: larger files are refused.
    """

    root: Path
    names: Sequence[str]
    max_bytes: int

    def path(self, index: int) -> Path:
        """Return the file of item number `index`."""
        return self.root / self.names[index]

    def read(self, index: int) -> bytes:
        """Return the content of a file.

        Raises:
            DataError: not there, not an ordinary file, too large, or not readable.
        """
        path = self.path(index)
        try:
            return read_file(path, self.max_bytes)
        except (DataError, MissingPathError) as error:
            reason = str(error).removeprefix(f"{printable(str(path))}: ")
            raise DataError(f"{printable(self.names[index])}: {reason}") from error

    def stamp(self, index: int) -> str:
        """Return size, times and inode of a file."""
        try:
            state = self.path(index).stat()
        except OSError:
            return "not there"
        return f"{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}-{state.st_ino}"

    def subset(self, indices: Sequence[int]) -> "FileReader":
        """Return a reader of some of the files."""
        return replace(self, names=[self.names[index] for index in indices])


@dataclass(frozen=True, eq=False)
class ZipReader:
    """Pictures that are members of an archive.

    Attributes:
        archive: checked.
        members: the number of each item's member.
        max_bytes: larger members are refused.
    """

    archive: Archive
    members: Sequence[int]
    max_bytes: int

    def read(self, index: int) -> bytes:
        """Return the content of a member.

        Raises:
            DataError: too large or damaged.
        """
        return self.archive.read(self.members[index], self.max_bytes)

    def stamp(self, index: int) -> str:
        """Return checksum and size of a member."""
        member = self.archive.members[self.members[index]]
        return f"{member.crc:08x}-{member.size}"

    def path(self, index: int) -> Path:
        """Return the path of item number `index` through the archive."""
        return self.archive.path / self.archive.members[self.members[index]].name

    def subset(self, indices: Sequence[int]) -> "ZipReader":
        """Return a reader of some of the members."""
        return replace(self, members=[self.members[index] for index in indices])


@dataclass(frozen=True, eq=False)
class ParquetReader:
    """Pictures that are cells of a Parquet file.

    Attributes:
        pictures: the column.
        rows: the row of each item.
        names: of the items, for errors.
        max_bytes: larger pictures are refused.
    """

    pictures: ParquetPictures
    rows: Sequence[int]
    names: Sequence[str]
    max_bytes: int

    def read(self, index: int) -> bytes:
        """Return the content of a cell.

        Raises:
            DataError: empty, too large or damaged.
        """
        name = printable(self.names[index])
        try:
            data = self.pictures.read(self.rows[index])
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        if len(data) > self.max_bytes:
            raise DataError(f"{name}: {len(data):,} bytes; at most {self.max_bytes:,} are read")
        return data

    def stamp(self, index: int) -> str:
        """Return size, time and inode of the file, and the row."""
        return self.pictures.stamp(self.rows[index])

    def path(self, index: int) -> None:
        """Return None: no manifest can name the item."""

    def subset(self, indices: Sequence[int]) -> "ParquetReader":
        """Return a reader of some of the cells."""
        return replace(
            self,
            rows=[self.rows[index] for index in indices],
            names=[self.names[index] for index in indices],
        )


@dataclass(frozen=True, eq=False)
class ArrayReader:
    """Pictures that are decoded already.

    Attributes:
        pictures: ``uint8 (H, W)`` or ``(H, W, 3)`` each.
    """

    pictures: Sequence[NDArray[np.uint8]]

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of a picture, ``uint8 (H, W)`` or ``(H, W, 3)``."""
        return self.pictures[index]

    def stamp(self, index: int) -> str:
        """Return a digest of the pixels."""
        pixels = self.pictures[index]
        return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()

    def path(self, index: int) -> None:
        """Return None: no manifest can name the item."""

    def subset(self, indices: Sequence[int]) -> "ArrayReader":
        """Return a reader of some of the pictures."""
        return replace(self, pictures=[self.pictures[index] for index in indices])
