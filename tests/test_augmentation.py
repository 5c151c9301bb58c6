import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kenspeckle.augmentation import (
    Stream,
    augment,
    colour,
    cutout,
    mirrored,
    mix,
    reflect,
    resample,
    take,
    uniforms,
    window,
)
from kenspeckle.config import AugmentationConfig

EVERYTHING = AugmentationConfig(
    flip=True, shift=3, zoom=0.3, cutout=4, brightness=0.3, contrast=0.3, saturation=0.3
)
ONE_EACH = {
    "flip": AugmentationConfig(flip=True),
    "shift": AugmentationConfig(shift=3),
    "zoom": AugmentationConfig(zoom=0.5),
    "cutout": AugmentationConfig(cutout=4),
    "brightness": AugmentationConfig(brightness=0.5),
    "contrast": AugmentationConfig(contrast=0.5),
    "saturation": AugmentationConfig(saturation=0.5),
    "everything": EVERYTHING,
}


def pictures(num_images=6, height=10, width=7, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (num_images, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def splitmix64(seed, number):
    """Output of the published generator, in whole numbers of any length."""
    mask = 2**64 - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    items=st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
    stream=st.sampled_from([s for s in Stream if s is not Stream.FLIP]),
)
def test_uniforms_are_the_outputs_of_splitmix64(seed, epoch, items, stream):
    key = int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0])
    wanted = [(splitmix64(key, item) >> 40) / 2**24 for item in items]
    found = uniforms(seed, epoch, torch.tensor(items))
    assert found.dtype == torch.float32
    assert_array_equal(found[stream].numpy(), wanted)


def test_the_reference_is_the_published_generator():
    # First outputs for seed 1234567, as listed at https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    assert [splitmix64(1234567, number) for number in range(2)] == [
        6457827717110365317,
        3203168211198807973,
    ]


def test_uniforms_fill_the_unit_interval_evenly_and_without_correlation():
    chances = uniforms(3, 1, torch.arange(20_000)).numpy()
    assert chances.min() >= 0
    assert chances.max() < 1
    counts = np.stack([np.histogram(row, bins=20, range=(0, 1))[0] for row in chances])
    assert_allclose(counts, 1000, atol=160)  # five standard deviations
    assert_allclose(np.corrcoef(chances), np.eye(len(Stream)), atol=0.04)


@pytest.mark.parametrize("other", [(1, 0), (0, 1)])
def test_uniforms_change_with_the_seed_and_the_epoch(other):
    items = torch.arange(100)
    one, two = uniforms(0, 0, items), uniforms(other[0], other[1], items)
    changed = (one != two).float().mean(1)
    unchanging = [] if other == (1, 0) else [Stream.FLIP]
    assert [s for s in Stream if changed[s] < 0.9] == unchanging


@pytest.mark.parametrize("name", ONE_EACH)
@settings(max_examples=20)
@given(order=st.permutations(range(6)), cut=st.integers(1, 5), epoch=st.integers(0, 3))
def test_choices_do_not_depend_on_the_batch(name, order, cut, epoch):
    images, items = pictures(), torch.tensor([3, 14, 15, 92, 65, 35])
    change = functools.partial(augment, config=ONE_EACH[name], seed=7, epoch=epoch)
    together = change(images, items)
    index = torch.tensor(order)
    parts = [change(images[some], items[some]) for some in (index[:cut], index[cut:])]
    assert_array_equal(torch.cat(parts).numpy(), together[index].numpy())


@pytest.mark.parametrize("name", ONE_EACH)
def test_each_amount_changes_pictures_and_leaves_the_originals(name):
    images = pictures(30)
    before = images.clone()
    changed = augment(images, torch.arange(30), ONE_EACH[name], seed=0, epoch=0)
    assert changed.shape == images.shape
    assert (changed != before).any()
    assert_array_equal(images.numpy(), before.numpy())


