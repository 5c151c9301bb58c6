"""The model file `.ken`: one ZIP, stored and not compressed, that is read without running anything.

    manifest.json          what it is, how pictures become inputs, and the SHA-256 of the rest
    model.onnx             uint8 (N, H, W, 3) → logits, probabilities, embedding, features
    weights.safetensors    the same weights, for training on
    report.json            the evaluation that it was shipped with
    thumbnails/…           the pictures of that report
    reference/…            generated pictures and what the model says of them

The archive's comment is the SHA-256 of all bytes before it, so that a file that was cut short or
has one bit flipped is refused before anything in it is parsed.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

from kenspeckle.core import (
    Geometry,
    InvalidValueError,
    MissingPathError,
    ModelFileError,
    Normalisation,
)
from kenspeckle.costs import Costs
from kenspeckle.graphs import check_graph

__all__ = ["FORMAT_VERSION", "Manifest", "ModelFile", "Rejection", "pack", "read"]

FORMAT_VERSION = 2
"""The newest that is read: 1, or 2 where costs decide, which earlier releases would not heed."""

MAX_FILE_BYTES = 4_000_000_000
MAX_MANIFEST_BYTES = 64_000_000
MAX_MEMBERS = 10_000
MAX_SIDE = 4096
MEMBER_NAMES = re.compile(
    r"manifest\.json|model\.onnx|weights\.safetensors|report\.json"
    r"|thumbnails/[0-9]{1,6}\.(png|jpg)|reference/[a-z0-9_-]{1,60}\.[a-z]{3,4}"
)
REQUIRED = ("manifest.json", "model.onnx", "reference/expected.json")
COMMENT = b"kenspeckle sha256:"
COMMENT_BYTES = len(COMMENT) + 64
COMMENT_LENGTH_BYTES = 2  # the last field of a ZIP's end record, right before the comment
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Rejection:
    """How the model answers `unknown`.

    Attributes:
        score: name of the score; higher means more familiar.
        threshold: pictures below it are unknown.
        false_alarm_rate: share of known pictures that the threshold was set to refuse.
    """

    score: str
    threshold: float
    false_alarm_rate: float


@dataclass(frozen=True)
class Manifest:
    """What a model file says of itself.

    Attributes:
        classes: class names in the order of the outputs.
        geometry: how a picture becomes an input.
        normalisation: the map to network inputs; it is in the graph, and stands here to be seen.
        temperature: what the logits are divided by before the softmax; it is in the graph.
        rejection: how the model answers `unknown`; None when it always names a class.
        backbone: family, number of parameters and, for pretrained weights, their origin.
        recipe: every setting of the run.
        provenance: data fingerprint, split, seeds, versions, machine and wall time.
        licence: of the weights, as an SPDX expression or None where the user decides.
        costs: ``costs[true][answered]``, K rows of K numbers in the order of `classes`, by which
            the answer is chosen (see `kenspeckle.costs.Costs`); None answers the most probable.
        members: SHA-256 of every other member, by name.
        format_version: of the file: the lowest that can say all this.

    Raises:
        InvalidValueError: `costs` are not a cost matrix of these classes.
    """

    classes: tuple[str, ...]
    geometry: Geometry
    normalisation: Normalisation
    temperature: float
    rejection: Rejection | None
    backbone: Mapping[str, Any]
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    licence: str | None = None
    costs: tuple[tuple[float, ...], ...] | None = None
    members: Mapping[str, str] = field(default_factory=dict)
    format_version: int = field(init=False)

    def __post_init__(self) -> None:
        if self.costs is not None and len(Costs(self.costs).matrix) != len(self.classes):
            raise InvalidValueError(
                f"costs must be those of the {len(self.classes)} classes; got {len(self.costs)} "
                "rows"
            )
        object.__setattr__(self, "format_version", 1 if self.costs is None else 2)


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A model file whose sizes, names and hashes were checked.

    Attributes:
        path: where it was read.
        manifest: what it says of itself.
        members: content of the members that were asked for, by name.
    """

    path: Path
    manifest: Manifest
    members: Mapping[str, bytes]

    def json(self, name: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return a member as plain JSON values.

        Raises:
            ModelFileError: it is missing or not JSON.
        """
        if name not in self.members:
            raise ModelFileError(f"{self.path}: holds no {name}")
        return _parse_json(self.path, name, self.members[name])


def pack(manifest: Manifest, members: Mapping[str, bytes]) -> bytes:
    """Return the content of a model file.

    Args:
        manifest: its `members` are filled in here.
        members: content by member name.

    Raises:
        InvalidValueError: a member's name is not one that the format knows.
    """
    for name in members:
        if not MEMBER_NAMES.fullmatch(name) or name == "manifest.json":
            raise InvalidValueError(f"a model file has no member named {name!r}")
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    plain = asdict(manifest) | {"members": hashes}
    if manifest.costs is None:
        del plain["costs"]  # version 1 has no such entry
    text = json.dumps(plain, ensure_ascii=True, indent=1, sort_keys=True, allow_nan=False)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name, data in {"manifest.json": text.encode(), **members}.items():
            file.writestr(zipfile.ZipInfo(name, EPOCH), data)
        file.comment = COMMENT + b"0" * 64
    with archive.getbuffer() as whole:
        whole[-64:] = hashlib.sha256(whole[:-COMMENT_BYTES]).hexdigest().encode()
    return archive.getvalue()


def read(path: Path, wanted: tuple[str, ...] = ("model.onnx",)) -> ModelFile:
    """Read a model file, after the hash of the whole, the member list and each hash were checked.

    Args:
        path: the file.
        wanted: names of members, or prefixes ending in ``/``, to return.

    Raises:
        MissingPathError: there is no such file.
        ModelFileError: damaged, hostile, not a model file, or of a later format version.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise MissingPathError(f"{path}: no such model file") from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file:
        try:
            _check_whole(path, file)
            with zipfile.ZipFile(file) as archive:
                return _read_members(path, archive, wanted)
        except (zipfile.BadZipFile, OSError, RecursionError, NotImplementedError) as error:
            raise ModelFileError(f"{path}: damaged: {error}; get a fresh copy") from error


def _check_whole(path: Path, file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE_BYTES:
        raise ModelFileError(f"{path}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(max(0, size - COMMENT_BYTES))
    comment = file.read()
    if not is_zip:
        raise ModelFileError(f"{path}: not a model file; `ken train DATA` writes one")
    if not comment.startswith(COMMENT):
        raise ModelFileError(
            f"{path}: the end is missing: cut short, or not written by kenspeckle; get a fresh copy"
        )
    file.seek(0)
    digest = hashlib.sha256()
    left = size - COMMENT_BYTES
    while left > 0:
        block = file.read(min(left, 1 << 20))
        digest.update(block)
        left -= len(block)
    if digest.hexdigest().encode() != comment[len(COMMENT) :]:
        raise ModelFileError(f"{path}: damaged: its SHA-256 does not match; get a fresh copy")


def _read_members(path: Path, archive: zipfile.ZipFile, wanted: tuple[str, ...]) -> ModelFile:
    names = _member_names(path, archive)
    plain = _parse_json(path, "manifest.json", archive.read("manifest.json"))
    manifest = _manifest(path, plain)
    if set(manifest.members) != names - {"manifest.json"}:
        raise ModelFileError(f"{path}: its members are not those that the manifest lists; refused")
    kept = {}
    for name, expected in manifest.members.items():
        data = archive.read(name)
        if hashlib.sha256(data).hexdigest() != expected:
            raise ModelFileError(f"{path}: {name} is not the one that was saved; get a fresh copy")
        if any(name == want or (want.endswith("/") and name.startswith(want)) for want in wanted):
            kept[name] = data
    if "model.onnx" in kept:
        try:
            check_graph(kept["model.onnx"])
        except ModelFileError as error:
            raise ModelFileError(f"{path}: model.onnx: {error}") from error
    return ModelFile(path, manifest, kept)


def _member_names(path: Path, archive: zipfile.ZipFile) -> set[str]:
    """Return the members' names, after everything that can be known before reading is checked."""
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    if len(entries) > MAX_MEMBERS or len(names) != len(entries):
        raise ModelFileError(f"{path}: has too many members, or one name twice; refused")
    for entry in entries:
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.flag_bits & 0x1 == 0
        if not stored or not MEMBER_NAMES.fullmatch(entry.filename):
            raise ModelFileError(
                f"{path}: has an unexpected member {entry.filename[:80]!r}; refused"
            )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ModelFileError(f"{path}: not a model file: it holds no {missing[0]}")
    if archive.getinfo("manifest.json").file_size > MAX_MANIFEST_BYTES:
        raise ModelFileError(f"{path}: its manifest is too large; refused")
    return names


def _parse_json(path: Path, name: str, data: bytes) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {name} is not valid JSON: {error}") from error


def _manifest(path: Path, plain: Any) -> Manifest:  # noqa: ANN401 - any JSON value
    if not isinstance(plain, dict):
        raise ModelFileError(f"{path}: manifest.json must hold a table; got {type(plain).__name__}")
    version = plain.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ModelFileError(f"{path}: manifest.json states no format version")
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: format version {version}, of a later release; this one reads up to "
            f"{FORMAT_VERSION}; run: pip install --upgrade kenspeckle"
        )
    try:
        manifest = _checked(plain)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelFileError(f"{path}: manifest.json is not one: {error!r}") from error
    if manifest.format_version != version:
        raise ModelFileError(
            f"{path}: manifest.json must state format version {manifest.format_version} for what "
            f"it holds; got {version}"
        )
    return manifest


def _checked(plain: dict[str, Any]) -> Manifest:
    """Return the manifest; every value that decides an answer is checked, whoever wrote it."""
    classes = tuple(_all(str, plain["classes"]))
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise ValueError("classes must be at least two different names")
    shape = plain["geometry"]
    height, width = _all(int, shape["size"])
    red, green, blue = _all(int, shape["background"])
    geometry = Geometry((height, width), shape["fit"], shape["interpolation"], (red, green, blue))
    sides_fit = all(1 <= side <= MAX_SIDE for side in geometry.size)
    levels_fit = all(0 <= level <= 255 for level in geometry.background)
    hints = Geometry.__annotations__
    known = geometry.fit in get_args(hints["fit"])
    known = known and geometry.interpolation in get_args(hints["interpolation"])
    if not (sides_fit and levels_fit and known):
        raise ValueError(f"geometry {shape!r}")
    mean, deviation = (_all(float, plain["normalisation"][k]) for k in ("mean", "deviation"))
    if not (len(mean) == len(deviation) == 3 and min(deviation) > 0):
        raise ValueError(f"normalisation {plain['normalisation']!r}")
    if not 0 < plain["temperature"] < 1e6:
        raise ValueError(f"temperature {plain['temperature']!r}")
    rejection = plain["rejection"]
    triple = cast("tuple[tuple[float, float, float], ...]", (tuple(mean), tuple(deviation)))
    return Manifest(
        classes=classes,
        geometry=geometry,
        normalisation=Normalisation(*triple),
        temperature=float(plain["temperature"]),
        rejection=None if rejection is None else Rejection(**rejection),
        backbone=dict(plain["backbone"]),
        recipe=dict(plain["recipe"]),
        provenance=dict(plain["provenance"]),
        licence=plain["licence"],
        costs=_matrix(plain.get("costs")),
        members=dict(zip(plain["members"], _all(str, plain["members"].values()), strict=True)),
    )


def _matrix(plain: Any) -> tuple[tuple[float, ...], ...] | None:  # noqa: ANN401 - any JSON value
    if plain is None:
        return None
    rows = ([float(v) if type(v) is int else v for v in row] for row in plain)
    return tuple(tuple(_all(float, row)) for row in rows)


def _all(kind: type, values: Any) -> list[Any]:  # noqa: ANN401 - any JSON value
    entries = list(values)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, kind):
            raise TypeError(f"{entry!r} must be {kind.__name__}")
    return entries
