"""ZIP archives of pictures, read in place: nothing is ever extracted.

Every check works on the archive's directory alone, before anything is inflated, and refuses the
whole archive: paths that escape, links, devices, encryption, names that are there twice, entries
that overlap (D. Fifield, "A better zip bomb", WOOT 2019), and ratios that no picture reaches.
"""

import io
import re
import stat
import struct
import threading
import weakref
import zipfile
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kenspeckle.core import DataError, printable

__all__ = ["MAX_ENTRIES", "MAX_RATIO", "MAX_TOTAL_BYTES", "Archive", "Member"]

MAX_ENTRIES = 1_000_000
"""An archive of so many entries, or more, is refused."""

MAX_RATIO = 200
"""Bytes out per byte in, for members above `_SMALL_BYTES`; deflate itself can reach 1032."""

MAX_TOTAL_BYTES = 1 << 40
"""Most bytes that all members together may declare; ImageNet has 1.5e11."""

_MAX_DIRECTORY_BYTES = 256 << 20
_SMALL_BYTES = 1 << 20  # a blank bitmap of this size may deflate to next to nothing
_ENTRY_SIGNATURE = b"PK\x01\x02"
_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_HEADER_SIGNATURE = b"PK\x03\x04"
_EXTRA_GUESS = 64  # bytes of extra field that are read along, to save a second read
_ENCRYPTED = 0x1
_UTF8 = 0x800
_CODECS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate"}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive.

    Attributes:
        name: its path, ``/`` between folders.
        size: bytes once inflated.
        crc: CRC-32 of those bytes.
        packed_size: bytes in the archive.
        offset: where its local header stands in the archive.
        deflated: whether the bytes are deflated, or stored as they are.
    """

    name: str
    size: int
    crc: int
    packed_size: int
    offset: int
    deflated: bool


class _GuardedFile(io.BufferedReader):
    """The file under `zipfile`, which reads the whole directory at once, however large it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise DataError(f"its directory has {size:,} bytes; at most {_MAX_DIRECTORY_BYTES:,}")
        data = super().read(size)
        # An upper bound on the entries: whatever the end record says, zipfile walks these bytes.
        if data.count(_ENTRY_SIGNATURE) >= MAX_ENTRIES:
            raise DataError(f"it has {MAX_ENTRIES:,} entries or more; fewer are accepted")
        return data


