import io
import stat
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kenspeckle.archives import MAX_ENTRIES, Archive
from kenspeckle.core import DataError

GENEROUS = 1 << 30
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def special(mode: int) -> bytes:
    """An archive whose second member has the Unix mode `mode`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/1.png", b"one")
        info = zipfile.ZipInfo("a/2.png")
        info.external_attr = mode << 16
        archive.writestr(info, b"/etc/passwd")
    return file.getvalue()


def patched(data: bytes, at: int, form: str, value: int, member: int = 0) -> bytes:
    """Change a field of the directory's entry number `member`; `at` counts from its signature."""
    start = -1
    for _ in range(member + 1):
        start = data.index(b"PK\x01\x02", start + 1)
    changed = bytearray(data)
    struct.pack_into(form, changed, start + at, value)
    return bytes(changed)


@pytest.fixture
def opened(tmp_path):
    def open_bytes(data: bytes) -> Archive:
        path = tmp_path / "set.zip"
        path.write_bytes(data)
        return Archive(path)

    return open_bytes


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_what_was_packed(opened, compression):
    members = {"a/1.png": b"x" * 1000, "a/empty.png": b"", "b/🌻 ä\n.png": bytes(range(256))}
    archive = opened(zipped(members, compression))
    assert [m.name for m in archive.members] == list(members)
    for index, (name, data) in enumerate(members.items()):
        assert archive.members[index].size == len(data)
        assert archive.members[index].crc == zlib.crc32(data)
        assert archive.read(index, GENEROUS) == data, name


def test_folders_are_no_members(opened):
    archive = opened(zipped({"a/": b"", "a/1.png": b"1"}))
    assert [m.name for m in archive.members] == ["a/1.png"]
    assert archive.folders == ("a",)


def test_zip64_and_a_long_extra_field(opened):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("a/1.png")
        info.extra = struct.pack("<HH", 0xCAFE, 200) + bytes(200)
        with archive.open(info, "w", force_zip64=True) as member:
            member.write(b"pixels")
    assert opened(file.getvalue()).read(0, GENEROUS) == b"pixels"


def test_bytes_before_the_archive(opened):
    assert opened(b"#!/bin/sh\n" + zipped({"a/1.png": b"1"})).read(0, GENEROUS) == b"1"


def test_names_of_macos_are_utf8_without_saying_so(opened):
    data = zipped({"cafXX/1.png": b"1"}).replace(b"cafXX", "café".encode())
    assert opened(data).members[0].name == "café/1.png"


def test_names_of_dos(opened):
    data = zipped({"cafX/1.png": b"1"}).replace(b"cafX", b"caf\x82")
    assert opened(data).members[0].name == "café/1.png"


def test_threads_read_what_one_reads(opened):
    members = {f"a/{i}.png": bytes([i % 256]) * (i * 7) for i in range(200)}
    archive = opened(zipped(members))
    indices = list(range(200)) * 5
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: archive.read(i, GENEROUS), indices))
    assert found == [members[f"a/{i}.png"] for i in indices]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../evil.png", "'..' part"),
        ("a/../../evil.png", "'..' part"),
        ("a//1.png", "empty"),
        ("./a/1.png", "'.'"),
        ("/etc/evil.png", "absolute path"),
        ("C:/evil.png", "absolute path"),
        ("..\\evil.png", "backslash"),
        ("a\\..\\..\\evil.png", "backslash"),
    ],
)
def test_paths_that_escape_are_refused(opened, tmp_path, name, fault):
    with pytest.raises(DataError, match=r"set\.zip: member '.*the archive is refused") as caught:
        opened(zipped({"a/1.png": b"1", name: b"2"}))
    assert fault in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]


def test_a_nul_in_a_name(opened):
    data = zipped({"a/1_.png": b"1"}).replace(b"a/1_.png", b"a/1\0.png")
    with pytest.raises(DataError, match=r"member 'a/1\\x00.png' has a NUL in its name"):
        opened(data)


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        (stat.S_IFLNK | 0o777, "is a symbolic link"),
        (stat.S_IFCHR | 0o600, "is not a regular file"),
        (stat.S_IFIFO | 0o600, "is not a regular file"),
        (stat.S_IFDIR | 0o700, "is not a regular file"),
    ],
)
def test_links_and_devices_are_refused(opened, mode, fault):
    with pytest.raises(DataError, match=f"member 'a/2.png' {fault}"):
        opened(special(mode))


def test_an_ordinary_mode_is_accepted(opened):
    assert len(opened(special(stat.S_IFREG | 0o644)).members) == 2


def test_encrypted_members_are_refused(opened):
    with pytest.raises(DataError, match=r"member 'a/1\.png' is encrypted"):
        opened(patched(zipped({"a/1.png": b"1"}), 8, "<H", 1))


def test_other_packings_are_refused(opened):
    with pytest.raises(DataError, match="packed by method 14; stored and deflate are read"):
        opened(zipped({"a/1.png": b"1"}, zipfile.ZIP_LZMA))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice(opened):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/1.png", b"1")
        archive.writestr("a/1.png", b"2")
    with pytest.raises(DataError, match=r"member 'a/1\.png' is there twice"):
        opened(file.getvalue())


def test_names_that_differ_in_case_are_two(opened):
    assert len(opened(zipped({"a/1.png": b"1", "A/1.png": b"2"})).members) == 2


def test_a_bomb_is_refused_before_it_is_inflated(opened):
    with pytest.raises(DataError, match=r"grows from .* to 20,000,000 bytes; at most 200 times"):
        opened(zipped({"a/1.png": bytes(20_000_000)}))


