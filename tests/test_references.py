"""The generated pictures that travel in a model file."""

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from kenspeckle.core import Geometry
from kenspeckle.images import decode, prepare
from kenspeckle.references import reference_pictures

PICTURES = reference_pictures()


def test_there_are_enough_and_they_are_small():
    assert len(PICTURES) >= 16
    assert sum(len(data) for data in PICTURES.values()) <= 200_000
    assert len(set(PICTURES.values())) == len(PICTURES)


def test_every_process_draws_the_same_bytes():
    script = (
        "import hashlib; from kenspeckle.references import reference_pictures; "
        "print(hashlib.sha256(repr(reference_pictures()).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert run.stdout.strip() == hashlib.sha256(repr(PICTURES).encode()).hexdigest()


def test_modes_formats_and_sizes_are_odd():
    modes, formats, sizes = set(), set(), set()
    for data in PICTURES.values():
        with Image.open(io.BytesIO(data)) as image:
            modes.add(image.mode)
            formats.add(image.format)
            sizes.add(image.size)
    assert modes >= {"1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"}
    assert formats == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"}
    assert sizes >= {(1, 1), (50, 1), (3, 200)}


def test_special_roads_are_taken():
    assert decode(PICTURES["rotated.jpg"], "").shape == (100, 60, 3)
    assert decode(PICTURES["large.jpg"], "", target=(224, 224)).shape == (460, 500, 3)
    with Image.open(io.BytesIO(PICTURES["progressive.jpg"])) as image:
        assert "progressive" in image.info
    for name in ("palette-transparent.png", "grey-alpha.png", "rgba.png", "lossless.webp"):
        white = decode(PICTURES[name], name)
        assert (white != decode(PICTURES[name], name, background=(0, 0, 0))).any()


@pytest.mark.parametrize("name", [n for n in PICTURES if n != "one-pixel.png"])
def test_every_picture_shows_something(name):
    pixels = prepare(PICTURES[name], name, Geometry((64, 64)))
    assert pixels.std() > 10


def test_pictures_differ_from_one_another():
    small = {n: prepare(d, n, Geometry((16, 16))).astype(float) for n, d in PICTURES.items()}
    names = list(small)
    gaps = [np.abs(small[a] - small[b]).mean() for i, a in enumerate(names) for b in names[i + 1 :]]
    assert min(gaps) > 10
