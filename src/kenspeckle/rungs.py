"""A climb under way: what was tried, what came of it, and how long there is left."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kenspeckle.backbones import Backbone
from kenspeckle.config import Recipe
from kenspeckle.core import Stage, TrainingError, relayed
from kenspeckle.health import Examination, Examined
from kenspeckle.learning import EpochDone
from kenspeckle.metrics import accuracy, score_of
from kenspeckle.plans import Attempt, Choice, Plan
from kenspeckle.preparation import Prepared
from kenspeckle.probe import probe_logits
from kenspeckle.transfer import Frozen, Means, Trained, metric_of, train_recipe
from kenspeckle.trials import geometry_words

__all__ = ["Budget", "Climb", "Event", "Notice", "Progress", "Stopped", "Wish", "gap"]

Result = TypeVar("Result")

MARGIN_SHARE, MARGIN_SECONDS = 0.015, 0.5  # for what cannot be foreseen, and for the process's end


@dataclass(frozen=True)
class Notice:
    """Something the user should know, in one sentence."""

    text: str

    def __str__(self) -> str:
        return f"note: {self.text}"


Event = Notice | Stage | EpochDone
Progress = Generator[Event, None, Result]


@dataclass(frozen=True)
class Budget:
    """How long a run may take.

    Attributes:
        seconds: in all.
        asked: whether the user named them.
        started: `time.perf_counter` at the start of the run.
    """

    seconds: float
    asked: bool
    started: float

    @property
    def deadline(self) -> float:
        """When the last thing must be done, by the same clock."""
        return self.started + self.seconds * (1 - MARGIN_SHARE) - MARGIN_SECONDS

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.deadline - time.perf_counter()


@dataclass(frozen=True)
class Wish:
    """What the user fixed.

    Attributes:
        recipe: seed, shares of the split and pixels; all else is planned.
        pinned: names of the pixel settings that were fixed, such as ``pixels.size``.
        backbone: what to start from; None to start from nothing.
        labels: look for wrong labels; as time allows when None.
    """

    recipe: Recipe
    pinned: frozenset[str]
    backbone: Backbone | None
    labels: bool | None


class Stopped(Exception):  # noqa: N818 - it is no error
    """The user stopped the run between two steps."""


@dataclass(eq=False)
class Climb:
    """A climb under way.

    Attributes:
        examination: of the data, after `begin`.
        wish: what the user fixed.
        budget: how long it may take.
        means: what to work with.
        save: writes a model file.
        attempts: the steps so far.
        choices: what validation chose.
        regularisation: what was done against overfitting, and what it brought.
        promise: what was planned.
        examined: the data after their check, once it is done.
        best: by validation.
        best_score: of the best, 0 to 1.
        save_seconds: what saving a model takes.
        forward_seconds: for the features of a picture, where that was measured at the first size.
        ended_because: why the run ended, in words.
    """

    examination: Examination
    wish: Wish
    budget: Budget
    means: Means
    save: Callable[[Trained, Plan], None]
    attempts: list[Attempt] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    regularisation: list[str] = field(default_factory=list)
    promise: list[str] = field(default_factory=list)
    examined: Examined | None = None
    best: Trained | None = None
    best_score: float = -1.0
    save_seconds: float = 3.0
    forward_seconds: float | None = None
    ended_because: str = "everything that was planned is done"

    @property
    def recipe(self) -> Recipe:
        """What the user fixed."""
        return self.wish.recipe

    def plan(self) -> Plan:
        """Return what has been done so far."""
        metric = "accuracy" if self.best is None else metric_of(self.best.prepared.task)
        return Plan(
            seconds=self.budget.seconds,
            asked=self.budget.asked,
            metric=metric,
            promise=tuple(self.promise),
            choices=tuple(self.choices),
            attempts=tuple(self.attempts),
            regularisation=tuple(self.regularisation),
            ended_because=f"{self.ended_because[:1].upper()}{self.ended_because[1:]}.",
        )

    def stoppable(self, work: Progress[Result]) -> Progress[Result]:
        """Pass on some work; a stop ends it, but a training, which ends itself with its best.

        Raises:
            Stopped: the user stopped the run.
        """

        def unless_stopped(event: Event) -> Event:
            between = isinstance(event, Stage) and event.name != "training"
            if self.means.stop.is_set() and between:
                raise Stopped
            return event

        return relayed(work, unless_stopped)

    def step(
        self,
        name: str,
        prepared: Prepared,
        recipe: Recipe,
        *,
        frozen: Frozen | None = None,
        planned: float,
        deadline: float | None = None,
        started: float | None = None,
    ) -> Progress[Trained | None]:
        """Train by a recipe, note what came of it, and keep the model if it is the best.

        Returns:
            None when training failed and there is a model from before.

        Raises:
            TrainingError: training failed, and there is none.
        """
        started = started or time.perf_counter()
        backbone = None if frozen is None else frozen.backbone
        # What a step keeps is not the best of the run before it has ended.
        means = replace(self.means, keep=lambda _: None)
        training = train_recipe(
            prepared, recipe, means, backbone=backbone, frozen=frozen, deadline=deadline
        )
        try:
            trained = yield from self.stoppable(training)
        except TrainingError as error:
            if self.best is None:
                raise
            self.left_out(name, f"it failed: {error}", planned)
            return None
        now = time.perf_counter()
        task = prepared.task
        answers = trained.learned.validation_logits.argmax(axis=1)
        score = score_of(metric_of(task), task.labels[task.validation], answers, task.num_classes)
        better = score > self.best_score
        history = trained.learned.history
        kept_epoch = history[trained.learned.best_epoch - 1] if history else None
        self.attempts.append(
            Attempt(
                name=name,
                settings=_settings_words(trained),
                outcome="kept" if better else "no better",
                planned_seconds=planned,
                seconds=now - started,
                num_epochs=len(history),
                score=score,
                train_score=kept_epoch.train_accuracy if kept_epoch else _fitted(trained),
                gain=score - self.best_score if self.best else None,
                finished=now - self.budget.started,
            )
        )
        self.regularisation += _against_overfitting(name, trained)
        yield Notice(_outcome(self.attempts[-1], metric_of(task)))
        if better:
            self.best, self.best_score = trained, score
            self.means.keep(trained.network.state_dict())
        return trained

    def left_out(self, name: str, why: str, needed: float | None = None) -> None:
        """Note a step that does not run."""
        self.attempts.append(Attempt(name, "", why, needed, 0.0, 0, None, None, None, None))
        self.ended_because = f"{name}: {why}"

    def recipe_from(
        self,
        recipe: Recipe,
        prepared: Prepared,
        frozen: Frozen,
        *,
        flip: bool = False,
        epochs: int | None = None,
    ) -> Recipe:
        """Return a step's recipe for these data: what the user fixed and validation chose."""
        own, backbone = self.recipe, frozen.backbone
        training = replace(
            recipe.training,
            epochs=epochs or recipe.training.epochs,
            imbalance=frozen.probe.imbalance,
        )
        return replace(
            recipe,
            promise="",
            model=backbone.config,
            pixels=replace(own.pixels, size=prepared.geometry.size, fit=prepared.geometry.fit),
            augmentation=replace(recipe.augmentation, flip=flip),
            training=training,
            transfer=replace(recipe.transfer, weights=backbone.weights),
            split=own.split,
            seed=own.seed,
        )


