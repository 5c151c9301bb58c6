"""Bytes to RGB pixels of the network's size: the one road that every picture takes.

    bytes -> decode -> uint8 (H, W, 3) -> fit -> uint8 (height, width, 3)

Training, prediction, evaluation and serving all call `prepare`, so they see the same pixels.

Formats are told by content, never by file name; of several frames or pages the first is taken;
EXIF orientation is applied; `kenspeckle.colours` says what becomes of modes other than RGB.
Every size is read from the header and checked before memory is taken for it. Pillow decides what
can be decoded; only `ImageError` leaves this module for bytes of any kind.
"""

import contextlib
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from kenspeckle.colours import WHITE, Colour, from_array, image_to_rgb
from kenspeckle.core import Geometry, ImageError, Pixels

__all__ = [
    "DAMAGE",
    "DECODER_VERSION",
    "FORMATS",
    "Limits",
    "decode",
    "fit",
    "from_array",
    "prepare",
    "thumbnail",
]

DECODER_VERSION = "1"
"""Part of the keys of pixel caches; raised by whatever changes a pixel that leaves this module."""

# The readers are called directly and not through `Image.open`: that would judge the size by the
# process-wide `Image.MAX_IMAGE_PIXELS`, and take a JPEG with several frames (MPO, from phones) to a
# reader of its own, although its first frame is an ordinary JPEG.
_READERS: dict[str, tuple[type[ImageFile], re.Pattern[bytes]]] = {
    "JPEG": (JpegImageFile, re.compile(rb"\xff\xd8\xff")),
    "PNG": (PngImageFile, re.compile(rb"\x89PNG\r\n\x1a\n")),
    "WEBP": (WebPImageFile, re.compile(rb"RIFF.{4}WEBPVP8[ LX]", re.DOTALL)),
    "GIF": (GifImageFile, re.compile(rb"GIF8[79]a")),
    "BMP": (BmpImageFile, re.compile(rb"BM")),
    "TIFF": (TiffImageFile, re.compile(rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0")),
    "PPM": (PpmImageFile, re.compile(rb"P[1-6f]\s")),
}

FORMATS: tuple[str, ...] = tuple(_READERS)
"""The formats that are read, by Pillow's names; PPM stands for all of Netpbm."""

# What people most often take for a picture, for the error's words.
_OTHER_FILES = {
    "a web page (HTML)": re.compile(rb"\s*<(!doctype html|html|head|body)", re.IGNORECASE),
    "an XML or SVG file": re.compile(rb"(\xef\xbb\xbf)?\s*<(\?xml|svg)", re.IGNORECASE),
    "an AVIF picture, which must be converted first": re.compile(rb".{4}ftypavi", re.DOTALL),
    "a HEIC picture, which must be converted first": re.compile(
        rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL
    ),
    "a PDF document": re.compile(rb"%PDF"),
    "a ZIP archive": re.compile(rb"PK\x03\x04"),
    "a text file": re.compile(rb"[\t\n\f\r\x20-\x7e\x80-\xff]+\Z"),
}

DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""All that Pillow 12 and 13 were seen or read to raise for damaged files; not Warning."""

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

_RESERVE = 2  # a JPEG is decoded at no less than this many times the size that is needed
_SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that swap height and width

# libjpeg-turbo's own fuzzers stop here; real progressive files have about ten scans. Without a
# cap a file of 10 MB can hold 10⁵ scans that each walk through the whole picture.
_MAX_SCANS = 500

# Codecs that Pillow runs in Python, at about 0.4 µs a sample: this many take about 5 s.
_PYTHON_CODECS = {"ppm", "ppm_plain", "bmp_rle"}
_MAX_PYTHON_SAMPLES = 12_000_000

# Pillow removes the comments of plain Netpbm one by one, each time copying the rest: a file of 1 MB
# full of them takes 5 s. One pass here has the same result.
_PLAIN_NETPBM = re.compile(rb"P[1-3]\s")
_NETPBM_COMMENT = re.compile(rb"#[^\r\n]*(?:[\r\n]|\Z)")

# From the samples in a PNG file to those of the picture that Pillow makes of them.
_PNG_LEVELS: dict[str, Callable[[int], int]] = {
    "L;2": lambda sample: sample * 85,
    "L;4": lambda sample: sample * 17,
    "RGB;16B": lambda sample: sample >> 8,
}

# The longest side of a JPEG. The work of a resize grows with the longest side too, not with the
# pixels alone: 25,000,000 x 1 would take 500 MB.
_MAX_SIDE = 65_535

_MAX_RESIZED = 16_000_000  # pixels of the resized picture before the centre is cut out, 64 MB


@dataclass(frozen=True)
class Limits:
    """What is refused before it is decoded.

    Attributes:
        max_bytes: size of the file.
        max_pixels: height times width of what is decoded. 25 million take about 200 MB while they
            are decoded, as WebP 400 MB.
        max_pixels_reduced: height times width of a JPEG that is decoded row by row (one scan, not
            progressive) at a reduced scale, which takes the memory of the reduced picture alone.
    """

    max_bytes: int = 100_000_000
    max_pixels: int = 25_000_000
    max_pixels_reduced: int = 89_000_000


_LIMITS = Limits()


def prepare(
    source: bytes | NDArray[Any], name: str, geometry: Geometry, limits: Limits = _LIMITS
) -> Pixels:
    """Return the picture as the network sees it.

    Args:
        source: an encoded file, or an array as `from_array` takes it.
        name: the picture's name, for errors.
        geometry: size, fit, interpolation and background.
        limits: what is refused.

    Returns:
        ``uint8 (height, width, 3)`` of ``geometry.size``.

    Raises:
        ImageError: the source is no picture, is damaged or exceeds a limit.
    """
    if isinstance(source, bytes):
        picture = decode(
            source, name, target=geometry.size, background=geometry.background, limits=limits
        )
    else:
        picture = from_array(source, name, geometry.background)
    return fit(picture, geometry)


def decode(
    data: bytes,
    name: str,
    *,
    target: tuple[int, int] | None = None,
    background: Colour = WHITE,
    limits: Limits = _LIMITS,
    seen: Callable[[ImageFile], object] | None = None,
) -> Pixels:
    """Return the upright RGB pixels of an encoded picture.

    Args:
        data: the whole file.
        name: the picture's name, for errors.
        target: ``(height, width)`` that the picture will be resized to. A JPEG is then decoded at
            1/2, 1/4 or 1/8 of its size where both sides stay at least twice as long as these.
        background: RGB, 0 to 255 each, under transparent pixels.
        limits: what is refused.
        seen: is given the opened file once the pixels are known, for what else it says of itself.

    Returns:
        ``uint8 (H, W, 3)``.

    Raises:
        ImageError: not a picture in one of `FORMATS`, damaged, cut short, or beyond a limit.

    Example:
        >>> decode(b"P5 2 1 255 " + bytes([0, 200]), "two.pgm").tolist()
        [[[0, 0, 0], [200, 200, 200]]]
    """
    if not data:
        raise ImageError(name, "empty file")
    if len(data) > limits.max_bytes:
        raise ImageError(name, f"{len(data):,} bytes; at most {limits.max_bytes:,} are decoded")
    with _pillow(name):
        file = _open(data, name)
        full_size = file.size
        _reduce(file, target)
        _check_cost(file, full_size, data, name, limits)
        _scale_transparent_colour(file)
        pixels = _fast_jpeg(file, full_size, data)
        if pixels is None:
            ImageOps.exif_transpose(file, in_place=True)
            pixels = image_to_rgb(file, background)
        if seen is not None:
            seen(file)
        return pixels


def fit(picture: Pixels, geometry: Geometry) -> Pixels:
    """Return the picture at the size of the geometry.

    Equals torchvision's transforms of a PIL picture: ``squash`` is
    ``Resize((height, width))``; ``crop`` is ``Resize(side)`` and ``CenterCrop(side)``, and where
    the size is not square, the smallest scale that covers both sides.

    Args:
        picture: ``uint8 (H, W, 3)``, of any size.
        geometry: size, fit, interpolation and, for ``pad``, the background.

    Returns:
        ``uint8 (height, width, 3)``; the picture itself where it has that size already.
    """
    if picture.shape[:2] == geometry.size:
        return picture
    return _FITS[geometry.fit](Image.fromarray(picture), geometry)


def thumbnail(picture: Pixels, side: int) -> bytes:
    """Return the picture as a small file for a report.

    Args:
        picture: ``uint8 (H, W, 3)``.
        side: length of the longest side in pixels; a smaller picture is not enlarged.

    Returns:
        A JPEG file, or a PNG file where it has at most 64 x 64 pixels: they are shown enlarged, and
        JPEG's blocks would be seen.
    """
    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    file = io.BytesIO()
    if image.width * image.height <= 64 * 64:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=85)
    return file.getvalue()


# Errors and warnings.


class _Decoding(threading.local):
    active = False


_decoding = _Decoding()


class _WhileDecoding(type):
    def __subclasscheck__(cls, category: type) -> bool:
        return _decoding.active


class _AnyWarning(Warning, metaclass=_WhileDecoding):
    """To a warning filter, the base of all warnings that come while this thread decodes."""


@contextlib.contextmanager
def _pillow(name: str) -> Iterator[None]:
    """Turn Pillow's errors into `ImageError`, and keep its warnings to ourselves.

    `warnings.catch_warnings` swaps a list that all threads share, so two threads that leave it in
    the wrong order lose the user's filters for good. Instead one filter is put in front and stays,
    which stops nothing but the warnings of a thread that is decoding here.
    """
    filters = warnings.filters
    if not filters or filters[0][2] is not _AnyWarning:  # someone else's may be in front by now
        warnings.simplefilter("ignore", _AnyWarning)
    _decoding.active = True
    try:
        yield
    except DAMAGE as error:
        raise ImageError(name, _reason(error)) from error
    finally:
        _decoding.active = False


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({words})"
    if isinstance(error, EOFError) or "truncated" in words.lower():
        return f"cut short ({words})"
    return f"damaged or of an unknown variant ({words})"


# From the file to an opened picture of which the header alone has been read.


def _open(data: bytes, name: str) -> ImageFile:
    if _PLAIN_NETPBM.match(data):
        data = _NETPBM_COMMENT.sub(b"", data)
    for reader, signature in _READERS.values():
        if signature.match(data):
            return reader(io.BytesIO(data))
    for words, signature in _OTHER_FILES.items():
        if signature.match(data[:256]):
            raise ImageError(name, f"not a picture but {words}")
    raise ImageError(
        name, f"not a picture in a known format ({', '.join(FORMATS)}); begins with {data[:8]!r}"
    )


def _reduce(file: ImageFile, target: tuple[int, int] | None) -> None:
    if target is None or not isinstance(file, JpegImageFile):
        return
    height, width = target
    if file.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS:
        height, width = width, height
    file.draft(None, (_RESERVE * width, _RESERVE * height))


def _check_cost(
    file: ImageFile, full_size: tuple[int, int], data: bytes, name: str, limits: Limits
) -> None:
    """Refuse what takes too much memory or time; `file.size` is that of the decoded picture."""
    _check_size(file.size, limits.max_pixels, name)
    if not isinstance(file, JpegImageFile):
        _check_codec(file, name)
    elif _is_one_scan(file, data):
        _check_size(full_size, max(limits.max_pixels, limits.max_pixels_reduced), name)
    else:
        _check_size(full_size, limits.max_pixels, name)
        num_scans = data.count(b"\xff\xda")
        if num_scans > _MAX_SCANS:
            raise ImageError(name, f"{num_scans:,} JPEG scans; at most {_MAX_SCANS} are decoded")


def _is_one_scan(file: JpegImageFile, data: bytes) -> bool:
    """Return whether libjpeg decodes row by row: otherwise it holds all coefficients in memory.

    The header was read up to the end of the first start-of-scan segment (ITU-T T.81, B.2.3):
    marker, length 6 + 2 n, number n of components in the scan, and so on. All must be in that scan.
    """
    if file.fp is None or "progressive" in file.info:
        return False
    length = 6 + 2 * file.layers
    start = file.fp.tell() - length - 2
    return data[start : start + 5] == bytes([0xFF, 0xDA, 0, length, file.layers])


def _check_codec(file: ImageFile, name: str) -> None:
    num_samples = file.width * file.height * len(file.getbands())
    if num_samples > _MAX_PYTHON_SAMPLES and {tile[0] for tile in file.tile} & _PYTHON_CODECS:
        raise ImageError(
            name,
            f"{num_samples:,} samples in a slow variant of {file.format}; at most "
            f"{_MAX_PYTHON_SAMPLES:,} are decoded; save it as PNG",
        )


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            name,
            f"too many pixels: {height} x {width} = {width * height:,}; "
            f"at most {max_pixels:,} are decoded",
        )
    if max(size) > _MAX_SIDE:
        raise ImageError(name, f"{height} x {width} pixels; no side may exceed {_MAX_SIDE:,}")


def _fast_jpeg(file: ImageFile, full_size: tuple[int, int], data: bytes) -> Pixels | None:
    """Return the pixels of an upright JPEG at full scale, or None where Pillow must decide.

    simplejpeg has the same pixels and takes half the time for large pictures; at reduced scales
    nothing is gained. It refuses whatever libjpeg as much as warns of.
    """
    if not isinstance(file, JpegImageFile) or file.mode == "CMYK" or file.size != full_size:
        return None
    if file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels if pixels.shape == (file.height, file.width, 3) else None


def _scale_transparent_colour(file: ImageFile) -> None:
    """Bring the transparent colour, which Pillow leaves as it stands in the file, to eight bits."""
    rawmode = file.tile[0][3] if isinstance(file, PngImageFile) and file.tile else None
    scale = _PNG_LEVELS.get(rawmode) if isinstance(rawmode, str) else None
    key = file.info.get("transparency")
    if scale and isinstance(key, tuple):
        file.info["transparency"] = tuple(scale(sample) for sample in key)
    elif scale and isinstance(key, int):
        file.info["transparency"] = scale(key)


# From RGB of any size to the network's size.


def _squash(image: Image.Image, geometry: Geometry) -> Pixels:
    height, width = geometry.size
    return np.array(image.resize((width, height), _FILTERS[geometry.interpolation]))


def _crop(image: Image.Image, geometry: Geometry) -> Pixels:
    height, width = geometry.size
    if height * image.width >= width * image.height:
        full_height, full_width = height, height * image.width // image.height
    else:
        full_height, full_width = width * image.height // image.width, width
    kernel = _FILTERS[geometry.interpolation]
    top, left = round((full_height - height) / 2), round((full_width - width) / 2)
    if full_height * full_width <= _MAX_RESIZED:
        full = np.asarray(image.resize((full_width, full_height), kernel))
        return full[top : top + height, left : left + width].copy()
    # 1 x 65535 would become 224 x 14,679,840. The same centre is resized alone; it differs in the
    # rounding, and the filter still sees what lies beside it.
    y_scale, x_scale = image.height / full_height, image.width / full_width
    box = (
        left * x_scale,
        top * y_scale,
        min((left + width) * x_scale, image.width),
        min((top + height) * y_scale, image.height),
    )
    return np.array(image.resize((width, height), kernel, box))


def _pad(image: Image.Image, geometry: Geometry) -> Pixels:
    height, width = geometry.size
    if height * image.width <= width * image.height:
        inner_height, inner_width = height, max(1, round(height * image.width / image.height))
    else:
        inner_height, inner_width = max(1, round(width * image.height / image.width)), width
    inner = image.resize((inner_width, inner_height), _FILTERS[geometry.interpolation])
    canvas = Image.new("RGB", (width, height), geometry.background)
    canvas.paste(inner, ((width - inner_width) // 2, (height - inner_height) // 2))
    return np.array(canvas)


_FITS: dict[str, Callable[[Image.Image, Geometry], Pixels]] = {
    "squash": _squash,
    "crop": _crop,
    "pad": _pad,
}
