import unicodedata

import pytest

from kenspeckle.core import DataError, printable
from kenspeckle.names import (
    PICTURE_SUFFIXES,
    Place,
    Split,
    arrange,
    class_name,
    is_hidden,
    is_picture,
    listed,
    settle_classes,
)


def classes_of(*files: str, folders: tuple[str, ...] = ()) -> dict[str, tuple[str, str | None]]:
    return {p.name: (p.label, p.split) for p in arrange(files, folders).places}


class TestPrintable:
    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("two words.jpg", "two words.jpg"),
            ("ärger 🌻.jpg", "ärger 🌻.jpg"),
            ("👩\u200d🌾.jpg", "👩\u200d🌾.jpg"),
            ("a\nb\r\x1b[31m", "a\\nb\\r\\x1b[31m"),
            ("gpj.\u202eexe", "gpj.\\u202eexe"),
            ("caf\udce9", "caf\\udce9"),
            ("a\u2028b", "a\\u2028b"),
        ],
    )
    def test_escapes_what_breaks_or_disguises_a_line(self, name, shown):
        assert printable(name) == shown
        assert len(printable(name).splitlines()) == 1

    def test_listed_counts_the_rest(self):
        assert listed(["a\n", "b", "c", "d"]) == "'a\\n', 'b', 'c' and 1 more"


class TestKinds:
    @pytest.mark.parametrize("suffix", sorted(PICTURE_SUFFIXES))
    def test_endings_in_any_case(self, suffix):
        assert is_picture(f"a.{suffix}")
        assert is_picture(f"a.b.{suffix.upper()}")

    @pytest.mark.parametrize("name", ["README", "jpg", "a.txt", "a.jpg.zip", "a."])
    def test_other_endings(self, name):
        assert not is_picture(name)

    @pytest.mark.parametrize(
        "name", [".DS_Store", "._x.jpg", ".git", "__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"]
    )
    def test_hidden(self, name):
        assert is_hidden(name)

    def test_class_name_is_composed(self):
        assert class_name(unicodedata.normalize("NFD", "café")) == "café"

    def test_class_name_must_be_text(self):
        with pytest.raises(DataError, match=r"must be valid UTF-8; got 'caf\\udce9'"):
            class_name("caf\udce9")


