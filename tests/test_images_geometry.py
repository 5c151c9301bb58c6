"""From RGB of any size to the network's size: squash, crop, pad, thumbnails."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kenspeckle import images
from kenspeckle.core import Geometry, ImageError
from kenspeckle.images import Limits, decode, fit, from_array, prepare, thumbnail


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (7 + c) + y / (11 - c) + c) for c in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def torchvision_crop(image, side, kernel):
    """Resize(side) and CenterCrop(side), as torchvision's functional.py has them."""
    short, long = sorted(image.size)
    scaled = int(side * long / short)
    size = (side, scaled) if image.width <= image.height else (scaled, side)
    image = image.resize(size, kernel)
    top = round((image.height - side) / 2.0)
    left = round((image.width - side) / 2.0)
    return np.asarray(image.crop((left, top, left + side, top + side)))


KERNELS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@given(*[st.integers(1, 120)] * 2, st.integers(1, 64), st.sampled_from(sorted(KERNELS)))
def test_a_square_crop_is_resize_and_center_crop(height, width, side, interpolation):
    picture = noise(height, width)
    expected = torchvision_crop(Image.fromarray(picture), side, KERNELS[interpolation])
    np.testing.assert_array_equal(
        fit(picture, Geometry((side, side), "crop", interpolation)), expected
    )


@given(*[st.integers(1, 90)] * 4, st.sampled_from(sorted(KERNELS)))
def test_a_crop_covers_both_sides_by_the_smallest_scale(height, width, tall, wide, interpolation):
    scale = max(tall / height, wide / width)
    full = np.array([height, width]) * scale
    picture = noise(height, width)
    pixels = fit(picture, Geometry((tall, wide), "crop", interpolation))
    size = [tall if full[0] <= tall + 1e-9 else int(full[0] + 1e-9)]
    size += [wide if full[1] <= wide + 1e-9 else int(full[1] + 1e-9)]
    whole = Image.fromarray(picture).resize((size[1], size[0]), KERNELS[interpolation])
    top, left = round((size[0] - tall) / 2), round((size[1] - wide) / 2)
    np.testing.assert_array_equal(pixels, np.array(whole)[top : top + tall, left : left + wide])


@pytest.mark.parametrize("interpolation", KERNELS)
def test_a_squash_is_resize(interpolation):
    picture = noise(31, 47)
    expected = Image.fromarray(picture).resize((20, 30), KERNELS[interpolation])
    np.testing.assert_array_equal(
        fit(picture, Geometry((30, 20), "squash", interpolation)), np.array(expected)
    )


@given(*[st.integers(1, 90)] * 4)
def test_a_pad_shows_the_whole_picture_in_the_middle(height, width, tall, wide):
    picture = np.full((height, width, 3), 200, np.uint8)
    pixels = fit(picture, Geometry((tall, wide), "pad", background=(1, 2, 3)))
    assert pixels.shape == (tall, wide, 3)
    inside = (pixels == 200).all(axis=2)
    assert (pixels[~inside] == (1, 2, 3)).all()
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    scale = min(tall / height, wide / width)
    assert abs(rows.size - max(1, height * scale)) <= 0.5 + 1e-9
    assert abs(columns.size - max(1, width * scale)) <= 0.5 + 1e-9
    assert 0 <= (tall - 1 - rows[-1]) - rows[0] <= 1
    assert 0 <= (wide - 1 - columns[-1]) - columns[0] <= 1


@pytest.mark.parametrize("kind", ["squash", "crop", "pad"])
def test_a_picture_of_the_right_size_is_left_alone(kind):
    picture = noise(32, 24)
    assert fit(picture, Geometry((32, 24), kind)) is picture


@pytest.mark.parametrize("kind", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (2, 2), (3, 3), (1, 65_535), (65_535, 1)])
@pytest.mark.parametrize("size", [(224, 224), (1, 1), (32, 96)])
def test_degenerate_sizes_have_an_answer(shape, kind, size):
    picture = np.full((*shape, 3), 77, np.uint8)
    pixels = fit(picture, Geometry(size, kind, background=(77, 77, 77)))
    np.testing.assert_array_equal(pixels, np.full((*size, 3), 77))


