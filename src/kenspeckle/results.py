"""The results of a run as plain frozen values that go to JSON and back.

A `Report` is all that `reports` draws and all that a model file keeps of how it was made. An
undefined number is nan here and null in JSON. The pictures of the mistakes are bytes and travel
beside the JSON, which names them.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kenspeckle.core import Interval, InvalidValueError, nearest
from kenspeckle.plans import Plan

__all__ = [
    "Averages",
    "ClassCounts",
    "ClassScores",
    "DataSummary",
    "Epoch",
    "Mistake",
    "ModelSummary",
    "Report",
    "Scores",
    "TrainingSummary",
    "to_plain",
]

_PICTURE_SUFFIXES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg"}
_MAX_PICTURE_BYTES = 100_000  # 24 of them, in base64, leave a report below 5 MB
_MAX_DEPTH = 8  # of the tables in a report; far more than any recipe has


@dataclass(frozen=True)
class ClassScores:
    """How well one class is told from all others.

    Attributes:
        name: of the class.
        num_items: pictures of the class.
        num_predicted: pictures that were taken for it.
        precision: share of `num_predicted` that is of the class; undefined when never predicted.
        recall: share of `num_items` that was found; undefined without pictures.
        f1: harmonic mean of both; undefined only when both counts are zero.
    """

    name: str
    num_items: int
    num_predicted: int
    precision: Interval
    recall: Interval
    f1: Interval


@dataclass(frozen=True)
class Averages:
    """One measure of all classes, over those for which it is defined.

    Attributes:
        macro: every class weighs the same.
        weighted: every class weighs its number of pictures.
    """

    macro: Interval
    weighted: Interval


@dataclass(frozen=True)
class Scores:
    """What a model is worth on a set of pictures; every interval is one of 95 %.

    Attributes:
        classes: names, in the order of the network's outputs.
        num_items: pictures.
        accuracy: share answered right; the answer is the most probable class or, where mistakes
            have costs, the one of least expected cost.
        top_k: how many classes `top_k_accuracy` looks at; None with two classes.
        top_k_accuracy: share whose class is among the `top_k` most probable.
        balanced_accuracy: mean recall over the classes that have pictures.
        precision: averages over classes.
        recall: averages over classes; macro is the balanced accuracy, weighted the accuracy.
        f1: averages over classes.
        log_loss: mean negative natural logarithm of the right class's probability.
        expected_calibration_error: mean distance of stated probability and share right, 0 to 1.
        majority_class: the most frequent class of these pictures.
        majority_accuracy: the accuracy of always saying `majority_class`.
        confusion: pictures per true class (rows) and predicted class (columns).
        per_class: in the order of `classes`.
        mean_cost: of an answer, where mistakes have costs. Its interval knows only mistakes that
            were seen: a dearer one may still come.
    """

    classes: tuple[str, ...]
    num_items: int
    accuracy: Interval
    top_k: int | None
    top_k_accuracy: Interval | None
    balanced_accuracy: Interval
    precision: Averages
    recall: Averages
    f1: Averages
    log_loss: Interval
    expected_calibration_error: float
    majority_class: str
    majority_accuracy: float
    confusion: tuple[tuple[int, ...], ...]
    per_class: tuple[ClassScores, ...]
    mean_cost: Interval | None = None

    def __post_init__(self) -> None:
        widths = {len(self.per_class), len(self.confusion), *map(len, self.confusion)}
        if widths != {len(self.classes)}:
            raise InvalidValueError(
                f"confusion and per_class must have one entry for each of the {len(self.classes)} "
                f"classes; got {sorted(widths)}"
            )
        if any(cell < 0 for row in self.confusion for cell in row):
            raise InvalidValueError("confusion must hold counts from 0 on; got a negative one")

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values; undefined numbers are None."""
        return dict(to_plain(self))

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Scores":
        """Return the scores that `to_dict` wrote.

        Raises:
            InvalidValueError: a key is unknown or missing, or a value has the wrong type.
        """
        return typing.cast("Scores", _build(Scores, plain, "scores", {}))