class Archive:
    """A checked ZIP archive; `read` may be called from several threads.

    Attributes:
        path: the archive.
        members: its files, in the order of its directory.
        folders: names of its folders that have an entry of their own, without the last ``/``.
    """

    def __init__(self, path: Path) -> None:
        """Open and check the archive at `path`.

        Raises:
            DataError: not a ZIP archive, or one of the things that are refused; names the member.
        """
        self.path = path
        try:
            self._file = _GuardedFile(io.FileIO(path, "rb"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.close = weakref.finalize(self, self._file.close)
        try:
            entries = _directory(self._file)
        except DataError as error:
            self.close()
            raise DataError(f"{path}: {error}") from error
        self._lock = threading.Lock()
        self.members = tuple(_member(info, name) for name, info in entries if name[-1] != "/")
        self.folders = tuple(name[:-1] for name, _ in entries if name[-1] == "/")

    def read(self, index: int, max_bytes: int) -> bytes:
        """Return the content of member number `index`, of at most `max_bytes` bytes.

        Raises:
            DataError: larger, damaged, or not what the archive's directory declares.
        """
        member = self.members[index]
        if member.size > max_bytes:
            raise self._fault(member, f"{member.size:,} bytes; at most {max_bytes:,} are read")
        packed = self._packed(member)
        if member.deflated:
            try:
                inflater = zlib.decompressobj(-zlib.MAX_WBITS)
                data = inflater.decompress(packed, member.size + 1)
            except zlib.error as error:
                raise self._fault(member, f"cannot be inflated: {error}") from error
        else:
            data = packed
        if len(data) != member.size:
            raise self._fault(member, f"does not hold the {member.size:,} bytes that it declares")
        if zlib.crc32(data) != member.crc:
            raise self._fault(member, "its checksum does not match; the archive is damaged")
        return data

    def _packed(self, member: Member) -> bytes:
        likely = _HEADER.size + len(member.name) + _EXTRA_GUESS + member.packed_size
        try:
            with self._lock:
                self._file.seek(member.offset)
                raw = self._file.read(likely)
                if len(raw) < _HEADER.size or raw[:4] != _HEADER_SIGNATURE:
                    raise self._fault(member, "has no header where the directory says")
                _, name_length, extra_length = _HEADER.unpack_from(raw)
                start = _HEADER.size + name_length + extra_length
                if len(raw) < start + member.packed_size:
                    self._file.seek(member.offset + start)
                    return self._file.read(member.packed_size)
        except OSError as error:
            raise self._fault(member, f"cannot be read: {error.strerror or error}") from error
        return raw[start : start + member.packed_size]

    def _fault(self, member: Member, reason: str) -> DataError:
        return DataError(f"{self.path}: member '{printable(member.name)}': {reason}")


def _directory(file: io.BufferedReader) -> list[tuple[str, zipfile.ZipInfo]]:
    """Return names and entries of an archive, all of them checked."""
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise DataError(f"not a ZIP archive that can be read: {error}") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    entries = [(_name(info), info) for info in infos]
    for name, info in entries:
        fault = _name_fault(name) or _kind_fault(name, info) or _size_fault(info)
        if fault:
            raise DataError(f"member '{printable(name)}' {fault}; the archive is refused")
    _check_twins([name for name, _ in entries])
    _check_overlaps(entries)
    total = sum(info.file_size for info in infos)
    if total > MAX_TOTAL_BYTES:
        raise DataError(f"its members declare {total:,} bytes; at most {MAX_TOTAL_BYTES:,}")
    return entries


def _name(info: zipfile.ZipInfo) -> str:
    """Return the name as written; macOS writes UTF-8 without saying so."""
    if info.flag_bits & _UTF8 or info.orig_filename.isascii():
        return info.orig_filename
    try:
        return info.orig_filename.encode("cp437").decode()
    except UnicodeError:
        return info.orig_filename


def _name_fault(name: str) -> str | None:
    if "\0" in name:
        return "has a NUL in its name"
    if "\\" in name:
        return "has a backslash in its name, where '/' must stand between folders"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if not {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/")):
        return "has an empty, '.' or '..' part in its path"
    return None


def _kind_fault(name: str, info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where no Unix mode was stored
    if kind == stat.S_IFLNK:
        return "is a symbolic link"
    if kind not in (0, stat.S_IFREG) and not (kind == stat.S_IFDIR and name.endswith("/")):
        return "is not a regular file"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in _CODECS:
        known = " and ".join(_CODECS.values())
        return f"is packed by method {info.compress_type}; {known} are read"
    return None


def _size_fault(info: zipfile.ZipInfo) -> str | None:
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        return "is stored, but its two sizes differ"
    if info.file_size > max(_SMALL_BYTES, MAX_RATIO * info.compress_size):
        return (
            f"grows from {info.compress_size:,} to {info.file_size:,} bytes; "
            f"at most {MAX_RATIO} times is accepted"
        )
    return None


def _check_twins(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"member '{printable(name)}' is there twice; the archive is refused")
        seen.add(name)


def _check_overlaps(entries: list[tuple[str, zipfile.ZipInfo]]) -> None:
    by_offset = sorted(entries, key=lambda entry: entry[1].header_offset)
    for (name, info), (next_name, next_info) in pairwise(by_offset):
        if info.header_offset + _HEADER.size + info.compress_size > next_info.header_offset:
            raise DataError(
                f"members '{printable(name)}' and '{printable(next_name)}' overlap; "
                "the archive is refused"
            )


def _member(info: zipfile.ZipInfo, name: str) -> Member:
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return Member(name, info.file_size, info.CRC, info.compress_size, info.header_offset, deflated)
