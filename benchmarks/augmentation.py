"""How much faster batched augmentation is than torchvision's chain of PIL transforms.

The work is that of a CIFAR-10 training picture: shift by up to 4 pixels with a reflected border,
mirror, scale, normalise. One thread; both sides take turns, and the quickest turn of each counts,
so that a busy machine slows both alike.

    python benchmarks/augmentation.py        (needs the extras `train` and `zoo`)
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from kenspeckle.augmentation import augment
from kenspeckle.config import AugmentationConfig
from kenspeckle.layers import normalise

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIZE = 32


def torchvision_chain(pictures: list[Image.Image]) -> Tensor:
    """Return a batch of inputs, one picture after another."""
    chain = transforms.Compose(
        [
            transforms.RandomCrop(SIZE, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )
    return torch.stack([chain(picture) for picture in pictures])


def batched(images: Tensor, items: Tensor) -> Tensor:
    """Return a batch of inputs, all pictures at once."""
    config = AugmentationConfig(flip=True, shift=4)
    return normalise(augment(images, items, config, seed=0, epoch=0), MEAN, DEVIATION)


def seconds(work: Callable[[], Tensor], num_batches: int) -> float:
    """Return the wall time of that many calls."""
    start = time.perf_counter()
    for _ in range(num_batches):
        work()
    return time.perf_counter() - start


def main() -> None:
    """Print microseconds per picture of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64, help="pictures per batch")
    parser.add_argument("--num-batches", type=int, default=8, help="batches per turn")
    parser.add_argument("--num-turns", type=int, default=20, help="turns of each side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (options.batch_size, SIZE, SIZE, 3), dtype=np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    images, items = torch.from_numpy(pixels), torch.arange(options.batch_size)
    sides: dict[str, Callable[[], Tensor]] = {
        "torchvision's PIL chain": lambda: torchvision_chain(pictures),
        "batched": lambda: batched(images, items),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(options.num_turns):
        for name, work in sides.items():
            best[name] = min(best[name], seconds(work, options.num_batches))
    theirs, ours = (b / options.num_batches / options.batch_size * 1e6 for b in best.values())
    for name, cost in zip(sides, (theirs, ours), strict=True):
        print(f"{name:24}{cost:8.1f} us per picture")
    print(f"{'ratio':24}{theirs / ours:8.1f} (goal: at least 20)")


if __name__ == "__main__":
    main()