def test_without_any_amount_the_pictures_stay():
    images = pictures()
    changed = augment(images, torch.arange(6), AugmentationConfig(), seed=0, epoch=0)
    assert_array_equal(changed.numpy(), images.numpy())


def test_half_of_the_pictures_are_mirrored_and_the_other_half_in_the_next_epoch():
    images = pictures(2000, 1, 5)
    turned = images.flip(2)
    config = AugmentationConfig(flip=True)
    halves = [augment(images, torch.arange(2000), config, 5, epoch) for epoch in (0, 1, 2)]
    first, second, third = ((half == turned).flatten(1).all(1).numpy() for half in halves)
    assert 900 < first.sum() < 1100
    assert_array_equal(second, ~first)
    assert_array_equal(third, first)
    untouched = (halves[0] == images).flatten(1).all(1).numpy()
    assert_array_equal(untouched, ~first)


def test_mirrored_follows_the_coin_in_even_epochs():
    coins = torch.tensor([0.0, 0.49, 0.5, 0.99])
    assert mirrored(coins, 4).tolist() == [True, True, False, False]


def test_shift_is_a_window_of_the_reflected_picture():
    images, most = pictures(300, 9, 8), 3
    shifted = augment(images, torch.arange(300), AugmentationConfig(shift=most), 1, 2).numpy()
    wide = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="reflect")
    seen = set()
    for picture, source in zip(shifted, wide, strict=True):
        windows = {
            (top, left): source[top : top + 9, left : left + 8]
            for top in range(2 * most + 1)
            for left in range(2 * most + 1)
        }
        fitting = [at for at, window in windows.items() if np.array_equal(window, picture)]
        assert len(fitting) == 1
        seen.update(fitting)
    assert len(seen) == (2 * most + 1) ** 2  # every translation occurs


def test_shift_and_flip_together_are_the_flip_of_the_shift():
    images, items = pictures(40), torch.arange(40)
    shifted = augment(images, items, AugmentationConfig(shift=2), 0, 0)
    both = augment(images, items, AugmentationConfig(flip=True, shift=2), 0, 0)
    mirror = mirrored(uniforms(0, 0, items)[Stream.FLIP], 0)[:, None, None, None]
    wanted = torch.where(mirror, shifted.flip(2), shifted)
    assert_array_equal(both.numpy(), wanted.numpy())


@given(length=st.integers(1, 9), reach=st.integers(0, 40))
def test_reflect_is_numpys(length, reach):
    positions = torch.arange(-reach, length + reach)[None]
    wanted = np.pad(np.arange(length), reach, mode="reflect")
    assert_array_equal(reflect(positions, length)[0].numpy(), wanted)


@given(data=st.data())
def test_take_is_a_double_loop(data):
    images = pictures(2, 4, 5, seed=data.draw(st.integers(0, 9)))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=2)
    )
    columns = data.draw(
        st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=2, max_size=2)
    )
    wanted = [[[images[n, y, x].tolist() for x in columns[n]] for y in rows[n]] for n in range(2)]
    found = take(images, torch.tensor(rows), torch.tensor(columns))
    assert_array_equal(found.numpy(), wanted)


@given(
    width=st.integers(1, 6),
    starts=st.tuples(st.integers(-40, 40), st.integers(-40, 40)),
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5),
)
def test_window_runs_over_the_endlessly_reflected_picture(width, starts, rows):
    images = pictures(2, 4, width)
    table = torch.tensor(rows).T
    found = window(images, table, torch.tensor(starts)).numpy()
    for n in range(2):
        # 50 columns on either side hold every window that is asked for.
        wide = np.pad(images[n].numpy(), ((0, 0), (50, 50), (0, 0)), mode="reflect")
        wanted = wide[table[n].numpy(), starts[n] + 50 : starts[n] + 50 + width]
        assert_array_equal(found[n], wanted)


