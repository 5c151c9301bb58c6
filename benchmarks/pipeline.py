"""Claim: fetching, augmenting and normalising 32x32 pictures takes at most 3 % of a training step.

    python benchmarks/pipeline.py

The share is measured inside real epochs of each recipe as it stands, on 12,800 pictures of random
pixels: the time spent in the feed against that of the whole epoch.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch

from kenspeckle import learning
from kenspeckle.core import Normalisation
from kenspeckle.models import build
from kenspeckle.pixels import CachedPixels
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings

NUM_PICTURES = 12_800


def share(name: str, changes: list[str]) -> float:
    """Return the smallest share of the feed in three epochs."""
    recipe = with_settings(named(name), ["epochs=1", *changes])
    chance = np.random.default_rng(0)
    images = chance.integers(0, 256, (NUM_PICTURES, 32, 32, 3), np.uint8)
    store = CachedPixels(images, np.zeros((NUM_PICTURES, 16), np.uint8))
    every = np.arange(NUM_PICTURES)
    task = learning.Task(store, every % 10, every, every[:10], 10, Normalisation())
    network = build(recipe.model, 10, (32, 32), torch.Generator().manual_seed(0))
    return min(_share(learning._Run(network, task, recipe)) for _ in range(4))


def _share(run: learning._Run) -> float:
    """Return the share of one epoch that is spent in the feed."""
    spent = 0.0
    feed = run.batches

    def timed(epoch: int, num_threads: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal spent
        pairs = feed(epoch, num_threads)
        while True:
            started = time.perf_counter()
            pair = next(pairs, None)
            spent += time.perf_counter() - started
            if pair is None:
                return
            yield pair

    run.batches = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    for _step in run.steps(0, 0):
        pass
    return spent / (time.perf_counter() - started)


if __name__ == "__main__":
    for recipe in ("seed-cnn", "small-cnn", "speed"):
        print(f"{recipe:<10} {share(recipe, []):.2%} of a step (bar 3 %)", flush=True)
    print(f"seed-cnn with flip and shift: {share('seed-cnn', ['flip=yes', 'shift=4']):.2%}")
