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
from torch.nn import functional as F

from kenspeckle.augmentation import mix
from kenspeckle.calibration import softmax
from kenspeckle.config import AugmentationConfig, Recipe
from kenspeckle.core import InvalidValueError, Normalisation, Stage, TrainingError
from kenspeckle.feeding import Feed, PictureFeed, balanced_order, shuffled
from kenspeckle.layers import Classifier, reseed
from kenspeckle.losses import balanced_weights, mixed_cross_entropy, objective
from kenspeckle.metrics import accuracy, balanced_accuracy, confusion_matrix, log_loss
from kenspeckle.optimizers import Ema, Update, accumulate, clip, optimizer, plain, schedule
from kenspeckle.pacing import Pace
from kenspeckle.pixels import PixelStore, spans
from kenspeckle.results import Epoch
from kenspeckle.training import EarlyStopping, Step, autocast, train

__all__ = ["EpochDone", "Learned", "Task", "learn", "logits_of"]

State = dict[str, Tensor]
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
        balanced: whether the best epoch is the one with the best balanced accuracy.
        feed: what the network takes in instead of the pictures, where it is not they.
    """

    store: PixelStore
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    num_classes: int
    normalisation: Normalisation
    balanced: bool = False
    feed: Feed | None = None


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
        unaveraged_accuracy: validation accuracy of the last epoch's weights before averaging; None
            where nothing was averaged.
    """

    history: tuple[Epoch, ...]
    best_epoch: int
    stopped_because: str
    interrupted: bool
    validation_logits: NDArray[np.float32]
    unaveraged_accuracy: float | None = None


def logits_of(
    network: Classifier,
    task: Task,
    items: NDArray[np.int64],
    device: torch.device,
) -> NDArray[np.float32]:
    """Return the network's logits, ``float32 (len(items), K)``, in evaluation mode.

    Args:
        network: on the device.
        task: whose pictures.
        items: their numbers.
        device: where to compute.
    """
    network.eval()
    feed = task.feed or PictureFeed(task.store, task.normalisation, AugmentationConfig(), 0)
    rows = [np.empty((0, task.num_classes), np.float32)]
    with torch.no_grad():
        rows += [network(inputs).float().cpu().numpy() for inputs in feed.plain(items, device)]
    return np.concatenate(rows)


