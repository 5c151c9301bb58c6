"""From the numbers of pictures to what a network takes in: pixels made anew, or maps from before.

A feed is asked in two ways: `plain` for answers, `varied` for training, where each epoch shows
every picture a little differently.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kenspeckle.augmentation import Stream, augment, mirrored, uniforms
from kenspeckle.config import AugmentationConfig
from kenspeckle.core import Normalisation
from kenspeckle.layers import normalise
from kenspeckle.pixels import PixelStore, batches, permutation, spans

__all__ = ["Feed", "MapFeed", "PictureFeed", "balanced_order", "shuffled"]

Items = NDArray[np.int64]

GROUP_BYTES = 2**21
PLAIN_BATCH = 256


class Feed(Protocol):
    """Network inputs by the number of the picture."""

    def plain(self, items: Items, device: torch.device) -> Iterator[Tensor]:
        """Yield the inputs of pictures in order, some at a time."""
        ...

    def varied(
        self, order: Items, batch_size: int, epoch: int, device: torch.device, num_threads: int
    ) -> Iterator[tuple[Tensor, Items]]:
        """Yield batches of inputs as one epoch shows them, with the pictures' numbers."""
        ...


@dataclass(frozen=True, eq=False)
class PictureFeed:
    """Pictures, augmented in training.

    Attributes:
        store: the pictures.
        normalisation: from grey levels to inputs.
        augmentation: random changes in training.
        seed: of these changes.
    """

    store: PixelStore
    normalisation: Normalisation
    augmentation: AugmentationConfig
    seed: int

    def plain(self, items: Items, device: torch.device) -> Iterator[Tensor]:
        """Yield ``float32 (B, 3, H, W)`` of the pictures as they are."""
        norm = self.normalisation
        for batch in batches(self.store, items, PLAIN_BATCH):
            images = torch.from_numpy(batch.images).to(device)
            yield normalise(images, norm.mean, norm.deviation)

    def varied(
        self, order: Items, batch_size: int, epoch: int, device: torch.device, num_threads: int
    ) -> Iterator[tuple[Tensor, Items]]:
        """Yield ``float32 (B, 3, H, W)`` of the pictures as the epoch changes them."""
        norm = self.normalisation
        # Small pictures are fetched and augmented many batches at a time; calls would cost more.
        one = self.store.gather(order[:1]).nbytes * batch_size
        group_size = batch_size * max(1, GROUP_BYTES // one)
        for group in batches(self.store, order, group_size, num_threads):
            numbers = torch.from_numpy(group.items).to(device)
            images = torch.from_numpy(group.images).to(device)
            images = augment(images, numbers, self.augmentation, self.seed, epoch)
            for part in spans(len(numbers), batch_size):
                yield normalise(images[part], norm.mean, norm.deviation), group.items[part]


@dataclass(frozen=True, eq=False)
class MapFeed:
    """Maps from inside a frozen network, mirrored in every second epoch of training.

    Attributes:
        maps: ``float16 (N, h, w, C)``.
        mirrored_maps: those of the mirrored pictures; None where pictures are not mirrored.
        seed: of the coins.
    """

    maps: NDArray[np.float16]
    mirrored_maps: NDArray[np.float16] | None
    seed: int

    def plain(self, items: Items, device: torch.device) -> Iterator[Tensor]:
        """Yield ``float32 (B, C, h, w)`` of the pictures as they are."""
        for part in spans(len(items), PLAIN_BATCH):
            yield _inputs(self.maps[items[part]], device)

    def varied(
        self, order: Items, batch_size: int, epoch: int, device: torch.device, num_threads: int
    ) -> Iterator[tuple[Tensor, Items]]:
        """Yield ``float32 (B, C, h, w)``, of the mirrored picture where it is its turn.

        Maps need no fetching ahead: the number of threads does not matter.
        """
        for part in spans(len(order), batch_size):
            items = order[part]
            maps = self.maps[items]
            if self.mirrored_maps is not None:
                coins = uniforms(self.seed, epoch, torch.from_numpy(items))[Stream.FLIP]
                turn = mirrored(coins, epoch).numpy()
                maps[turn] = self.mirrored_maps[items[turn]]
            yield _inputs(maps, device), items


def _inputs(maps: NDArray[np.float16], device: torch.device) -> Tensor:
    return torch.from_numpy(maps).to(device).float().permute(0, 3, 1, 2)


def shuffled(items: Items, seed: int, epoch: int) -> Items:
    """Return the items in the order of one epoch."""
    order: Items = items[permutation(len(items), seed, epoch)]
    return order


def balanced_order(items: Items, labels: Items, seed: int, epoch: int) -> Items:
    """Return as many items as there are, in random order, every class equally often.

    A large class shows another part of its pictures in each epoch, a small one shows each several
    times. Classes differ by one picture where their number does not divide the items'.

    Args:
        items: ``int64 (T,)``, at least one.
        labels: ``int64 (T,)``, their classes.
        seed: of the run.
        epoch: number of the epoch, from 0.
    """
    classes = np.unique(labels)
    any_order = permutation(len(items), seed, epoch)
    shares = np.full(len(classes), len(items) // len(classes))
    shares[permutation(len(classes), seed, epoch)[: len(items) % len(classes)]] += 1
    drawn = []
    for name, share in zip(classes, shares, strict=True):
        members = any_order[labels[any_order] == name]
        drawn.append(np.resize(members, share))  # repeats them as often as it takes
    together = np.concatenate(drawn)
    order = together[permutation(len(together), seed, epoch)]
    return np.asarray(items[order])
