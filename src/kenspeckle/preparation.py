"""From a data set and a recipe to pictures, labels, splits and a network to start from."""

import hashlib
import json
import math
import statistics
from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kenspeckle.backbones import Backbone
from kenspeckle.config import Recipe
from kenspeckle.core import DataError, Geometry, Normalisation, Stage, staged
from kenspeckle.duplicates import equal_groups, joined
from kenspeckle.features import default_size
from kenspeckle.images import Limits
from kenspeckle.layers import Classifier, Whitening, normalise, whiten_
from kenspeckle.learning import Task
from kenspeckle.models import build
from kenspeckle.pixels import Cache, PixelStore, open_pixels, original
from kenspeckle.sources import Dataset
from kenspeckle.splits import assign, units

__all__ = ["Prepared", "at_geometry", "network_for", "prepare_data", "small_size", "typical_side"]

LARGEST_DERIVED_SIDE = 64
NUM_MEASURED = 5_000  # pictures whose mean and deviation stand for the training set's
MAX_WHITENED_PIXELS = NUM_MEASURED * 32 * 32  # 61 MB as floats


@dataclass(frozen=True, eq=False)
class Prepared:
    """Data ready to learn from.

    Attributes:
        dataset: where the pictures are.
        task: pixels, labels, and what to train and validate on.
        parts: ``train``, ``validation`` or ``test`` for every picture.
        geometry: what the pictures became.
        fingerprint: SHA-256 of every picture with its name, class and split.
        notices: what the user should know, a sentence each.
        leaked: ``bool (N,)``, test pictures of which the training pictures hold a copy; only a
            split that the data bring can have any.
        together: ``int64 (N,)``; pictures of equal numbers belong together.
    """

    dataset: Dataset
    task: Task
    parts: NDArray[np.str_]
    geometry: Geometry
    fingerprint: str
    notices: tuple[str, ...]
    leaked: NDArray[np.bool_]
    together: NDArray[np.int64]

    def part(self, name: str) -> NDArray[np.int64]:
        """Return the indices of one part."""
        return np.flatnonzero(self.parts == name)


def prepare_data(
    dataset: Dataset,
    recipe: Recipe,
    limits: Limits,
    cache: Cache,
    *,
    together: NDArray[np.int64] | None = None,
    leaked: NDArray[np.int64] | None = None,
    backbone: Backbone | None = None,
) -> Generator[Stage, None, Prepared]:
    """Decode every picture (or find it in the cache), split, and measure.

    Pictures that are equal at the network's size are never on two sides of a split that is drawn.

    Args:
        dataset: labelled pictures.
        recipe: geometry, shares of the split, and the seed.
        limits: what pictures are refused.
        cache: where decoded pictures are kept.
        together: ``int64 (N,)``; nor are pictures of equal numbers.
        leaked: indices of pictures of a given test part of which the training pictures hold a copy.
        backbone: what the network starts from, which decides the size and the normalisation that
            the recipe leaves open; None where it starts from nothing.

    Yields:
        Progress.

    Raises:
        DataError: pictures cannot be decoded, have no label, or are too few.
        WriteError: the cache could not be written.
    """
    if any(item.label is None for item in dataset.items):
        raise DataError(f"{dataset.location}: pictures without a label cannot be learnt from")
    if backbone is None:
        size = small_size(dataset, limits)
    else:
        size = (default_size(typical_side(dataset, limits)),) * 2
    geometry = recipe.pixels.geometry(size)
    store = yield from staged("reading pictures", open_pixels(dataset, geometry, limits, cache))
    groups = equal_groups(store.digests)
    groups = groups if together is None else joined(groups, together)
    split, split_notices = assign(
        dataset, recipe.split.validation, recipe.split.test, seed=recipe.seed, together=groups
    )
    parts = np.array(split)
    labels = np.array([item.label for item in dataset.items], np.int64)
    train_items, validation = (np.flatnonzero(parts == p) for p in ("train", "validation"))
    if not len(train_items) or not len(validation):
        raise DataError(
            f"{dataset.location}: {len(dataset.items)} pictures are too few to train and validate"
        )
    measured = _measured(store, train_items) if backbone is None else backbone.normalisation
    task = Task(
        store=store,
        labels=labels,
        train=train_items,
        validation=validation,
        num_classes=len(dataset.classes),
        normalisation=recipe.pixels.normalisation(measured),
        balanced=recipe.training.imbalance != "none",
    )
    fingerprint = _fingerprint(dataset, store, parts)
    notices = (*dataset.notices, *split_notices)
    leaks = np.zeros(len(parts), bool)
    leaks[[] if leaked is None else leaked] = True
    belong = np.array(units(dataset.items, groups), np.int64)
    return Prepared(dataset, task, parts, geometry, fingerprint, notices, leaks, belong)