class _Run:
    """The moving parts of a run: optimizer, learning rate, averaged weights, running counts."""

    def __init__(
        self, network: Classifier, task: Task, recipe: Recipe, deadline: float | None = None
    ) -> None:
        self.network, self.task, self.recipe = network, task, recipe
        self.device = device = next(network.parameters()).device
        network.norms_frozen = recipe.transfer.norms == "frozen"
        self.feed = task.feed or PictureFeed(
            task.store, task.normalisation, recipe.augmentation, recipe.seed
        )
        counts = np.bincount(task.labels[task.train], minlength=task.num_classes)
        weighted = recipe.training.imbalance == "weights"
        self.item_loss = objective(recipe.loss, counts.tolist() if weighted else None)
        self.class_weights = balanced_weights(counts.tolist()).to(device) if weighted else None
        self.mixes = recipe.augmentation.mixup > 0 or recipe.augmentation.cutmix > 0
        self.correction = _correction(network, recipe, counts)
        self.optimizer = optimizer(
            recipe.optimizer, network, network.stages(), recipe.transfer.layer_decay
        )
        self.num_steps = len(spans(len(task.train), recipe.training.batch_size))
        moves = 1 if recipe.optimizer.name == "gd" else self.num_steps
        self.factor = schedule(recipe.schedule, recipe.training.epochs * moves)
        self.steps_per_move = self.num_steps // moves
        self.pace = Pace(recipe.training.epochs * moves, moves, deadline)
        self.ema = Ema(network, recipe.training.ema_decay) if recipe.training.ema_decay else None
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.num_seen = 0

    def update(self) -> Update:
        norm = self.recipe.training.clip_norm
        if self.recipe.optimizer.name == "gd":
            return accumulate(len(self.task.train), norm or math.inf)
        return clip(norm) if norm else plain

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.num_seen += len(labels)
        if self.mixes:
            self.hits += (logits.detach().argmax(dim=1) == labels.argmax(dim=1)).sum()
            smoothing = self.recipe.loss.label_smoothing
            return mixed_cross_entropy(logits, labels, smoothing, self.class_weights)
        self.hits += (logits.detach().argmax(dim=1) == labels).sum()
        return self.item_loss(logits, labels)

    def batches(self, epoch: int, num_threads: int) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, task = self.recipe, self.task
        if recipe.training.imbalance == "sampling":
            order = balanced_order(task.train, task.labels[task.train], recipe.seed, epoch)
        else:
            order = shuffled(task.train, recipe.seed, epoch)
        varied = self.feed.varied(
            order, recipe.training.batch_size, epoch, self.device, num_threads
        )
        for number, (inputs, items) in enumerate(varied):
            labels = torch.from_numpy(task.labels[items]).to(self.device)
            if self.mixes:
                targets = F.one_hot(labels, task.num_classes).to(inputs.dtype)
                words = (recipe.seed, epoch, number)
                yield mix(inputs, targets, recipe.augmentation, words)
            else:
                yield inputs, labels

    def steps(self, epoch: int, num_threads: int) -> Generator[Step, None, None]:
        reseed(self.network, self.recipe.seed, epoch)
        self.hits.zero_()
        self.num_seen = 0
        yield from train(
            self.network,
            self.batches(epoch, num_threads),
            self.loss,
            self.optimizer,
            update=self.update(),
            rate=lambda _: self.factor(self.pace.position),
            start=epoch * self.num_steps,
        )

    def weights(self) -> State:
        return self.ema.weights() if self.ema else self.network.state_dict()

    def answers(self, network: Classifier) -> NDArray[np.float32]:
        """Return the logits of the validation pictures, as they will be shipped."""
        logits = logits_of(network, self.task, self.task.validation, self.device)
        return np.asarray(logits + self.correction, np.float32)

    def score(self, epoch: Epoch) -> float:
        return epoch.score if epoch.score is not None else epoch.validation_accuracy


