"""The training loop, in the open: a generator that knows tensors only.

    for step in train(model, batches, objective, optimizer, update, rate):
        ...validation, averaging, early stopping, checkpoints, progress: ordinary code of the caller

What a batch is, where it came from and who listens to the steps is none of the loop's business.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kenspeckle.core import InvalidValueError, nearest
from kenspeckle.optimizers import Update

__all__ = ["EarlyStopping", "Step", "autocast", "choose_device", "train"]

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Step:
    """One batch seen.

    Attributes:
        number: steps before this one, from the start of the run.
        loss: mean loss of the batch, a detached scalar on the device; reading it waits for the
            device, so the caller decides when to look.
        rate: learning rate that was used.
        num_items: pictures in the batch.
    """

    number: int
    loss: Tensor
    rate: float
    num_items: int


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    objective: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    *,
    update: Update,
    rate: Callable[[int], float],
    start: int = 0,
) -> Iterator[Step]:
    """Train for as long as there are batches, and yield after each.

    Args:
        model: from inputs ``(B, ...)`` to logits ``(B, K)``.
        batches: pairs of inputs and labels ``(B,)``, on the model's device.
        objective: from logits and labels to a loss per item, ``(B,)``.
        optimizer: each of its groups keeps its own ratio to the learning rate.
        update: how a loss becomes a move of the weights.
        rate: from the step's number to the factor on each group's ``initial_lr``.
        start: number of the first step, when a run goes on from an earlier one.

    Yields:
        The step that was made.
    """
    model.train()
    for number, (inputs, labels) in enumerate(batches, start):
        factor = rate(number)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        def loss_of_batch(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            return objective(model(inputs).float(), labels).mean()

        loss = update(optimizer, loss_of_batch, len(labels))
        yield Step(number, loss, optimizer.param_groups[0]["lr"], len(labels))


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        InvalidValueError: the name is unknown, or this machine has no such device.
    """
    found = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if found[kind]))
    if name not in found:
        raise InvalidValueError(f"no device named '{name}'; {nearest(name, DEVICES)}")
    if not found[name]:
        present = ", ".join(kind for kind, there in found.items() if there)
        raise InvalidValueError(f"device '{name}' is not on this machine; here: {present}")
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the mixed-precision context for a device, or one that does nothing.

    Only CUDA devices with native bfloat16 take it: on a CPU without it a bfloat16 convolution is
    ten times slower than float32, and float16 would need loss scaling. Steps may be taken inside:
    weights are cast anew in each forward pass, where torch's cache would keep the first cast until
    the context ends.
    """
    if precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(False):
        return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


class EarlyStopping:
    """Remember the best value, and say when too many have passed without a better one.

    Args:
        patience: values without a better one before `exhausted`; 0 never stops.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = float("-inf")
        self.since = 0

    def improved(self, value: float) -> bool:
        """Note a value, higher is better, and return whether it is the best so far."""
        better = value > self.best
        self.best = max(self.best, value)
        self.since = 0 if better else self.since + 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether `patience` values have passed without a better one."""
        return 0 < self.patience <= self.since
