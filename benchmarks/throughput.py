"""Claim: a ResNet-type net trains at 0.70 or more of the machine's float32 matrix rate.

    python benchmarks/throughput.py

A training's rate is that of whole epochs of the real loop on random pixels: feed, augmentation and
optimizer take their time, but only convolutions and linear layers count, forward and backward, with
2 operations for a multiply-add. Those with the zeros of the padding are counted; norms, activations
and what the optimizer multiplies are not. The matrix rate is that of the product of two square
matrices, by the same threads in the same process, all interleaved; the best of each counts.

There are two matrix rates. `torch.matmul` calls MKL, which reaches half of what an AMD processor
can do or less; oneDNN, which computes torch's convolutions, comes nearer, so that trainings can
exceed the first rate. The share of the second is the one to believe.
EfficientNet-Lite0 is there for information: its depthwise convolutions wait for memory.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from kenspeckle import learning
from kenspeckle.backbones import open_backbone
from kenspeckle.config import Recipe
from kenspeckle.core import Normalisation
from kenspeckle.layers import Classifier
from kenspeckle.models import build
from kenspeckle.pixels import CachedPixels
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings

BAR = 0.70
MATRIX_SIDE = 2048
NUM_CLASSES = 10
NUM_PRODUCTS = 5  # timed as one: a single one can meet a burst of the clock, an epoch does not

NETS = {
    "resnet 32,64,128": ["model=resnet", "channels=32,64,128"],
    "resnet 64,128,256,512": ["model=resnet", "channels=64,128,256,512"],  # ResNet-18's widths
    "speed 32,128,128": ["channels=32,128,128"],
    "speed 64,256,256": ["channels=64,256,256"],
}


@dataclass(frozen=True, eq=False)
class Case:
    """A training to time, and the floating-point operations of one of its epochs."""

    name: str
    run: learning._Run
    size: int
    num_operations: int
    bar: float | None


def cases(num_batches: int) -> Iterator[Case]:
    """Yield the trainings."""
    for name, words in NETS.items():
        for batch_size in (64, 128):
            recipe = with_settings(named("speed"), [*words, f"batch_size={batch_size}"])
            generator = torch.Generator().manual_seed(0)
            network = build(recipe.model, NUM_CLASSES, (32, 32), generator)
            yield _case(name, network, recipe, num_batches, BAR)
    recipe = with_settings(named("fine-tune"), ["size=160"])
    backbone = open_backbone(recipe.model, recipe.transfer.weights)
    network = backbone.network(NUM_CLASSES, (160, 160), torch.Generator().manual_seed(0))
    yield _case(backbone.name, network, recipe, num_batches, None)


def _case(
    name: str, network: Classifier, recipe: Recipe, num_batches: int, bar: float | None
) -> Case:
    size, batch_size = (recipe.pixels.size or (32, 32))[0], recipe.training.batch_size
    num_pictures = num_batches * batch_size
    chance = np.random.default_rng(0)
    images = chance.integers(0, 256, (num_pictures, size, size, 3), np.uint8)
    store = CachedPixels(images, np.zeros((num_pictures, 16), np.uint8))
    every = np.arange(num_pictures)
    task = learning.Task(store, every % NUM_CLASSES, every, every[:1], NUM_CLASSES, Normalisation())
    run = learning._Run(network, task, recipe)
    return Case(name, run, size, num_batches * operations(network, batch_size, size), bar)


def operations(network: Classifier, batch_size: int, size: int) -> int:
    """Return the floating-point operations of one step, forward and backward."""
    # By shapes alone, without computing; `eval` since dropout has no chance on meta tensors.
    twin = copy.deepcopy(network).to("meta").eval()
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        twin(torch.empty(batch_size, 3, size, size, device="meta")).sum().backward()
    return int(counter.get_total_flops())


def _convolution_backward(
    grad_shape: list[int],
    x_shape: list[int],
    weight_shape: list[int],
    *rest: Any,  # noqa: ANN401 - as aten.convolution_backward has them
    **_: Any,  # noqa: ANN401
) -> int:
    """Return the operations of the gradients that are asked for, each as many as forward.

    Torch's own formula takes the weights' gradient of a grouped convolution for that of a full one:
    for a depthwise one that is as many times too much as there are channels.
    """
    (*_rest, (of_input, of_weight, _of_bias)) = rest
    return int(of_input + of_weight) * int(conv_flop_count(x_shape, weight_shape, grad_shape))


def products() -> dict[str, Callable[[], Tensor]]:
    """Return the ways to multiply two matrices, by name."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(MATRIX_SIDE, MATRIX_SIDE, generator=generator) for _ in range(2))
    result, packed_left, packed_right = torch.empty_like(left), left.to_mkldnn(), right.to_mkldnn()
    return {
        "torch.matmul": lambda: torch.matmul(left, right, out=result),
        "oneDNN": lambda: F.linear(packed_left, packed_right),
    }


def matrix_rate(product: Callable[[], Tensor]) -> float:
    """Return the rate of a few matrix products, in operations per second."""
    started = time.perf_counter()
    for _ in range(NUM_PRODUCTS):
        product()
    return NUM_PRODUCTS * 2 * MATRIX_SIDE**3 / (time.perf_counter() - started)


def training_rate(case: Case) -> float:
    """Return the rate of one epoch, in operations per second."""
    started = time.perf_counter()
    for _step in case.run.steps(0, 0):
        pass
    return case.num_operations / (time.perf_counter() - started)


def main(num_rounds: int, num_batches: int) -> None:
    """Print the rates, and their shares of the matrix rate."""
    trainings, ways = list(cases(num_batches)), products()
    rates: list[list[float]] = [[] for _ in trainings]
    matrix_rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for case, found in zip(trainings, rates, strict=True):
            for name, product in ways.items():
                matrix_rates[name].append(matrix_rate(product))
            found.append(training_rate(case))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, found in matrix_rates.items():
        print(
            f"float32 product of {MATRIX_SIDE} x {MATRIX_SIDE} by {name}: {max(found) / 1e9:.1f} "
            f"GFLOP/s, median {np.median(found) / 1e9:.1f}"
        )
    shares = "  ".join(f"of {name}" for name in ways)
    print(f"network                 size  batch  GFLOP/step  pictures/s  GFLOP/s  {shares}")
    for case, found in zip(trainings, rates, strict=True):
        batch_size = case.run.recipe.training.batch_size
        per_step, rate = case.num_operations / num_batches, max(found)
        shares = "  ".join(f"{rate / max(matrix_rates[name]):>{3 + len(name)}.2f}" for name in ways)
        bar = "" if case.bar is None else f"  (bar {case.bar:.2f})"
        print(
            f"{case.name:<22}  {case.size:>4}  {batch_size:>5}  {per_step / 1e9:>10.1f}  "
            f"{batch_size * rate / per_step:>10.0f}  {rate / 1e9:>7.1f}  {shares}{bar}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batches", type=int, default=8, help="in an epoch")
    options = parser.parse_args()
    main(options.rounds, options.batches)