@pytest.mark.parametrize("name", ONE_EACH)
def test_pictures_may_lie_in_memory_in_any_way(name):
    images = pictures()
    items = torch.arange(6)
    strided = images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    wanted = augment(images, items, ONE_EACH[name], 0, 0)
    assert_array_equal(augment(strided, items, ONE_EACH[name], 0, 0).numpy(), wanted.numpy())


def bilinear(picture, row, column):
    """Level at a fractional position, by the formula."""
    height, width, _ = picture.shape
    row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
    y, x = int(row), int(column)
    down, across = row - y, column - x
    below, right = min(y + 1, height - 1), min(x + 1, width - 1)
    top = (1 - across) * picture[y, x] + across * picture[y, right]
    bottom = (1 - across) * picture[below, x] + across * picture[below, right]
    return (1 - down) * top + down * bottom


@given(
    rows=st.lists(st.floats(-3, 12, width=32), min_size=3, max_size=3),
    columns=st.lists(st.floats(-3, 9, width=32), min_size=2, max_size=2),
)
def test_resample_is_bilinear(rows, columns):
    images = pictures(1)
    found = resample(images, torch.tensor([rows]), torch.tensor([columns]))[0].numpy()
    picture = images[0].numpy().astype(float)
    wanted = [[bilinear(picture, row, column) for column in columns] for row in rows]
    assert_allclose(found, wanted, atol=0.51)


def test_zoom_enlarges_a_crop_that_lies_inside_the_picture():
    # A picture whose levels are its coordinates shows where each pixel came from.
    ramp = torch.arange(0, 200, 4, dtype=torch.uint8)
    images = torch.stack(
        [*torch.meshgrid(ramp, ramp, indexing="ij"), torch.zeros(50, 50).byte()], 2
    )
    images = images.expand(200, 50, 50, 3)
    zoomed = augment(images, torch.arange(200), AugmentationConfig(zoom=0.4), 0, 0).float() / 4
    for axis, channel in ((1, 0), (2, 1)):
        sides = (zoomed.select(axis, 40) - zoomed.select(axis, 10)).select(2, channel)[:, 25] / 30
        assert 0.6 - 0.02 <= sides.min() < 0.65
        assert 0.95 < sides.max() <= 1.02
    assert zoomed[..., :2].max() > 48
    assert zoomed[..., :2].min() < 1


def test_zoom_samples_the_crop_at_the_centres_of_its_pixels():
    images, items = pictures(3), torch.arange(3)
    zoomed = augment(images, items, AugmentationConfig(zoom=0.5), 4, 1).numpy()
    chances = uniforms(4, 1, items).double().numpy()
    for n, (amount, top, left) in enumerate(chances[Stream.ZOOM : Stream.ZOOM_LEFT + 1].T):
        left_out = 0.5 * amount  # the crop covers the rest of each side, as if cut into 10 by 7
        rows = left_out * top * 10 + (np.arange(10) + 0.5) * (1 - left_out) - 0.5
        columns = left_out * left * 7 + (np.arange(7) + 0.5) * (1 - left_out) - 0.5
        picture = images[n].numpy().astype(float)
        wanted = [[bilinear(picture, row, column) for column in columns] for row in rows]
        assert_allclose(zoomed[n], wanted, atol=0.51)


def test_zoom_by_nothing_is_the_identity():
    images = pictures()
    rows = torch.arange(10.0).expand(6, 10)
    columns = torch.arange(7.0).expand(6, 7)
    assert_array_equal(resample(images, rows, columns).numpy(), images.numpy())


