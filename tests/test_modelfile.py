"""The model file is exactly what the format says, and anything else is refused in one line."""

import dataclasses
import hashlib
import io
import json
import zipfile

import numpy as np
import pytest

from kenspeckle import modelfile
from kenspeckle.core import (
    Geometry,
    InvalidValueError,
    MissingPathError,
    ModelFileError,
    Normalisation,
)
from kenspeckle.modelfile import FORMAT_VERSION, Manifest, pack, read
from kenspeckle.prediction import load, verify


def sealed(members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    """Return an archive with a right comment, whatever its members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=compression)
        archive.comment = modelfile.COMMENT + b"0" * 64
    body = file.getvalue()[: -modelfile.COMMENT_BYTES]
    return body + modelfile.COMMENT + hashlib.sha256(body).hexdigest().encode()


def opened(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_manifest(path, **changes) -> bytes:
    members = opened(path)
    manifest = json.loads(members["manifest.json"]) | changes
    return sealed(members | {"manifest.json": json.dumps(manifest).encode()})


def test_members_and_manifest_are_those_of_the_format(model_path):
    members = opened(model_path)
    names = set(members)
    assert {"manifest.json", "model.onnx", "weights.safetensors", "report.json"} <= names
    assert len([n for n in names if n.startswith("reference/")]) >= 17  # 16 and what is expected
    manifest = json.loads(members["manifest.json"])
    assert manifest["format_version"] == 1
    assert manifest["classes"] == ["blue", "green", "red"]
    assert manifest["geometry"]["size"] == [16, 16]
    for name, digest in manifest["members"].items():
        assert hashlib.sha256(members[name]).hexdigest() == digest
    with zipfile.ZipFile(model_path) as archive:
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())


def test_every_flipped_bit_is_refused(model_path, tmp_path):
    data = bytearray(model_path.read_bytes())
    chance = np.random.default_rng(0)
    places = {0, 3, 30, len(data) - 1, len(data) - 70, len(data) - 90}
    places |= {int(p) for p in chance.integers(len(data), size=60)}
    copy = tmp_path / "flipped.ken"
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(chance.integers(8))
        copy.write_bytes(flipped)
        with pytest.raises(ModelFileError, match=r"flipped\.ken: "):
            read(copy)


def test_every_cut_is_refused(model_path, tmp_path):
    data = model_path.read_bytes()
    copy = tmp_path / "cut.ken"
    for length in [0, 1, 4, 100, len(data) // 2, len(data) - 65, len(data) - 1]:
        copy.write_bytes(data[:length])
        with pytest.raises(
            ModelFileError, match=r"cut\.ken: .*(cut short|not a model file|damaged)"
        ):
            read(copy)


def test_a_later_format_says_what_to_do(model_path, tmp_path):
    copy = tmp_path / "later.ken"
    copy.write_bytes(with_manifest(model_path, format_version=FORMAT_VERSION + 1))
    with pytest.raises(ModelFileError, match=r"later release.*pip install --upgrade"):
        read(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["one"]},
        {"classes": ["a", "a", "b"]},
        {"classes": [1, 2, 3]},
        {"temperature": 0},
        {"temperature": "1"},
        {"temperature": None},
        {"normalisation": {"mean": [0, 0, 0], "deviation": [1.0, 1.0, 0.0]}},
        {"geometry": {"size": [10**6, 16], "fit": "squash"}},
        {"format_version": "1"},
        {"format_version": 0},
        {"recipe": 3},
        {"members": {}},
    ],
)
def test_a_manifest_that_is_none_is_refused(model_path, tmp_path, changes):
    copy = tmp_path / "odd.ken"
    copy.write_bytes(with_manifest(model_path, **changes))
    with pytest.raises(ModelFileError, match=r"odd\.ken: "):
        load(copy)


def test_classes_that_do_not_fit_the_graph_are_refused(model_path, tmp_path):
    copy = tmp_path / "odd.ken"
    copy.write_bytes(with_manifest(model_path, classes=["a", "b"]))
    with pytest.raises(ModelFileError, match="does not fit its manifest"):
        load(copy)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "model.pkl", "weights.pt", "reference/../x.png"]
)
def test_unexpected_members_are_refused(model_path, tmp_path, name):
    copy = tmp_path / "odd.ken"
    copy.write_bytes(sealed(opened(model_path) | {name: b"x"}))
    with pytest.raises(ModelFileError, match="unexpected member"):
        read(copy)
    with pytest.raises(InvalidValueError, match="no member named"):
        pack(a_manifest(), {name: b"x"})


def test_compressed_members_are_refused(model_path, tmp_path):
    copy = tmp_path / "odd.ken"
    copy.write_bytes(sealed(opened(model_path), zipfile.ZIP_DEFLATED))
    with pytest.raises(ModelFileError, match="unexpected member"):
        read(copy)


def test_a_member_that_was_exchanged_is_refused(model_path, tmp_path):
    copy = tmp_path / "odd.ken"
    copy.write_bytes(sealed(opened(model_path) | {"model.onnx": b"other"}))
    with pytest.raises(ModelFileError, match=r"model\.onnx is not the one that was saved"):
        read(copy)


def test_other_files_are_refused(tmp_path):
    text = tmp_path / "text.ken"
    text.write_text("hello")
    with pytest.raises(ModelFileError, match="not a model file"):
        read(text)
    with pytest.raises(MissingPathError, match="no such model file"):
        read(tmp_path / "missing.ken")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read(tmp_path)


def a_manifest() -> Manifest:
    return Manifest(
        classes=("a", "b"),
        geometry=Geometry((8, 8)),
        normalisation=Normalisation(),
        temperature=1.0,
        rejection=None,
        backbone={},
        recipe={},
        provenance={},
    )


def test_pack_and_read_give_the_same_manifest(tmp_path):
    path = tmp_path / "a.ken"
    names = ("snow\nman", "☃ \U0001f600", "=cmd()", "<b>", "\u202eevil")
    manifest = dataclasses.replace(a_manifest(), classes=names)
    members = {"model.onnx": b"x", "reference/expected.json": b"{}"}
    path.write_bytes(pack(manifest, members))
    found = read(path, ()).manifest
    assert found.classes == names
    assert dataclasses.replace(found, members={}) == manifest
    # No time stamps: equal content is an equal file.
    assert path.read_bytes() == pack(manifest, members)


COSTS = ((0.0, 100.0), (1.0, 0.5))
MEMBERS = {"model.onnx": b"x", "reference/expected.json": b"{}"}


def test_costs_make_a_file_that_earlier_releases_refuse(tmp_path):
    path = tmp_path / "a.ken"
    plain = a_manifest()
    manifest = dataclasses.replace(plain, costs=COSTS)
    path.write_bytes(pack(manifest, MEMBERS))
    assert json.loads(opened(path)["manifest.json"])["format_version"] == 2
    found = read(path, ()).manifest
    assert found.costs == COSTS
    assert dataclasses.replace(found, members={}) == manifest
    assert (plain.format_version, found.format_version) == (1, 2)
    assert dataclasses.replace(found, costs=None, members={}) == plain


def test_without_costs_a_file_is_one_of_version_1_to_the_byte(tmp_path):
    path = tmp_path / "a.ken"
    path.write_bytes(pack(a_manifest(), MEMBERS))
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in MEMBERS.items()}
    version_1 = {
        "backbone": {},
        "classes": ["a", "b"],
        "format_version": 1,
        "geometry": {
            "background": [255, 255, 255],
            "fit": "squash",
            "interpolation": "bilinear",
            "size": [8, 8],
        },
        "licence": None,
        "members": hashes,
        "normalisation": {"deviation": [0.5, 0.5, 0.5], "mean": [0.5, 0.5, 0.5]},
        "provenance": {},
        "recipe": {},
        "rejection": None,
        "temperature": 1.0,
    }
    expected = json.dumps(version_1, indent=1, sort_keys=True).encode()
    assert opened(path)["manifest.json"] == expected


@pytest.mark.parametrize(
    "costs",
    [((0.0, 1.0),), ((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)), ((0.0, 0.0), (1.0, 0.0))],
)
def test_a_manifest_holds_no_costs_of_other_classes(costs):
    with pytest.raises(InvalidValueError, match=r"costs must be|right answer must cost less"):
        dataclasses.replace(a_manifest(), costs=costs)


def test_whole_numbers_are_costs_too(tmp_path):
    path = tmp_path / "a.ken"
    path.write_bytes(pack(dataclasses.replace(a_manifest(), costs=COSTS), MEMBERS))
    path.write_bytes(with_manifest(path, costs=[[0, 100], [1, 0.5]]))
    found = read(path, ()).manifest.costs
    assert found == COSTS
    assert all(type(cost) is float for row in found for cost in row)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"costs": []}, "at least two classes"),
        ({"costs": {}}, "at least two classes"),
        ({"costs": 3}, "not iterable"),
        ({"costs": False}, "not iterable"),
        ({"costs": "ab"}, "'a' must be float"),
        ({"costs": [[0, 1], 2]}, "not iterable"),
        ({"costs": [[0, 1]]}, "square matrix"),
        ({"costs": [[0, 1], [1]]}, "square matrix"),
        ({"costs": [[0, 1, 1], [1, 0, 1], [1, 1, 0]]}, "costs must be those of the 2 classes"),
        ({"costs": [[0, True], [1, 0]]}, "True must be float"),
        ({"costs": [[0, "1"], [1, 0]]}, "'1' must be float"),
        ({"costs": [[0, None], [1, 0]]}, "None must be float"),
        ({"costs": [[0, [1]], [1, 0]]}, r"\[1\] must be float"),
        ({"costs": [[0, -1], [1, 0]]}, "got -1.0 in row 0, column 1"),
        ({"costs": [[0, float("nan")], [1, 0]]}, "got nan"),
        ({"costs": [[0, float("inf")], [1, 0]]}, "got inf"),
        ({"costs": [[0, 10**400], [1, 0]]}, "too large"),
        ({"costs": [[0, 1e13], [1, 0]]}, "got 10000000000000.0"),
        ({"costs": [[0, 0], [1, 0]]}, "right answer must cost less"),
        ({"costs": None}, "must state format version 1 for what it holds; got 2"),
        ({"format_version": 1}, "must state format version 2 for what it holds; got 1"),
    ],
)
def test_costs_that_are_none_are_refused(tmp_path, changes, text):
    path = tmp_path / "odd.ken"
    path.write_bytes(pack(dataclasses.replace(a_manifest(), costs=COSTS), MEMBERS))
    path.write_bytes(with_manifest(path, **changes))
    with pytest.raises(ModelFileError, match=rf"odd\.ken: manifest\.json .*{text}"):
        read(path, ())


def test_verify_replays_the_reference_pictures(model_path):
    differences = verify(model_path)
    assert len(differences) >= 16
    assert all(difference.agrees for difference in differences)


def test_verify_sees_a_changed_answer(model_path, tmp_path):
    members = opened(model_path)
    expected = json.loads(members["reference/expected.json"])
    name = min(expected)
    expected[name] = list(np.roll(expected[name], 1))
    members["reference/expected.json"] = json.dumps(expected).encode()
    manifest = json.loads(members["manifest.json"])
    digest = hashlib.sha256(members["reference/expected.json"]).hexdigest()
    manifest["members"]["reference/expected.json"] = digest
    members["manifest.json"] = json.dumps(manifest).encode()
    copy = tmp_path / "changed.ken"
    copy.write_bytes(sealed(members))
    assert [d.name for d in verify(copy) if not d.agrees] == [name]
