"""Claim: `seed-cnn` is the textbook run at a third of the time, and nothing else has changed.

Baseline: torchvision's ImageFolder, Resize / ToTensor / Normalize and a DataLoader around the same
network in plain PyTorch (NCHW, convolution, ReLU, pooling), same settings. Both start from the same
weights and see the same order of pictures, so that the accuracies can be compared seed by seed.

    python benchmarks/seed_cnn.py accuracy --data DATA    10 epochs of 3 seeds, both ways
    python benchmarks/seed_cnn.py time --data DATA        interleaved epochs, the shortest of each

Needs the zoo environment, and cifar10-train.zip and cifar10-test.zip in DATA.
"""

import argparse
import copy
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from recipes import unpack
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from kenspeckle.core import Normalisation
from kenspeckle.images import Limits
from kenspeckle.layers import Classifier
from kenspeckle.learning import EpochDone, Task, learn, logits_of
from kenspeckle.models import build
from kenspeckle.pixels import Cache, open_pixels, permutation
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings
from kenspeckle.sources import open_dataset

CPU = torch.device("cpu")


def plain_network(weights: list[torch.Tensor]) -> nn.Sequential:
    """Return the textbook network with the given weights."""
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    with torch.no_grad():
        for mine, given in zip(network.parameters(), weights, strict=True):
            mine.copy_(given.reshape(mine.shape))
    return network


def plain_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: datasets.ImageFolder,
    order: NDArray[np.int64],
    num_workers: int,
) -> float:
    """Train one epoch the plain way and return its seconds."""
    loader = DataLoader(folder, batch_size=64, sampler=order.tolist(), num_workers=num_workers)
    loss_of = nn.CrossEntropyLoss()
    network.train()
    started = time.perf_counter()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = loss_of(network(images), labels)
        loss.backward()
        optimizer.step()
    return time.perf_counter() - started


@torch.no_grad()
def plain_accuracy(network: nn.Module, folder: datasets.ImageFolder) -> float:
    """Return the share of a folder that the network gets right."""
    network.eval()
    hits = sum(
        int((network(images).argmax(1) == labels).sum())
        for images, labels in DataLoader(folder, batch_size=256)
    )
    return hits / len(folder)


def folders(data: Path, target: Path) -> list[datasets.ImageFolder]:
    """Unpack both archives and return them as ImageFolders."""
    chain = transforms.Compose(
        [
            transforms.Resize((32, 32)),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    unpack(data, target)
    return [datasets.ImageFolder(str(target / part), chain) for part in ("train", "test")]


def our_task(folder: Path, cache: Path) -> tuple[Task, float]:
    """Return the pictures of a folder as ours, and the seconds that reading them took."""
    started = time.perf_counter()
    dataset = open_dataset(folder)
    recipe = named("seed-cnn")
    reading = open_pixels(dataset, recipe.pixels.geometry((32, 32)), Limits(), Cache(cache))
    try:
        while True:
            next(reading)
    except StopIteration as end:
        store = end.value
    everything = np.arange(len(dataset.items))
    task = Task(store, dataset.labels, everything, everything[:10], 10, Normalisation())
    return task, time.perf_counter() - started


def our_epochs(task: Task, seed: int, epochs: int) -> tuple[Classifier, list[float]]:
    """Train our way; return the network and the seconds of each epoch."""
    recipe = with_settings(named("seed-cnn"), [f"epochs={epochs}", f"seed={seed}"])
    network = build(recipe.model, 10, (32, 32), torch.Generator().manual_seed(seed))
    seconds = []
    learning = learn(network, task, recipe, stop=threading.Event(), keep=lambda state: None)
    started = time.perf_counter()
    for event in learning:
        if isinstance(event, EpochDone):
            seconds.append(time.perf_counter() - started)
            last = copy.deepcopy(network)  # of this epoch; `learn` ends with the best one's
            started = time.perf_counter()
    return last, seconds


def initial_weights(seed: int) -> list[torch.Tensor]:
    """Return the weights that our run of this seed starts from."""
    generator = torch.Generator().manual_seed(seed)
    return list(build(named("seed-cnn").model, 10, (32, 32), generator).parameters())


def compare_time(data: Path, rounds: int) -> None:
    """Print the shortest epochs of interleaved runs."""
    with tempfile.TemporaryDirectory() as name:
        target = Path(name)
        train, _ = folders(data, target)
        first, cached, plain = [], [], {0: [], 2: []}
        for number in range(rounds):
            task, reading = our_task(target / "train", target / f"cache-{number}")
            _, seconds = our_epochs(task, 0, 2)
            first.append(reading + seconds[0])
            cached.append(min(seconds))
            for workers, times in plain.items():
                network = plain_network(initial_weights(0))
                optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
                order = permutation(len(train), 0, number)
                times.append(plain_epoch(network, optimizer, train, order, workers))
            print(
                f"round {number + 1}: ours first {first[-1]:.1f} s, cached {cached[-1]:.1f} s; "
                f"plain {plain[0][-1]:.1f} s (0 workers), {plain[2][-1]:.1f} s (2)",
                flush=True,
            )
        best = min(min(times) for times in plain.values())
    print(f"first epoch with decoding: {min(first) / best:.3f} of the plain loop (bar 0.60)")
    print(f"epoch from the cache:      {min(cached) / best:.3f} of the plain loop (bar 0.36)")


def our_accuracies(target: Path, seeds: int, epochs: int) -> Iterator[float]:
    """Yield the test accuracy of each seed, trained our way."""
    task, _ = our_task(target / "train", target / "cache")
    test, _ = our_task(target / "test", target / "cache")
    for seed in range(seeds):
        # The last epoch's weights, as in the plain loop: no validation split chooses.
        network, _ = our_epochs(task, seed, epochs)
        logits = logits_of(network, test, test.train, CPU)
        yield float((logits.argmax(1) == test.labels).mean())


def plain_accuracies(parts: list[datasets.ImageFolder], seeds: int, epochs: int) -> Iterator[float]:
    """Yield the test accuracy of each seed, trained the plain way."""
    train, test = parts
    for seed in range(seeds):
        network = plain_network(initial_weights(seed))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for epoch in range(epochs):
            plain_epoch(network, optimizer, train, permutation(len(train), seed, epoch), 2)
        yield plain_accuracy(network, test)


def compare_accuracy(data: Path, seeds: int, epochs: int, sides: list[str]) -> None:
    """Print test accuracies after training, ours and the plain loop's, seed by seed."""
    means = []
    with tempfile.TemporaryDirectory() as name:
        target = Path(name)
        parts = folders(data, target)
        runs = {
            "ours": our_accuracies(target, seeds, epochs),
            "plain": plain_accuracies(parts, seeds, epochs),
        }
        for side in sides:
            values = []
            for seed, accuracy in enumerate(runs[side]):
                values.append(accuracy)
                print(f"seed {seed}: {side} {accuracy:.4f}", flush=True)
            spread = statistics.stdev(values) if seeds > 1 else 0.0
            means.append(statistics.mean(values))
            print(f"{side}: {means[-1]:.4f} ± {spread:.4f} over {seeds} seeds")
    if len(means) == 2:
        print(f"difference of the means: {100 * abs(means[0] - means[1]):.2f} points (bar 1)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "time"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=("ours", "plain"), default=["ours", "plain"])
    options = parser.parse_args()
    if options.what == "time":
        compare_time(options.data, options.rounds)
    else:
        compare_accuracy(options.data, options.seeds, options.epochs, options.sides)
