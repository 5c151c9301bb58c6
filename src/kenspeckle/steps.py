"""The steps above the first: another geometry, the tail, everything, or a network from nothing.

Each starts only if it fits into the time that is left, and says so where it does not.
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from kenspeckle.config import Imbalance, Recipe, SpeedConfig
from kenspeckle.core import Geometry
from kenspeckle.models import build
from kenspeckle.planning import (
    FEW_EPOCHS,
    GOOD_EPOCHS,
    MOST_EPOCHS,
    SIDES,
    TEMPLATE_SECONDS,
    Job,
    Speeds,
    duration_words,
    final_seconds,
    full_epoch_seconds,
    tail_seconds,
    training_seconds,
)
from kenspeckle.plans import Choice, Option
from kenspeckle.preparation import Prepared, at_geometry, small_size
from kenspeckle.recipes import fine_tune, linear_probe, small_cnn, speed, tail
from kenspeckle.rungs import Climb, Progress, gap
from kenspeckle.transfer import Frozen, freeze
from kenspeckle.trials import (
    NUM_TRIED,
    choose_geometry,
    choose_mirroring,
    geometry_words,
    shapes_differ,
)

__all__ = [
    "ALL",
    "HEAD",
    "NOTHING",
    "TAIL",
    "another_size",
    "better_geometry",
    "choose_mirrors",
    "deeper",
    "scratch",
]

HEAD, TAIL, ALL = "linear head on frozen features", "tail on kept maps", "full fine-tuning"
NOTHING = "training from nothing"

TRIAL_SHARE = 0.1  # of the time that is left
LARGE_GAP = 0.1  # between training and validation accuracy, from which on pictures are mixed
MIXUP, CUTMIX = 0.2, 0.5
FEW_SCRATCH_EPOCHS, GOOD_SCRATCH_EPOCHS, MOST_SCRATCH_EPOCHS = 3, 10, 40
WIDTHS = ((64, 256, 256), (64, 128, 128), (32, 128, 128))
SMALLEST_SPEED_SIDE = 16
SECONDS_PER_ANSWER = 5e-4  # of a small network, with the bootstrap of its scores
# Why nothing else was tried: where the plan was free to, and where the user fixed it.
UNTRIED = {
    "pixels.size": (
        "a larger size leaves no time for the steps that follow, or is of no use",
        "the size is fixed by --size",
    ),
    "pixels.fit": ("the pictures are nearly square", "the fit is fixed by --set fit"),
}
SPARE_EPOCHS = 1.3  # more are planned than fit: the clock shortens the schedule, never the run


def better_geometry(
    state: Climb, prepared: Prepared, frozen: Frozen, job: Job, speeds: Speeds
) -> Progress[tuple[Prepared, Frozen]]:
    """Try other sizes and fits, as far as nobody fixed them and there is time."""
    candidates = _candidates(state, prepared, job, speeds)
    if not candidates:
        only = Option(geometry_words(prepared.geometry), frozen.probe.score, True)
        words = [UNTRIED[name][name in state.wish.pinned] for name in ("pixels.size", "pixels.fit")]
        why = "; ".join(words)
        state.choices.append(Choice("size and fit", (only,), why))
        return prepared, frozen
    num_tried = min(NUM_TRIED, len(prepared.task.train))
    seconds = sum(1 + num_tried * (job.reading + speeds.forward_at(g.size[0])) for g in candidates)
    if seconds > TRIAL_SHARE * state.budget.left:
        present = Option(geometry_words(prepared.geometry), frozen.probe.score, True)
        others = tuple(Option(geometry_words(g), None, False) for g in candidates)
        why = f"others would have taken {duration_words(seconds)}, which the time does not allow"
        state.choices.append(Choice("size and fit", (present, *others), why))
        return prepared, frozen
    chosen, choice = yield from state.stoppable(
        choose_geometry(prepared, frozen, candidates, state.means, state.recipe.seed)
    )
    state.choices.append(choice)
    if chosen == prepared.geometry:
        return prepared, frozen
    started = time.perf_counter()
    other, known = yield from _frozen_at(state, prepared, frozen, chosen)
    recipe = state.recipe_from(linear_probe.RECIPE, other, known)
    planned = job.num_pictures * (job.reading + speeds.forward_at(chosen.size[0]))
    yield from state.step(HEAD, other, recipe, frozen=known, planned=planned, started=started)
    return other, known


def another_size(
    state: Climb, prepared: Prepared, frozen: Frozen, side: int
) -> Progress[tuple[Prepared, Frozen]]:
    """Return the pictures at another size, and what is known of them there."""
    geometry = replace(prepared.geometry, size=(side, side))
    return (yield from _frozen_at(state, prepared, frozen, geometry))


def _frozen_at(
    state: Climb, prepared: Prepared, frozen: Frozen, geometry: Geometry
) -> Progress[tuple[Prepared, Frozen]]:
    means, backbone = state.means, frozen.backbone
    other = yield from state.stoppable(
        at_geometry(prepared, geometry, backbone.normalisation, means.limits, means.cache)
    )
    imbalance = frozen.probe.imbalance
    known = yield from state.stoppable(
        freeze(other, backbone, means, imbalance=imbalance, seed=state.recipe.seed)
    )
    return other, known


def _candidates(state: Climb, prepared: Prepared, job: Job, speeds: Speeds) -> list[Geometry]:
    """Return the geometries that could be better than the present one, and that are affordable."""
    present, pinned, left = prepared.geometry, state.wish.pinned, state.budget.left
    traits = state.examination.known.traits
    found = []
    if "pixels.fit" not in pinned and shapes_differ(
        np.stack([traits.height, traits.width], axis=1)
    ):
        found += [replace(present, fit=fit) for fit in ("squash", "crop", "pad")]
    larger = [side for side in SIDES if side > present.size[0]]
    if "pixels.size" not in pinned and larger:
        # Larger pictures make everything slower: only where the steps after this one still fit.
        epochs = [
            left / full_epoch_seconds(job, speeds, side) for side in (present.size[0], larger[0])
        ]
        seconds = job.num_pictures * (job.reading + speeds.forward_at(larger[0]))
        if epochs[1] >= GOOD_EPOCHS or (epochs[0] < FEW_EPOCHS and seconds < left / 3):
            found.append(replace(present, size=(larger[0], larger[0])))
    return [geometry for geometry in found if geometry != present]


def choose_mirrors(state: Climb, prepared: Prepared, frozen: Frozen) -> Progress[bool]:
    """Return whether training may mirror pictures."""
    mirrors, choice = yield from state.stoppable(
        choose_mirroring(prepared, frozen, state.means, state.recipe.seed)
    )
    state.choices.append(choice)
    return mirrors


def deeper(
    state: Climb, prepared: Prepared, frozen: Frozen, job: Job, speeds: Speeds
) -> Progress[None]:
    """Train the tail, then everything, as far as there is time.

    Args:
        state: of the climb.
        prepared: pictures at their geometry.
        frozen: what is known of them.
        job: how much there is to do.
        speeds: of the network.
    """
    side = round(math.sqrt(math.prod(prepared.geometry.size)))
    final = final_seconds(job, speeds, side) + state.save_seconds
    time_left = _TimeLeft(state, final, side, job, speeds)
    has_tail = _maps_fit(state, job)
    tail_needs = tail_seconds(job, speeds, side)
    all_needs = FEW_EPOCHS * full_epoch_seconds(job, speeds, side)
    if (tail_needs if has_tail else all_needs) > time_left.seconds < all_needs:
        name, needs = (TAIL, tail_needs) if has_tail else (ALL, all_needs)
        _out_of_time(state, name, needs, time_left.seconds)
        return
    mirrors = yield from choose_mirrors(state, prepared, frozen)
    overfit = 0.0
    if has_tail and (tail_needs < 0.2 * time_left.seconds or time_left.seconds < all_needs):
        overfit = yield from _train_tail(state, prepared, frozen, mirrors, time_left)
    if state.means.stop.is_set():
        return
    if time_left.seconds < all_needs:
        _out_of_time(state, ALL, all_needs, time_left.seconds)
        return
    yield from _train_all(state, prepared, frozen, (mirrors, overfit), time_left)


@dataclass(frozen=True)
class _TimeLeft:
    """What is left for training, when judging and saving the result take `final` seconds."""

    state: Climb
    final: float
    side: int
    job: Job
    speeds: Speeds

    @property
    def seconds(self) -> float:
        return self.state.budget.left - self.final

    @property
    def deadline(self) -> float:
        return self.state.budget.deadline - self.final

    @property
    def epochs(self) -> float:
        """Of everything that fit."""
        return self.seconds / full_epoch_seconds(self.job, self.speeds, self.side)


def _out_of_time(state: Climb, name: str, needs: float, left: float) -> None:
    words = f"{duration_words(needs)}, and {duration_words(left)} are left"
    state.left_out(name, f"it takes about {words}", needs)


def _train_tail(
    state: Climb, prepared: Prepared, frozen: Frozen, mirrors: bool, time_left: _TimeLeft
) -> Progress[float]:
    """Train the tail; return how much more often it is right on what it learnt from."""
    needs = tail_seconds(time_left.job, time_left.speeds, time_left.side)
    deadline = time_left.deadline
    if time_left.epochs >= FEW_EPOCHS:  # everything is trained after it
        deadline = min(deadline, time.perf_counter() + 1.5 * needs)
    recipe = state.recipe_from(tail.RECIPE, prepared, frozen, flip=mirrors)
    trained = yield from state.step(
        TAIL, prepared, recipe, frozen=frozen, planned=needs, deadline=deadline
    )
    return gap(state.attempts[-1], trained) if trained else 0.0


def _train_all(
    state: Climb,
    prepared: Prepared,
    frozen: Frozen,
    found: tuple[bool, float],
    time_left: _TimeLeft,
) -> Progress[None]:
    """Train everything for as long as there is time."""
    mirrors, overfit = found
    epochs = min(MOST_EPOCHS, math.ceil(SPARE_EPOCHS * time_left.epochs))
    recipe = state.recipe_from(fine_tune.RECIPE, prepared, frozen, flip=mirrors, epochs=epochs)
    if overfit > LARGE_GAP and time_left.epochs >= GOOD_EPOCHS:
        mixed = replace(recipe.augmentation, mixup=MIXUP, cutmix=CUTMIX)
        recipe = replace(recipe, augmentation=mixed)
        state.regularisation.append(
            f"The tail was right on {100 * overfit:.0f} points more of the training pictures than "
            "of validation: the training of everything mixed pictures (mixup, cutmix)."
        )
    trained = yield from state.step(
        ALL,
        prepared,
        recipe,
        frozen=frozen,
        planned=time_left.seconds,
        deadline=time_left.deadline,
    )
    if trained is not None:
        state.ended_because = f"{ALL}: {trained.learned.stopped_because}"


def _maps_fit(state: Climb, job: Job) -> bool:
    """Return whether the network has a tail whose maps, mirrored ones too, fit into the cache."""
    if state.best is None or not state.best.network.has_tail:
        return False
    size = state.best.prepared.geometry.size
    with torch.no_grad():
        num_values = state.best.network.eval().middle(torch.zeros(1, 3, *size)).numel()
    return 2 * 2 * num_values * job.num_pictures <= state.means.cache.limit_bytes


def scratch(
    state: Climb, prepared: Prepared, mirrors: bool, imbalance: Imbalance
) -> Progress[None]:
    """Train the widest network that can be trained long enough."""
    means, own = state.means, state.recipe
    geometry = own.pixels.geometry(small_size(state.examination.sound, means.limits))
    if geometry != prepared.geometry:
        prepared = yield from state.stoppable(
            at_geometry(prepared, geometry, None, means.limits, means.cache)
        )
    task = prepared.task
    num_judged = len(prepared.parts) - len(task.train)
    final = TEMPLATE_SECONDS + state.save_seconds + SECONDS_PER_ANSWER * num_judged
    left = state.budget.left - final
    base, num_epochs = _scratch_recipe(prepared, left, means.device)
    if num_epochs < FEW_SCRATCH_EPOCHS and state.best is not None:
        seconds = FEW_SCRATCH_EPOCHS * left / num_epochs
        words = f"{duration_words(seconds)}, and {duration_words(left)} are left"
        state.left_out(NOTHING, f"{FEW_SCRATCH_EPOCHS} epochs take about {words}", seconds)
        return
    epochs = min(MOST_SCRATCH_EPOCHS, math.ceil(SPARE_EPOCHS * num_epochs))
    # Its last layer has no bias in which a prior could be corrected.
    remedy: Imbalance = "weights" if imbalance == "prior" else imbalance
    recipe = replace(
        base,
        promise="",
        pixels=replace(own.pixels, size=geometry.size),
        augmentation=replace(base.augmentation, flip=mirrors),
        training=replace(base.training, epochs=epochs, imbalance=remedy),
        split=own.split,
        seed=own.seed,
    )
    deadline = state.budget.deadline - final
    trained = yield from state.step(NOTHING, prepared, recipe, planned=left, deadline=deadline)
    if trained is not None:
        state.ended_because = f"{NOTHING}: {trained.learned.stopped_because}"


def _scratch_recipe(
    prepared: Prepared, seconds: float, device: torch.device
) -> tuple[Recipe, float]:
    """Return the recipe of the widest network that fits, and how many epochs of it do."""
    size, num_train = prepared.geometry.size, len(prepared.task.train)
    small = min(size) < SMALLEST_SPEED_SIDE
    recipes = [replace(speed.RECIPE, model=SpeedConfig(channels=widths)) for widths in WIDTHS]
    fitting = (small_cnn.RECIPE, 0.0)
    for recipe in [small_cnn.RECIPE] if small else recipes:
        generator = torch.Generator().manual_seed(0)
        network = build(recipe.model, prepared.task.num_classes, size, generator).to(device)
        each = training_seconds(network, size, recipe.training.batch_size, device)
        fitting = recipe, max(0.01, seconds) / (each * num_train)
        if fitting[1] >= GOOD_SCRATCH_EPOCHS:
            break
    return fitting
