"""Files that are written whole or not at all, and read only when they are ordinary files.

A file is written under a temporary name in the same folder, flushed to the disk, renamed over the
old one, and the folder is flushed too: after a crash or a full disk either the old or the new file
stands there, never a part (Pillai et al., OSDI 2014, "All File Systems Are Not Created Equal").
"""

import contextlib
import datetime as dt
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kenspeckle.core import (
    DataError,
    InvalidValueError,
    MissingPathError,
    WriteError,
    printable,
)

__all__ = ["PART_SUFFIX", "file_stem", "new_run_folder", "read_file", "replacing", "write_file"]

PART_SUFFIX = ".part"
"""Ends the temporary name of a file that is being written."""

# Without O_NONBLOCK, opening a FIFO waits for somebody who writes to it.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose content takes the place of `path` when the block ends without an error.

    Raises:
        WriteError: the disk is full, the folder cannot be written, or is missing.
    """
    part = path.with_name(f".{path.name[:40]}.{os.getpid()}-{uuid.uuid4().hex[:8]}{PART_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise WriteError(_explain(path, error)) from error
    finally:
        with contextlib.suppress(OSError):  # the rename took it, or it never came to be
            part.unlink()
    _flush_folder(path)


def file_stem(name: str) -> str:
    """Return `name` with what is awkward in a file name left out.

    Example:
        >>> file_stem("my flowers (2)")
        'my-flowers--2'
    """
    kept = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    return kept.strip("-")[:60] or "pictures"


def new_run_folder(name: str, wanted: Path | None) -> Path:
    """Return a folder that is new or empty: `wanted`, or ``runs/NAME-TIME`` when that is None.

    Raises:
        InvalidValueError: `wanted` is in use.
    """
    if wanted is None:
        stem = f"{file_stem(name)}-{dt.datetime.now().astimezone():%Y%m%d-%H%M%S}"
        tries = [Path("runs") / stem, *(Path("runs") / f"{stem}-{n}" for n in range(2, 1000))]
        return next(path for path in tries if not path.exists())
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise InvalidValueError(
            f"--run-folder must be new or empty; {printable(str(wanted))} is not"
        )
    return wanted


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all.

    Raises:
        WriteError: see `replacing`.
    """
    with replacing(path) as file:
        file.write(data)


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of an ordinary file of at most `max_bytes` bytes.

    A FIFO, a socket or a device is refused before it is opened for data, so nothing can hang.

    Raises:
        MissingPathError: there is no such path.
        DataError: not an ordinary file, too large, or not readable.
    """
    name = printable(str(path))
    try:
        handle = os.open(path, _READ_FLAGS)
    except FileNotFoundError as error:
        raise MissingPathError(f"{name}: no such file") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL, or a character that no file name can have
        raise DataError(f"{name}: cannot be read: {error}") from error
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise DataError(f"{name}: not an ordinary file")
        if state.st_size > max_bytes:
            raise DataError(f"{name}: {state.st_size:,} bytes; at most {max_bytes:,} are read")
        return _read(handle, state.st_size, max_bytes)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    finally:
        os.close(handle)


def _read(handle: int, expected: int, max_bytes: int) -> bytes:
    """Return what is left of a file; unbuffered, since small files are read by the ten thousand."""
    data = os.read(handle, min(expected, max_bytes))
    if len(data) < expected:  # one call gives at most 2 GB, and fewer bytes when interrupted
        parts = [data]
        while parts[-1] and sum(map(len, parts)) < max_bytes:
            parts.append(os.read(handle, max_bytes - sum(map(len, parts))))
        return b"".join(parts)
    return data


def _flush_folder(path: Path) -> None:
    if os.name != "posix":
        return  # Windows has no handle on a folder that could be flushed
    handle = -1
    try:
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.ENOTSUP}:
            return  # some network file systems cannot flush a folder
        raise WriteError(
            f"{printable(str(path))}: written, but its folder could not be flushed to the disk: "
            f"{error.strerror or error}"
        ) from error
    finally:
        if handle >= 0:
            os.close(handle)


def _explain(path: Path, error: OSError) -> str:
    name = printable(str(path))
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        return (
            f"{name}: could not be written: {error.strerror or error} "
            f"({free / 1e6:,.1f} MB free there); what stood there before is untouched"
        )
    return f"{name}: could not be written: {error.strerror or error}"
