import errno
import io
import os
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kenspeckle.core import DataError, InvalidValueError, MissingPathError
from kenspeckle.sources import Dataset, find_pictures, open_dataset

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
shared = pytest.mark.skipif(not DATA.exists(), reason="needs the shared data")


def make(root: Path, *names: str) -> Path:
    """Write a file for each name; its content is its name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return root


def make_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name.encode())
    return path


def content(dataset: Dataset) -> dict[str, tuple[str, bytes]]:
    """Class and content by name."""
    found = {}
    for index, item in enumerate(dataset.items):
        data = dataset.reader.read(index)
        assert isinstance(data, bytes)
        assert item.label is not None
        found[item.name] = (dataset.classes[item.label], data)
    return found


PETS = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg")


class TestFolder:
    def test_class_folders(self, tmp_path):
        dataset = open_dataset(make(tmp_path / "pets", *PETS))
        assert dataset.name == "pets"
        assert dataset.location == str(tmp_path / "pets")
        assert dataset.classes == ("cat", "dog")
        assert content(dataset) == {
            "cat/1.jpg": ("cat", b"cat/1.jpg"),
            "cat/2.jpg": ("cat", b"cat/2.jpg"),
            "dog/1.jpg": ("dog", b"dog/1.jpg"),
        }
        assert dataset.labels.tolist() == [0, 0, 1]
        assert {item.split for item in dataset.items} == {None}
        assert dataset.notices == ()

    def test_split_folders_share_classes_by_name(self, tmp_path):
        names = ("training/b/1.jpg", "training/a/1.jpg", "training/c/1.jpg", "val/c/1.jpg")
        dataset = open_dataset(make(tmp_path, *names))
        assert [(item.name, item.label, item.split) for item in dataset.items] == [
            ("training/a/1.jpg", 0, "train"),
            ("training/b/1.jpg", 1, "train"),
            ("training/c/1.jpg", 2, "train"),
            ("val/c/1.jpg", 2, "validation"),
        ]
        assert dataset.notices[-1] == "no validation pictures of 'a', 'b'"

    def test_a_class_that_training_lacks(self, tmp_path):
        make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cats/1.jpg")
        with pytest.raises(DataError, match=r"class 'cats' is in the test .* did you mean 'cat'"):
            open_dataset(tmp_path)

    def test_a_text_file_called_jpg_is_an_item(self, tmp_path):
        make(tmp_path, *PETS, "dog/notes.jpg")
        assert content(open_dataset(tmp_path))["dog/notes.jpg"] == ("dog", b"dog/notes.jpg")

    def test_hidden_files_are_one_notice(self, tmp_path):
        make(tmp_path, *PETS, ".DS_Store", "cat/.DS_Store", "cat/._1.jpg", ".git/x/y.jpg")
        make(tmp_path, "__MACOSX/cat/1.jpg", "Thumbs.db")
        dataset = open_dataset(tmp_path)
        assert len(dataset.items) == 3
        assert dataset.notices == (
            (
                "ignored hidden files and folders: '.DS_Store' (2), '._1.jpg' (1), '.git' (1), "
                "'Thumbs.db' (1), '__MACOSX' (1)"
            ),
        )

    def test_empty_folders_are_no_classes(self, tmp_path):
        (make(tmp_path, *PETS) / "bird").mkdir()
        dataset = open_dataset(tmp_path)
        assert dataset.classes == ("cat", "dog")
        assert dataset.notices == ("left out 'bird': no pictures there",)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(
            DataError, match="found 0 files; expected: a folder per class"
        ) as caught:
            open_dataset(tmp_path)
        assert str(caught.value).startswith(str(tmp_path))

    def test_one_class_only(self, tmp_path):
        make(tmp_path, "cat/1.jpg")
        with pytest.raises(DataError, match="at least 2 classes are needed; found only 'cat'"):
            open_dataset(tmp_path)
        assert open_dataset(tmp_path, min_classes=1).classes == ("cat",)

    def test_a_class_with_one_picture(self, tmp_path):
        assert open_dataset(make(tmp_path, *PETS)).labels.tolist().count(1) == 1

    @pytest.mark.parametrize(
        "name",
        ["a b.jpg", "🌻.jpg", "line\nbreak.jpg", "\u202eevil.jpg", "=1+1.jpg", "é.jpg", '"q".jpg'],
    )
    def test_any_name(self, tmp_path, name):
        dataset = open_dataset(make(tmp_path, "a/1.jpg", f"b {name}/{name}"))
        assert content(dataset)[f"b {name}/{name}"][1] == f"b {name}/{name}".encode()

    def test_a_file_name_that_is_not_utf8(self, tmp_path):
        name = "cat/caf\udce9.jpg"
        dataset = open_dataset(make(tmp_path, *PETS, name))
        assert content(dataset)[name] == ("cat", b"cat/caf\xe9.jpg")

    def test_a_class_name_that_is_not_utf8(self, tmp_path):
        make(tmp_path, *PETS, "caf\udce9/1.jpg")
        with pytest.raises(DataError, match=r"valid UTF-8; got 'caf\\udce9'; rename the folder"):
            open_dataset(tmp_path)

    def test_errors_stay_on_one_line(self, tmp_path):
        make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/two\nlines/1.jpg")
        with pytest.raises(DataError) as caught:
            open_dataset(tmp_path)
        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.slow
    def test_a_hundred_thousand_files_are_listed(self, tmp_path):
        make(tmp_path, *PETS)
        for index in range(100_000):
            os.close(os.open(tmp_path / "cat" / f"{index}.png", os.O_CREAT | os.O_WRONLY))
        assert len(open_dataset(tmp_path).items) == 100_003


class TestSpecialFiles:
    def test_a_loop_counts_each_picture_once(self, tmp_path):
        (make(tmp_path, *PETS) / "cat" / "loop").symlink_to("..")
        (tmp_path / "again").symlink_to(".")
        dataset = open_dataset(tmp_path)
        assert len(dataset.items) == 3
        assert dataset.notices == (
            (
                "did not follow 2 links that lead to folders, out of the data or nowhere: 'again', "
                "'cat/loop'; a manifest can name files anywhere"
            ),
        )

    def test_links_to_files_inside_are_followed(self, tmp_path):
        (make(tmp_path, *PETS) / "dog" / "2.jpg").symlink_to("../cat/2.jpg")
        assert content(open_dataset(tmp_path))["dog/2.jpg"] == ("dog", b"cat/2.jpg")

    def test_links_that_lead_out_are_not_followed(self, tmp_path):
        make(tmp_path, "secret.jpg")
        root = make(tmp_path / "set", *PETS)
        (root / "cat" / "3.jpg").symlink_to(tmp_path / "secret.jpg")
        (root / "cat" / "4.jpg").symlink_to("nowhere.jpg")
        (root / "cat" / "5.jpg").symlink_to("5.jpg")
        dataset = open_dataset(root)
        assert set(content(dataset)) == set(PETS)
        assert "did not follow 3 links" in dataset.notices[0]

    def test_links_are_the_reason_when_nothing_is_left(self, tmp_path):
        make(tmp_path, "1.jpg")
        (tmp_path / "set" / "cat").mkdir(parents=True)
        (tmp_path / "set" / "cat" / "1.jpg").symlink_to(tmp_path / "1.jpg")
        with pytest.raises(
            DataError, match=r"no pictures in class folders.*did not follow 1 links"
        ):
            open_dataset(tmp_path / "set")

    def test_the_root_itself_may_be_a_link(self, tmp_path):
        make(tmp_path / "set", *PETS)
        (tmp_path / "link").symlink_to("set")
        assert len(open_dataset(tmp_path / "link").items) == 3

    def test_pipes_and_sockets_are_never_opened(self, tmp_path, monkeypatch):
        make(tmp_path, *PETS)
        os.mkfifo(tmp_path / "cat" / "pipe.jpg")
        monkeypatch.chdir(tmp_path / "cat")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.jpg")
            dataset = open_dataset(tmp_path)
        assert set(content(dataset)) == set(PETS)
        assert dataset.notices == (
            "ignored 2 pipes, sockets or devices: 'cat/pipe.jpg', 'cat/socket.jpg'",
        )

    def test_a_pipe_as_data(self, tmp_path):
        os.mkfifo(tmp_path / "data.zip")
        with pytest.raises(DataError, match="got a pipe, socket or device"):
            open_dataset(tmp_path / "data.zip")

    def test_an_unreadable_file_stays_an_item_and_is_named(self, tmp_path, monkeypatch):
        dataset = open_dataset(make(tmp_path, *PETS, "dog/line\nbreak.jpg"))
        forbidden = tmp_path / "dog" / "line\nbreak.jpg"
        really_open = os.open

        def refuse(path, *rest, **more):
            if path == forbidden:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return really_open(path, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
        index = [item.name for item in dataset.items].index("dog/line\nbreak.jpg")
        with pytest.raises(DataError, match=r"^dog/line\\nbreak\.jpg: cannot be read: Permission"):
            dataset.reader.read(index)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_permissions_that_are_missing(self, tmp_path):
        dataset = open_dataset(make(tmp_path, *PETS))
        (tmp_path / "cat" / "1.jpg").chmod(0)
        with pytest.raises(DataError, match=r"^cat/1\.jpg: cannot be read: Permission denied"):
            dataset.reader.read(0)
        (tmp_path / "dog").chmod(0)
        try:
            with pytest.raises(DataError, match="dog: cannot be listed: Permission denied"):
                open_dataset(tmp_path)
        finally:
            (tmp_path / "dog").chmod(0o700)

    def test_files_that_change_after_listing(self, tmp_path):
        dataset = open_dataset(make(tmp_path, *PETS), max_bytes=100)
        before = [dataset.reader.stamp(i) for i in range(3)]
        (tmp_path / "cat" / "1.jpg").unlink()
        (tmp_path / "cat" / "2.jpg").write_bytes(b"x" * 101)
        after = [dataset.reader.stamp(i) for i in range(3)]
        assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]
        with pytest.raises(DataError, match=r"^cat/1\.jpg: no such file"):
            dataset.reader.read(0)
        with pytest.raises(DataError, match=r"^cat/2\.jpg: 101 bytes; at most 100 are read"):
            dataset.reader.read(1)


class TestArchive:
    def test_a_zip_reads_like_its_folder(self, tmp_path):
        names = ("train/a/1.jpg", "train/b/2.jpg", "test/a/3.jpg")
        folder = open_dataset(make(tmp_path / "set", *names))
        archive = open_dataset(make_zip(tmp_path / "set.zip", *reversed(names)))
        assert archive.items == folder.items
        assert archive.classes == folder.classes
        assert content(archive) == content(folder)
        assert archive.name == "set"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.zip"]

    def test_a_wrapping_folder_and_hidden_members(self, tmp_path):
        names = [f"set/{name}" for name in PETS]
        path = make_zip(tmp_path / "a.ZIP", *names, "__MACOSX/set/._1.jpg", "set/.DS_Store")
        dataset = open_dataset(path)
        assert sorted(content(dataset)) == names
        assert dataset.notices == (
            "ignored hidden files and folders: '.DS_Store' (1), '__MACOSX' (1)",
            "looked through the folder 'set' around the classes",
        )

    def test_what_is_refused_names_archive_and_member(self, tmp_path):
        path = make_zip(tmp_path / "a.zip", *PETS, "../evil.jpg")
        with pytest.raises(DataError, match=r"a\.zip: member '\.\./evil\.jpg' has"):
            open_dataset(path)

    def test_stamps_follow_the_content(self, tmp_path):
        first = open_dataset(make_zip(tmp_path / "a.zip", *PETS))
        second = open_dataset(make_zip(tmp_path / "b.zip", *PETS, "dog/2.jpg"))
        assert [first.reader.stamp(i) for i in range(3)] == [
            second.reader.stamp(i) for i in range(3)
        ]
        assert len({second.reader.stamp(i) for i in range(4)}) == 4

    def test_threads(self, tmp_path):
        dataset = open_dataset(
            make_zip(tmp_path / "a.zip", *(f"{c}/{i}.jpg" for c in "ab" for i in range(50)))
        )
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(dataset.reader.read, list(range(100)) * 5))
        assert found == [item.name.encode() for item in dataset.items] * 5


class TestManifest:
    def test_csv(self, tmp_path):
        make(tmp_path, *PETS)
        (tmp_path / "m.csv").write_text(
            "path,label,split,group\ncat/1.jpg,Cat,train,\ndog/1.jpg,Dog,train,g1\ncat/2.jpg,Cat,test,\n"
        )
        dataset = open_dataset(tmp_path / "m.csv")
        assert dataset.name == "m"
        assert content(dataset)["dog/1.jpg"] == ("Dog", b"dog/1.jpg")
        assert [(item.split, item.group) for item in dataset.items] == [
            ("train", None),
            ("train", "g1"),
            ("test", None),
        ]
        assert dataset.notices == ("no test pictures of 'Dog'",)

    def test_numbers_are_names(self, tmp_path):
        make(tmp_path, *PETS)
        (tmp_path / "m.tsv").write_text("file\tclass\ncat/1.jpg\t10\ndog/1.jpg\t9\n")
        assert open_dataset(tmp_path / "m.tsv").classes == ("10", "9")

    def test_a_column_of_its_own_name(self, tmp_path):
        make(tmp_path, *PETS)
        (tmp_path / "m.csv").write_text("path,breed\ncat/1.jpg,pug\ndog/1.jpg,lab\n")
        assert open_dataset(tmp_path / "m.csv", label_column="breed").classes == ("lab", "pug")
        with pytest.raises(DataError, match="no column for the class; found 'path', 'breed'"):
            open_dataset(tmp_path / "m.csv")
        with pytest.raises(
            InvalidValueError, match="label_column must be left out, except for a man"
        ):
            open_dataset(tmp_path, label_column="breed")

    def test_parquet_with_bytes(self, tmp_path):
        table = pa.table({"image": [b"one", b"", b"three"], "label": ["a", "b", "b"]})
        pq.write_table(table, tmp_path / "m.parquet")
        dataset = open_dataset(tmp_path / "m.parquet", max_bytes=4)
        assert dataset.reader.read(0) == b"one"
        with pytest.raises(DataError, match=r"^row-1: the cell of the picture is empty"):
            dataset.reader.read(1)
        with pytest.raises(DataError, match=r"^row-2: 5 bytes; at most 4 are read"):
            dataset.reader.read(2)
        assert len({dataset.reader.stamp(i) for i in range(3)}) == 3


class TestNames:
    def test_the_sample(self):
        sample = open_dataset("sample")
        assert (sample.name, sample.location) == ("sample", "sample")
        assert sample.classes[:2] == ("T-shirt/top", "Trouser")
        parts = [item.split for item in sample.items]
        assert (parts.count("train"), parts.count("test")) == (10_000, 2_000)
        assert np.bincount(sample.labels).tolist() == [1200] * 10
        pixels = sample.reader.read(0)
        assert isinstance(pixels, np.ndarray)
        assert pixels.shape == (28, 28)
        assert pixels.dtype == np.uint8
        assert sample.items[10_000].name == "test/00000"
        assert sample.reader.stamp(0) == open_dataset("sample").reader.stamp(0)
        assert sample.reader.stamp(0) != sample.reader.stamp(1)

    def test_a_path_goes_before_a_name(self, tmp_path, monkeypatch):
        make(tmp_path / "sample", *PETS)
        monkeypatch.chdir(tmp_path)
        dataset = open_dataset("sample")
        assert len(dataset.items) == 3
        assert dataset.notices == ("'sample' is read from here, and not as the set of that name",)

    @pytest.mark.parametrize(
        ("data", "hint"),
        [
            ("cifar-10", "did you mean 'cifar10'"),
            ("flowrs", "did you mean 'flowers'"),
            ("zzz", "known: 'sample', 'cifar10'"),
            ("no/such/folder", "no such folder or file"),
            ("a\0b", r"'a\\x00b': no such folder"),
            ("two\nlines", r"'two\\nlines': no such folder"),
        ],
    )
    def test_what_is_not_there(self, tmp_path, monkeypatch, data, hint):
        make(tmp_path / "flowers", *PETS)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(MissingPathError, match=hint) as caught:
            open_dataset(data)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.exit_code == 2

    def test_another_kind_of_file(self, tmp_path):
        make(tmp_path, "cat.jpg")
        with pytest.raises(
            DataError, match=r"must be a folder, a \.zip or a \.csv, .* another kind"
        ):
            open_dataset(tmp_path / "cat.jpg")

    def test_a_path_that_is_too_long(self):
        with pytest.raises(DataError, match="File name too long"):
            open_dataset("x" * 5000)


class TestFindPictures:
    def test_files_as_they_are_and_folders_with_all_inside(self, tmp_path):
        make(tmp_path, "in/b.JPG", "in/a/c.png", "in/.x.jpg", "in/README", "odd.txt")
        found = find_pictures([tmp_path / "odd.txt", tmp_path / "in"])
        assert found == [tmp_path / "odd.txt", tmp_path / "in/a/c.png", tmp_path / "in/b.JPG"]

    def test_a_folder_without_pictures(self, tmp_path):
        make(tmp_path, ".hidden.jpg")
        with pytest.raises(DataError, match=r"no pictures in this folder; ignored hidden files"):
            find_pictures([tmp_path])

    def test_a_missing_file(self, tmp_path):
        make(tmp_path, "daisy.jpg")
        with pytest.raises(
            MissingPathError, match=r"daisi\.jpg': no such file .* mean '.*daisy\.jpg"
        ):
            find_pictures([tmp_path / "daisi.jpg"])


@shared
class TestRealSets:
    @pytest.mark.parametrize(
        ("name", "num_items", "num_classes", "splits"),
        [
            ("flowers", 4317, 5, {None}),
            ("objects", 762, 7, {None}),
            ("orl_faces", 400, 40, {None}),
            ("omniglot", 2720, 5, {None}),
            ("traffic_lights", 1484, 3, {"train", "test"}),
            ("pneumonia", 5856, 2, {"train", "validation", "test"}),
            ("cifar10-test", 10_000, 10, {None}),
        ],
    )
    def test_counts(self, name, num_items, num_classes, splits):
        dataset = open_dataset(DATA / f"{name}.zip")
        assert len(dataset.items) == num_items
        assert len(dataset.classes) == num_classes
        assert {item.split for item in dataset.items} == splits
        assert np.bincount(dataset.labels).min() > 0

    @pytest.mark.parametrize(
        ("name", "notice"),
        [
            ("flowers", "ignored hidden files and folders: '.DS_Store' (1)"),
            ("orl_faces", "ignored 1 file without a picture's ending: 'README'"),
            (
                "omniglot",
                (
                    "folders inside class folders belong to the class: "
                    "'Balinese/character01/0108_01.png' is of class 'Balinese'"
                ),
            ),
            (
                "traffic_lights",
                (
                    "the split is taken from the folders: 'test' is test (297), "
                    "'training' is train (1,187)"
                ),
            ),
        ],
    )
    def test_their_traps_are_noticed(self, name, notice):
        assert open_dataset(DATA / f"{name}.zip").notices == (notice,)

    def test_cifar10_is_listed_whole(self):
        dataset = open_dataset(DATA / "cifar10-train.zip")
        assert np.bincount(dataset.labels).tolist() == [5000] * 10
        data = dataset.reader.read(49_999)
        assert isinstance(data, bytes)
        assert io.BytesIO(data).read(4) == b"\x89PNG"
