"""The ladder of a planned run: a head within seconds, then what time allows and validation rewards.

    check -> plan -> frozen features, head (saved) -> geometry, mirroring -> tail -> all, or from
    nothing -> the best by validation

A step starts only if it fits into the time and if validation could tell its gain from chance. The
best by validation is kept, the earlier and simpler of equals.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from kenspeckle.backbones import Backbone
from kenspeckle.checks.copies import leaked
from kenspeckle.core import DataError, InvalidValueError, Stage, staged
from kenspeckle.features import default_size, features_of, has_template, template_of
from kenspeckle.health import Examination, Examined
from kenspeckle.pixels import StreamedPixels, open_pixels
from kenspeckle.planning import (
    SIDES,
    Job,
    Route,
    Speeds,
    duration_words,
    first_seconds,
    measure_speeds,
    plan_route,
)
from kenspeckle.plans import Plan
from kenspeckle.preparation import Prepared, prepare_data
from kenspeckle.probe import IMBALANCED, probe_logits
from kenspeckle.recipes import linear_probe
from kenspeckle.rungs import Budget, Climb, Notice, Progress, Stopped, Wish
from kenspeckle.steps import (
    HEAD,
    another_size,
    better_geometry,
    choose_mirrors,
    deeper,
    scratch,
)
from kenspeckle.transfer import Frozen, Means, Trained, freeze

__all__ = ["Climbed", "climb"]

LEAST_ERRORS = 6  # fewer wrong answers than that, all put right, could be chance (McNemar's test)
MOST_LABELS_ASKED = 10_000  # pictures whose labels are looked at without being told to
SECONDS_PER_LABEL = 2e-3
LABELS_SHARE = 0.06  # of the time that is left
TINY_SIDE, MANY_PICTURES = 64, 5_000  # training from nothing pays below, and above
HEAD_SHARE = 0.3  # of the time, that the first model may take for the sake of larger pictures
LATE_SHARE = 0.3  # of the time: a head that is later is left out where it is the lesser way
SECONDS_WORTH_BELIEVING = 0.5  # for features that were computed and not found in the cache
MEASURED_SIDE = 96  # of the pictures on which the machine is measured, in pixels
NUM_READ = 16  # pictures whose decoding is timed


@dataclass(frozen=True, eq=False)
class Climbed:
    """Where the ladder led.

    Attributes:
        best: by validation.
        plan: what was planned, tried and chosen.
        examined: the data after their check.
        interrupted: whether the user stopped it.
    """

    best: Trained
    plan: Plan
    examined: Examined
    interrupted: bool


def climb(
    examination: Examination,
    wish: Wish,
    budget: Budget,
    means: Means,
    save: Callable[[Trained, Plan], None],
) -> Progress[Climbed]:
    """Plan, train step by step, and return the best model by validation.

    Args:
        examination: of the data, after `begin`.
        wish: what the user fixed.
        budget: how long it may take.
        means: what to work with.
        save: writes a model file; called with the first model. The last is the caller's to save.

    Yields:
        Notices, progress and finished epochs.

    Raises:
        InvalidValueError: the time is too short for a first model.
        DataError: the data cannot be used as they stand.
        TrainingError: the loss of the only training is no longer finite.
        ModelFileError: a graph does not answer as its network does.
        WriteError: a file could not be written.
        KeyboardInterrupt: the run was stopped before there was a model.
    """
    state = Climb(examination, wish, budget, means, save)
    try:
        if wish.backbone is None:
            yield from _from_nothing(state)
        else:
            yield from _from_backbone(state, wish.backbone)
    except Stopped:
        state.ended_because = "it was interrupted"
    if state.best is None:
        raise KeyboardInterrupt
    examined = state.examined or (
        yield from examination.conclude(None, "there was no time; `ken check` looks")
    )
    interrupted = means.stop.is_set()
    return Climbed(state.best, state.plan(), examined, interrupted)


def _from_backbone(state: Climb, backbone: Backbone) -> Progress[None]:
    """Climb from the head on frozen features."""
    yield Stage("measuring this machine", 0, 1)
    job = _job(state, backbone)
    tiny = job.typical <= TINY_SIDE and job.num_train >= MANY_PICTURES
    speeds, has_tail = _speeds(state, backbone)
    try:
        route = plan_route(job, speeds, state.budget.left, has_tail)
    except InvalidValueError as error:
        if tiny:  # many small pictures: a network learns before all have been looked at
            yield from _from_nothing(state)
            return
        raise _too_short(state, job, speeds, error) from error
    if tiny and route.first > LATE_SHARE * state.budget.left:
        yield from _from_nothing(state)
        return
    if state.recipe.pixels.size is not None:
        route = replace(route, side=round(math.sqrt(math.prod(state.recipe.pixels.size))))
    side = _head_side(state, job, speeds, route)
    first = max(route.first, first_seconds(job, speeds, side))
    state.promise = _promise(job, replace(route, side=side, first=first), tiny)
    yield from map(Notice, state.promise)
    prepared, frozen = yield from _first_model(state, backbone, side, first)
    if state.forward_seconds is not None:
        speeds = Speeds(side, state.forward_seconds, speeds.training_at(side))
    if _headroom(state, prepared, frozen):
        yield from _above_the_head(state, (prepared, frozen), (job, speeds), route, tiny)


def _above_the_head(
    state: Climb,
    found: tuple[Prepared, Frozen],
    costs: tuple[Job, Speeds],
    route: Route,
    tiny: bool,
) -> Progress[None]:
    """Train more than a head."""
    prepared, frozen = found
    if tiny:
        mirrors = yield from choose_mirrors(state, prepared, frozen)
        yield from scratch(state, prepared, mirrors, frozen.probe.imbalance)
        return
    if prepared.geometry.size == (route.side, route.side) or "pixels.size" in state.wish.pinned:
        here = prepared, frozen
    else:
        here = yield from another_size(state, prepared, frozen, route.side)
    prepared, frozen = yield from better_geometry(state, *here, *costs)
    yield from deeper(state, prepared, frozen, *costs)


def _head_side(state: Climb, job: Job, speeds: Speeds, route: Route) -> int:
    """Return the largest size at which a head comes early enough; what follows takes the route's.

    A head costs little, and is all that there is where it makes hardly a mistake.
    """
    if "pixels.size" in state.wish.pinned:
        return route.side
    most = HEAD_SHARE * state.budget.left
    early = [side for side in SIDES if first_seconds(job, speeds, side) <= most]
    return max([route.side, *(side for side in early if side <= job.side)])


def _speeds(state: Climb, backbone: Backbone) -> tuple[Speeds, bool]:
    """Return how fast the network runs here, and whether it has a tail."""
    means, side = state.means, MEASURED_SIDE
    num_classes = len(state.examination.sound.classes)
    network = backbone.network(num_classes, (side, side), torch.Generator()).to(means.device)
    speeds = measure_speeds(network, side, means.device, choose_threads=not means.num_threads)
    if means.stop.is_set():
        raise Stopped
    return speeds, network.has_tail


def _too_short(
    state: Climb, job: Job, speeds: Speeds, error: InvalidValueError
) -> InvalidValueError:
    budget = state.budget
    least = budget.seconds - budget.left + first_seconds(job, speeds, SIDES[0])
    return InvalidValueError(
        f"--time {duration_words(budget.seconds)} is too short: {error}; the least is about "
        f"{duration_words(1.1 * least)}"
    )


def _first_model(
    state: Climb, backbone: Backbone, side: int, planned: float
) -> Progress[tuple[Prepared, Frozen]]:
    """Fit a head to the frozen features, save the model, and look at the labels."""
    began = time.perf_counter()
    prepared, frozen = yield from state.stoppable(_first(state, backbone, side))
    recipe = state.recipe_from(linear_probe.RECIPE, prepared, frozen)
    trained = yield from state.step(
        HEAD, prepared, recipe, frozen=frozen, planned=planned, started=began
    )
    state.choices += frozen.probe.choices
    started = time.perf_counter()
    if trained is not None:
        state.save(trained, state.plan())
    state.save_seconds = time.perf_counter() - started
    taken = time.perf_counter() - state.budget.started
    yield Notice(f"a first model is saved after {taken:.0f} s; what follows can only better it")
    yield from state.stoppable(_look_at_labels(state, frozen))
    return prepared, frozen


def _job(state: Climb, backbone: Backbone) -> Job:
    """Return how much there is to do, before the pictures are split."""
    if not len(state.examination.sound.items):
        raise DataError(f"{state.examination.sound.location}: no picture can be decoded")
    dataset, traits = state.examination.sound, state.examination.known.traits
    given = [item.split for item in dataset.items]
    shares, total = state.recipe.split, len(given)
    num_test = given.count("test") if "test" in given else round(shares.test * total)
    if any(given) and "validation" in given:
        num_validation = given.count("validation")
        num_test = given.count("test")
    else:
        num_validation = round(shares.validation * (total - given.count("test")))
    typical = float(np.median(np.sqrt(1.0 * traits.height * traits.width)))
    side = default_size(typical)
    geometry = state.recipe.pixels.geometry((side, side))
    streamed = StreamedPixels(dataset, geometry, state.means.limits, np.empty((0, 16), np.uint8))
    some = np.linspace(0, total - 1, min(total, NUM_READ)).astype(np.int64)
    started = time.perf_counter()
    streamed.gather(some)
    reading = (time.perf_counter() - started) / len(some)
    return Job(
        num_train=total - num_validation - num_test,
        num_validation=num_validation,
        num_test=num_test,
        side=side,
        typical=typical,
        reading=reading,
        num_classes=len(dataset.classes),
        exported=frozenset(
            side for side in SIDES if has_template(backbone, (side, side), state.means.cache)
        ),
    )


def _promise(job: Job, route: Route, tiny: bool) -> list[str]:
    """Return what is planned, a line each."""
    size = f"{route.side}x{route.side}"
    first = duration_words(route.first)
    lines = [f"a linear head on frozen features at {size}: a first model after about {first}"]
    if tiny:
        return [*lines, "then a network from nothing, for as long as the time allows"]
    if route.tail:
        lines.append(f"the tail on kept maps, about {duration_words(route.tail)}")
    if route.full_epochs:
        lines.append(f"then everything, about {route.full_epochs:.0f} epochs")
    else:
        lines.append(
            f"no training of everything: that takes {duration_words(route.needed)} or more"
        )
    return lines


def _first(state: Climb, backbone: Backbone, side: int) -> Progress[tuple[Prepared, Frozen]]:
    """Look at every picture with the frozen network, split them, and fit a head."""
    means, examination, recipe = state.means, state.examination, state.recipe
    geometry = recipe.pixels.geometry((side, side))
    reading = open_pixels(examination.sound, geometry, means.limits, means.cache)
    store = yield from staged("reading pictures", reading)
    yield Stage("preparing the network", 0, 1)
    template_of(backbone, geometry.size, means.cache)
    started = time.perf_counter()
    computing = features_of(store, geometry, means.cache, backbone, num_threads=means.num_threads)
    features = yield from staged("computing features", computing)
    seconds = time.perf_counter() - started
    if seconds > SECONDS_WORTH_BELIEVING:
        state.forward_seconds = seconds / len(store)
    yield Stage("comparing pictures", 0, 1)
    few = len(store) <= MOST_LABELS_ASKED
    subject = examination.compare(features if few else None)
    sized = replace(recipe, pixels=replace(recipe.pixels, size=geometry.size))
    prepared = yield from prepare_data(
        examination.sound,
        sized,
        means.limits,
        means.cache,
        together=subject.copies.together,
        leaked=leaked(subject, "test"),
        backbone=backbone,
    )
    prepared = _with_metric(prepared)
    frozen = yield from freeze(
        prepared, backbone, means, imbalance=None, seed=recipe.seed, features=features
    )
    return prepared, frozen


def _with_metric(prepared: Prepared) -> Prepared:
    """Let the balanced accuracy choose where a remedy for uneven classes is looked for."""
    task = prepared.task
    counts = np.bincount(task.labels[task.train], minlength=task.num_classes)
    balanced = bool(counts.max() >= IMBALANCED * max(1, counts.min()))
    return replace(prepared, task=replace(task, balanced=balanced))


def _look_at_labels(state: Climb, frozen: Frozen) -> Progress[None]:
    """Run the other checks of the data; those of labels as far as they are wanted and fit."""
    num_pictures, asked = len(frozen.features), state.wish.labels
    fits = 1 + SECONDS_PER_LABEL * num_pictures <= LABELS_SHARE * state.budget.left
    why = "left out; --labels asks for it"
    if asked is None and num_pictures <= MOST_LABELS_ASKED and not fits:
        why = "there was no time for it; --labels asks for it, and `ken check` does it"
    looks = asked if asked is not None else fits and num_pictures <= MOST_LABELS_ASKED
    features = frozen.features if looks else None
    state.examined = yield from state.examination.conclude(features, "" if looks else why)


def _headroom(state: Climb, prepared: Prepared, frozen: Frozen) -> bool:
    """Return whether a better model could be told from the present one."""
    task = prepared.task
    answers = np.concatenate(
        [
            frozen.probe.out_of_fold.argmax(axis=1),
            probe_logits(frozen.probe, frozen.features[task.validation]).argmax(axis=1),
        ]
    )
    labels = task.labels[np.concatenate([task.train, task.validation])]
    num_errors = int((answers != labels).sum())
    if num_errors < LEAST_ERRORS:
        state.left_out(
            "training more of the network",
            f"the head is wrong on {num_errors} of {len(labels):,} pictures that it had not seen: "
            "no gain could be told from chance",
        )
    return num_errors >= LEAST_ERRORS


def _from_nothing(state: Climb) -> Progress[None]:
    """Train a network from nothing, where no pretrained one is installed or wanted."""
    means, examination, recipe = state.means, state.examination, state.recipe
    looked = examination.features(bool(state.wish.labels), means.num_threads)
    features = yield from state.stoppable(looked)
    yield Stage("comparing pictures", 0, 1)
    subject = examination.compare(features)
    state.examined = yield from state.stoppable(examination.conclude(features))
    prepared = yield from state.stoppable(
        prepare_data(
            examination.sound,
            recipe,
            means.limits,
            means.cache,
            together=subject.copies.together,
            leaked=leaked(subject, "test"),
        )
    )
    state.promise = ["a network from nothing, for as long as the time allows"]
    yield from map(Notice, state.promise)
    yield from scratch(state, _with_metric(prepared), mirrors=False, imbalance="none")
