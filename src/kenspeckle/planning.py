"""What to try in the time there is: arithmetic on a short measurement of the machine and the data.

    speeds + pictures + seconds -> Route: the pictures' size, and the steps that fit

Nothing here trains. The ladder asks again after each step, with what that step really took.
"""

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from kenspeckle.backbones import config_of
from kenspeckle.config import ModelConfig, Recipe
from kenspeckle.core import InvalidValueError
from kenspeckle.layers import Classifier
from kenspeckle.settings import full_name, with_settings

__all__ = [
    "DEFAULT_SECONDS",
    "FEW_EPOCHS",
    "GOOD_EPOCHS",
    "MOST_EPOCHS",
    "PINNABLE",
    "SIDES",
    "TAIL_EPOCHS",
    "TEMPLATE_SECONDS",
    "Job",
    "Planned",
    "Route",
    "Speeds",
    "duration_words",
    "final_seconds",
    "first_seconds",
    "full_epoch_seconds",
    "head_seconds",
    "measure_speeds",
    "plan_route",
    "planned",
    "seconds_of",
    "tail_seconds",
    "training_seconds",
]

DEFAULT_SECONDS = 300.0
"""How long a run takes that nobody gave a time: enough to fine-tune on a few thousand pictures."""

LEAST_SECONDS = 5.0  # below that, not even torch is loaded
MOST_SECONDS = 7 * 24 * 3600.0

SIDES = (96, 128, 160, 192, 224)
"""Of squares, in pixels: what `features.default_size` gives, and what is quicker."""

# Of the time of one training step on all weights, by measurement (benchmarks/RESULTS.md).
TAIL_SHARE = 0.33
FRONT_SHARE = 0.75  # of a frozen network's time, what stands before its tail
RUNTIME_SHARE = 0.45  # ONNX Runtime's time over torch's
TEMPLATE_SECONDS = 5.0  # to export a backbone once
SAVE_SECONDS = 3.0  # to write a model and its report, without the answers it is judged on
LEAST_HEAD_SECONDS = 0.5
LABEL_SECONDS = 2e-4  # a picture, to compare it with the others and to split

CONTENDED = 1.5  # times that half of the threads must be faster before they are taken
MEASURED_BATCH = 16  # pictures in a step that is timed

FEW_EPOCHS, GOOD_EPOCHS, MOST_EPOCHS = 3, 8, 30
TAIL_EPOCHS = 8


def seconds_of(text: str) -> float:
    """Return a time such as ``30s``, ``5m``, ``1h30m`` or ``90`` in seconds.

    Raises:
        InvalidValueError: it is no such time, or out of range.

    Example:
        >>> seconds_of("90"), seconds_of("5m"), seconds_of("1h30m")
        (90.0, 300.0, 5400.0)
    """
    parts = re.fullmatch(
        r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip().lower()
    )
    if parts is None or not any(parts.groups()):
        raise InvalidValueError(
            f"--time must be a number with h, m or s, such as 30s, 5m or 1h30m; got {text!r}"
        )
    hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    total = 3600 * hours + 60 * minutes + seconds
    if not LEAST_SECONDS <= total <= MOST_SECONDS:
        raise InvalidValueError(
            f"--time must be from {LEAST_SECONDS:.0f}s to {MOST_SECONDS / 3600:.0f}h; got {text!r}"
        )
    return total


def duration_words(seconds: float) -> str:
    """Return a time as `seconds_of` reads it.

    Example:
        >>> duration_words(30), duration_words(300), duration_words(5400)
        ('30s', '5m', '1h30m')
    """
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    words = [f"{hours}h" * bool(hours), f"{minutes}m" * bool(minutes), f"{rest}s" * bool(rest)]
    return "".join(words) or "0s"