@dataclass(frozen=True)
class Mistake:
    """A picture that was taken for another class.

    Attributes:
        index: of the picture in its split.
        name: of the picture, as the user knows it.
        label: index of the right class.
        predicted: index of the class that was answered.
        probability: of the answer, 0 to 1.
        picture: a small PNG or JPEG, at most 100,000 bytes, if there is one.
    """

    index: int
    name: str
    label: int
    predicted: int
    probability: float
    picture: bytes | None = None

    def __post_init__(self) -> None:
        if self.picture is None:
            return
        if not self.suffix or len(self.picture) > _MAX_PICTURE_BYTES:
            raise InvalidValueError(
                f"picture of a mistake must be a PNG or JPEG of at most {_MAX_PICTURE_BYTES:,} "
                f"bytes; got {len(self.picture):,} bytes that begin with {self.picture[:8]!r}"
            )

    @property
    def suffix(self) -> str:
        """``png`` or ``jpg``, by the picture's first bytes; empty without a picture."""
        start = self.picture or b""
        return next((s for magic, s in _PICTURE_SUFFIXES.items() if start.startswith(magic)), "")


@dataclass(frozen=True)
class ClassCounts:
    """How many pictures one class has in each split.

    Attributes:
        name: of the class.
        train: pictures trained on.
        validation: pictures that chose the best epoch.
        test: pictures that were looked at once, at the end.
    """

    name: str
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class DataSummary:
    """What was learnt from.

    Attributes:
        name: of the data set.
        location: where it was read from.
        classes: counts, in the order of the network's outputs.
        notices: what was left out or assumed while reading, a sentence each.
        findings: what is wrong with the data, a sentence each.
    """

    name: str
    location: str
    classes: tuple[ClassCounts, ...]
    notices: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Epoch:
    """One pass over the training set.

    Attributes:
        number: from 1.
        train_loss: mean loss over the epoch's steps.
        learning_rate: at the end of the epoch.
        validation_loss: after the epoch.
        validation_accuracy: after the epoch, 0 to 1.
        train_accuracy: over the epoch's steps, 0 to 1, if it was measured.
        seconds: wall time.
        score: balanced validation accuracy, 0 to 1, where that chooses the best epoch.
    """

    number: int
    train_loss: float
    learning_rate: float
    validation_loss: float
    validation_accuracy: float
    train_accuracy: float | None
    seconds: float
    score: float | None = None


@dataclass(frozen=True)
class TrainingSummary:
    """How training went.

    Attributes:
        seconds: wall time of the whole run.
        history: epochs in order.
        best_epoch: number of the epoch whose weights were kept.
        stopped_because: why training ended, in words.
    """

    seconds: float
    history: tuple[Epoch, ...]
    best_epoch: int
    stopped_because: str


@dataclass(frozen=True)
class ModelSummary:
    """What came out.

    Attributes:
        family: of the network.
        num_parameters: trained numbers.
        input_size: ``(height, width)`` in pixels.
        temperature: by which the logits are divided, fitted on the validation split.
        file_size_bytes: of the model file, if known.
        milliseconds_per_picture: of one answer on the machine that trained, if measured.
    """

    family: str
    num_parameters: int
    input_size: tuple[int, int]
    temperature: float
    file_size_bytes: int | None = None
    milliseconds_per_picture: float | None = None


@dataclass(frozen=True)
class Report:
    """All that is told about a run.

    Attributes:
        title: usually the name of the model file.
        created: date and time, ISO 8601.
        data: what was learnt from.
        model: what came out.
        training: how training went.
        validation: scores on the pictures that chose the best epoch.
        test: scores on pictures that decided nothing, if there are any.
        mistakes: the most confident errors on `judged`, worst first.
        recipe: every setting.
        provenance: versions, seed, machine, fingerprint of the data.
        command: reproduces the run.
        next_commands: what to do with the model.
        test_without_leaks: scores on the test pictures that do not stand in the training pictures
            too, if some do.
        plan: how the time was used, where the run was planned and not a recipe's.
    """

    title: str
    created: str
    data: DataSummary
    model: ModelSummary
    training: TrainingSummary
    validation: Scores
    test: Scores | None
    mistakes: tuple[Mistake, ...]
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    command: str
    next_commands: tuple[str, ...] = ()
    test_without_leaks: Scores | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        classes = self.validation.classes
        others = [tuple(counts.name for counts in self.data.classes)]
        others += [self.test.classes] if self.test else []
        if any(other != classes for other in others):
            raise InvalidValueError("data, validation and test must have the same classes")
        for mistake in self.mistakes:
            if (
                not 0
                <= min(mistake.label, mistake.predicted)
                <= max(mistake.label, mistake.predicted)
                < len(classes)
            ):
                raise InvalidValueError(
                    f"mistakes must name classes from 0 to {len(classes) - 1}; got {mistake.label} "
                    f"and {mistake.predicted} for '{mistake.name}'"
                )

    @property
    def judged(self) -> Scores:
        """The scores that count: those on test, or on validation when there is no test split."""
        return self.test or self.validation

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; pictures by the names that `pictures` gives them."""
        plain = dict(to_plain(self))
        for entry, name in zip(plain["mistakes"], self._picture_names(), strict=True):
            entry["picture"] = name
        return plain

    def pictures(self) -> dict[str, bytes]:
        """Return the pictures of the mistakes by name, such as ``thumbnails/00.png``."""
        named = zip(self._picture_names(), self.mistakes, strict=True)
        return {name: mistake.picture for name, mistake in named if name and mistake.picture}

    def _picture_names(self) -> list[str | None]:
        return [
            f"thumbnails/{index:02d}.{mistake.suffix}" if mistake.picture else None
            for index, mistake in enumerate(self.mistakes)
        ]

    @staticmethod
    def from_dict(
        plain: Mapping[str, Any], pictures: Mapping[str, bytes] = types.MappingProxyType({})
    ) -> "Report":
        """Return the report that `to_dict` wrote, without the pictures that are not given.

        Raises:
            InvalidValueError: a key is unknown or missing, or a value has the wrong type.
        """
        return typing.cast("Report", _build(Report, plain, "report", pictures))


def to_plain(value: Any) -> Any:  # noqa: ANN401 - any value of a report
    """Return a value made of dataclasses as JSON has it; None for nan, infinity and bytes."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(entry) for entry in value]
    undefined = isinstance(value, float) and not math.isfinite(value)
    return None if undefined or isinstance(value, bytes) else value


