import csv
import json
import re
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kenspeckle.core import DataError, MissingExtraError, MissingPathError
from kenspeckle.manifests import LABEL_COLUMNS, PATH_COLUMNS, Manifest, read_manifest


@pytest.fixture
def folder(tmp_path):
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (tmp_path / name).write_bytes(b"picture")
    return tmp_path


def read(
    folder: Path, text: str | bytes, name: str = "m.csv", label: str | None = None
) -> Manifest:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_manifest(path, label)


def labels(manifest: Manifest) -> list[str]:
    return [row.label for row in manifest.rows]


class TestText:
    def test_all_columns(self, folder):
        found = read(folder, "path,label,split,group\n1.jpg,cat,train,a\n2.jpg,dog,Val,\n")
        assert [(r.where, r.name, r.label, r.split, r.group) for r in found.rows] == [
            ("line 2", "1.jpg", "cat", "train", "a"),
            ("line 3", "2.jpg", "dog", "validation", None),
        ]
        assert found.notices == ()

    @pytest.mark.parametrize("path_column", PATH_COLUMNS)
    @pytest.mark.parametrize("label_column", LABEL_COLUMNS)
    def test_accepted_names_of_columns(self, folder, path_column, label_column):
        found = read(folder, f"{label_column.upper()}, {path_column}\ncat,1.jpg\n")
        assert (found.rows[0].name, found.rows[0].label) == ("1.jpg", "cat")

    def test_tabs(self, folder):
        assert labels(read(folder, "path\tlabel\n1.jpg\ta, b\n", "m.tsv")) == ["a, b"]

    def test_byte_order_mark_crlf_and_blank_lines(self, folder):
        text = b"\xef\xbb\xbfpath,label\r\n\r\n1.jpg,cat\r\n"
        found = read(folder, text)
        assert (found.rows[0].where, found.rows[0].label) == ("line 3", "cat")

    def test_other_columns_are_ignored_and_said(self, folder):
        found = read(folder, "path,label,weight,filename\n1.jpg,cat,2.5,x\n")
        assert found.notices == ("ignored columns: 'filename', 'weight'",)

    def test_a_column_of_classes_by_name(self, folder):
        found = read(folder, "path,breed,label\n1.jpg,pug,dog\n", label="Breed")
        assert labels(found) == ["pug"]
        with pytest.raises(DataError, match="no column 'bred'; did you mean 'breed'"):
            read(folder, "path,breed\n1.jpg,pug\n", label="bred")

    def test_a_path_in_any_folder(self, folder):
        (folder / "in").mkdir()
        found = read(folder / "in", f"path,label\n../1.jpg,a\n{folder}/2.jpg,b\n./../3.jpg,c\n")
        assert [row.name for row in found.rows] == ["../1.jpg", f"{folder}/2.jpg", "../3.jpg"]

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("name,label\n1.jpg,a\n", r"no column for the picture's path; found 'name', 'label'; "),
            (
                "path,breed\n1.jpg,a\n",
                r"no column for the class; found 'path', 'breed'; accepted: la",
            ),
            ("1.jpg,cat\n2.jpg,dog\n", r"no column for the class; found '1\.jpg', 'cat'"),
            ("", r"empty; expected the names of the columns"),
            ("path,label\n", r"no rows"),
            ("path,label,Label\n1.jpg,a,b\n", r"two columns are named 'label'"),
            ("path,label\n1.jpg,a\n2.jpg\n", r"line 3: 1 fields; the first line has 2"),
            ("path,label\n1.jpg,a,b\n", r"line 2: 3 fields; the first line has 2"),
            ('path,label\n1.jpg,"a\n', r"line 2: unexpected end of data"),
            ("path,label\n1.jpg,\n", r"line 2: the label is empty"),
            ("path,label\n1.jpg, \n", r"line 2: the label is empty"),
            ("path,label\n,a\n", r"line 2: the picture's path is empty"),
            (
                "path,label,split\n1.jpg,a,tarin\n",
                r"line 2: split must be one of train, .*got 'tarin'",
            ),
            ("path,label,split\n1.jpg,a,\n", r"line 2: split must be one of train, .*got ''"),
        ],
    )
    def test_what_cannot_be_used(self, folder, text, fault):
        with pytest.raises(DataError, match=re.escape(str(folder)) + r"/m\.csv: " + fault):
            read(folder, text)

    def test_a_missing_manifest(self, tmp_path):
        with pytest.raises(MissingPathError, match="no such file"):
            read_manifest(tmp_path / "none.csv")

    def test_utf16_is_said(self, folder):
        with pytest.raises(DataError, match="not UTF-8 text; save it as 'CSV UTF-8'"):
            read(folder, "path,label\n1.jpg,a\n".encode("utf-16"))

    def test_a_class_that_is_not_utf8(self, folder):
        with pytest.raises(DataError, match=r"line 2: the name of a class must be valid UTF-8"):
            read(folder, "path,label\n1.jpg,café\n".encode("latin-1"))

    def test_a_file_name_that_is_not_utf8(self, folder):
        Path(folder, "caf\udce9.jpg").write_bytes(b"picture")
        found = read(folder, b"path,label\ncaf\xe9.jpg,a\n")
        assert found.rows[0].name == "caf\udce9.jpg"

    def test_a_field_beyond_the_limit_of_csv(self, folder):
        limit = csv.field_size_limit()
        with pytest.raises(DataError, match="line 2: field larger than field limit"):
            read(folder, f"path,label\n1.jpg,{'a' * (limit + 1)}\n")
        assert csv.field_size_limit() == limit

    def test_missing_pictures_are_counted_and_five_are_shown(self, folder):
        text = "path,label\n1.jpg,a\n" + "".join(f"no{i}.jpg,a\n" for i in range(7))
        with pytest.raises(DataError, match="7 of its pictures are not there as files") as caught:
            read(folder, text)
        assert "line 3 'no0.jpg'" in str(caught.value)
        assert "line 7 'no4.jpg' …" in str(caught.value)
        assert "no5" not in str(caught.value)

    @pytest.mark.parametrize("name", [".", "a\0b.jpg", "x" * 5000, "a\nb.jpg", "1.jpg/x"])
    def test_paths_that_are_no_files(self, folder, name):
        with pytest.raises(DataError, match="1 of its pictures are not there") as caught:
            read(folder, f'path,label\n"{name}",a\n')
        assert len(str(caught.value).splitlines()) == 1

    def test_backslashes_are_hinted_at(self, folder):
        with pytest.raises(DataError, match="paths are written with '/'"):
            read(folder, "path,label\ncats\\1.jpg,a\n")

    def test_repeated_rows_are_counted_once(self, folder):
        found = read(folder, "path,label\n1.jpg,a\n./1.jpg,a\n2.jpg,b\n")
        assert [row.name for row in found.rows] == ["1.jpg", "2.jpg"]
        assert found.notices == ("rows that repeat another are counted once (1)",)

    @pytest.mark.parametrize(
        ("first", "second", "said"),
        [
            ("a,train", "b,train", "'a' (train) and 'b' (train)"),
            ("a,train", "a,test", "'a' (train) and 'a' (test)"),
        ],
    )
    def test_rows_that_contradict_each_other(self, folder, first, second, said):
        with pytest.raises(
            DataError, match=r"line 2 and line 3 say different things of '1\.jpg'"
        ) as e:
            read(folder, f"path,label,split\n1.jpg,{first}\n1.jpg,{second}\n")
        assert said in str(e.value)


