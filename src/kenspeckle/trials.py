"""Questions about pictures that a linear head on frozen features answers in seconds.

How large should they be, cropped, padded or squashed? Is a picture still of its class when it is
mirrored?
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import Geometry, Pixels, Stage, staged
from kenspeckle.features import features_of
from kenspeckle.metrics import accuracy
from kenspeckle.pixels import PixelStore, open_pixels
from kenspeckle.plans import Choice, Option
from kenspeckle.preparation import Prepared
from kenspeckle.probe import Probe, fit_probe, probe_logits
from kenspeckle.transfer import Frozen, Means, metric_of

__all__ = ["choose_geometry", "choose_mirroring", "geometry_words", "shapes_differ"]

NUM_TRIED = 1_500  # training pictures on which geometries are compared
NUM_MIRRORED = 400  # validation pictures that are shown mirrored
SQUARE_WITHIN = 0.1  # of a side: nothing to crop or to pad then


def shapes_differ(shapes: NDArray[np.float64]) -> bool:
    """Return whether pictures are far enough from squares for the fit to matter.

    Args:
        shapes: ``(N, 2)``, height and width in pixels.

    Example:
        >>> shapes_differ(np.array([[128.0, 128.0], [100.0, 98.0]]))
        False
    """
    ratios = shapes.max(axis=1) / shapes.min(axis=1)
    return bool(np.mean(ratios > 1 + SQUARE_WITHIN) > SQUARE_WITHIN)


def geometry_words(geometry: Geometry) -> str:
    """Return a geometry in words, such as ``160x160, squash``."""
    height, width = geometry.size
    return f"{height}x{width}, {geometry.fit}"


def choose_geometry(
    prepared: Prepared,
    frozen: Frozen,
    candidates: Sequence[Geometry],
    means: Means,
    seed: int,
) -> Generator[Stage, None, tuple[Geometry, Choice]]:
    """Return the geometry whose features tell the classes apart best, by cross-validation.

    All are tried on the same training pictures; another one than the present must be right on more
    of them than chance explains (one standard error of the difference).

    Args:
        prepared: pictures at the present geometry.
        frozen: their features.
        candidates: other geometries.
        means: what to work with.
        seed: of the sample and of the folds.

    Yields:
        Progress.

    Raises:
        DataError: a picture cannot be decoded.
        ModelFileError: a graph does not answer as its network does.
        WriteError: the cache could not be written.
    """
    train = prepared.task.train
    chosen = np.random.default_rng(np.random.SeedSequence([seed, len(train)]))
    items = np.sort(chosen.permutation(train)[:NUM_TRIED])
    labels = prepared.task.labels[items]
    present = prepared.geometry
    probes = {present: _probe(prepared, frozen.features[items], items, frozen, seed)}
    subset = prepared.dataset.subset(items.tolist())
    for geometry in candidates:
        name = f"trying {geometry_words(geometry)}"
        reading = open_pixels(subset, geometry, means.limits, means.cache)
        store = yield from staged(name, reading)
        computing = features_of(
            store, geometry, means.cache, frozen.backbone, num_threads=means.num_threads
        )
        features = yield from staged(name, computing)
        probes[geometry] = _probe(prepared, features, items, frozen, seed)
    right = {g: p.out_of_fold.argmax(axis=1) == labels for g, p in probes.items()}
    best = max(probes, key=lambda geometry: probes[geometry].score)
    if not _exceeds(right[best], right[present]) or probes[best].score <= probes[present].score:
        best = present
    options = tuple(
        Option(geometry_words(geometry), found.score, geometry == best)
        for geometry, found in probes.items()
    )
    metric = metric_of(prepared.task)
    reason = f"cross-validated {metric} of a linear head on {len(items):,} training pictures; " + (
        "no other is better by more than a standard error"
        if best == present
        else "better by more than a standard error of the difference"
    )
    return best, Choice("size and fit", options, reason)


def _probe(
    prepared: Prepared,
    features: NDArray[np.float32],
    items: NDArray[np.int64],
    frozen: Frozen,
    seed: int,
) -> Probe:
    """Fit a head to the features of some training pictures, which stand in the order of `items`."""
    task = prepared.task
    return fit_probe(
        features,
        task.labels[items],
        np.arange(len(items)),
        prepared.together[items],
        task.num_classes,
        metric=metric_of(task),
        imbalance=frozen.probe.imbalance,
        seed=seed,
    )


def _exceeds(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> bool:
    """Return whether the first is right more often, by over a standard error of the difference."""
    difference = first.astype(float) - second.astype(float)
    error = float(np.std(difference)) / math.sqrt(len(difference))
    return float(difference.mean()) > error


@dataclass(frozen=True, eq=False)
class _Mirrored:
    """Some pictures of a store, mirrored left to right."""

    store: PixelStore
    items: NDArray[np.int64]

    @property
    def digests(self) -> NDArray[np.uint8]:
        """Other than those of the pictures themselves."""
        return np.bitwise_not(self.store.digests[self.items])

    def __len__(self) -> int:
        return len(self.items)

    def gather(self, indices: NDArray[np.int64]) -> Pixels:
        """Return ``uint8 (B, H, W, 3)`` for B indices."""
        return np.ascontiguousarray(self.store.gather(self.items[indices])[:, :, ::-1])


def choose_mirroring(
    prepared: Prepared, frozen: Frozen, means: Means, seed: int
) -> Generator[Stage, None, tuple[bool, Choice]]:
    """Return whether training may mirror pictures: whether the head knows them mirrored as well.

    A mirrored letter, digit or sign is another class, or none; a mirrored flower is a flower.

    Args:
        prepared: pictures at their geometry.
        frozen: their features, and the head.
        means: what to work with.
        seed: of the sample.

    Yields:
        Progress.

    Raises:
        DataError: a picture cannot be decoded.
        WriteError: the cache could not be written.
    """
    task = prepared.task
    chance = np.random.default_rng(np.random.SeedSequence([seed, len(task.validation)]))
    items = np.sort(chance.permutation(task.validation)[:NUM_MIRRORED])
    computing = features_of(
        _Mirrored(task.store, items),
        prepared.geometry,
        means.cache,
        frozen.backbone,
        num_threads=means.num_threads,
    )
    mirrored = yield from staged("looking at mirrored pictures", computing)
    labels = task.labels[items]
    answers = [
        probe_logits(frozen.probe, features).argmax(axis=1)
        for features in (frozen.features[items], mirrored)
    ]
    plain_score, mirrored_score = (accuracy(labels, answer) for answer in answers)
    harmful = _exceeds(answers[0] == labels, answers[1] == labels)
    options = (
        Option("as they are", plain_score, harmful),
        Option("mirrored too", mirrored_score, not harmful),
    )
    reason = (
        f"accuracy of the head on {len(items):,} validation pictures as they are, and mirrored; "
        + (
            "mirrored they are known less well, so training does not mirror"
            if harmful
            else "the difference is within a standard error, so training mirrors every second time"
        )
    )
    return not harmful, Choice("mirroring", options, reason)
