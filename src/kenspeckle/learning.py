"""The epochs of one run: training, validation, averaged weights, early stopping, the best kept.

Everything here is ordinary code around the loop of `training`: it knows pixels and a recipe, and
neither files nor reports.
"""

import contextlib
import copy
import dataclasses
import datetime as dt
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kenspeckle.augmentation import augment
from kenspeckle.calibration import softmax
from kenspeckle.config import Recipe
from kenspeckle.core import Normalisation, Stage, TrainingError
from kenspeckle.layers import Classifier, normalise, reseed
from kenspeckle.losses import objective
from kenspeckle.metrics import accuracy, log_loss
from kenspeckle.optimizers import Ema, Update, accumulate, clip, optimizer, plain, schedule
from kenspeckle.pixels import PixelStore, batches, permutation, spans
from kenspeckle.results import Epoch
from kenspeckle.training import EarlyStopping, Step, autocast, train

__all__ = ["EpochDone", "Learned", "Task", "learn", "logits_of"]

State = dict[str, Tensor]
GROUP_BYTES = 2**21
STEPS_BETWEEN_LOOKS = 50  # at the loss on an accelerator, where each look waits for the device


@dataclass(frozen=True, eq=False)
class Task:
    """What there is to learn.

    Attributes:
        store: the pictures.
        labels: ``int64 (N,)``, of every picture in the store.
        train: ``int64``, indices to learn from.
        validation: ``int64``, indices that choose the best epoch.
        num_classes: K.
        normalisation: from grey levels to inputs.
    """

    store: PixelStore
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    num_classes: int
    normalisation: Normalisation


@dataclass(frozen=True)
class EpochDone:
    """An epoch was trained and validated.

    Attributes:
        epoch: its measurements.
        num_epochs: epochs in all.
        best: whether it is the best so far.
    """

    epoch: Epoch
    num_epochs: int
    best: bool

    @property
    def seconds_left(self) -> float:
        """Seconds until the last epoch ends, if each takes as long as this one."""
        return self.epoch.seconds * (self.num_epochs - self.epoch.number)

    def __str__(self) -> str:
        e = self.epoch
        left = (
            f", {dt.timedelta(seconds=round(self.seconds_left))} left" if self.seconds_left else ""
        )
        return (
            f"epoch {e.number}/{self.num_epochs}  train loss {e.train_loss:.3f}  "
            f"validation loss {e.validation_loss:.3f}  accuracy {e.validation_accuracy:.3f}"
            f"{' (best)' if self.best else ''}  {e.seconds:.1f} s{left}"
        )


@dataclass(frozen=True, eq=False)
class Learned:
    """What training came to; the network holds the weights of the best epoch.

    Attributes:
        history: epochs in order.
        best_epoch: number of the best one, from 1.
        stopped_because: in words.
        interrupted: whether the user stopped it.
        validation_logits: ``float32 (V, K)`` of the best epoch.
    """

    history: tuple[Epoch, ...]
    best_epoch: int
    stopped_because: str
    interrupted: bool
    validation_logits: NDArray[np.float32]


def logits_of(
    network: Classifier, task: Task, items: NDArray[np.int64], device: torch.device
) -> NDArray[np.float32]:
    """Return the network's logits, ``float32 (len(items), K)``, in evaluation mode."""
    network.eval()
    rows = [np.empty((0, task.num_classes), np.float32)]
    with torch.no_grad():
        for batch in batches(task.store, items, 256):
            images = torch.from_numpy(batch.images).to(device)
            inputs = normalise(images, task.normalisation.mean, task.normalisation.deviation)
            rows.append(network(inputs).float().cpu().numpy())
    return np.concatenate(rows)


