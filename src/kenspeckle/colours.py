"""Pictures of any mode to RGB: alpha, palettes, CMYK, and more than eight bits.

* Transparent pixels show a stated background, not the colour that happens to lie under them.
* Colour profiles (ICC) are ignored, everywhere alike.
* Integers of b > 8 bits become their high byte, as libpng and Pillow reduce 16-bit colour, so a
  picture has the same pixels as 16-bit grey and as 16-bit RGB. (Pillow alone clips 16-bit grey at
  255 and turns it white.)
* Floats from 0 to 1 are multiplied by 255 and rounded.
* Other floats, and 32-bit integers of TIFF, have no white level in their format. Any fixed one
  would turn some data sets all black or all white, so the lowest finite value of the picture
  becomes black and its highest white; infinities become black and white, and nan and a constant
  picture black.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from kenspeckle.core import ImageError, Pixels

__all__ = ["WHITE", "Colour", "from_array", "image_to_rgb"]

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255 each."""

WHITE: Colour = (255, 255, 255)

_STRIP_PIXELS = 1 << 20  # the work is done on strips, so it adds 4 MB and not a second picture


def image_to_rgb(image: Image.Image, background: Colour) -> Pixels:
    """Return the pixels of a Pillow picture of any mode, ``uint8 (H, W, 3)``.

    Raises what Pillow raises for a damaged file, if the picture is not loaded yet.

    Example:
        >>> image_to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), WHITE).tolist()
        [[[255, 255, 255]]]
    """
    image.load()
    is_deep = image.mode in {"I", "F"} or image.mode.startswith("I;16")
    convert = _deep_grey(image, background) if is_deep else _flat(background)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, strip in _strips(image):
        pixels[rows] = convert(strip)
    return pixels


def from_array(array: NDArray[Any], name: str, background: Colour = WHITE) -> Pixels:
    """Return the RGB pixels of an array, by the same rules as those of a file.

    Args:
        array: ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)`` or ``(H, W, 4)``, the last with alpha;
            uint8, uint16, bool, or floats from 0 to 1.
        name: the picture's name, for errors.
        background: under transparent pixels.

    Returns:
        ``uint8 (H, W, 3)``, an array of its own.

    Raises:
        ImageError: another shape or type, or a float that is not from 0 to 1.

    Example:
        >>> from_array(np.array([[0, 0x80FF]], np.uint16), "grey").tolist()
        [[[0, 0, 0], [128, 128, 128]]]
    """
    samples = array[..., None] if array.ndim == 2 else array
    if samples.ndim != 3 or samples.shape[2] not in {1, 3, 4} or 0 in samples.shape:
        raise ImageError(
            name,
            "an array must be (height, width) or (height, width, 1, 3 or 4) and not empty; "
            f"got {array.shape}",
        )
    levels = _levels(samples, name)
    if levels.shape[2] == 4:
        return np.array(_over(Image.fromarray(levels), background))
    return np.array(np.broadcast_to(levels, (*levels.shape[:2], 3)), order="C")


def _levels(samples: NDArray[Any], name: str) -> Pixels:
    levels: NDArray[Any]
    if samples.dtype == np.uint8:
        levels = samples
    elif samples.dtype == np.uint16:
        levels = samples >> 8
    elif samples.dtype == np.bool_:
        levels = samples * np.uint8(255)
    elif samples.dtype.kind == "f":
        low, high = float(samples.min()), float(samples.max())
        if not (low >= 0 and high <= 1):  # so written, nan is refused
            raise ImageError(name, f"floats must lie from 0 to 1; got {low:g} to {high:g}")
        levels = np.rint(samples * 255)
    else:
        raise ImageError(
            name, f"an array must be uint8, uint16, bool or float; got {samples.dtype}"
        )
    return levels.astype(np.uint8)


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    num_rows = max(1, _STRIP_PIXELS // image.width)
    if num_rows >= image.height:
        yield slice(None), image
        return
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _flat(background: Colour) -> Callable[[Image.Image], NDArray[Any]]:
    """Return what converts a strip of eight bits or fewer."""

    def convert(strip: Image.Image) -> NDArray[Any]:
        if strip.has_transparency_data:
            straight = strip.convert("LA") if strip.mode == "La" else strip
            return np.asarray(_over(straight.convert("RGBA"), background))
        return np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))

    return convert


def _over(image: Image.Image, background: Colour) -> Image.Image:
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image)
    return canvas


def _deep_grey(image: Image.Image, background: Colour) -> Callable[[Image.Image], NDArray[Any]]:
    """Return what converts a strip of this picture of more than eight bits of grey."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    is_negative = tags.get(ExifTags.Base.PhotometricInterpretation) == 0  # zero is white
    has_white = image.mode.startswith("I;16") or (
        image.mode == "I" and isinstance(image, PpmImageFile)  # scaled to 65535 by Pillow
    )
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    low, high = (0.0, 1.0) if has_white else _extremes(image)
    key = image.info.get("transparency")

    def convert(strip: Image.Image) -> NDArray[Any]:
        values = np.asarray(strip)
        grey = np.right_shift(values, bits - 8) if has_white else _stretch(values, low, high)
        pixels = np.repeat((255 - grey if is_negative else grey)[..., None], 3, axis=2)
        if isinstance(key, int):
            pixels[values == key] = background
        return pixels

    return convert


def _extremes(image: Image.Image) -> tuple[float, float]:
    """Return the values that become black and white where the format sets none."""
    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        values = np.asarray(strip)
        finite = values[np.isfinite(values)].astype(np.float64)
        low = finite.min(initial=low)
        high = finite.max(initial=high)
    is_share = image.mode == "F" and low >= 0 and high <= 1
    return (0.0, 1.0) if is_share or low > high else (float(low), float(high))


def _stretch(values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    finite = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    levels: NDArray[Any] = np.rint((finite - low) * (255 / ((high - low) or 1.0)))
    return levels.astype(np.uint8)
