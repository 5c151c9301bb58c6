"""A file is whole or not there, whatever happens; what is read is an ordinary file."""

import contextlib
import errno
import os
import re
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from kenspeckle import files
from kenspeckle.core import DataError, MissingPathError, WriteError
from kenspeckle.files import PART_SUFFIX, read_file, replacing, write_file
from tests.conftest import is_root

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX files")


@pytest.fixture
def old(tmp_path):
    """A file that stands where another is to be written."""
    path = tmp_path / "model.ken"
    path.write_bytes(b"old")
    return path


def assert_untouched(old):
    assert old.read_bytes() == b"old"
    assert list(old.parent.iterdir()) == [old]  # and no part is left


def test_content_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_an_old_file_stands_until_the_new_one_is_whole(old):
    with replacing(old) as file:
        file.write(b"n")
        file.flush()
        assert old.read_bytes() == b"old"
        (part,) = (path for path in old.parent.iterdir() if path != old)
        assert part.name.startswith(".")
        assert part.name.endswith(PART_SUFFIX)
        file.write(b"ew")
    assert old.read_bytes() == b"new"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_error_in_the_block_leaves_the_old_file(old, kind):
    def write_half():
        with replacing(old) as file:
            file.write(b"half")
            raise kind

    with pytest.raises(kind):
        write_half()
    assert_untouched(old)


@pytest.fixture
def calls(monkeypatch):
    """Record, in order, what happens to files, and fail at one of it when told."""
    seen: list[str] = []
    failing: set[str] = set()
    fsync, replace = os.fsync, os.replace

    def note(name):
        seen.append(name)
        if name in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def watched_fsync(handle):
        kind = "folder" if os.path.isdir(f"/dev/fd/{handle}") else "file"  # noqa: PTH112
        content = b"" if kind == "folder" else Path(f"/dev/fd/{handle}").read_bytes()
        note(f"fsync {kind} {content.decode()}".strip())
        fsync(handle)

    def watched_replace(source, target, **options):
        note(f"rename {Path(target).name}")
        replace(source, target, **options)

    monkeypatch.setattr("os.fsync", watched_fsync)
    monkeypatch.setattr("os.replace", watched_replace)
    return seen, failing


@POSIX
def test_content_reaches_the_disk_before_the_name_does(old, calls):
    seen, _ = calls
    write_file(old, b"new")
    assert seen == ["fsync file new", "rename model.ken", "fsync folder"]


@POSIX
@pytest.mark.parametrize("step", ["fsync file new", "rename model.ken"])
def test_a_failing_disk_leaves_the_old_file(old, calls, step):
    seen, failing = calls
    failing.add(step)
    with pytest.raises(WriteError, match=r"model\.ken: could not be written: No space left.*MB"):
        write_file(old, b"new")
    assert seen[-1] == step
    assert_untouched(old)


@POSIX
def test_a_failing_folder_is_an_error_too(old, calls):
    calls[1].add("fsync folder")
    with pytest.raises(WriteError, match=r"model\.ken"):
        write_file(old, b"new")
    assert old.read_bytes() in {b"old", b"new"}  # one of both, whole
    assert list(old.parent.iterdir()) == [old]


def test_the_error_names_path_reason_and_free_space(old, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_500_000}))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError) as caught:
        write_file(old, b"new")
    assert str(caught.value) == (
        f"{old}: could not be written: No space left on device (1.5 MB free there); "
        "what stood there before is untouched"
    )


def full(handle):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_in_place_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(WriteError, match=r"file/a\.ken: could not be written"):
        write_file(tmp_path / "file" / "a.ken", b"x")


@POSIX
@pytest.mark.skipif(is_root(), reason="permissions do not bind root")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(WriteError, match="Permission denied"):
        write_file(tmp_path / "closed" / "a.ken", b"x")


def test_the_longest_name_that_a_file_may_have(tmp_path):
    path = tmp_path / ("\U0001f600" * 62 + ".ken")  # 252 of 255 bytes
    write_file(path, b"x")
    assert path.read_bytes() == b"x"


@pytest.fixture
def full_disk(tmp_path):
    """A real file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no command to mount a small file system")
    if done.returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S607


@POSIX
@pytest.mark.parametrize("at_once", [True, False])
def test_a_full_disk_leaves_the_old_file(full_disk, at_once):
    old = full_disk / "model.ken"
    old.write_bytes(b"old")
    blocks = [b"x" * 2_000_000] if at_once else [b"x" * 100_000] * 20

    def write_too_much():
        with replacing(old) as file:
            file.writelines(blocks)

    with pytest.raises(WriteError, match=rf"{re.escape(str(old))}: .*No space left.*\d MB free"):
        write_too_much()
    assert_untouched(old)
    write_file(old, b"new")  # the space was given back
    assert old.read_bytes() == b"new"


# Reading.


def test_an_ordinary_file_is_read_up_to_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(DataError, match="file: 5 bytes; at most 4 are read"):
        read_file(path, 4)


def test_a_file_that_grows_while_it_is_read_is_cut_at_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    fstat = os.fstat

    def grow(handle):
        state = fstat(handle)
        path.write_bytes(b"1" * 100)
        return state

    monkeypatch.setattr("os.fstat", grow)
    assert len(read_file(path, 5)) == 5


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingPathError, match="nowhere: no such file"):
        read_file(tmp_path / "nowhere", 10)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"a\\\w+b: cannot be read"):
        read_file(tmp_path / name, 10)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not an ordinary file|cannot be read"):
        read_file(tmp_path, 10)


@POSIX
def test_a_refused_file_is_closed(tmp_path):
    before = os.listdir("/dev/fd")  # noqa: PTH208
    with pytest.raises(DataError):
        read_file(tmp_path, 10)
    assert len(os.listdir("/dev/fd")) == len(before)  # noqa: PTH208


@POSIX
@pytest.mark.timeout(5)
def test_a_pipe_a_device_and_a_socket_never_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind("socket")
        for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "socket"):
            with pytest.raises(DataError, match=r"not an ordinary file|cannot be read"):
                read_file(path, 10)


@POSIX
@pytest.mark.skipif(is_root(), reason="nothing is unreadable for root")
def test_a_file_without_permission_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "file").chmod(0)
    with pytest.raises(DataError, match="file: cannot be read: Permission denied"):
        read_file(tmp_path / "file", 10)


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(DataError, match="file: cannot be read: Permission denied"):
        read_file(tmp_path / "file", 10)


def test_a_file_whose_reading_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")

    def broken(handle, size):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.read", broken)
    with pytest.raises(DataError, match="file: cannot be read: Input/output error"):
        read_file(tmp_path / "file", 10)


@POSIX
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, "no")
        fsync(handle)

    monkeypatch.setattr("os.fsync", refuse)
    if code == errno.EINVAL:  # some network file systems cannot
        write_file(tmp_path / "file", b"new")
    else:
        with pytest.raises(WriteError, match="written, but its folder could not be flushed"):
            write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_names_are_printed_in_one_line(tmp_path):
    with pytest.raises(MissingPathError, match=r"two\\nlines: no such file"):
        read_file(tmp_path / "two\nlines", 10)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(WriteError) as caught:
        write_file(tmp_path / "file" / "two\nlines", b"x")
    assert "\n" not in str(caught.value)
    assert files.PART_SUFFIX not in str(caught.value)