@dataclass(frozen=True)
class Planned:
    """A run whose recipe is chosen by validation, within what the user fixed.

    Attributes:
        recipe: seed, shares of the split and pixels; everything else is chosen.
        pinned: names of the settings in `recipe` that the user fixed.
        model: the network to start from; the default when None.
        weights: where its weights are from: ``imagenet``, ``hub``, a file, or ``none`` to start
            from nothing; the default when None.
        seconds: that the run may take; a default when None.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(name="planned"))
    pinned: frozenset[str] = frozenset()
    model: ModelConfig | None = None
    weights: str | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        chosen = sorted(self.pinned - PINNABLE)
        if chosen:
            raise InvalidValueError(
                f"{chosen[0]} has no effect without a recipe: the run is planned, and chooses it; "
                f"name one, for example --recipe fine-tune --set {chosen[0]}=…"
            )


PINNABLE = frozenset(
    {
        "seed",
        "pixels.size",
        "pixels.fit",
        "pixels.interpolation",
        "pixels.background",
        "split.validation",
        "split.test",
    }
)
"""Settings that a planned run takes from the user."""


def planned(
    assignments: list[str],
    *,
    time: str | None = None,
    backbone: str | None = None,
    weights: str | None = None,
) -> Planned:
    """Return a run to be planned, from a user's words.

    Args:
        assignments: settings that the user fixes, each written ``name=value``.
        time: such as ``5m``.
        backbone: name of the network to start from.
        weights: ``imagenet``, ``hub``, ``none`` or a file.

    Raises:
        InvalidValueError: a word is unknown or out of range, or has no effect on a planned run.
    """
    base = Recipe(name="planned")
    recipe = with_settings(base, assignments)
    pinned = {full_name(base, word) for word in assignments}
    if backbone is not None and weights == "none":
        raise InvalidValueError("--backbone has no effect with --weights none")
    return Planned(
        recipe=recipe,
        pinned=frozenset(pinned),
        model=None if backbone is None else config_of(backbone),
        weights=weights,
        seconds=None if time is None else seconds_of(time),
    )


@dataclass(frozen=True)
class Speeds:
    """How fast this machine runs one network.

    Attributes:
        side: of the square pictures that were measured, in pixels.
        forward: seconds for a picture's features, in ONNX Runtime on all threads.
        training: seconds for a picture in a training step of all weights.
    """

    side: int
    forward: float
    training: float

    def forward_at(self, side: float) -> float:
        """Return the seconds for the features of a picture of another size."""
        return self.forward * (side / self.side) ** 2

    def training_at(self, side: float) -> float:
        """Return the seconds in a training step for a picture of another size."""
        return self.training * (side / self.side) ** 2


def training_seconds(
    network: Classifier, size: tuple[int, int], batch_size: int, device: torch.device
) -> float:
    """Return the seconds that a picture takes in a training step, the least of three.

    Args:
        network: on the device; its weights do not change, its norms' statistics may.
        size: ``(height, width)`` of the pictures in pixels.
        batch_size: pictures in a step.
        device: where to compute.
    """
    step = _training_step(network, size, batch_size, device)
    seconds = min(step() for _ in range(3))
    network.zero_grad(set_to_none=True)
    return seconds / batch_size


def _training_step(
    network: Classifier, size: tuple[int, int], batch_size: int, device: torch.device
) -> Callable[[], float]:
    """Return what trains on a made-up batch, but moves no weight, and tells its seconds."""
    images = torch.zeros(batch_size, 3, *size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step() -> float:
        network.train()
        started = time.perf_counter()
        F.cross_entropy(network(images), labels).backward()
        _wait(device)
        return time.perf_counter() - started

    return step


def measure_speeds(
    network: Classifier, side: int, device: torch.device, *, choose_threads: bool
) -> Speeds:
    """Return how fast a network runs here; takes less than a second.

    On a machine that others use too, a thread that waits for its core holds up all others at every
    layer: on two busy cores one thread was up to ten times as fast as two.

    Args:
        network: on the device; left in evaluation mode.
        side: of the square pictures in pixels.
        device: where it is trained. Features are computed on the CPU.
        choose_threads: let torch use half as many threads from now on, where that is far faster.
    """
    step = _training_step(network, (side, side), MEASURED_BATCH, device)
    step()  # the first one prepares what all later ones use
    most = torch.get_num_threads()
    counts = [most]
    if choose_threads and device.type == "cpu" and most > 1 and _is_busy():
        counts.append(most // 2)
    seconds = {}
    for num_threads in counts:
        torch.set_num_threads(num_threads)
        seconds[num_threads] = min(step() for _ in range(2))
    best = counts[-1] if seconds[counts[-1]] * CONTENDED < seconds[most] else most
    torch.set_num_threads(best)
    network.zero_grad(set_to_none=True)
    network.eval().to("cpu")
    images = torch.zeros(MEASURED_BATCH, 3, side, side).to(memory_format=torch.channels_last)
    times = []
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            network(images)
            times.append(time.perf_counter() - started)
    network.to(device)
    forward = RUNTIME_SHARE * min(times) / MEASURED_BATCH
    return Speeds(side, forward, seconds[best] / MEASURED_BATCH)


def _is_busy() -> bool:
    """Return whether others seem to use half of this machine; where that is unknown, it is."""
    if not hasattr(os, "getloadavg"):
        return True
    return os.getloadavg()[0] > (os.cpu_count() or 1) / 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Job:
    """How much there is to do.

    Attributes:
        num_train: pictures to learn from.
        num_validation: pictures that choose.
        num_test: pictures that judge.
        side: at which the pictures are worth looking at, in pixels.
        typical: side of the pictures as they are: median of ``sqrt(height * width)``, in pixels.
        reading: seconds to decode a picture.
        num_classes: how many.
        exported: sides for which the network's graph is in the cache.
    """

    num_train: int
    num_validation: int
    num_test: int
    side: int
    typical: float
    reading: float
    num_classes: int
    exported: frozenset[int] = frozenset()

    @property
    def num_pictures(self) -> int:
        """All pictures."""
        return self.num_train + self.num_validation + self.num_test


@dataclass(frozen=True)
class Route:
    """What fits into the time.

    Attributes:
        side: of the pictures in pixels.
        first: seconds to the first model.
        tail: seconds to train the tail; 0 where that is left out.
        full_epochs: epochs of training everything; 0 where that does not fit.
        needed: seconds that the least step left out would have needed in all; 0 where none is.
    """

    side: int
    first: float
    tail: float
    full_epochs: float
    needed: float = 0.0


def first_seconds(job: Job, speeds: Speeds, side: int) -> float:
    """Return the seconds to a first model: read, look, fit a head, save."""
    each = job.reading + speeds.forward_at(side) + LABEL_SECONDS
    export = 0.0 if side in job.exported else TEMPLATE_SECONDS
    return job.num_pictures * each + export + head_seconds(job) + SAVE_SECONDS


def head_seconds(job: Job) -> float:
    """Return the seconds to fit a head with its cross-validation.

    Fitted to 0.5 s for 3,000 pictures of 5 classes, 11 s for 42,500 of 10, and 37 to 140 s for
    10,000 and 2,000 of 1,000, on 2 cores.
    """
    return LEAST_HEAD_SECONDS + 2e-3 * math.pow(job.num_train * job.num_classes, 0.7)


def final_seconds(job: Job, speeds: Speeds, side: int) -> float:
    """Return the seconds to judge and save a model whose answers are not known yet."""
    return (job.num_validation + job.num_test) * speeds.forward_at(side) + SAVE_SECONDS


def tail_seconds(job: Job, speeds: Speeds, side: int, epochs: int = TAIL_EPOCHS) -> float:
    """Return the seconds to compute the maps, mirrored ones too, and train the tail on them."""
    maps = 2 * job.num_pictures * speeds.forward_at(side) * FRONT_SHARE
    return maps + epochs * TAIL_SHARE * full_epoch_seconds(job, speeds, side)


def full_epoch_seconds(job: Job, speeds: Speeds, side: int) -> float:
    """Return the seconds of an epoch in which everything is trained, with its validation."""
    validating = job.num_validation * speeds.forward_at(side) / RUNTIME_SHARE
    return job.num_train * speeds.training_at(side) + validating


def plan_route(job: Job, speeds: Speeds, seconds: float, has_tail: bool) -> Route:
    """Return the steps that fit, and the size of the pictures that lets them.

    The largest pictures on which everything can be trained for `GOOD_EPOCHS` come first; where
    there is less time, smaller ones; where there is too little to train everything, the largest
    that leave time for the tail, or for a head.

    Args:
        job: how much there is to do.
        speeds: of the network on this machine.
        seconds: that are left.
        has_tail: whether the network can be cut in two.

    Raises:
        InvalidValueError: there is not even time for a head; the text says what the least is.
    """
    sides = [side for side in SIDES if side <= job.side] or [job.side]
    least = first_seconds(job, speeds, sides[0])
    if least > seconds:
        raise InvalidValueError(
            f"a first model of {job.num_pictures:,} pictures takes about {duration_words(least)} "
            f"more on this machine, and {duration_words(seconds)} are left"
        )

    def epochs(side: int) -> float:
        spent = first_seconds(job, speeds, side) + final_seconds(job, speeds, side)
        return max(0.0, seconds - spent) / full_epoch_seconds(job, speeds, side)

    good = [side for side in sides if epochs(side) >= GOOD_EPOCHS]
    side = good[-1] if good else sides[0]
    if epochs(side) >= FEW_EPOCHS:
        first = first_seconds(job, speeds, side)
        tail = tail_seconds(job, speeds, side) if has_tail else math.inf
        pays = tail < 0.2 * (seconds - first)
        return Route(side, first, tail if pays else 0.0, min(MOST_EPOCHS, epochs(side)))
    needed = FEW_EPOCHS * full_epoch_seconds(job, speeds, side) + least
    needed += final_seconds(job, speeds, side)
    for side in reversed(sides):
        first = first_seconds(job, speeds, side)
        tail = tail_seconds(job, speeds, side) if has_tail else math.inf
        if first + tail + final_seconds(job, speeds, side) < seconds:
            return Route(side, first, tail, 0.0, needed)
    for side in reversed(sides):
        first = first_seconds(job, speeds, side)
        if first < 0.6 * seconds:
            return Route(side, first, 0.0, 0.0, needed)
    return Route(sides[0], least, 0.0, 0.0, needed)
