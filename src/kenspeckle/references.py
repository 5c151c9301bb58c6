"""Generated pictures of odd sizes and modes, by which a model file proves its preprocessing.

A model file carries them with the outputs expected for them. Whoever replays them goes through
decoding, alpha, orientation, depth and geometry, and not through the network alone. They are drawn
here, so nobody's data travels in a model file. Smooth colours with a few shapes, and not noise, so
that a network's answers differ from picture to picture.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from kenspeckle.core import Pixels

__all__ = ["reference_pictures"]

_SEED = 20260101


def reference_pictures() -> dict[str, bytes]:
    """Return file names and encoded pictures, the same on every run with the same Pillow.

    Example:
        >>> sorted(reference_pictures())[0]
        'bitonal.png'
    """
    return {
        "rgb.png": _file(_picture(0, 96, 128), "PNG"),
        "grey.png": _file(_picture(1, 75, 50).convert("L"), "PNG"),
        "bitonal.png": _file(_picture(2, 61, 67).convert("1"), "PNG"),
        "palette.png": _file(_picture(3, 48, 64).quantize(32), "PNG"),
        "palette-transparent.png": _file(_picture(4, 40, 56).quantize(16), "PNG", transparency=3),
        "grey-alpha.png": _file(_with_alpha(5, 45, 33).convert("LA"), "PNG"),
        "rgba.png": _file(_with_alpha(6, 64, 64), "PNG"),
        "grey-16.png": _file(_grey_16(7, 52, 44), "PNG"),
        "cmyk.jpg": _file(_picture(8, 50, 70).convert("CMYK"), "JPEG", quality=90),
        "rotated.jpg": _file(_picture(9, 60, 100), "JPEG", quality=90, exif=_orientation(6)),
        "progressive.jpg": _file(_picture(10, 130, 90), "JPEG", quality=85, progressive=True),
        "grey.jpg": _file(_picture(11, 33, 47).convert("L"), "JPEG", quality=80),
        "large.jpg": _file(_picture(12, 920, 1000), "JPEG", quality=60),
        "lossless.webp": _file(_with_alpha(13, 42, 58), "WEBP", lossless=True),
        "palette.gif": _file(_picture(14, 36, 52).quantize(32), "GIF"),
        "rgb.bmp": _file(_picture(15, 31, 37), "BMP"),
        "rgb.tiff": _file(_picture(16, 39, 41), "TIFF"),
        "rgb.ppm": _file(_picture(17, 29, 23), "PPM"),
        "grey.pgm": _file(_picture(18, 27, 45).convert("L"), "PPM"),
        "one-pixel.png": _file(_picture(19, 1, 1), "PNG"),
        "row.png": _file(_picture(20, 1, 50), "PNG"),
        "column.png": _file(_picture(21, 200, 3), "PNG"),
    }


def _scene(index: int, height: int, width: int) -> NDArray[np.float64]:
    """Return levels 0 to 1, ``(height, width, 3)``: two colours that fade, an ellipse, a box."""
    rng = np.random.default_rng([_SEED, index])
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    angle, cycles = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.5)
    share = 0.5 + 0.5 * np.sin(cycles * np.pi * (x * np.cos(angle) + y * np.sin(angle)))
    first, second, third, fourth = rng.uniform(0, 1, (4, 3))
    scene: NDArray[np.float64] = first + share[..., None] * (second - first)
    (top, left), (tall, wide) = rng.uniform(-0.8, 0.2, 2), rng.uniform(0.3, 0.6, 2)
    scene[(abs(y - top) < tall) & (abs(x - left) < wide)] = third
    (centre_y, centre_x), (radius_y, radius_x) = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.2, 0.6, 2)
    scene[((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 < 1] = fourth
    return scene


def _picture(index: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.rint(_scene(index, height, width) * 255).astype(np.uint8))


def _with_alpha(index: int, height: int, width: int) -> Image.Image:
    """Return RGBA that fades to nothing from left to right; its hidden colours stay."""
    alpha = np.linspace(255, 0, width).round().astype(np.uint8)
    rgb: Pixels = np.asarray(_picture(index, height, width))
    return Image.fromarray(np.dstack([rgb, np.broadcast_to(alpha, (height, width))]))


def _grey_16(index: int, height: int, width: int) -> Image.Image:
    grey = _scene(index, height, width).mean(axis=2)
    return Image.fromarray(np.rint(grey * 65535).astype(np.uint16))


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:  # noqa: ANN401 - of Pillow
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
