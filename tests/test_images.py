"""Bytes to pixels of the network's size; what must never happen on the way."""

import io
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from kenspeckle import images
from kenspeckle.core import Geometry, ImageError
from kenspeckle.images import FORMATS, Limits, decode, prepare
from kenspeckle.references import reference_pictures


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data, **options):
    with Image.open(io.BytesIO(data), **options) as image:
        return np.asarray(image.convert("RGB"))


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (7 + c) + y / (11 - c) + c) for c in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


WRITERS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 90},
    "PNG": {},
    "WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
}
FILES = {kind: encoded(smooth(40, 60), kind, **options) for kind, options in WRITERS.items()}


# Formats.


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_told_by_content(kind):
    pixels = decode(FILES[kind], "holiday.doc")
    np.testing.assert_array_equal(pixels, by_pillow(FILES[kind]))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize(
    "data",
    [
        b"P3 2 1 # two\n255 1 2 3#\n 4 5 6",
        b"P2 2 1 255 1#joined\r2 7 # end",
        b"P1 #\n3 1 1#\n01",
    ],
)
def test_comments_in_plain_netpbm_are_what_pillow_takes_them_for(data):
    np.testing.assert_array_equal(decode(data, "comment.ppm"), by_pillow(data))


def test_a_file_of_comments_takes_no_time():
    start = time.perf_counter()
    with pytest.raises(ImageError, match="not enough image data"):
        decode(b"P2 1000 1000 255\n" + b"#\n" * 500_000, "comments.pgm")
    assert time.perf_counter() - start < 1  # Pillow alone takes 5 s


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_of_several_frames_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(data, "many"), np.array(frames[0]))


