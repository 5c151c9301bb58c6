"""Pictures of any mode to RGB: depth, alpha, palettes, arrays."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from kenspeckle import colours
from kenspeckle.colours import WHITE, from_array, image_to_rgb
from kenspeckle.core import ImageError
from kenspeckle.images import decode

GREEN = (0, 200, 0)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(samples, bits, colour, *extra):
    """Return a PNG file of rows of packed samples; Pillow writes neither 2 bits nor 16-bit RGB."""
    height, width = samples.shape[:2]
    rows = b"".join(
        b"\0" + np.packbits(unpacked(row, bits)).tobytes() for row in samples.reshape(height, -1)
    )
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def unpacked(values, bits):
    return (values[:, None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1


def tiff(samples, bits, photometric=1, sample_format=1):
    """Return a little-endian TIFF file of one strip of packed grey samples."""
    height, width = samples.shape
    if bits == 12:
        body = b"".join(np.packbits(unpacked(row, 12)).tobytes() for row in samples)
    else:
        body = samples.tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(body)), (339, sample_format)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<I", 8 + len(body))
    return b"II*\0" + start + body + struct.pack("<H", len(tags)) + directory + bytes(4)


@pytest.fixture
def ramp():
    return np.arange(256, dtype=np.uint16).reshape(8, 32)


# More than eight bits.


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_16_bit_grey_picture_equals_its_8_bit_twin(ramp, kind):
    deep = decode(encoded(Image.fromarray(ramp * 257), kind), "deep")
    np.testing.assert_array_equal(
        deep, decode(encoded(Image.fromarray(ramp.astype("u1")), kind), "")
    )
    assert 127 <= deep.mean() <= 128


@given(arrays.arrays(np.uint16, (3, 5)))
def test_16_bit_grey_and_16_bit_colour_have_the_same_pixels(values):
    grey = decode(encoded(Image.fromarray(values), "PNG"), "grey")
    colour = decode(png(np.repeat(values[..., None], 3, axis=2), 16, 2), "colour")
    np.testing.assert_array_equal(grey, colour)
    np.testing.assert_array_equal(grey[..., 0], np.floor(values / 256))
    np.testing.assert_array_equal(from_array(values, "array"), grey)


def test_big_endian_tiff(ramp):
    image = Image.frombytes("I;16B", (32, 8), (ramp * 256).astype(">u2").tobytes())
    pixels = decode(encoded(image, "TIFF"), "big.tif")
    np.testing.assert_array_equal(pixels[..., 0], ramp)


def test_a_12_bit_tiff_uses_its_own_white(ramp):
    pixels = decode(tiff(ramp * 16 + 15, 12), "12.tif")
    np.testing.assert_array_equal(pixels[..., 0], ramp)


def test_a_tiff_in_which_zero_is_white_is_turned_over(ramp):
    pixels = decode(tiff(ramp * 257, 16, photometric=0), "negative.tif")
    np.testing.assert_array_equal(pixels[..., 0], 255 - ramp)


@pytest.mark.parametrize("maxval", [511, 1023, 4095, 65535])
def test_netpbm_uses_its_own_white(maxval):
    samples = np.array([0, maxval // 2, maxval], ">u2")
    pixels = decode(b"P5 3 1 %d\n" % maxval + samples.tobytes(), "deep.pgm")
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 127, 255])


@pytest.mark.parametrize("scale", [1, 100, 2**22])
def test_32_bit_integers_are_stretched_over_their_own_range(ramp, scale):
    values = ramp.astype(np.int32) * scale - 5
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), "int.tif")
    np.testing.assert_array_equal(pixels[..., 0], ramp)


def test_floats_from_0_to_1_are_multiplied_by_255(ramp):
    values = (ramp / 255).astype(np.float32) / 2
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), "float.tif")
    np.testing.assert_array_equal(pixels[..., 0], np.rint(values * np.float64(255)))
    assert pixels.max() < 129  # not stretched


def test_other_floats_are_stretched_over_their_own_range(ramp):
    values = ramp.astype(np.float32) * 7 - 300
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), "float.tif")
    np.testing.assert_array_equal(pixels[..., 0], ramp)


def test_nan_is_black_and_infinities_are_black_and_white():
    values = np.array([[np.nan, -np.inf, np.inf, -3, 0, 3]], np.float32)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), "odd.tif")
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 255, 0, 128, 255])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, 7e30, -2])
def test_a_constant_float_picture_has_one_level(value):
    values = np.full((2, 2), value, np.float32)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), "flat.tif")
    np.testing.assert_array_equal(pixels, 255 if value == np.inf else 0)


@given(
    arrays.arrays(
        np.float32, (2, 3), elements=st.floats(allow_nan=True, allow_infinity=True, width=32)
    )
)
def test_any_floats_give_levels_in_their_order(values):
    pixels = image_to_rgb(Image.fromarray(values), WHITE)[..., 0].astype(int)
    numbers = np.isfinite(values)
    order = np.argsort(values[numbers])
    assert (np.diff(pixels[numbers][order]) >= 0).all()


# Alpha.


def transparent_red():
    """Return files of a transparent red or bright pixel at the left, an opaque one at the right."""
    rgba = Image.fromarray(np.array([[(255, 0, 0, 0), (10, 20, 30, 255)]], np.uint8))
    grey = Image.fromarray(np.array([[(90, 0), (60, 255)]], np.uint8), "LA")
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 10, 20, 30])
    return {
        "rgba.png": encoded(rgba, "PNG"),
        "rgba.webp": encoded(rgba, "WEBP", lossless=True, exact=True),
        "rgba.tiff": encoded(rgba, "TIFF"),
        "la.png": encoded(grey, "PNG"),
        "la.tiff": encoded(grey, "TIFF"),
        "index.png": encoded(palette, "PNG", transparency=0),
        "index.gif": encoded(palette, "GIF", transparency=0),
        "table.png": encoded(palette, "PNG", transparency=bytes([0, 255])),
        "key-rgb.png": encoded(rgba.convert("RGB"), "PNG", transparency=(255, 0, 0)),
        "key-grey.png": encoded(grey.convert("L"), "PNG", transparency=90),
        "key-bit.png": png(np.array([[1, 0]]), 1, 0, (b"tRNS", b"\0\1")),
        "key-2.png": png(np.array([[2, 1]]), 2, 0, (b"tRNS", b"\0\2")),
        "key-4.png": png(np.array([[9, 4]]), 4, 0, (b"tRNS", b"\0\x09")),
        "key-16.png": png(np.array([[700, 9000]]), 16, 0, (b"tRNS", struct.pack(">H", 700))),
        "key-rgb-16.png": png(
            np.array([[(60000, 500, 0), (2570, 5140, 7710)]]),
            16,
            2,
            (b"tRNS", struct.pack(">HHH", 60000, 500, 0)),
        ),
    }


@pytest.mark.parametrize("name", transparent_red())
@pytest.mark.parametrize("background", [WHITE, GREEN])
def test_transparent_pixels_show_the_background(name, background):
    left, right = decode(transparent_red()[name], name, background=background)[0]
    np.testing.assert_array_equal(left, background)
    assert max(right) < 90
    assert tuple(right) != background


def test_a_grey_picture_keeps_grey_beside_a_transparent_level():
    data = png(np.array([[9, 4, 15]]), 4, 0, (b"tRNS", b"\0\x09"))
    pixels = decode(data, "key.png", background=GREEN)
    np.testing.assert_array_equal(pixels[0, 1:, 0], [4 * 17, 255])


@given(arrays.arrays(np.uint8, (3, 4, 4)), st.tuples(*[st.integers(0, 255)] * 3))
def test_half_transparent_pixels_are_mixed_in_proportion(rgba, background):
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + np.array(background) * (1 - share)
    pixels = image_to_rgb(Image.fromarray(rgba), background)
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(from_array(rgba, "array", background), pixels)


# The other modes.


@pytest.mark.parametrize(
    ("mode", "value", "rgb"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", (77, 128, 128), (77, 77, 77)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("I;16", 0x8000, (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(mode, value, rgb):
    pixels = image_to_rgb(Image.new(mode, (3, 2), value), WHITE)
    assert pixels.shape == (2, 3, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels[1, 2].astype(int) - rgb).max() <= 2  # LAB is a matter of rounding


def test_premultiplied_grey():
    image = Image.new("LA", (1, 1), (100, 0)).convert("La")
    np.testing.assert_array_equal(image_to_rgb(image, GREEN), [[GREEN]])


def test_a_palette_with_alpha_of_its_own():
    image = Image.new("P", (1, 1), 0)
    image.putpalette([255, 0, 0, 0], "RGBA")
    np.testing.assert_array_equal(image_to_rgb(image, GREEN), [[GREEN]])


def test_pixels_can_be_written_to():
    for mode in ("RGB", "RGBA", "I;16", "P"):
        assert image_to_rgb(Image.new(mode, (2, 2)), WHITE).flags.writeable


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F"])
def test_strips_join_without_a_seam(mode, monkeypatch):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 7, 3), np.uint8))
    image = (
        rgb.convert("L").convert(mode) if mode in {"LA", "I;16", "I", "F"} else rgb.convert(mode)
    )
    if mode == "P":
        image.info["transparency"] = 3
    whole = image_to_rgb(image, GREEN)
    monkeypatch.setattr(colours, "_STRIP_PIXELS", 7 * 5)
    np.testing.assert_array_equal(image_to_rgb(image, GREEN), whole)


# Arrays.


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1)])
def test_grey_arrays(shape):
    values = np.arange(20, dtype=np.uint8).reshape(shape)
    pixels = from_array(values, "grey")
    np.testing.assert_array_equal(pixels, np.dstack([values.reshape(4, 5)] * 3))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def test_a_colour_array_is_copied():
    values = np.zeros((2, 2, 3), np.uint8)
    from_array(values, "copy")[:] = 1
    assert values.max() == 0


def test_other_array_types():
    np.testing.assert_array_equal(from_array(np.array([[True, False]]), "")[0, :, 0], [255, 0])
    for kind in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(
            from_array(np.array([[0, 0.5, 1]], kind), "")[0, :, 0], [0, 128, 255]
        )
    every_level = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(
        from_array((every_level / 255).astype(np.float32), "")[..., 0], every_level
    )


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(3, np.uint8), r"an array must be .*; got \(3,\)"),
        (np.zeros((2, 2, 2), np.uint8), r"got \(2, 2, 2\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"got \(1, 2, 2, 3\)"),
        (np.zeros((0, 2), np.uint8), r"not empty; got \(0, 2\)"),
        (np.zeros((2, 2), np.int64), "uint8, uint16, bool or float; got int64"),
        (np.zeros((2, 2), np.complex64), "got complex64"),
        (np.zeros((2, 2), object), "got object"),
        (np.full((2, 2), 255.0), "floats must lie from 0 to 1; got 255 to 255"),
        (np.array([[0, np.nan]]), "floats must lie from 0 to 1; got nan"),
        (np.array([[-0.1, 0.5]]), "got -0.1 to 0.5"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array, reason):
    with pytest.raises(ImageError, match=f"^thing: .*{reason}"):
        from_array(array, "thing")