class TestArrange:
    def test_class_folders(self):
        assert classes_of("dog/1.jpg", "cat/2.PNG") == {
            "dog/1.jpg": ("dog", None),
            "cat/2.PNG": ("cat", None),
        }

    def test_places_are_sorted_by_name(self):
        layout = arrange(["b/10.jpg", "b/9.jpg", "a/1.jpg"])
        assert layout.places[0] == Place("a/1.jpg", "a", None)
        assert [p.name for p in layout.places] == ["a/1.jpg", "b/10.jpg", "b/9.jpg"]

    def test_deeper_folders_belong_to_the_class_and_that_is_said(self):
        layout = arrange(["cat/2019/may/1.jpg", "dog/1.jpg"])
        assert layout.places[0].label == "cat"
        assert layout.notices == (
            (
                "folders inside class folders belong to the class: "
                "'cat/2019/may/1.jpg' is of class 'cat'"
            ),
        )

    @pytest.mark.parametrize(
        ("train", "validation", "test"),
        [("train", "val", "test"), ("Training", "VALID", "Testing"), ("TRAIN", "dev", "test")],
    )
    def test_split_folders(self, train, validation, test):
        files = [f"{part}/{c}/1.jpg" for part in (train, validation, test) for c in "ab"]
        layout = arrange(files)
        assert {(p.name.split("/")[0], p.split) for p in layout.places} == {
            (train, "train"),
            (validation, "validation"),
            (test, "test"),
        }
        assert {p.label for p in layout.places} == {"a", "b"}
        assert f"'{train}' is train (2)" in layout.notices[0]

    def test_a_wrapping_folder_is_looked_through(self):
        layout = arrange(["set/train/a/1.jpg", "set/test/a/1.jpg", "set/README.txt"])
        assert [(p.label, p.split) for p in layout.places] == [("a", "test"), ("a", "train")]
        assert any("looked through the folder 'set'" in line for line in layout.notices)

    def test_a_class_may_be_called_train(self):
        assert classes_of("train/1.jpg", "plane/1.jpg", "test/1.jpg") == {
            "train/1.jpg": ("train", None),
            "plane/1.jpg": ("plane", None),
            "test/1.jpg": ("test", None),
        }

    def test_flat_split_folders_never_become_classes(self):
        with pytest.raises(DataError, match="'test', 'train': these folders name splits"):
            arrange(["train/cat.1.jpg", "train/dog.1.jpg", "test/3.jpg"])

    def test_no_training_folder(self):
        with pytest.raises(DataError, match="no training folder"):
            arrange(["val/a/1.jpg", "test/a/1.jpg"])

    def test_a_split_that_is_there_twice(self):
        with pytest.raises(
            DataError, match="'dev', 'val': only one folder may hold the validation"
        ):
            arrange(["train/a/1.jpg", "val/a/1.jpg", "dev/a/1.jpg"])

    def test_what_is_left_out_is_named(self):
        layout = arrange(
            ["a/1.jpg", "b/1.jpg", "top.jpg", "a/notes.txt", "docs/x.pdf"], folders=["a", "empty"]
        )
        assert len(layout.places) == 2
        assert layout.notices == (
            "ignored 2 files without a picture's ending: 'a/notes.txt', 'docs/x.pdf'",
            "ignored 1 file outside class folders: 'top.jpg'",
            "left out 'docs', 'empty': no pictures there",
        )

    def test_folders_beside_split_folders_are_named(self):
        layout = arrange(["train/a/1.jpg", "test/a/1.jpg", "extra/a/1.jpg", "test/2.jpg"])
        assert [p.name for p in layout.places] == ["test/a/1.jpg", "train/a/1.jpg"]
        assert layout.notices[-1] == (
            "ignored 2 files outside class folders: 'extra/a/1.jpg', 'test/2.jpg'"
        )

    def test_an_empty_class_folder_in_a_split(self):
        layout = arrange(
            ["train/a/1.jpg", "test/a/1.jpg"], ["train", "train/b", "extra/c", "test/a"]
        )
        assert layout.notices[-1] == "left out 'b': no pictures there"

    @pytest.mark.parametrize("files", [[], ["1.jpg"], ["cat/notes.txt"]])
    def test_nothing_to_use(self, files):
        with pytest.raises(DataError, match=r"no pictures in class folders; found .*; expected"):
            arrange(files)

    def test_one_class_in_two_spellings(self):
        files = [f"train/{unicodedata.normalize('NFC', 'é')}/1.jpg"]
        files.append(f"val/{unicodedata.normalize('NFD', 'é')}/1.jpg")
        assert {p.label for p in arrange(files).places} == {"é"}


class TestSettleClasses:
    def test_sorted_by_code_point(self):
        classes, _ = settle_classes({(c, None): 1 for c in ("é", "b", "a10", "a9", "B")}, 2)
        assert classes == ("B", "a10", "a9", "b", "é")

    def test_a_class_missing_from_a_split_is_said(self):
        counts: dict[tuple[str, Split | None], int] = {
            ("a", "train"): 1,
            ("b", "train"): 1,
            ("a", "test"): 1,
        }
        classes, notices = settle_classes(counts, 2)
        assert classes == ("a", "b")
        assert notices == ("no test pictures of 'b'",)

    def test_a_class_that_training_lacks_is_an_error(self):
        counts: dict[tuple[str, Split | None], int] = {
            ("daisy", "train"): 1,
            ("rose", "train"): 1,
            ("roses", "validation"): 1,
        }
        message = (
            r"class 'roses' is in the validation .* not in the training .* did you mean 'rose'"
        )
        with pytest.raises(DataError, match=message):
            settle_classes(counts, 2)

    def test_one_class_only(self):
        with pytest.raises(DataError, match="at least 2 classes are needed; found only 'cat'"):
            settle_classes({("cat", None): 9}, 2)
        assert settle_classes({("cat", None): 9}, 1)[0] == ("cat",)

    def test_names_that_look_alike_are_said(self):
        _, notices = settle_classes({("Cat", None): 1, ("cat ", None): 1}, 2)
        assert notices == ("classes 'Cat' and 'cat ' differ only in case or spaces",)