def _build(kind: Any, plain: Any, where: str, pictures: Mapping[str, bytes]) -> Any:  # noqa: ANN401
    """Return the value of type `kind` that `to_plain` turned into `plain`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        (inner,) = (part for part in parts if part is not types.NoneType)
        return None if plain is None else _build(inner, plain, where, pictures)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, plain, where, pictures)
    if origin is tuple:
        _require(isinstance(plain, list), where, "a list", plain)
        many = [parts[0]] * len(plain) if parts[-1] is Ellipsis else list(parts)
        _require(len(many) == len(plain), where, f"{len(many)} entries", plain)
        entries = enumerate(zip(many, plain, strict=True))
        return tuple(_build(one, entry, f"{where}[{i}]", pictures) for i, (one, entry) in entries)
    if origin is dict:
        _require(isinstance(plain, Mapping), where, "a table", plain)
        _require_shallow(plain, where, _MAX_DEPTH)
        return dict(plain)
    if kind is bytes:
        _require(isinstance(plain, str), where, "the name of a picture", plain)
        return pictures.get(plain)
    return _build_scalar(kind, plain, where)


def _build_dataclass(kind: Any, plain: Any, where: str, pictures: Mapping[str, bytes]) -> Any:  # noqa: ANN401
    _require(isinstance(plain, Mapping), where, "a table", plain)
    hints = _hints(kind)
    for key in plain:
        if key not in hints:
            raise InvalidValueError(f"no entry named '{where}.{key}'; {nearest(str(key), hints)}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in plain:
            raise InvalidValueError(f"{where} must have an entry '{field.name}'; it has none")
    return kind(**{k: _build(hints[k], v, f"{where}.{k}", pictures) for k, v in plain.items()})


def _build_scalar(kind: type, plain: object, where: str) -> object:
    if kind is not float:
        words = {int: "a whole number", str: "text", bool: "true or false"}
        fits = isinstance(plain, kind) and isinstance(plain, bool) is (kind is bool)
        small = not isinstance(plain, int) or abs(plain) < 2**63
        _require(fits and small, where, words[kind], plain)
        return plain
    if plain is None:
        return math.nan
    fits = isinstance(plain, int | float) and not isinstance(plain, bool)
    _require(fits and abs(typing.cast("float", plain)) < 1e300, where, "a number", plain)
    return float(typing.cast("float", plain))


def _require(holds: bool, where: str, allowed: str, got: object) -> None:
    if not holds:
        text = repr(got)
        raise InvalidValueError(
            f"{where} must be {allowed}; got {text if len(text) < 80 else text[:80] + '…'}"
        )


def _require_shallow(plain: object, where: str, depth: int) -> None:
    _require(depth > 0, where, f"nested at most {_MAX_DEPTH} deep", plain)
    parts = plain.values() if isinstance(plain, Mapping) else plain
    for part in parts if isinstance(parts, Iterable) and not isinstance(parts, str) else ():
        _require_shallow(part, where, depth - 1)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