class _Run:
    """The moving parts of a run: optimizer, learning rate, averaged weights, running counts."""

    def __init__(
        self, network: Classifier, task: Task, recipe: Recipe, device: torch.device
    ) -> None:
        self.network, self.task, self.recipe, self.device = network, task, recipe, device
        counts = np.bincount(task.labels[task.train], minlength=task.num_classes)
        self.item_loss = objective(recipe.loss, counts.tolist())
        self.optimizer = optimizer(recipe.optimizer, network)
        self.num_steps = len(spans(len(task.train), recipe.training.batch_size))
        moves = 1 if recipe.optimizer.name == "gd" else self.num_steps
        self.factor = schedule(recipe.schedule, recipe.training.epochs * moves)
        self.steps_per_move = self.num_steps // moves
        self.ema = Ema(network, recipe.training.ema_decay) if recipe.training.ema_decay else None
        # Small pictures are fetched and augmented many batches at a time; calls would cost more.
        one = task.store.gather(task.train[:1]).nbytes * recipe.training.batch_size
        self.group_size = recipe.training.batch_size * max(1, GROUP_BYTES // one)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.num_seen = 0

    def update(self) -> Update:
        norm = self.recipe.training.clip_norm
        if self.recipe.optimizer.name == "gd":
            return accumulate(len(self.task.train), norm or math.inf)
        return clip(norm) if norm else plain

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.hits += (logits.detach().argmax(dim=1) == labels).sum()
        self.num_seen += len(labels)
        return self.item_loss(logits, labels)

    def feed(self, epoch: int, num_threads: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed, task, batch_size = self.recipe.seed, self.task, self.recipe.training.batch_size
        order = task.train[permutation(len(task.train), seed, epoch)]
        norm = task.normalisation
        for group in batches(task.store, order, self.group_size, num_threads):
            items = torch.from_numpy(group.items).to(self.device)
            images = torch.from_numpy(group.images).to(self.device)
            images = augment(images, items, self.recipe.augmentation, seed, epoch)
            labels = torch.from_numpy(task.labels[group.items]).to(self.device)
            for part in spans(len(items), batch_size):
                yield normalise(images[part], norm.mean, norm.deviation), labels[part]

    def steps(self, epoch: int, num_threads: int) -> Generator[Step, None, None]:
        reseed(self.network, self.recipe.seed, epoch)
        self.hits.zero_()
        self.num_seen = 0
        yield from train(
            self.network,
            self.feed(epoch, num_threads),
            self.loss,
            self.optimizer,
            update=self.update(),
            rate=lambda number: self.factor(number // self.steps_per_move),
            start=epoch * self.num_steps,
        )

    def weights(self) -> State:
        return self.ema.weights() if self.ema else self.network.state_dict()


def learn(
    network: Classifier,
    task: Task,
    recipe: Recipe,
    device: torch.device,
    *,
    stop: threading.Event,
    keep: Callable[[State], None],
    num_loader_threads: int = 0,
) -> Generator[Stage | EpochDone, None, Learned]:
    """Train for the recipe's epochs and leave the best epoch's weights in the network.

    The best epoch is the one with the highest validation accuracy, the earliest of equals.

    Args:
        network: initialised, on the device.
        task: pictures and labels.
        recipe: every setting.
        device: where to compute.
        stop: when set, training ends after the running batch with the best weights so far.
        keep: called with the weights each time they are the best so far.
        num_loader_threads: threads that fetch pictures ahead; the result does not depend on it.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    run = _Run(network, task, recipe, device)
    judge = copy.deepcopy(network) if run.ema else network
    stopping = EarlyStopping(recipe.training.patience)
    history: list[Epoch] = []
    best_state: State = {}
    best_logits = np.empty((0, task.num_classes), np.float32)
    why = f"all {recipe.training.epochs} epochs are done"
    for number in range(recipe.training.epochs):
        started = time.perf_counter()
        mean_loss, rate = yield from _epoch(run, number, num_loader_threads, stop)
        if stop.is_set() and history:
            why = f"interrupted in epoch {number + 1}"
            break
        if run.ema:
            judge.load_state_dict(run.weights())
        logits = logits_of(judge, task, task.validation, device)
        epoch = _measured(run, logits, number + 1, mean_loss, rate)
        epoch = dataclasses.replace(epoch, seconds=time.perf_counter() - started)
        history.append(epoch)
        better = stopping.improved(epoch.validation_accuracy)
        if better:
            best_state = {k: v.detach().clone() for k, v in judge.state_dict().items()}
            best_logits = logits
            keep(best_state)
        yield EpochDone(epoch, recipe.training.epochs, better)
        if stop.is_set():
            why = f"interrupted in epoch {number + 1}"
            break
        if stopping.exhausted:
            why = f"no better validation accuracy in {stopping.patience} epochs"
            break
    network.load_state_dict(best_state)
    best = max(history, key=lambda epoch: epoch.validation_accuracy)
    return Learned(tuple(history), best.number, why, stop.is_set(), best_logits)


def _epoch(
    run: _Run, number: int, num_threads: int, stop: threading.Event
) -> Generator[Stage, None, tuple[float, float]]:
    """Train one epoch; return the mean loss and the last learning rate."""
    total = run.recipe.training.epochs * run.num_steps
    losses: list[Tensor] = []  # they stay on the device: reading one waits for it
    rate = 0.0
    with (
        autocast(run.device, run.recipe.training.precision),
        contextlib.closing(run.steps(number, num_threads)) as steps,
    ):
        for step in steps:
            if run.ema and (step.number + 1) % run.steps_per_move == 0:
                run.ema.update(run.network)
            losses.append(step.loss * step.num_items)
            rate = step.rate
            detail = ""
            if run.device.type == "cpu" or step.number % STEPS_BETWEEN_LOOKS == 0:
                detail = _look(step)
            yield Stage("training", step.number + 1, total, detail)
            if stop.is_set():
                break
    # Summed on the CPU, since not every accelerator has double precision.
    return float(torch.stack(losses).cpu().double().sum()) / run.num_seen, rate


def _look(step: Step) -> str:
    loss = float(step.loss)
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {step.number + 1} (learning rate {step.rate:g}); try a "
            f"lower one, for example --set lr={step.rate / 10:.1g}, or --set clip_norm=1"
        )
    return f"loss {loss:.3f}  rate {step.rate:.2g}"


def _measured(
    run: _Run, logits: NDArray[np.float32], number: int, train_loss: float, rate: float
) -> Epoch:
    """Return the epoch's measurements; the time is filled in by the caller."""
    labels = run.task.labels[run.task.validation]
    if not np.isfinite(logits).all():
        raise TrainingError(
            f"the network's outputs are not finite after epoch {number}; try a lower learning rate"
        )
    return Epoch(
        number=number,
        train_loss=train_loss,
        learning_rate=rate,
        validation_loss=log_loss(labels, softmax(logits)),
        validation_accuracy=accuracy(labels, logits.argmax(axis=1)),
        train_accuracy=int(run.hits) / run.num_seen,
        seconds=0.0,
    )
