"""Claims: of 5 % flipped labels at least 0.8 rank among the top 10 %; strangers rank high.

    python benchmarks/labels.py --data DATA

DATA holds the archives of real pictures. At most 2,000 pictures of each are drawn, three times;
5 % of their labels become another class at random. Then 20 pictures of another archive are mixed
in. Flowers and X-rays have wrong labels of their own, and CIFAR-10 is enlarged from 32 pixels.
"""

import argparse
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import Geometry
from kenspeckle.features import default_size, features_of
from kenspeckle.images import decode, prepare
from kenspeckle.pixels import Cache, CachedPixels, default_cache_folder
from kenspeckle.sources import open_dataset
from kenspeckle.suspects import compact, label_suspects, out_of_fold, outliers

ARCHIVES = ("objects", "traffic_lights", "pneumonia", "cifar10-test", "flowers")
SEEDS = range(3)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Features ``float32 (N, 1280)``, labels ``int64 (N,)`` and the names of the classes."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def load(path: Path, max_pictures: int) -> Pictures:
    """Return the features of at most that many pictures of an archive, drawn at random."""
    dataset = open_dataset(path)
    chosen = np.random.default_rng(0).permutation(len(dataset.items))[:max_pictures]
    sources = [dataset.reader.read(int(i)) for i in chosen]
    files = [source for source in sources if isinstance(source, bytes)]
    shapes = np.array([decode(file, "picture").shape[:2] for file in files[:100]])
    side = default_size(float(np.median(np.sqrt(shapes.prod(axis=1)))))
    geometry = Geometry((side, side))
    images = np.stack([prepare(file, "picture", geometry) for file in files])
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    work = features_of(CachedPixels(images, rows), geometry, Cache(default_cache_folder()))
    while True:
        try:
            next(work)
        except StopIteration as end:
            return Pictures(end.value, dataset.labels[chosen], dataset.classes)


def flipped(name: str, pictures: Pictures) -> None:
    """Print how many flipped labels are found."""
    num_pictures, num_classes = len(pictures.labels), len(pictures.classes)
    small, rows = compact(pictures.features), []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        labels = pictures.labels.copy()
        wrong = rng.permutation(num_pictures)[: num_pictures // 20]
        labels[wrong] = (labels[wrong] + rng.integers(1, num_classes, len(wrong))) % num_classes
        begun = time.perf_counter()
        groups = np.arange(num_pictures)
        found = label_suspects(out_of_fold(small, labels, groups, num_classes, seed), labels)
        seconds = time.perf_counter() - begun
        issues = found.ranking[: found.num_issues]
        rows.append(
            (
                np.isin(wrong, found.ranking[: num_pictures // 10]).mean(),
                found.num_issues / num_pictures,
                np.isin(issues, wrong).mean(),
                (found.suggested == pictures.labels).mean(),
                seconds,
            )
        )
    clean = out_of_fold(small, pictures.labels, np.arange(num_pictures), num_classes, 0)
    mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
    print(
        f"{name:<15}{num_pictures:>6} recall {mean[0]:.3f} ± {spread[0]:.3f} in the top 10 %; "
        f"issues {mean[1]:.3f} of all, {mean[2]:.2f} of them flipped; before flipping "
        f"{label_suspects(clean, pictures.labels).num_issues / num_pictures:.3f}; "
        f"head right on {mean[3]:.3f}; {mean[4]:.1f} s"
    )


def strangers(name: str, pictures: Pictures, other: str, guests: Pictures) -> None:
    """Print how many of 20 pictures of another kind are found."""
    num_pictures, num_classes = len(pictures.labels), len(pictures.classes)
    rng = np.random.default_rng(0)
    chosen = guests.features[rng.permutation(len(guests.features))[:20]]
    features = np.concatenate([pictures.features, chosen])
    labels = np.concatenate([pictures.labels, rng.integers(0, num_classes, 20)])
    found = outliers(features, labels, np.arange(len(features)), seed=0)
    alone = outliers(pictures.features, pictures.labels, np.arange(num_pictures), seed=0)
    ranked = np.flatnonzero(found.ranking >= num_pictures)
    print(
        f"{name:<15}+ 20 of {other:<15}: in the top 1, 5, 10 %: "
        f"{', '.join(str((ranked < len(features) * p // 100).sum()) for p in (1, 5, 10))}; counted "
        f"{(found.ranking[: found.num_outliers] >= num_pictures).sum()} strangers of "
        f"{found.num_outliers} outliers; {alone.num_outliers} without them"
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    data = parser.parse_args().data
    sets = {name: load(data / f"{name}.zip", 2_000) for name in ARCHIVES}
    for name, pictures in sets.items():
        flipped(name, pictures)
    for name, pictures in sets.items():
        for other, guests in sets.items():
            if other != name:
                strangers(name, pictures, other, guests)


if __name__ == "__main__":
    main()
