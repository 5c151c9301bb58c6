"""Random changes of training pictures, whole batches at a time, on any device.

Every choice is a pure function of (seed, epoch, item): neither the order of the pictures, nor the
batch that they are in, nor the number of loader threads can change it.

Mirroring and shifting are one copy of whole rows out of the reflected picture; zooming makes it a
table of source rows and one of source columns for each picture, in a single pass.
"""

import enum
import functools

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped, UInt8
from torch import Tensor

from kenspeckle.config import AugmentationConfig

__all__ = [
    "Stream",
    "augment",
    "colour",
    "cutout",
    "mirrored",
    "mix",
    "reflect",
    "resample",
    "take",
    "uniforms",
    "window",
]


class Stream(enum.IntEnum):
    """The independent choices that are made for one picture."""

    FLIP = 0
    SHIFT_ROWS = 1
    SHIFT_COLUMNS = 2
    ZOOM = 3
    ZOOM_TOP = 4
    ZOOM_LEFT = 5
    CUTOUT_ROW = 6
    CUTOUT_COLUMN = 7
    BRIGHTNESS = 8
    CONTRAST = 9
    SATURATION = 10


def augment(
    images: UInt8[Tensor, "n h w 3"],
    items: Int[Tensor, " n"],
    config: AugmentationConfig,
    seed: int,
    epoch: int,
) -> UInt8[Tensor, "n h w 3"]:
    """Return the pictures with the changes that `config` asks for.

    The order is zoom, shift, flip, colour, cutout. With every amount at zero the pictures
    themselves are returned.

    Args:
        images: RGB, 0 to 255.
        items: number of each picture in the training set, on the pictures' device.
        config: which changes, and how large they may be.
        seed: the run's seed, at least 0.
        epoch: number of the epoch, from 0.
    """
    if config == AugmentationConfig():
        return images
    chances = uniforms(seed, epoch, items)
    if config.flip or config.shift or config.zoom:
        images = _move(images, config, chances, epoch)
    if config.brightness or config.contrast or config.saturation:
        signed = 2 * chances - 1
        images = colour(
            images,
            1 + config.brightness * signed[Stream.BRIGHTNESS],
            1 + config.contrast * signed[Stream.CONTRAST],
            1 + config.saturation * signed[Stream.SATURATION],
        )
    if config.cutout:
        rows = (chances[Stream.CUTOUT_ROW] * images.shape[1]).long()
        columns = (chances[Stream.CUTOUT_COLUMN] * images.shape[2]).long()
        images = cutout(images, rows, columns, config.cutout)
    return images


def _move(
    images: UInt8[Tensor, "n h w 3"],
    config: AugmentationConfig,
    chances: Float[Tensor, "streams n"],
    epoch: int,
) -> UInt8[Tensor, "n h w 3"]:
    N, H, W, _ = images.shape
    rows = torch.arange(H, device=images.device).expand(N, H)
    steps = chances[Stream.SHIFT_ROWS : Stream.SHIFT_COLUMNS + 1] * (2 * config.shift + 1)
    down, right = steps.long() - config.shift
    rows = reflect(rows - down[:, None], H)
    starts = -right
    if config.flip:  # the reflected picture runs backwards from its last column on
        mirror = mirrored(chances[Stream.FLIP], epoch)
        starts = torch.where(mirror, W - 1 + right, starts)
    if not config.zoom:
        return window(images, rows, starts)
    columns = reflect(starts[:, None] + torch.arange(W, device=images.device), W)
    left_out = config.zoom * chances[Stream.ZOOM]
    return resample(
        images,
        _crop(rows, left_out, chances[Stream.ZOOM_TOP], H),
        _crop(columns, left_out, chances[Stream.ZOOM_LEFT], W),
    )


def _crop(
    positions: Int64[Tensor, "n size"],
    left_out: Float[Tensor, " n"],
    before: Float[Tensor, " n"],
    length: int,
) -> Float[Tensor, "n size"]:
    """Source positions in a crop that leaves out a share of a side, `before` of it on one end."""
    share = (1 - left_out)[:, None]
    start = (left_out * before)[:, None] * length
    return (positions + 0.5) * share + start - 0.5  # pixel centres lie at half numbers


@functools.lru_cache(maxsize=4)
def _keys(seed: int, epoch: int) -> Int64[Tensor, " streams"]:
    """A well-mixed number for each stream; mirroring alternates, so its coin is the run's."""
    words = [(seed, 0 if stream is Stream.FLIP else epoch, stream) for stream in Stream]
    keys = [np.random.SeedSequence(three).generate_state(1, np.uint64) for three in words]
    return torch.from_numpy(np.concatenate(keys).view(np.int64))