def test_mpo_opens_as_its_first_jpeg():
    assert "MPO" not in FORMATS
    frames = [smooth(40, 60), smooth(60, 40)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    np.testing.assert_array_equal(decode(data, "phone.jpg"), by_pillow(data, formats=["JPEG"]))
    for end in (20, 300, len(data) // 4):
        with pytest.raises(ImageError):
            decode(data[:end], "phone.jpg")


def test_profiles_are_ignored():
    plain = encoded(smooth(9, 9), "PNG")
    tagged = encoded(smooth(9, 9), "PNG", icc_profile=b"any profile")
    np.testing.assert_array_equal(decode(plain, "plain"), decode(tagged, "tagged"))


def test_cmyk_jpeg():
    data = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95)
    assert np.abs(decode(data, "print.jpg").astype(int) - (0, 255, 255)).max() <= 3


# Refusals.


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"just some words\n", "not a picture but a text file"),
        ("käse\n".encode(), "not a picture but a text file"),
        (b"Python code", "not a picture but a text file"),
        (b"\n<!DOCTYPE html><p>404", "not a picture but a web page"),
        (b"<svg xmlns='x'>", "not a picture but an XML or SVG file"),
        (b"%PDF-1.7\n\xff\0", "not a picture but a PDF"),
        (b"PK\x03\x04\0\0", "not a picture but a ZIP archive"),
        (b"\0\0\0\x18ftypheic\0\0", "not a picture but a HEIC picture"),
        (b"\0\0\0\x18ftypavif\0\0", "not a picture but an AVIF picture"),
        (bytes(range(256)), r"not a picture in a known format \(JPEG, .*begins with b'\\x00\\x01"),
        (b"\xff\xd8\xff", "damaged or of an unknown variant"),
        (b"BM", "damaged or of an unknown variant"),
        (b"GIF89a", "damaged or of an unknown variant"),
        (b"P5 0 7 255 ", "damaged or of an unknown variant"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(data, reason):
    with pytest.raises(ImageError, match=f"^cat.jpg: {reason}") as caught:
        decode(data, "cat.jpg")
    assert caught.value.name == "cat.jpg"
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_files_that_are_cut_short_are_refused(kind, share):
    data = FILES[kind]
    with pytest.raises(ImageError, match=r"cut short|damaged"):
        decode(data[: int(len(data) * share)], "half")


def test_a_cut_jpeg_says_so():
    with pytest.raises(ImageError, match=r"^half.jpg: cut short \(image file is truncated"):
        decode(FILES["JPEG"][:700], "half.jpg")


def test_caps_hold():
    with pytest.raises(ImageError, match=r"1,000 bytes; at most 999 are decoded"):
        decode(bytes(1000), "long", limits=Limits(max_bytes=999))
    assert decode(FILES["PNG"], "fits", limits=Limits(max_pixels=2400)).shape == (40, 60, 3)
    for kind, data in FILES.items():
        with pytest.raises(ImageError, match=r"too many pixels: 40 x 60 = 2,400; at most 2,399"):
            decode(data, kind, limits=Limits(max_pixels=2399))


@pytest.mark.parametrize("options", [{"progressive": True}, {}])
def test_only_jpeg_that_is_decoded_row_by_row_may_be_larger(options):
    data = encoded(smooth(400, 500), "JPEG", **options)
    limits = Limits(max_pixels=60_000, max_pixels_reduced=200_000)
    if options:
        with pytest.raises(ImageError, match="too many pixels: 400 x 500"):
            decode(data, "scans.jpg", target=(50, 50), limits=limits)
    else:
        assert decode(data, "rows.jpg", target=(50, 50), limits=limits).shape == (100, 125, 3)
        for target in (None, (150, 150)):
            with pytest.raises(ImageError, match="too many pixels: 400 x 500"):
                decode(data, "rows.jpg", target=target, limits=limits)
        with pytest.raises(ImageError, match="too many pixels: 400 x 500"):
            decode(data, "", target=(50, 50), limits=Limits(60_000_000, 60_000, 199_999))


def one_component_per_scan(planes):
    """Return a baseline JPEG of three scans, joined from three grey ones with the same tables."""
    grey = [encoded(Image.fromarray(plane), "JPEG", quality=90) for plane in planes]
    starts = [data.index(b"\xff\xda") for data in grey]
    frame = grey[0].index(b"\xff\xc0")
    size = grey[0][frame + 4 : frame + 9]
    colour = b"\xff\xc0\0\x11" + size + b"\3" + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    header = grey[0][:frame] + colour + grey[0][frame + 13 : starts[0]]
    scans = [
        b"\xff\xda\0\x08\1" + bytes([number, 0, 0, 63, 0]) + data[start + 10 : -2]
        for number, (data, start) in enumerate(zip(grey, starts, strict=True), start=1)
    ]
    return header + b"".join(scans) + b"\xff\xd9"


def test_a_baseline_jpeg_of_several_scans_counts_like_a_progressive_one():
    planes = np.array(smooth(400, 496).convert("YCbCr")).transpose(2, 0, 1)
    data = one_component_per_scan(planes)
    pixels = decode(data, "scans.jpg")
    assert np.abs(pixels.astype(int) - np.array(smooth(400, 496))).mean() < 3
    np.testing.assert_array_equal(pixels, by_pillow(data))
    with pytest.raises(ImageError, match="too many pixels: 400 x 496"):
        decode(data, "scans.jpg", target=(50, 50), limits=Limits(max_pixels=60_000))


def test_a_jpeg_of_very_many_scans_is_refused():
    data = encoded(smooth(16, 16), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    decode(data[:-2] + scan * 50 + data[-2:], "some.jpg")
    with pytest.raises(ImageError, match="610 JPEG scans; at most 500 are decoded"):
        decode(data[:-2] + scan * 600 + data[-2:], "many.jpg")


def test_slow_variants_have_a_cap_of_their_own(monkeypatch):
    monkeypatch.setattr(images, "_MAX_PYTHON_SAMPLES", 11)
    assert decode(b"P6 2 2 255\n" + bytes(12), "fast.ppm").shape == (2, 2, 3)
    for data in (b"P6 2 2 99\n" + bytes(12), b"P3 2 2 255\n" + b"1 " * 12):
        with pytest.raises(ImageError, match="12 samples in a slow variant of PPM"):
            decode(data, "slow.ppm")


# JPEG: orientation, reduced scale, the fast path.

INVERSE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def oriented(upright, orientation, kind, **options):
    method = INVERSE[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = upright if method is None else upright.transpose(method)
    return encoded(stored, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", INVERSE)
def test_all_orientations_are_the_upright_picture(orientation):
    upright = smooth(40, 64)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = oriented(upright, orientation, kind, **options)
        np.testing.assert_array_equal(decode(data, kind), np.array(upright))
    jpeg = decode(oriented(upright, orientation, "JPEG", quality=95, subsampling=0), "jpeg")
    assert jpeg.shape == (40, 64, 3)
    assert np.abs(jpeg.astype(int) - np.array(upright)).mean() < 1.3


def test_the_reserve_minds_sides_that_are_swapped():
    upright = smooth(200, 800)
    for orientation in INVERSE:
        data = oriented(upright, orientation, "JPEG")
        assert decode(data, "", target=(50, 50)).shape == (100, 400, 3)
        assert decode(data, "", target=(20, 100)).shape == (50, 200, 3)
        assert decode(data, "", target=(100, 20)).shape == (200, 800, 3)


@given(*[st.integers(1, 300)] * 2, *[st.integers(1, 80)] * 2)
def test_a_jpeg_is_reduced_as_far_as_the_reserve_of_two_allows(height, width, tall, wide):
    data = encoded(Image.new("L", (width, height)), "JPEG")
    shape = decode(data, "", target=(tall, wide)).shape[:2]
    scale = max(
        s for s in (1, 2, 4, 8) if s == 1 or (height >= 2 * s * tall and width >= 2 * s * wide)
    )
    assert shape == (-(-height // scale), -(-width // scale))


JPEG_KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True, "quality": 30},
    "restarts": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("kind", [*JPEG_KINDS, "grey", "rgb"])
@pytest.mark.parametrize("shape", [(37, 53), (64, 48), (1, 1), (3, 200)])
def test_the_fast_path_has_pillows_pixels(kind, shape, monkeypatch):
    image = smooth(*shape).convert("L") if kind == "grey" else smooth(*shape)
    options = {"keep_rgb": True} if kind == "rgb" else JPEG_KINDS.get(kind, {})
    data = encoded(image, "JPEG", **options)
    expected = by_pillow(data)
    original, fast = simplejpeg.decode_jpeg, []

    def spy(*arguments):
        fast.append(original(*arguments))
        return fast[-1]

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    np.testing.assert_array_equal(decode(data, kind), expected)
    assert len(fast) == 1


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_reduced_pixels_are_those_of_pillows_draft(kind, scale):
    data = encoded(smooth(161, 243), "JPEG", **JPEG_KINDS[kind])
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (243 // scale, 161 // scale))
        expected = np.asarray(image.convert("RGB"))
    target = (161 // (2 * scale), 243 // (2 * scale))
    np.testing.assert_array_equal(decode(data, kind, target=target), expected)
    enlarged = np.asarray(Image.fromarray(expected).resize((243, 161), Image.Resampling.BICUBIC))
    assert np.abs(enlarged - np.array(smooth(161, 243), int)).mean() < 8 * scale


def test_where_simplejpeg_refuses_pillow_decides():
    num_decided = 0
    for at in range(FILES["JPEG"].index(b"\xff\xda") + 20, len(FILES["JPEG"]) - 4, 5):
        data = bytearray(FILES["JPEG"])
        data[at] ^= 0x15
        try:
            simplejpeg.decode_jpeg(bytes(data), "RGB")
        except ValueError:
            try:
                expected = by_pillow(bytes(data))
            except OSError:
                with pytest.raises(ImageError):
                    decode(bytes(data), "flipped.jpg")
                continue
            np.testing.assert_array_equal(decode(bytes(data), "flipped.jpg"), expected)
            num_decided += 1
    assert num_decided > 10


def test_verdicts_on_cut_jpegs_are_those_of_pillow():
    data = encoded(smooth(24, 24), "JPEG", progressive=True, quality=70)
    for end in range(0, len(data), 7):
        try:
            by_pillow(data[:end])
            is_good = True
        except (OSError, SyntaxError):
            is_good = False
        if is_good:
            np.testing.assert_array_equal(decode(data[:end], ""), by_pillow(data[:end]))
        else:
            with pytest.raises(ImageError):
                decode(data[:end], "")


# Warnings and other state of the process.


def warned_exif():
    """Return a JPEG whose EXIF promises more than it has: Pillow warns and goes on."""
    entry = struct.pack("<HHII", 0x010F, 2, 5000, 26)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4) + b"short"
    return encoded(smooth(8, 8), "JPEG", exif=exif)


def test_pillows_warnings_stay_inside():
    data = warned_exif()
    with pytest.warns(UserWarning, match="Skipping tag"), Image.open(io.BytesIO(data)) as image:
        image.load()
    assert decode(data, "odd.jpg").shape == (8, 8, 3)  # a warning here would be an error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(data, "odd.jpg")
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["mine"]


def test_threads_keep_their_warnings():
    data = warned_exif()
    filters = list(warnings.filters)
    stop = threading.Event()

    def warn_all_the_time():
        count = 0
        while not stop.is_set():
            with pytest.raises(UserWarning, match="mine"):
                warnings.warn("mine", UserWarning, stacklevel=1)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        mine = pool.submit(warn_all_the_time)
        pictures = list(pool.map(lambda i: decode(data, str(i)), range(300)))
        stop.set()
        assert mine.result() > 0
    assert {picture.shape for picture in pictures} == {(8, 8, 3)}
    assert [f for f in warnings.filters if f[2] is not images._AnyWarning] == [
        f for f in filters if f[2] is not images._AnyWarning
    ]


def test_the_processes_own_pixel_cap_is_neither_used_nor_changed(monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for kind, data in FILES.items():
        if kind not in {"TIFF", "WEBP"}:  # there Pillow itself applies it, to tiles and canvas
            prepare(data, kind, Geometry((8, 8), "crop"))
    assert Image.MAX_IMAGE_PIXELS == 10


# Fuzzing.

SEEDS = [data for name, data in reference_pictures().items() if name != "large.jpg"]
SEEDS += [warned_exif(), *FILES.values()]


@st.composite
def damaged_files(draw):
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        near = min(at, draw(st.sampled_from([at, 40])))  # headers matter most
        kind = draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
        if kind == "flip" and near < len(data):
            data[near] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[max(at, 8) :]
        elif kind == "insert":
            data[near:near] = draw(st.binary(max_size=8))
        else:
            del data[near : near + draw(st.integers(1, 8))]
    return bytes(data)


@settings(max_examples=500)
@given(damaged_files())
def test_damaged_files_give_a_picture_or_an_error(data):
    try:
        pixels = decode(data, "fuzz", limits=Limits(max_pixels=1_000_000))
    except ImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


@given(st.binary(max_size=64), st.sampled_from([b"", *(data[:30] for data in SEEDS)]))
def test_bytes_of_any_kind_give_a_picture_or_an_error(tail, head):
    try:
        pixels = decode(head + tail, "fuzz", limits=Limits(max_pixels=1_000_000))
    except ImageError:
        return
    assert pixels.size > 0
