"""One look at every picture: decoded in full, measured, and kept small for comparison.

Nothing is judged here. A picture that cannot be decoded is noted with the reason; of every other
one its traits (size, format, quality, camera), a digest of its pixels, a perceptual hash and a
sketch of 32 x 32 pixels are kept. The survey of unchanged data is read back from the cache:

    <cache>/surveys/<key>.npz   what is known of each picture, about 70 bytes
    <cache>/surveys/<key>.u8    the sketches, 3 KB each, memory-mapped
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from kenspeckle.core import DataError, ImageError, Pixels, WriteError, printable
from kenspeckle.duplicates import SKETCH_SIDE, perceptual_hashes
from kenspeckle.files import replacing, write_file
from kenspeckle.images import DAMAGE, DECODER_VERSION, Limits, decode, from_array
from kenspeckle.pixels import CHUNK, Cache, over_chunks, stamps
from kenspeckle.shortcuts import Traits
from kenspeckle.sources import Dataset

__all__ = ["Survey", "survey"]

Columns = dict[str, NDArray[Any]]

SURVEY_VERSION = "1"
"""Part of the key of a kept survey; raised by whatever changes what is measured."""

SKETCH_BYTES = SKETCH_SIDE * SKETCH_SIDE * 3
DIGEST_BYTES = 16
_SHAPE = (-1, SKETCH_SIDE, SKETCH_SIDE, 3)

# Long runs of Lanczos over millions of pixels are cut short by averaging blocks first. Below three
# times the target nothing is averaged, and the hash is that of ImageHash to the bit.
_REDUCING_GAP = 3.0

# The luminance table of the JPEG standard (ITU-T T.81, K.1), which libjpeg scales by the quality.
_STANDARD_LUMINANCE_MEAN = 57.625


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of the N pictures of a data set that can be decoded.

    Attributes:
        broken: reason, in words, by the index of every picture that cannot be decoded.
        sound: ``int64 (N,)``, indices of the others; the arrays below are in this order.
        traits: size, format, quality and camera, and the sketches.
        formats: names of the formats, by ``traits.format``.
        modes: Pillow's names of the pixel modes, by ``traits.mode``.
        cameras: names, by ``traits.camera``; the first is empty, for none.
        animated: ``bool (N,)``, more than one frame or page.
        digests: ``uint8 (N, 16)``, equal for equal pixels of equal size.
        hashes: ``uint64 (N,)``, perceptual.
    """

    broken: dict[int, str]
    sound: NDArray[np.int64]
    traits: Traits
    formats: tuple[str, ...]
    modes: tuple[str, ...]
    cameras: tuple[str, ...]
    animated: NDArray[np.bool_]
    digests: NDArray[np.uint8]
    hashes: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Look:
    """What one picture shows."""

    num_bytes: int
    size: tuple[int, int]
    quality: int
    animated: bool
    words: tuple[str, str, str]  # format, mode, camera
    digest: bytes
    grey: NDArray[np.uint8]
    sketch: Pixels


def survey(
    dataset: Dataset, limits: Limits, cache: Cache
) -> Generator[tuple[int, int], None, Survey]:
    """Decode every picture of a data set and note what there is to know of it.

    Memory does not grow with the size of the pictures; each takes about 70 bytes, and 3 KB in the
    cache, or in memory where that is more than the cache may hold.

    Yields:
        The number of pictures looked at so far, and of all.

    Raises:
        WriteError: the cache could not be written, for example because the disk is full.
    """
    key = stamps(dataset, "survey", SURVEY_VERSION, DECODER_VERSION, asdict(limits))
    known = cache.folder / "surveys" / f"{key}.npz"
    sketches = known.with_suffix(".u8")
    num_items = len(dataset.items)
    found = _remembered(known, sketches)
    if found is not None:
        os.utime(sketches)
        yield num_items, num_items
        return _assembled(found, _mapped(sketches, len(found["sound"])))
    if num_items * SKETCH_BYTES > cache.limit_bytes:
        parts: list[bytes] = []
        found = yield from _look_at_all(dataset, limits, parts.append)
        return _assembled(found, np.frombuffer(b"".join(parts), np.uint8).reshape(_SHAPE))
    cache.make_room(num_items * SKETCH_BYTES)
    try:
        with replacing(sketches) as file:
            found = yield from _look_at_all(dataset, limits, file.write)
        write_file(known, _packed(found))
    except WriteError as error:
        raise WriteError(
            f"the survey's cache {error}; choose another folder with --cache-dir, "
            "or keep it in memory with --cache-limit 0"
        ) from error
    return _assembled(found, _mapped(sketches, len(found["sound"])))


def _look_at_all(
    dataset: Dataset, limits: Limits, keep: Callable[[bytes], object]
) -> Generator[tuple[int, int], None, Columns]:
    """Return what is known of every picture, and hand the sketches to `keep` in order."""
    total = len(dataset.items)
    found = _empty(total)
    words: tuple[dict[str, int], ...] = ({"": 0}, {"": 0}, {"": 0})
    broken: dict[int, str] = {}

    def look_at(start: int) -> list[_Look | str]:
        return [_try(dataset, index, limits) for index in range(start, min(start + CHUNK, total))]

    done = num_sound = 0
    for looks in over_chunks(look_at, total):
        sound = []
        for index, look in enumerate(looks, start=done):
            if isinstance(look, str):
                broken[index] = look
                continue
            sound.append(look)
            said = zip(words, look.words, strict=True)
            codes = [known.setdefault(word, len(known)) for known, word in said]
            row = (index, look.num_bytes, *look.size, look.quality, look.animated, *codes)
            for name, value in zip(_NUMBERS, row, strict=True):
                found[name][num_sound] = value
            found["digests"][num_sound] = np.frombuffer(look.digest, np.uint8)
            keep(look.sketch.tobytes())
            num_sound += 1
        if sound:
            grey = np.stack([look.grey for look in sound])
            found["hashes"][num_sound - len(sound) : num_sound] = perceptual_hashes(grey)
        done += len(looks)
        yield done, total
    names = [list(known) for known in words]
    text = json.dumps({"broken": sorted(broken.items()), "words": names}).encode()
    kept = {name: column[:num_sound] for name, column in found.items()}
    return kept | {"text": np.frombuffer(text, np.uint8)}