def uniforms(seed: int, epoch: int, items: Int[Tensor, " n"]) -> Float[Tensor, "streams n"]:
    """Return a number from 0 to below 1 for each stream and item, a multiple of 2**-24.

    It is the item's own output of the generator SplitMix64 that (seed, epoch, stream) seeds;
    `Stream.FLIP` is the same in all epochs.
    Source: Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195

    Args:
        seed: at least 0.
        epoch: at least 0.
        items: number of each item, at least 0.

    Example:
        >>> both, one = uniforms(0, 0, torch.tensor([5, 9])), uniforms(0, 0, torch.tensor([9]))
        >>> torch.equal(both[:, 1:], one)
        True
    """
    # The generator's constants as signed numbers; products of int64 wrap around, as they must.
    counters = (items.long() + 1) * -0x61C8864680B583EB
    z = counters + _keys(seed, epoch).to(items.device)[:, None]
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return _shifted(z ^ _shifted(z, 31), 40) * 2.0**-24


def _shifted(z: Int64[Tensor, "streams n"], bits: int) -> Int64[Tensor, "streams n"]:
    """Shift right with zeros, which torch has for unsigned numbers only."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mirrored(coins: Float[Tensor, " n"], epoch: int) -> Bool[Tensor, " n"]:
    """Return which pictures are mirrored in this epoch: each one in every second epoch.

    A fair coin decides in which. Any two epochs then show both sides of every picture, where
    independent coins would show half of the pictures twice the same way.
    Source: airbench, section 3.6, arXiv 2404.00498.

    Args:
        coins: numbers from 0 to below 1 that do not depend on the epoch.
        epoch: number of the epoch, from 0.
    """
    return (coins < 0.5) ^ (epoch % 2 == 1)


def reflect(positions: Int64[Tensor, "n size"], length: int) -> Int64[Tensor, "n size"]:
    """Return positions inside 0 to `length` - 1; those outside are mirrored at the border pixel.

    Example:
        >>> reflect(torch.tensor([[-2, -1, 0, 3, 4, 5]]), 4)
        tensor([[2, 1, 0, 3, 2, 1]])
    """
    last = length - 1
    if last == 0:
        return torch.zeros_like(positions)
    return last - (positions.remainder(2 * last) - last).abs()


def window(
    images: UInt8[Tensor, "n h w 3"],
    rows: Int64[Tensor, "n y"],
    starts: Int64[Tensor, " n"],
) -> UInt8[Tensor, "n y w 3"]:
    """Return each picture's rows from a column on, `w` wide, in the picture reflected without end.

    Args:
        images: RGB, 0 to 255.
        rows: source rows, 0 to h - 1.
        starts: first column; outside the picture lie its reflections, so that from ``w - 1`` on
            a row runs backwards.
    """
    N, H, W, _ = images.shape
    period = max(1, 2 * (W - 1))
    endless = torch.cat([images, images.flip(2)[:, :, 1 : W - 1], images], 2)
    lines = torch.arange(N, device=images.device)[:, None] * H + rows
    firsts = lines * endless.shape[2] + starts.remainder(period)[:, None]
    # Every run of W pixels in memory is a row of this view: selecting copies whole runs, which is
    # ten times as fast as pixel by pixel.
    runs = endless.reshape(-1).as_strided((endless.numel() // 3 - W + 1, 3 * W), (3, 1))
    return runs.index_select(0, firsts.flatten()).view(N, rows.shape[1], W, 3)


def take(
    images: Shaped[Tensor, "n h w 3"],
    rows: Int64[Tensor, "n y"],
    columns: Int64[Tensor, "n x"],
) -> Shaped[Tensor, "n y x 3"]:
    """Return the pixels at the crossings of each picture's rows and columns.

    Args:
        images: pictures of any number type.
        rows: source rows, 0 to h - 1.
        columns: source columns, 0 to w - 1.
    """
    N, H, W, _ = images.shape
    tops = torch.arange(N, device=images.device)[:, None] * H
    # The table of pixel numbers is larger than the pictures: narrow numbers halve its traffic.
    kind = torch.int32 if N * H * W < 2**31 else torch.int64
    starts = ((tops + rows) * W).to(kind)
    crossings = starts[:, :, None] + columns.to(kind)[:, None, :]
    pixels = images.reshape(-1, 3).index_select(0, crossings.flatten())
    return pixels.view(*crossings.shape, 3)


def resample(
    images: UInt8[Tensor, "n h w 3"],
    rows: Float[Tensor, "n y"],
    columns: Float[Tensor, "n x"],
) -> UInt8[Tensor, "n y x 3"]:
    """Return the pictures at fractional positions, bilinear; beyond the border lies its pixel.

    Args:
        images: RGB, 0 to 255.
        rows: source rows in pixels; the centre of the first pixel is at 0.
        columns: source columns, likewise.
    """
    N, H, W, _ = images.shape
    above, below, down = _neighbours(rows, H)
    left, right, across = _neighbours(columns, W)
    all_columns = torch.arange(W, device=images.device).expand(N, W)
    all_rows = torch.arange(rows.shape[1], device=images.device).expand_as(rows)
    # Rows are blended as vectors of 3 * w levels: many times as fast as vectors of 3.
    upper, lower = (take(images, row, all_columns).flatten(2).float() for row in (above, below))
    lines = torch.lerp(upper, lower, down[:, :, None]).view(N, -1, W, 3)
    west, east = (take(lines, all_rows, column).flatten(2) for column in (left, right))
    levels = torch.lerp(west, east, across.repeat_interleave(3, 1)[:, None, :])
    return levels.round_().to(torch.uint8).view(N, rows.shape[1], columns.shape[1], 3)


def _neighbours(
    positions: Float[Tensor, "n size"], length: int
) -> tuple[Int64[Tensor, "n size"], Int64[Tensor, "n size"], Float[Tensor, "n size"]]:
    """The pixels on both sides of each position, and how far it is from the first to the second."""
    inside = positions.clamp(0, length - 1)
    first = inside.floor()
    second = (first + 1).clamp_max(length - 1)
    return first.long(), second.long(), inside - first


def colour(
    images: UInt8[Tensor, "n h w 3"],
    brightness: Float[Tensor, " n"],
    contrast: Float[Tensor, " n"],
    saturation: Float[Tensor, " n"],
) -> UInt8[Tensor, "n h w 3"]:
    """Return the pictures with their levels scaled in three ways; 1 leaves everything.

    Brightness scales the levels, contrast their distance from the picture's mean grey,
    saturation their distance from the pixel's own grey; grey is 0.299 R + 0.587 G + 0.114 B
    (ITU-R BT.601). All three are linear, so together they are one matrix and one offset a
    picture, and levels are rounded and clipped once, at the end.

    Args:
        images: RGB, 0 to 255.
        brightness: factor, at least 0.
        contrast: factor, at least 0.
        saturation: factor, at least 0.
    """
    levels = images.flatten(1, 2).float()
    grey = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    mean_grey = (levels.mean(1) * grey).sum(1)
    own = saturation[:, None, None] * torch.eye(3, device=images.device)
    towards_grey = (1 - saturation)[:, None, None] * grey[:, None].expand(3, 3)
    matrix = (brightness * contrast)[:, None, None] * (own + towards_grey)
    offset = ((1 - contrast) * brightness * mean_grey)[:, None, None]
    changed = torch.baddbmm(offset, levels, matrix)
    return changed.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)


def cutout(
    images: UInt8[Tensor, "n h w 3"],
    rows: Int64[Tensor, " n"],
    columns: Int64[Tensor, " n"],
    side: int,
) -> UInt8[Tensor, "n h w 3"]:
    """Return the pictures, each with a square set to its own mean colour.

    The square may reach over the border. Source: DeVries and Taylor 2017, arXiv 1708.04552.

    Args:
        images: RGB, 0 to 255.
        rows: row of each square's centre; of an even side, of the pixel after the centre.
        columns: column of each square's centre, likewise.
        side: of the square, in pixels.
    """
    _, H, W, _ = images.shape
    mean = images.flatten(1, 2).float().mean(1).round().to(torch.uint8)
    across = _within(columns, side, W).repeat_interleave(3, 1)  # rows of 3 * w levels are fastest
    hole = _within(rows, side, H)[:, :, None] & across[:, None, :]
    return torch.where(hole, mean.repeat(1, W)[:, None, :], images.flatten(2)).view(images.shape)


def _within(centres: Int64[Tensor, " n"], side: int, length: int) -> Bool[Tensor, "n length"]:
    distance = torch.arange(length, device=centres.device) - (centres[:, None] - side // 2)
    return (distance >= 0) & (distance < side)


def mix(
    inputs: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n k"],
    config: AugmentationConfig,
    words: tuple[int, int, int],
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n k"]]:
    """Return a batch blended with itself, moved on by one picture, and targets blended alike.

    Sources: mixup, Zhang et al. 2018, arXiv 1710.09412; cutmix, Yun et al. 2019, arXiv 1905.04899.

    Args:
        inputs: normalised pictures, or maps.
        targets: the share of each class, each row sums to one.
        config: `mixup` and `cutmix`, of which at least one is above zero.
        words: seed, epoch and number of the batch, from which the choices derive.
    """
    chances = np.random.default_rng(np.random.SeedSequence(words))
    cuts = config.cutmix > 0 and (config.mixup == 0 or chances.random() < 0.5)
    amount = config.cutmix if cuts else config.mixup
    share = float(chances.beta(amount, amount))
    others, other_targets = inputs.roll(1, 0), targets.roll(1, 0)
    if not cuts:
        return torch.lerp(others, inputs, share), torch.lerp(other_targets, targets, share)
    _, _, H, W = inputs.shape
    height, width = (round(side * (1 - share) ** 0.5) for side in (H, W))
    top, left = (int(chances.integers(0, n + 1)) for n in (H - height, W - width))
    inputs = inputs.clone(memory_format=torch.preserve_format)
    area = (..., slice(top, top + height), slice(left, left + width))
    inputs[area] = others[area]
    return inputs, torch.lerp(other_targets, targets, 1 - height * width / (H * W))
