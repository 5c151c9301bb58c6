"""The survey: what it notes of each picture, that it is kept, and that nothing stops it."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from kenspeckle.core import WriteError
from kenspeckle.images import Limits
from kenspeckle.pixels import Cache
from kenspeckle.sources import open_dataset
from kenspeckle.survey import survey
from tests.conftest import picture, png
from tests.test_duplicates import scene
from tests.test_files import full_disk  # noqa: F401 - a fixture


def finished(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def look(folder, cache, **limits):
    return finished(survey(open_dataset(folder), Limits(**limits), cache))


def fill(root, files: dict[str, bytes]):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_what_is_noted(tmp_path, cache):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "Acme", "One"
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 200)]
    files = {
        "a/1.jpg": encoded(scene(1), "JPEG", quality=83, exif=exif),
        "a/2.png": encoded(scene(2).convert("L"), "PNG"),
        "b/3.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "b/4.png": encoded(scene(1), "PNG"),
    }
    found = look(fill(tmp_path / "data", files), cache)
    traits = found.traits
    assert found.broken == {}
    assert traits.num_bytes.tolist() == [len(data) for data in files.values()]
    assert [found.formats[code] for code in traits.format] == ["JPEG", "PNG", "GIF", "PNG"]
    assert [found.modes[code] for code in traits.mode] == ["RGB", "L", "P", "RGB"]
    assert [found.cameras[code] for code in traits.camera] == ["Acme One", "", "", ""]
    assert found.animated.tolist() == [False, False, True, False]
    assert traits.height.tolist() == [96, 96, 8, 96]
    assert traits.width.tolist() == [128, 128, 8, 128]
    assert traits.quality.tolist() == [83, -1, -1, -1]
    assert traits.sketches.shape == (4, 32, 32, 3)


@pytest.mark.parametrize("quality", [25, 35, 50, 75, 90, 95, 100])
def test_the_quality_of_a_jpeg_is_libjpegs(tmp_path, cache, quality):
    data = encoded(scene(3), "JPEG", quality=quality)
    found = look(fill(tmp_path / "data", {"a/1.jpg": data, "b/2.jpg": data}), cache)
    assert abs(int(found.traits.quality[0]) - quality) <= 1


def test_a_turned_picture_counts_as_it_is_seen(tmp_path, cache):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(scene(1), "JPEG", exif=exif)
    found = look(fill(tmp_path / "data", {"a/1.jpg": data, "b/2.jpg": data}), cache)
    assert (found.traits.height[0], found.traits.width[0]) == (128, 96)


def test_equal_pixels_have_equal_digests_whatever_the_file(tmp_path, cache):
    files = {
        "a/1.png": encoded(scene(1), "PNG"),
        "a/2.bmp": encoded(scene(1), "BMP"),
        "b/3.png": encoded(scene(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"),
    }
    one, two, three = look(fill(tmp_path / "data", files), cache).digests.tolist()
    assert one == two != three


def broken_files() -> dict[str, bytes]:
    whole = png(picture((9, 9, 9), 0))
    return {
        "a/cut.png": whole[: len(whole) // 2],
        "a/empty.jpg": b"",
        "b/text.jpg": b"hello",
        "b/page.png": b"<!doctype html>",
    }


def test_broken_pictures_are_noted_with_the_reason_and_the_others_kept(folder, cache):
    fill(folder, broken_files())
    dataset = open_dataset(folder)
    found = look(folder, cache)
    reasons = {dataset.items[index].name: reason for index, reason in found.broken.items()}
    assert set(reasons) == set(broken_files())
    assert reasons["a/empty.jpg"] == "empty file"
    assert "cut short" in reasons["a/cut.png"]
    assert reasons["b/page.png"] == "not a picture but a web page (HTML)"
    assert len(found.sound) == 60
    assert {dataset.items[index].name for index in found.sound}.isdisjoint(reasons)
    assert len(found.traits.sketches) == len(found.hashes) == 60


def test_a_file_that_cannot_be_read(folder, cache):
    (folder / "red" / "gone.png").symlink_to(folder / "red" / "000.png")
    dataset = open_dataset(folder)
    (folder / "red" / "000.png").unlink()
    found = finished(survey(dataset, Limits(), cache))
    reasons = {dataset.items[index].name: reason for index, reason in found.broken.items()}
    assert set(reasons) == {"red/gone.png", "red/000.png"}
    assert all("no such file" in reason for reason in reasons.values())


def test_limits_count(folder, cache):
    assert len(look(folder, cache, max_pixels=10).broken) == 60


def same(one, other) -> bool:
    columns = ("sound", "animated", "digests", "hashes")
    return (
        one.broken == other.broken
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)
        and all(np.array_equal(a, vars(other.traits)[n]) for n, a in vars(one.traits).items())
        and (one.formats, one.modes, one.cameras) == (other.formats, other.modes, other.cameras)
    )


def test_a_kept_survey_is_the_same_and_reads_no_picture(folder, cache, monkeypatch):
    fill(folder, broken_files())
    first = look(folder, cache)
    monkeypatch.setattr("kenspeckle.survey.decode", None)
    assert same(first, look(folder, cache))


def test_a_changed_picture_is_looked_at_again(folder, cache):
    first = look(folder, cache)
    (folder / "red" / "000.png").write_bytes(png(picture((1, 2, 3), 5)))
    assert not same(first, look(folder, cache))


@pytest.mark.parametrize("what", ["*.npz", "*.u8"])
@pytest.mark.parametrize("left", [b"", b"PK", None])
def test_a_damaged_survey_is_made_anew(folder, cache, what, left):
    first = look(folder, cache)
    (path,) = (cache.folder / "surveys").glob(what)
    path.unlink()  # what is mapped stays as it was
    if left is not None:
        path.write_bytes(left)
    assert same(first, look(folder, cache))


def test_progress_counts_to_the_end(folder, cache):
    steps = list(survey(open_dataset(folder), Limits(), cache))
    assert steps[-1] == (60, 60)
    assert list(survey(open_dataset(folder), Limits(), cache)) == [(60, 60)]


def test_files_are_not_touched(folder, cache):
    fill(folder, broken_files())

    def state():
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    before = state()
    look(folder, cache)
    assert state() == before


def test_arrays_are_surveyed_too(cache):
    dataset = open_dataset("sample").subset(range(50))
    found = finished(survey(dataset, Limits(), cache))
    assert found.formats == ("", "array")
    assert len(found.sound) == 50


def test_a_cache_that_may_hold_nothing_stays_empty(folder, tmp_path):
    nothing, kept = Cache(tmp_path / "nothing", limit_bytes=0), Cache(tmp_path / "kept")
    assert same(look(folder, nothing), look(folder, kept))
    assert not nothing.folder.exists()


def test_old_surveys_make_room(folder, tmp_path):
    cache = Cache(tmp_path / "cache", limit_bytes=60 * 3072 + 1000)
    look(folder, cache)
    (folder / "red" / "000.png").write_bytes(png(picture((1, 2, 3), 5)))
    look(folder, cache)
    assert len(list((cache.folder / "surveys").glob("*.u8"))) == 1


def test_a_full_disk_is_said_and_nothing_half_is_left(folder, full_disk):  # noqa: F811
    dataset = open_dataset(folder)
    many = dataset.subset(list(range(60)) * 10)
    with pytest.raises(WriteError, match="--cache-dir"):
        finished(survey(many, Limits(), Cache(full_disk / "cache")))
    assert not [path for path in (full_disk / "cache").rglob("*") if path.is_file()]