class TestLabels:
    @pytest.mark.parametrize(
        ("written", "expected"),
        [
            (["0", "1"], ["0", "1"]),
            (["1.0", "2.0", "1e1"], ["1", "2", "10"]),
            (["007", "7"], ["007", "7"]),
            (["-1", "+1"], ["-1", "+1"]),
            (["1.5", "cat"], ["1.5", "cat"]),
            (["v1.0", "v2.0"], ["v1.0", "v2.0"]),
            (["nan", "NA"], ["nan", "NA"]),
            (["=1+1", "🌻 sun\nflower"], ["=1+1", "🌻 sun\nflower"]),
        ],
    )
    def test_numbers_become_their_text(self, folder, written, expected):
        rows = "".join(f'{i}.jpg,"{label}"\n' for i, label in enumerate(written, 1))
        assert labels(read(folder, "path,label\n" + rows)) == expected

    def test_regression_is_not_offered(self, folder):
        with pytest.raises(
            DataError, match=r"line 3: .* got the number 0\.5; regression is not off"
        ):
            read(folder, "path,label\n1.jpg,1\n2.jpg,0.5\n")

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([1, 2], ["1", "2"]),
            ([1.0, 2.0], ["1", "2"]),
            ([True, False], ["true", "false"]),
            (["a", "1.5"], ["a", "1.5"]),
        ],
    )
    def test_typed_values(self, folder, values, expected):
        assert labels(parquet(folder, path=["1.jpg", "2.jpg"], label=values)) == expected

    @pytest.mark.parametrize(
        ("values", "fault"),
        [
            ([1.0, 0.25], "row 1: .*got the number 0.25; regression"),
            ([1.0, float("inf")], "row 1: .*got the number inf; regression"),
            ([1.0, float("nan")], "row 1: the label is empty"),
            (["a", None], "row 1: the label is empty"),
            ([["a"], ["b"]], "row 0: the label must be text or a whole number; got list"),
        ],
    )
    def test_typed_values_that_are_no_class(self, folder, values, fault):
        with pytest.raises(DataError, match=fault):
            parquet(folder, path=["1.jpg", "2.jpg"], label=values)


def parquet(folder: Path, row_group_size: int = 100, **columns: Any) -> Manifest:
    path = folder / "m.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return read_manifest(path)