def _correction(
    network: Classifier, recipe: Recipe, counts: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return what is added to the logits after training: ``-log`` of each class's share.

    Source: Menon et al. 2021, section 4.1, arXiv 2007.07314.
    """
    if recipe.training.imbalance != "prior":
        return np.zeros(len(counts), np.float32)
    if network.last_layer().bias is None:
        raise InvalidValueError(
            f"imbalance 'prior' must have a last layer with a bias to correct; "
            f"the model '{recipe.model.family}' has none; use weights or sampling"
        )
    shares = (counts + 1) / (counts + 1).sum()  # a class without a picture has a share too
    return np.asarray(-np.log(shares * len(counts)), np.float32)


def learn(
    network: Classifier,
    task: Task,
    recipe: Recipe,
    *,
    stop: threading.Event,
    keep: Callable[[State], None],
    num_loader_threads: int = 0,
    deadline: float | None = None,
) -> Generator[Stage | EpochDone, None, Learned]:
    """Train for the recipe's epochs and leave the best epoch's weights in the network.

    The best epoch is the one with the highest validation accuracy (or balanced accuracy, where the
    task says so), the earliest of equals.

    Args:
        network: initialised, on the device where to compute.
        task: pictures and labels.
        recipe: every setting.
        stop: when set, training ends after the running batch with the best weights so far.
        keep: called with the weights each time they are the best so far.
        num_loader_threads: threads that fetch pictures ahead; the result does not depend on it.
        deadline: `time.perf_counter` in seconds by which the last epoch is validated. Where time
            runs short the learning rate falls faster, so that its schedule still comes to its end;
            where two epochs in a row make no mistake, it ends earlier.

    Raises:
        InvalidValueError: a setting has no effect on this network.
        TrainingError: the loss is no longer finite.
    """
    run = _Run(network, task, recipe, deadline)
    judge = copy.deepcopy(network) if run.ema else network
    stopping = EarlyStopping(recipe.training.patience)
    history: list[Epoch] = []
    best_state: State = {}
    stopped_early = 0
    best_logits = np.empty((0, task.num_classes), np.float32)
    why = f"all {recipe.training.epochs} epochs are done"
    for number in range(recipe.training.epochs):
        started = time.perf_counter()
        mean_loss, rate = yield from _epoch(run, number, num_loader_threads, stop)
        if stop.is_set() and history:
            stopped_early = 1
            break
        trained = time.perf_counter()
        if run.ema:
            judge.load_state_dict(run.weights())
        logits = run.answers(judge)
        epoch = _measured(run, logits, number + 1, mean_loss, rate)
        epoch = dataclasses.replace(epoch, seconds=time.perf_counter() - started)
        history.append(epoch)
        run.pace.validation_seconds = time.perf_counter() - trained
        better = stopping.improved(run.score(epoch))
        if better:
            best_state = {k: v.detach().clone() for k, v in judge.state_dict().items()}
            best_logits = logits
            keep(best_state)
        yield EpochDone(epoch, run.pace.num_epochs_left + number + 1, better)
        flawless = deadline is not None and all(run.score(e) == 1 for e in history[-2:])
        if stop.is_set() or run.pace.over or stopping.exhausted or (flawless and number > 0):
            break
    why = _why(run, stopping, len(history) + stopped_early, stop)
    unaveraged = accuracy(task.labels[task.validation], run.answers(network).argmax(axis=1))
    network.load_state_dict(best_state)
    if run.correction.any():
        with torch.no_grad():
            network.last_layer().bias.add_(torch.from_numpy(run.correction).to(run.device))
    best = max(history, key=run.score)
    return Learned(
        tuple(history),
        best.number,
        why,
        stop.is_set(),
        best_logits,
        unaveraged if run.ema else None,
    )


def _why(run: _Run, stopping: EarlyStopping, num_epochs: int, stop: threading.Event) -> str:
    """Return why training ended, in words."""
    planned = run.recipe.training.epochs
    if stop.is_set():
        return f"interrupted in epoch {num_epochs}"
    if stopping.exhausted:
        return f"no better validation accuracy in {stopping.patience} epochs"
    if num_epochs < planned and not run.pace.over:
        return "no mistake is left on the validation pictures"
    if num_epochs < planned:
        return f"the time was up after {num_epochs} of {planned} epochs"
    return f"all {planned} epochs are done"


def _epoch(
    run: _Run, number: int, num_threads: int, stop: threading.Event
) -> Generator[Stage, None, tuple[float, float]]:
    """Train one epoch; return the mean loss and the last learning rate."""
    total = run.recipe.training.epochs * run.num_steps
    losses: list[Tensor] = []  # they stay on the device: reading one waits for it
    rate = 0.0
    run.pace.start(time.perf_counter())
    with (
        autocast(run.device, run.recipe.training.precision),
        contextlib.closing(run.steps(number, num_threads)) as steps,
    ):
        for step in steps:
            if run.ema and (step.number + 1) % run.steps_per_move == 0:
                run.ema.update(run.network)
            losses.append(step.loss * step.num_items)
            if (step.number + 1) % run.steps_per_move == 0:
                run.pace.step_done(time.perf_counter())
            rate = step.rate
            detail = ""
            if run.device.type == "cpu" or step.number % STEPS_BETWEEN_LOOKS == 0:
                detail = _look(step)
            yield Stage("training", step.number + 1, total, detail)
            if stop.is_set() or run.pace.over:
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
    answers = logits.argmax(axis=1)
    confusion = confusion_matrix(labels, answers, run.task.num_classes)
    return Epoch(
        number=number,
        train_loss=train_loss,
        learning_rate=rate,
        validation_loss=log_loss(labels, softmax(logits)),
        validation_accuracy=accuracy(labels, answers),
        train_accuracy=int(run.hits) / run.num_seen,
        seconds=0.0,
        score=balanced_accuracy(confusion) if run.task.balanced else None,
    )