@pytest.mark.parametrize("interpolation", KERNELS)
@pytest.mark.parametrize("shape", [(40, 4000), (4000, 40), (97, 3001)])
def test_the_crop_of_a_long_picture_is_the_same_but_for_rounding(shape, interpolation, monkeypatch):
    picture = np.array(smooth(*shape))
    geometry = Geometry((64, 64), "crop", interpolation)
    whole = fit(picture, geometry)
    monkeypatch.setattr(images, "_MAX_RESIZED", 0)
    alone = fit(picture, geometry)
    assert np.abs(whole.astype(int) - alone).max() <= 2  # one rounding a pass


def test_the_centre_of_a_very_long_row_is_cut_out():
    picture = np.zeros((1, 65_535, 3), np.uint8)
    picture[0, 32_767] = 255
    pixels = fit(picture, Geometry((224, 224), "crop"))
    assert pixels[:, 112].min() > 250
    np.testing.assert_array_equal(pixels[0], pixels[-1])


def test_arrays_and_files_take_the_same_road():
    picture = noise(50, 70)
    for kind in ("squash", "crop", "pad"):
        geometry = Geometry((32, 48), kind, "bicubic", (9, 9, 9))
        expected = fit(from_array(picture, "array"), geometry)
        np.testing.assert_array_equal(prepare(picture, "array", geometry), expected)
        file = encoded(Image.fromarray(picture), "PNG")
        np.testing.assert_array_equal(prepare(file, "file", geometry), expected)


def test_prepare_hands_on_background_target_and_limits():
    clear = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")
    pixels = prepare(clear, "clear", Geometry((4, 4), background=(0, 9, 0)))
    np.testing.assert_array_equal(pixels, np.full((4, 4, 3), (0, 9, 0)))
    jpeg = encoded(smooth(400, 500), "JPEG")
    limits = Limits(max_pixels=60_000)
    assert prepare(jpeg, "large", Geometry((40, 40)), limits).shape == (40, 40, 3)
    with pytest.raises(ImageError, match="thing: floats must"):
        prepare(np.full((2, 2), 9.0), "thing", Geometry((4, 4)))


def test_the_reduced_road_ends_near_the_full_one():
    jpeg = encoded(smooth(800, 900), "JPEG", quality=95)
    for kind in ("squash", "crop", "pad"):
        geometry = Geometry((64, 64), kind, "bicubic")
        full = fit(decode(jpeg, "full"), geometry)
        assert np.abs(prepare(jpeg, "reduced", geometry).astype(int) - full).mean() < 1.5


# Thumbnails.


@pytest.mark.parametrize(("shape", "size"), [((200, 400), (50, 100)), ((1, 5000), (1, 100))])
def test_thumbnails_keep_the_shape_within_the_side(shape, size):
    data = thumbnail(noise(*shape), 100)
    assert decode(data, "thumbnail").shape[:2] == size
    assert len(data) < 20_000


def test_small_pictures_are_kept_without_loss():
    picture = noise(28, 28)
    np.testing.assert_array_equal(decode(thumbnail(picture, 96), "thumbnail"), picture)


# Beside torchvision.


@pytest.mark.zoo
@pytest.mark.parametrize("interpolation", KERNELS)
@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 333), (224, 224), (30, 200), (1000, 77), (5, 5)]
)
@pytest.mark.parametrize("side", [32, 97, 224])
def test_geometry_equals_torchvision(shape, interpolation, side):
    transforms = pytest.importorskip("torchvision.transforms")
    picture = noise(*shape)
    image = Image.fromarray(picture)
    mode = transforms.InterpolationMode(interpolation)
    crop = transforms.Compose([transforms.Resize(side, mode), transforms.CenterCrop(side)])
    squash = transforms.Resize((side, side // 2), mode)
    for expected, geometry in (
        (crop(image), Geometry((side, side), "crop", interpolation)),
        (squash(image), Geometry((side, side // 2), "squash", interpolation)),
    ):
        difference = np.abs(fit(picture, geometry).astype(int) - np.asarray(expected))
        assert difference.max() <= 1
