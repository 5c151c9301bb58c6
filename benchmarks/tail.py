"""Claim: an epoch of the tail takes at most 0.33 of one of everything, at most 1 point behind.

    python benchmarks/tail.py --data DATA

The recipes `tail` and `fine-tune` learn from the pictures of DATA/flowers.zip at 128 x 128, from
the same head and for as many epochs, an epoch of each in turn. The times are those of the loop,
with validation; the accuracies are those of the epoch that validation chose. The maps that the tail
learns from are computed once for all of its epochs, and timed apart.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from kenspeckle.backbones import Backbone, open_backbone
from kenspeckle.features import maps_of
from kenspeckle.images import Limits
from kenspeckle.learning import EpochDone, logits_of
from kenspeckle.metrics import accuracy
from kenspeckle.pixels import Cache
from kenspeckle.preparation import Prepared, prepare_data
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings
from kenspeckle.sources import Dataset, open_dataset
from kenspeckle.transfer import Means, Progress, Trained, freeze, train_recipe

DATA = Path(__file__).resolve().parents[2] / "shared/data"
NAMES = ("tail", "fine-tune")
TIME_BAR = 0.33

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Found:
    """What one recipe came to: seconds of every epoch, accuracies of every seed."""

    seconds: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)


def finished(work: Generator[object, None, Result]) -> Result:
    """Run some work to its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


def one_epoch(work: Progress[Trained]) -> EpochDone | Trained:
    """Run a training to the end of its next epoch, or to its own."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            trained: Trained = end.value
            return trained
        if isinstance(event, EpochDone):
            return event


def compare(
    prepared: Prepared,
    means: Means,
    backbone: Backbone,
    changes: list[str],
    found: dict[str, Found],
) -> None:
    """Train both recipes in turn, epoch by epoch, and note what comes of it."""
    task = prepared.task
    works = {}
    for name in NAMES:
        recipe = with_settings(named(name), changes)
        frozen = finished(
            freeze(prepared, backbone, means, imbalance=recipe.training.imbalance, seed=recipe.seed)
        )
        works[name] = train_recipe(prepared, recipe, means, backbone=backbone, frozen=frozen)
    while works:
        for name, work in list(works.items()):
            event = one_epoch(work)
            if isinstance(event, EpochDone):
                found[name].seconds.append(event.epoch.seconds)
                continue
            del works[name]
            answers = event.learned.validation_logits.argmax(axis=1)
            found[name].validation.append(accuracy(task.labels[task.validation], answers))
            test = prepared.part("test")
            answers = logits_of(event.network, task, test, means.device).argmax(axis=1)
            found[name].test.append(accuracy(task.labels[test], answers))


def map_seconds(prepared: Prepared, means: Means, backbone: Backbone) -> float:
    """Return how long it takes to compute the maps of every picture, or to find them."""
    started = time.perf_counter()
    finished(maps_of(prepared.task.store, prepared.geometry, means.cache, backbone))
    return time.perf_counter() - started


def main(dataset: Dataset, size: int, num_epochs: int, num_seeds: int) -> None:
    """Train both with every seed, and print how they compare."""
    found = {name: Found() for name in NAMES}
    seconds_of_maps = []
    backbone = open_backbone(named("tail").model, "imagenet")
    with tempfile.TemporaryDirectory() as folder:
        cache, stop = Cache(Path(folder)), threading.Event()
        means = Means(cache, Limits(), torch.device("cpu"), 0, 0, stop, lambda _: None)
        for seed in range(num_seeds):
            changes = [f"size={size}", f"epochs={num_epochs}", f"seed={seed}"]
            recipe = with_settings(named("tail"), changes)
            prepared = finished(
                prepare_data(dataset, recipe, means.limits, cache, backbone=backbone)
            )
            seconds_of_maps.append(map_seconds(prepared, means, backbone))
            compare(prepared, means, backbone, changes, found)
            tests = [f"{name} {found[name].test[-1]:.4f}" for name in NAMES]
            print(f"seed {seed}: test accuracy {', '.join(tests)}", flush=True)
    print(
        f"{dataset.name}: {len(dataset.items):,} pictures at {size} x {size}, {num_epochs} epochs, "
        f"{torch.get_num_threads()} threads"
    )
    tell(found, seconds_of_maps[0])


def tell(found: dict[str, Found], seconds_of_maps: float) -> None:
    """Print the table, and the ratios against their bars."""
    print("recipe     shortest epoch    median  validation accuracy    test accuracy")
    for name, one in found.items():
        print(
            f"{name:<9}  {min(one.seconds):>12.2f} s  {statistics.median(one.seconds):>6.2f} s  "
            f"{_spread(one.validation):>19}  {_spread(one.test):>15}"
        )
    tail, full = (found[name] for name in NAMES)
    shortest, median = (f(tail.seconds) / f(full.seconds) for f in (min, statistics.median))
    print(
        f"an epoch of the tail takes {shortest:.3f} of one of everything (bar {TIME_BAR}), by "
        f"medians {median:.3f}"
    )
    for part in ("validation", "test"):
        ours, theirs = (statistics.mean(getattr(one, part)) for one in (tail, full))
        print(f"its {part} accuracy is {100 * (ours - theirs):+.2f} points away (bar -1)")
    print(
        f"its maps take {seconds_of_maps:.1f} s once, as long as "
        f"{seconds_of_maps / min(full.seconds):.2f} epochs of everything"
    )


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--archive", default="flowers.zip")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    main(open_dataset(options.data / options.archive), options.size, options.epochs, options.seeds)