def _fitted(trained: Trained) -> float | None:
    """Return the accuracy of a head on the pictures that it learnt from."""
    if trained.frozen is None or trained.embeddings is None:
        return None
    task = trained.prepared.task
    logits = probe_logits(trained.frozen.probe, trained.embeddings[task.train])
    return accuracy(task.labels[task.train], logits.argmax(axis=1))


def gap(attempt: Attempt, trained: Trained) -> float:
    """Return how much more often a model is right on what it learnt from than on validation."""
    task = trained.prepared.task
    answers = trained.learned.validation_logits.argmax(axis=1)
    return (attempt.train_score or 0.0) - accuracy(task.labels[task.validation], answers)


def _against_overfitting(name: str, trained: Trained) -> list[str]:
    """Return what kept a training from learning its pictures by heart, and what it brought."""
    history, learned = trained.learned.history, trained.learned
    if not history:
        return []
    found = []
    last, best = history[-1], history[learned.best_epoch - 1]
    if learned.unaveraged_accuracy is not None:
        found.append(
            f"{name}: averaging the weights over the last steps brought "
            f"{_points(last.validation_accuracy - learned.unaveraged_accuracy)} of validation "
            "accuracy in the last epoch."
        )
    if best.number < last.number:
        found.append(
            f"{name}: the weights of epoch {best.number} of {last.number} were kept, which brought "
            f"{_points(best.validation_accuracy - last.validation_accuracy)} over the last."
        )
    return found


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"


def _settings_words(trained: Trained) -> str:
    """Return what was trained and how, in words."""
    recipe, words = trained.recipe, [geometry_words(trained.prepared.geometry)]
    if recipe.training.imbalance != "none":
        words.append(f"imbalance {recipe.training.imbalance}")
    if not trained.learned.history:
        if trained.frozen is not None:
            words.append(f"penalty {trained.frozen.probe.penalty:g}")
        return "; ".join(words)
    words.append(f"{recipe.optimizer.name}, rate {recipe.optimizer.lr:g}")
    changes = recipe.augmentation
    names = ("flip", "shift", "zoom", "brightness", "mixup", "cutmix")
    shown = [name for name in names if getattr(changes, name)]
    if recipe.transfer.depth != "tail" and shown:
        words.append("+".join(shown))
    if recipe.training.ema_decay:
        words.append("averaged weights")
    return "; ".join(words)


def _outcome(attempt: Attempt, metric: str) -> str:
    """Return what came of a step, in a sentence."""
    gain = "" if attempt.gain is None else f" ({_points(attempt.gain)}: {attempt.outcome})"
    return (
        f"{attempt.name}: validation {metric} {attempt.score:.3f}{gain} after "
        f"{attempt.seconds:.0f} s"
    )