# Numbers of a picture, in the order of a row.
_NUMBERS: dict[str, type[np.generic]] = {
    "sound": np.int64,
    "num_bytes": np.int64,
    "height": np.int32,
    "width": np.int32,
    "quality": np.int16,
    "animated": np.bool_,
    "format": np.int16,
    "mode": np.int16,
    "camera": np.int32,
}


def _empty(num_items: int) -> Columns:
    return {name: np.zeros(num_items, kind) for name, kind in _NUMBERS.items()} | {
        "digests": np.zeros((num_items, DIGEST_BYTES), np.uint8),
        "hashes": np.zeros(num_items, np.uint64),
    }


def _try(dataset: Dataset, index: int, limits: Limits) -> _Look | str:
    """Return what a picture shows, or what is wrong with it."""
    name = dataset.items[index].name
    try:
        return _look(dataset.reader.read(index), name, limits)
    except ImageError as error:
        return error.reason
    except DataError as error:
        return str(error).removeprefix(f"{printable(name)}: ")


def _look(source: bytes | NDArray[Any], name: str, limits: Limits) -> _Look:
    said: list[_Said] = []
    if isinstance(source, bytes):
        picture = decode(source, name, limits=limits, seen=lambda file: said.append(_said(file)))
        num_bytes = len(source)
    else:
        picture, num_bytes = from_array(source, name), source.nbytes
        said.append(_Said(("array", "", ""), -1, False))
    image = Image.fromarray(picture)
    grey = image.convert("L").resize(
        (SKETCH_SIDE, SKETCH_SIDE), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP
    )
    sketch = image.resize(
        (SKETCH_SIDE, SKETCH_SIDE), Image.Resampling.BILINEAR, reducing_gap=_REDUCING_GAP
    )
    height, width = picture.shape[:2]
    content = hashlib.blake2b(f"{height}x{width}".encode(), digest_size=DIGEST_BYTES)
    content.update(picture.tobytes())
    return _Look(
        num_bytes=num_bytes,
        size=(height, width),
        quality=said[0].quality,
        animated=said[0].animated,
        words=said[0].words,
        digest=content.digest(),
        grey=np.asarray(grey),
        sketch=np.asarray(sketch),
    )


@dataclass(frozen=True, slots=True)
class _Said:
    """What a file says of itself."""

    words: tuple[str, str, str]
    quality: int
    animated: bool


def _said(file: ImageFile) -> _Said:
    return _Said(
        words=(file.format or "", file.mode, _camera(file)),
        quality=_jpeg_quality(file),
        animated=_is_animated(file),
    )


def _camera(file: ImageFile) -> str:
    if not isinstance(file, JpegImageFile) and "exif" not in file.info:
        return ""
    exif = file.getexif()
    parts = (exif.get(tag) for tag in (ExifTags.Base.Make, ExifTags.Base.Model))
    return " ".join(part.strip("\0 ")[:60] for part in parts if isinstance(part, str)).strip()


def _jpeg_quality(file: ImageFile) -> int:
    """Return libjpeg's quality, 1 to 100, as the mean of the luminance table tells it; else -1."""
    tables = getattr(file, "quantization", None)
    if not isinstance(file, JpegImageFile) or not tables or 0 not in tables:
        return -1
    scale = 100 * float(np.mean(tables[0])) / _STANDARD_LUMINANCE_MEAN
    quality = 5000 / scale if scale > 100 else (200 - scale) / 2
    return int(min(100, max(1, round(quality))))


def _is_animated(file: ImageFile) -> bool:
    """Return whether there is a second frame or page; one that is damaged counts as none."""
    try:
        return bool(getattr(file, "is_animated", False))
    except DAMAGE:
        return False


# The kept survey.


def _packed(found: Columns) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **found)
    return file.getvalue()


def _remembered(path: Path, sketches: Path) -> Columns | None:
    """Return a kept survey, or None when there is none that is whole."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            found = {name: kept[name] for name in (*_empty(0), "text")}
        size = sketches.stat().st_size
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # never written, or damaged: the pictures are looked at again
    num_sound = len(found["sound"])
    whole = all(len(found[name]) == num_sound for name in _empty(0))
    return found if whole and size == num_sound * SKETCH_BYTES else None


def _mapped(path: Path, num_items: int) -> Pixels:
    if not num_items:  # an empty file cannot be mapped
        return np.zeros((0, *_SHAPE[1:]), np.uint8)
    return np.memmap(path, np.uint8, "r", shape=(num_items, *_SHAPE[1:])).view(np.ndarray)


def _assembled(found: Columns, sketches: Pixels) -> Survey:
    text = json.loads(found["text"].tobytes())
    formats, modes, cameras = (tuple(names) for names in text["words"])
    measured = {name: found[name] for name in _NUMBERS if name not in {"animated", "sound"}}
    return Survey(
        broken={int(index): str(reason) for index, reason in text["broken"]},
        sound=found["sound"],
        traits=Traits(**measured, sketches=sketches),
        formats=formats,
        modes=modes,
        cameras=cameras,
        animated=found["animated"],
        digests=found["digests"],
        hashes=found["hashes"],
    )
