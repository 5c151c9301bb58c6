"""The values that cross module borders, and the one family of errors.

    KenError                    everything that this package raises on purpose
    ├── InvalidValueError       an option, setting or argument is wrong (exit code 2)
    │   └── MissingPathError    a path that was named does not exist (exit code 2)
    ├── MissingExtraError       an optional dependency is not installed (exit code 1)
    ├── DataError               a data set cannot be used as it stands (exit code 1)
    │   └── ImageError          one picture cannot be decoded; names the picture and the reason
    ├── ModelFileError          a `.ken` file is damaged, hostile or of a later format (exit code 1)
    ├── TrainingError           training cannot go on, e.g. the loss is not finite (exit code 1)
    └── WriteError              a file could not be written; the old one is whole (exit code 1)

Nothing here imports more than numpy: the answering side starts without torch.
"""

import difflib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DataError",
    "Geometry",
    "ImageError",
    "Interval",
    "InvalidValueError",
    "KenError",
    "MissingExtraError",
    "MissingPathError",
    "ModelFileError",
    "Normalisation",
    "Pixels",
    "Predictions",
    "Stage",
    "TrainingError",
    "WriteError",
    "nearest",
    "printable",
    "relayed",
    "staged",
]

Result = TypeVar("Result")
Event = TypeVar("Event")
Changed = TypeVar("Changed")

NUM_SHOWN = 20  # known words, when none is near

Pixels = NDArray[np.uint8]
"""One RGB picture, ``uint8 (H, W, 3)``, or a stack of them, ``uint8 (N, H, W, 3)``."""


class KenError(Exception):
    """Root of every error that this package raises on purpose; its text is for people."""

    exit_code: ClassVar[int] = 1


class InvalidValueError(KenError, ValueError):
    """An option, a setting or an argument has a value that it must not have."""

    exit_code: ClassVar[int] = 2


class MissingPathError(InvalidValueError):
    """A path that the user named does not exist."""


class MissingExtraError(KenError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the extra '{extra}', which is not installed; "
            f"run: pip install 'kenspeckle[{extra}]'"
        )


class DataError(KenError):
    """A data set cannot be used as it stands; the text names the file, class or column."""


class ImageError(DataError):
    """One picture cannot be decoded.

    Attributes:
        name: the picture's file name as the user knows it.
        reason: why, in words, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{printable(name)}: {reason}")
        self.name = name
        self.reason = reason


class ModelFileError(KenError):
    """A model file is damaged, hostile, or of a format version that this release cannot read."""


class TrainingError(KenError):
    """Training cannot go on, for example because the loss is no longer finite."""


class WriteError(KenError):
    """A file could not be written; what stood there before is untouched."""


@dataclass(frozen=True)
class Geometry:
    """How a picture of any size becomes one of `size`; the same in training and in answering.

    Attributes:
        size: ``(height, width)`` in pixels of what the network sees.
        fit: ``squash`` resizes both sides, ``crop`` resizes the short side and cuts the centre,
            ``pad`` resizes the long side and fills the rest with `background`.
        interpolation: the resampling filter, always antialiased.
        background: the RGB colour, 0 to 255 each, under transparent pixels and beside padded ones.
    """

    size: tuple[int, int]
    fit: Literal["squash", "crop", "pad"] = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    background: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True)
class Normalisation:
    """The affine map from grey levels 0 to 1 to network inputs: ``(x - mean) / deviation``.

    Attributes:
        mean: per channel R, G, B, on the scale 0 to 1.
        deviation: per channel, on the scale 0 to 1, above zero.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    deviation: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Interval:
    """A value with the interval that holds the true one with probability 0.95.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network says of N pictures and K classes.

    Attributes:
        logits: ``float32 (N, K)``, before calibration.
        probabilities: ``float32 (N, K)``, calibrated; each row sums to one.
        embedding: ``float32 (N, D)``, the input of the last layer.
    """

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]


@dataclass(frozen=True)
class Stage:
    """Work under way.

    Attributes:
        name: what is being done.
        done: units finished.
        total: units in all.
        detail: the latest measurement, in words.
    """

    name: str
    done: int
    total: int
    detail: str = ""


def relayed(
    work: Generator[Event, None, Result], change: Callable[[Event], Changed]
) -> Generator[Changed, None, Result]:
    """Yield what `change` makes of each event of some work; return the work's result.

    What `change` raises ends the work.
    """
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
        yield change(event)


def staged(
    name: str, work: Generator[tuple[int, int], None, Result]
) -> Generator[Stage, None, Result]:
    """Yield the progress of some work, units done and in all, under a name; return its result."""
    return relayed(work, lambda progress: Stage(name, *progress))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a remedy that names the nearest known words, or all of them when none is near.

    Example:
        >>> nearest("adm", ["adam", "sgd"])
        "did you mean 'adam'?"
        >>> nearest("xyz", ["adam", "sgd"])
        "known: 'adam', 'sgd'"
    """
    words = list(known)
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    more = f" and {len(words) - NUM_SHOWN} more" if len(words) > NUM_SHOWN else ""
    return "known: " + ", ".join(repr(name) for name in words[:NUM_SHOWN]) + more


_JOINERS = frozenset("\u200c\u200d")  # inside Persian words and emoji; they do not change a line


def printable(name: str) -> str:
    r"""Return `name` with what would break or disguise a line of text written as escapes.

    That is control characters, line and paragraph separators, direction overrides, and bytes of a
    file name that are not UTF-8.

    Example:
        >>> printable("two\nlines.jpg")
        'two\\nlines.jpg'
    """
    if name.isprintable():
        return name
    return "".join(
        c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in name
    )