def test_a_small_blank_picture_is_no_bomb(opened):
    assert opened(zipped({"a/1.bmp": bytes(500_000)})).read(0, GENEROUS) == bytes(500_000)


def test_members_that_overlap_are_refused(opened):
    data = zipped({"a/1.png": b"1", "a/2.png": b"2"})
    with pytest.raises(DataError, match=r"'a/1\.png' and 'a/2\.png' overlap"):
        opened(patched(data, 42, "<L", 0, member=1))


def test_a_quine_like_overlap_is_refused(opened):
    data = zipped({"a/1.png": b"1" * 10, "a/2.png": b"2" * 10}, zipfile.ZIP_STORED)
    data = patched(data, 20, "<L", 40)
    with pytest.raises(DataError, match="overlap"):
        opened(patched(data, 24, "<L", 40))


def test_a_total_above_the_cap(opened, monkeypatch):
    monkeypatch.setattr("kenspeckle.archives.MAX_TOTAL_BYTES", 15)
    with pytest.raises(DataError, match="its members declare 20 bytes; at most 15"):
        opened(zipped({"a/1.png": b"1" * 10, "a/2.png": b"2" * 10}))


def test_a_million_entries_are_refused_within_a_second(tmp_path):
    entry = struct.pack("<4s42xB", b"PK\x01\x02", 0)[:46]
    entry = entry[:28] + struct.pack("<H", 1) + entry[30:] + b"x"
    directory = entry * MAX_ENTRIES
    end = struct.pack("<4s4xHHLLH", b"PK\x05\x06", 1, 1, len(directory), 0, 0)  # says: one entry
    path = tmp_path / "many.zip"
    path.write_bytes(directory + end)
    began = time.process_time()
    with pytest.raises(DataError, match="1,000,000 entries or more"):
        Archive(path)
    assert time.process_time() - began < 1


def test_a_directory_that_lies_about_its_size(tmp_path):
    path = tmp_path / "big.zip"
    end = struct.pack("<4s4xHHLLH", b"PK\x05\x06", 1, 1, 400_000_000, 0, 0)
    with path.open("wb") as file:
        file.truncate(400_000_000)  # sparse
        file.seek(0, io.SEEK_END)
        file.write(end)
    with pytest.raises(DataError, match="its directory has 400,000,000 bytes"):
        Archive(path)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "not a ZIP archive"),
        (b"not a zip, just text", "not a ZIP archive"),
        (zipped({"a/1.png": b"1" * 100})[:-30], "not a ZIP archive"),
    ],
)
def test_files_that_are_no_archive(opened, data, fault):
    with pytest.raises(DataError, match=f"set.zip: {fault}"):
        opened(data)


def test_a_missing_archive(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Archive(tmp_path / "none.zip")


def test_every_cut_and_flipped_byte_gives_a_data_error_or_the_same_bytes(opened):
    """Every single-bit damage is found, or touches nothing that is read."""
    members = {"a/1.png": b"pixels" * 20, "b/2.png": bytes(range(100))}
    whole = zipped(members)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        for data in (bytes(damaged), whole[:at]):
            try:
                archive = opened(data)
                found = [archive.read(i, GENEROUS) for i in range(len(archive.members))]
            except DataError:
                continue
            assert set(found) <= set(members.values())


class TestDamage:
    def test_a_flipped_bit(self, opened):
        data = zipped({"a/1.png": b"pixels"}, zipfile.ZIP_STORED).replace(b"pixels", b"pixelr", 1)
        with pytest.raises(DataError, match=r"set\.zip: member 'a/1\.png': its checksum"):
            opened(data).read(0, GENEROUS)

    @pytest.mark.parametrize("declared", [5, 500])
    def test_a_size_that_lies(self, opened, declared):
        archive = opened(patched(zipped({"a/1.png": b"pixels" * 30}), 24, "<L", declared))
        with pytest.raises(DataError, match=f"does not hold the {declared} bytes that it declares"):
            archive.read(0, GENEROUS)

    def test_a_stored_size_that_lies(self, opened):
        data = zipped({"a/1.png": b"pixels"}, zipfile.ZIP_STORED)
        with pytest.raises(DataError, match="is stored, but its two sizes differ"):
            opened(patched(data, 24, "<L", 7))

    def test_an_offset_that_lies(self, opened):
        data = zipped({"a/1.png": b"pixels", "a/2.png": b"pixels"}, zipfile.ZIP_STORED)
        with pytest.raises(DataError, match="has no header where the directory says"):
            opened(patched(data, 42, "<L", 60, member=1)).read(1, GENEROUS)

    def test_garbage_that_does_not_inflate(self, opened):
        data = zipped({"a/1.png": bytes(range(256)) * 2})
        start = data.index(b"a/1.png") + len("a/1.png")
        with pytest.raises(DataError, match=r"member 'a/1\.png': cannot be inflated"):
            opened(data[:start] + b"\xff" * 20 + data[start + 20 :]).read(0, GENEROUS)

    def test_a_member_above_the_limit(self, opened):
        with pytest.raises(DataError, match=r"member 'a/1\.png': 100 bytes; at most 99 are read"):
            opened(zipped({"a/1.png": b"x" * 100})).read(0, max_bytes=99)


@pytest.mark.skipif(not DATA.exists(), reason="needs the shared data")
def test_all_of_cifar10_is_checked():
    archive = Archive(DATA / "cifar10-train.zip")
    assert len(archive.members) == 50_000
    assert archive.read(49_999, GENEROUS).startswith(b"\x89PNG")