@given(
    brightness=st.floats(0, 2, width=16),
    contrast=st.floats(0, 2, width=16),
    saturation=st.floats(0, 2, width=16),
)
def test_colour_is_three_blends_in_a_row(brightness, contrast, saturation):
    images = pictures(1, 3, 2)
    x = images[0].numpy().astype(float)
    weights = np.array([0.299, 0.587, 0.114])
    x = brightness * x
    x = contrast * x + (1 - contrast) * (x @ weights).mean()
    x = saturation * x + (1 - saturation) * (x @ weights)[..., np.newaxis]
    factors = (torch.tensor([factor]) for factor in (brightness, contrast, saturation))
    assert_allclose(colour(images, *factors)[0].numpy(), x.clip(0, 255), atol=0.51)


def test_colour_by_one_is_the_identity():
    images, one = pictures(), torch.ones(6)
    assert_array_equal(colour(images, one, one, one).numpy(), images.numpy())


@given(row=st.integers(0, 9), column=st.integers(0, 6), side=st.integers(1, 12))
def test_cutout_sets_a_square_to_the_mean_colour(row, column, side):
    images = pictures(1)
    found = cutout(images, torch.tensor([row]), torch.tensor([column]), side)[0].numpy()
    wanted = images[0].numpy().copy()
    top, left = row - side // 2, column - side // 2
    wanted[max(top, 0) : top + side, max(left, 0) : left + side] = np.rint(
        images[0].numpy().mean((0, 1))
    )
    assert_array_equal(found, wanted)


def test_cutout_centres_reach_every_pixel():
    images = pictures(1).expand(3000, 10, 7, 3)
    changed = augment(images, torch.arange(3000), AugmentationConfig(cutout=1), 0, 0)
    assert (changed != images).any(3).any(0).all()


def test_pictures_of_one_pixel_survive_everything():
    images = pictures(4, 1, 1)
    assert augment(images, torch.arange(4), EVERYTHING, 0, 0).shape == (4, 1, 1, 3)


class TestMix:
    def batch(self):
        inputs = torch.randn(6, 3, 8, 10, generator=torch.Generator().manual_seed(0))
        return inputs, torch.eye(6)

    def share_of(self, targets):
        """Return what is left of each picture, which must be the same for all."""
        shares = targets.diagonal()
        assert torch.allclose(shares, shares[0].expand(6), atol=1e-6)
        assert torch.allclose(targets.sum(1), torch.ones(6))
        return float(shares[0])

    @given(st.integers(0, 100), st.floats(0.1, 3))
    def test_mixup_is_the_blend_that_the_targets_state(self, number, amount):
        inputs, targets = self.batch()
        words = (1, 2, number)
        mixed, shares = mix(inputs, targets, AugmentationConfig(mixup=amount), words)
        share = self.share_of(shares)
        assert torch.allclose(mixed, share * inputs + (1 - share) * inputs.roll(1, 0), atol=1e-5)

    @given(st.integers(0, 100))
    def test_cutmix_pastes_the_area_that_the_targets_state(self, number):
        inputs, targets = self.batch()
        mixed, shares = mix(inputs, targets, AugmentationConfig(cutmix=1.0), (1, 2, number))
        pasted = (mixed != inputs).all(1)
        assert torch.equal(mixed, torch.where(pasted[:, None], inputs.roll(1, 0), inputs))
        assert self.share_of(shares) == pytest.approx(1 - float(pasted.float().mean()), abs=1e-6)
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert torch.equal(pasted[0], rows[:, None] & columns[None, :])  # a rectangle

    def test_with_both_a_coin_decides(self):
        inputs, targets = self.batch()
        config = AugmentationConfig(mixup=1.0, cutmix=1.0)
        kinds = set()
        for number in range(30):
            mixed, _ = mix(inputs, targets, config, (0, 0, number))
            kinds.add(bool((mixed == inputs).any()))
        assert kinds == {True, False}

    def test_the_choice_is_a_function_of_seed_epoch_and_batch(self):
        inputs, targets = self.batch()
        config = AugmentationConfig(mixup=0.4, cutmix=0.4)
        first, again, other = (
            mix(inputs, targets, config, words)[0] for words in ((1, 2, 3), (1, 2, 3), (1, 2, 4))
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