def at_geometry(
    prepared: Prepared,
    geometry: Geometry,
    normalisation: Normalisation | None,
    limits: Limits,
    cache: Cache,
) -> Generator[Stage, None, Prepared]:
    """Return the same pictures in the same parts, made in another way.

    Args:
        prepared: the data.
        geometry: what the pictures become.
        normalisation: from grey levels to inputs; measured on the training pictures when None.
        limits: what pictures are refused.
        cache: where decoded pictures are kept.

    Yields:
        Progress.

    Raises:
        DataError: pictures cannot be decoded.
        WriteError: the cache could not be written.
    """
    reading = open_pixels(prepared.dataset, geometry, limits, cache)
    store = yield from staged("reading pictures", reading)
    normalisation = normalisation or _measured(store, prepared.task.train)
    task = replace(prepared.task, store=store, normalisation=normalisation)
    fingerprint = _fingerprint(prepared.dataset, store, prepared.parts)
    return replace(prepared, task=task, geometry=geometry, fingerprint=fingerprint)


def typical_side(dataset: Dataset, limits: Limits) -> float:
    """Return the median of ``sqrt(height * width)`` in pixels over some pictures.

    Camera pictures are decoded at a scale that is cheap, of which 256 pixels are left at least.
    """
    shapes = _shapes(dataset, limits, 256)
    return float(np.median([math.sqrt(h * w) for h, w in shapes])) if shapes else 256.0


def small_size(dataset: Dataset, limits: Limits) -> tuple[int, int]:
    """Return a square of the median shorter side of some pictures, a multiple of 4, at most 64."""
    sides = [min(shape) for shape in _shapes(dataset, limits, LARGEST_DERIVED_SIDE)]
    side = int(statistics.median(sides)) if sides else LARGEST_DERIVED_SIDE
    side = min(max(8, side // 4 * 4), LARGEST_DERIVED_SIDE)
    return side, side


def _shapes(dataset: Dataset, limits: Limits, side: int) -> list[tuple[int, int]]:
    """Return the shapes of evenly spaced pictures, as far as they can be decoded."""
    found = []
    for index in np.linspace(0, len(dataset.items) - 1, 32).astype(int):
        try:
            picture = original(dataset, int(index), limits, side)
        except DataError:
            continue  # named, with all others, when every picture is decoded
        found.append((picture.shape[0], picture.shape[1]))
    return found


def _measured(store: PixelStore, items: NDArray[np.int64]) -> Normalisation:
    """Return mean and deviation per channel over evenly spaced training pictures."""
    chosen = items[np.linspace(0, len(items) - 1, min(len(items), NUM_MEASURED)).astype(int)]
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for start in range(0, len(chosen), 500):
        levels = store.gather(chosen[start : start + 500]).reshape(-1, 3).astype(np.float64) / 255
        sums += levels.sum(axis=0)
        squares += (levels**2).sum(axis=0)
        count += len(levels)
    mean = sums / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    red, green, blue = (round(float(m), 4) for m in mean)
    spread = tuple(max(round(float(d), 4), 0.001) for d in deviation)
    return Normalisation((red, green, blue), (spread[0], spread[1], spread[2]))


def _fingerprint(dataset: Dataset, store: PixelStore, parts: NDArray[np.str_]) -> str:
    """Return a hash of every picture with its name, class and split, in the order of names."""
    rows = sorted(
        (
            item.name,
            dataset.classes[item.label or 0],
            str(parts[i]),
            store.digests[i].tobytes().hex(),
        )
        for i, item in enumerate(dataset.items)
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def network_for(prepared: Prepared, recipe: Recipe) -> Classifier:
    """Return the recipe's network, with weights drawn from its seed, on the CPU.

    Raises:
        InvalidValueError: its settings leave no map for pictures of this size.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    task = prepared.task
    network = build(recipe.model, task.num_classes, prepared.geometry.size, generator)
    if any(isinstance(module, Whitening) for module in network.modules()):
        num = min(len(task.train), max(1, MAX_WHITENED_PIXELS // math.prod(prepared.geometry.size)))
        some = task.train[np.linspace(0, len(task.train) - 1, num).astype(int)]
        images = torch.from_numpy(task.store.gather(some))
        whiten_(network, normalise(images, task.normalisation.mean, task.normalisation.deviation))
    return network
