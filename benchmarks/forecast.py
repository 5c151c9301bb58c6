"""Claim: the forecast's 90 % interval holds what twice the pictures bring in nine of ten cases.

    python benchmarks/forecast.py --data DATA

From a half and a quarter of each archive, drawn ten times, the accuracy with twice as many pictures
is forecast. What they bring is the mean of 20 heads that learn from so many pictures of the whole
archive, drawn at random, and are asked about the others.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from labels import ARCHIVES, Pictures, load
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from kenspeckle.forecast import forecast
from kenspeckle.suspects import compact

NUM_SEEDS = 10
NUM_HEADS = 20


def brings(
    features: NDArray[np.float32], pictures: Pictures, num_pictures: int
) -> tuple[float, NDArray[np.float64]]:
    """Return accuracy and recalls of heads that learn from `num_pictures`."""
    labels, rng = pictures.labels, np.random.default_rng(num_pictures)
    num_classes = len(pictures.classes)
    accuracies, right, num_asked = [], np.zeros(num_classes), np.zeros(num_classes)
    for _ in range(NUM_HEADS):
        order = rng.permutation(len(labels))
        learned, asked = order[:num_pictures], order[num_pictures:]
        head = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
        head.fit(features[learned], labels[learned])
        hits = head.predict(features[asked]) == labels[asked]
        accuracies.append(hits.mean())
        right += np.bincount(labels[asked], hits, num_classes)
        num_asked += np.bincount(labels[asked], minlength=num_classes)
    return float(np.mean(accuracies)), right / num_asked


def judge(name: str, pictures: Pictures, part: int) -> tuple[list[bool], list[bool]]:
    """Print how far forecasts from one `part`-th of the pictures are from what came."""
    num_all = len(pictures.labels)
    num_pictures = num_all // part
    everything = compact(pictures.features)
    now, recalls_now = brings(everything, pictures, num_pictures)
    # where twice as many are all, some must be left to ask
    then, recalls_then = brings(everything, pictures, min(2 * num_pictures, num_all * 19 // 20))
    gained = dict(zip(pictures.classes, recalls_then - recalls_now, strict=True))
    errors, unchanged, widths, held, gains, held_gains = [], [], [], [], [], []
    begun = time.perf_counter()
    for seed in range(NUM_SEEDS):
        drawn = np.random.default_rng(seed).permutation(num_all)[:num_pictures]
        groups = np.arange(num_pictures)
        small = compact(pictures.features[drawn])
        found = forecast(small, pictures.labels[drawn], groups, pictures.classes, seed)
        if found is None:
            print(f"{name:<15}1/{part}: {num_pictures} pictures are too few")
            return [], []
        errors.append(abs(found.expected - then))
        unchanged.append(abs(found.accuracy[-1] - then))
        widths.append(found.high - found.low)
        held.append(found.low <= then <= found.high)
        gains += [abs(one.gain - gained[one.name]) for one in found.classes]
        held_gains += [one.low <= gained[one.name] <= one.high for one in found.classes]
    seconds = (time.perf_counter() - begun) / NUM_SEEDS
    print(
        f"{name:<15}{num_pictures:>5} -> twice: {now:.4f} -> {then:.4f}; mean absolute error "
        f"{np.mean(errors):.4f} (of no change: {np.mean(unchanged):.4f}), held {sum(held)} of "
        f"{NUM_SEEDS}, width {np.mean(widths):.3f}; gain of a class: error {np.mean(gains):.3f} "
        f"(of none: {np.mean(np.abs(list(gained.values()))):.3f}), held {np.mean(held_gains):.2f}; "
        f"{seconds:.1f} s"
    )
    return held, held_gains


def main() -> None:
    """Print the figures of each archive, and the coverage of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    data = parser.parse_args().data
    held, held_gains = [], []
    for name in ARCHIVES:
        pictures = load(data / f"{name}.zip", 3_000)
        for part in (2, 4):
            whole, gains = judge(name, pictures, part)
            held += whole
            held_gains += gains
    print(
        f"90 % intervals held {np.mean(held):.3f} of {len(held)} forecasts "
        f"and {np.mean(held_gains):.3f} of {len(held_gains)} gains of a class"
    )


if __name__ == "__main__":
    main()