class TestParquet:
    def test_paths(self, folder):
        found = parquet(folder, image=["1.jpg", "2.jpg"], label=["a", "b"], split=["train", "test"])
        assert [(r.name, r.split) for r in found.rows] == [("1.jpg", "train"), ("2.jpg", "test")]
        assert found.pictures is None

    @pytest.mark.parametrize("column", ["bytes", "image"])
    def test_bytes(self, folder, column):
        columns: dict[str, Any] = {column: [b"one", b"two"]}
        found = parquet(folder, 100, label=["a", "b"], box=[[1], [2]], **columns)
        assert [row.name for row in found.rows] == ["row-0", "row-1"]
        assert found.pictures is not None
        assert [found.pictures.read(i) for i in (1, 0)] == [b"two", b"one"]
        assert found.notices == ("ignored columns: 'box'",)

    def test_classes_that_are_bytes(self, folder):
        with pytest.raises(DataError, match="no column for the class; found 'path', 'label'"):
            parquet(folder, path=["1.jpg"], label=[b"a"])

    def test_bytes_with_names(self, folder):
        found = parquet(folder, label=["a", "b"], bytes=[b"1", b"2"], path=["x.jpg", "y.jpg"])
        assert [row.name for row in found.rows] == ["x.jpg", "y.jpg"]

    def test_the_form_of_hugging_face(self, folder):
        images = [{"bytes": b"one", "path": "x.jpg"}, {"bytes": b"two", "path": None}]
        table = pa.table({"image": images, "label": [1, 0]})
        feature = {"names": ["cat", "dog"], "_type": "ClassLabel"}
        info = {"info": {"features": {"label": feature, "image": {"_type": "Image"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, folder / "m.parquet")
        found = read_manifest(folder / "m.parquet")
        assert labels(found) == ["dog", "cat"]
        assert found.pictures is not None
        assert [found.pictures.read(i) for i in range(2)] == [b"one", b"two"]

    def test_their_mark_for_no_label(self, folder):
        table = pa.table({"bytes": [b"1", b"2"], "label": [0, -1]})
        info = {"info": {"features": {"label": {"names": ["cat"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, folder / "m.parquet")
        with pytest.raises(DataError, match="row 1: the label is empty"):
            read_manifest(folder / "m.parquet")

    @pytest.mark.parametrize(
        "metadata", ["[]", "{", '{"info": {"features": {"label": 3}}}', "null"]
    )
    def test_other_metadata_under_their_key(self, folder, metadata):
        table = pa.table({"bytes": [b"1"], "label": [7]})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": metadata}), folder / "m.parquet"
        )
        assert labels(read_manifest(folder / "m.parquet")) == ["7"]

    def test_threads_and_row_groups(self, folder, monkeypatch):
        monkeypatch.setattr("kenspeckle.manifests._KEPT_BYTES", 100)
        pictures = [bytes([i]) * 20 for i in range(50)]
        found = parquet(folder, label=["a"] * 50, bytes=pictures, row_group_size=3).pictures
        assert found is not None
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(found.read, list(range(50)) * 3)) == pictures * 3
        assert 1 <= len(found._kept) < 17  # the bound is the point

    def test_an_empty_cell(self, folder):
        found = parquet(folder, label=["a", "b"], bytes=[b"1", None])
        assert found.pictures is not None
        with pytest.raises(DataError, match="the cell of the picture is empty"):
            found.pictures.read(1)

    def test_a_row_group_that_is_too_large(self, folder, monkeypatch):
        monkeypatch.setattr("kenspeckle.manifests._MAX_ROW_GROUP_BYTES", 10)
        found = parquet(folder, label=["a"], bytes=[b"1" * 100])
        assert found.pictures is not None
        with pytest.raises(DataError, match=r"row group 0 has .* bytes; at most 10; write"):
            found.pictures.read(0)

    def test_stamps_tell_rows_and_versions_apart(self, folder):
        first = parquet(folder, label=["a", "b"], bytes=[b"1", b"2"]).pictures
        again = read_manifest(folder / "m.parquet").pictures
        other = parquet(folder, label=["a", "b"], bytes=[b"1", b"3333"]).pictures
        assert first is not None
        assert again is not None
        assert other is not None
        assert len({first.stamp(0), first.stamp(1), other.stamp(1)}) == 3
        assert again.stamp(1) == first.stamp(1)

    @pytest.mark.parametrize("damage", [b"", b"not parquet", b"PAR1" + b"x" * 50 + b"PAR1"])
    def test_files_that_are_no_parquet(self, folder, damage):
        with pytest.raises(DataError, match="not a Parquet file that can be read"):
            read(folder, damage, "m.parquet")

    def test_without_pyarrow(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'kenspeckle\[parquet\]'"):
            read(folder, b"", "m.parquet")


NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20
)


@given(name=NAMES.filter(lambda n: n.strip(".")), label=NAMES.filter(str.strip))
def test_any_name_survives(tmp_path_factory, name, label):
    """What Python's csv module writes is what comes back, whatever the characters."""
    folder = tmp_path_factory.mktemp("names")
    picture = folder / f"x{name}"
    if len(picture.name.encode()) > 255:
        return
    picture.write_bytes(b"picture")
    with (folder / "m.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label"], [picture.name, f"c{label}"]])
    row = read_manifest(folder / "m.csv").rows[0]
    assert (row.name, row.label) == (picture.name, unicodedata.normalize("NFC", f"c{label}"))
