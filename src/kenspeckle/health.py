"""The health of a data set: every check, in order, as a generator of progress.

    survey -> copies -> files, shape, splits, shortcuts -> features -> labels, outliers, forecast

Nothing is altered. What was looked for and did not run is said, with the reason.
"""

import datetime as dt
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kenspeckle.checks import Subject
from kenspeckle.checks.copies import copy_findings, find_copies, leaked
from kenspeckle.checks.files import broken_files, file_findings, ignored_files
from kenspeckle.checks.labels import (
    Labelling,
    labelling,
    outlier_findings,
    suspect_findings,
    without_leaks,
)
from kenspeckle.checks.parts import drift_findings, share_findings
from kenspeckle.checks.shape import class_counts, shape_facts, shape_findings
from kenspeckle.checks.traits import shortcut_findings, tested_shortcuts
from kenspeckle.core import DataError, Geometry, MissingExtraError, Stage, printable
from kenspeckle.findings import Check, Finding, Health
from kenspeckle.forecast import Forecast, forecast
from kenspeckle.images import Limits, thumbnail
from kenspeckle.pixels import Cache, bad_pictures, open_pixels, original
from kenspeckle.sources import Dataset
from kenspeckle.survey import Survey, survey

__all__ = ["Examined", "examine", "thumbnails"]

Result = TypeVar("Result")

THUMBNAIL_SIDE = 160
_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True, eq=False)
class Examined:
    """A data set after its check.

    Attributes:
        health: everything that was found.
        broken: reason by index of every picture that cannot be decoded.
        subject: the pictures that can be decoded, and which of them are the same; the indices of
            the findings are theirs.
        labelling: out-of-fold answers for each picture, where labels were checked.
    """

    health: Health
    broken: Mapping[int, str]
    subject: Subject
    labelling: Labelling | None


@dataclass
class _Log:
    """What ran, how long, and what it found."""

    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, name: str, started: float, found: list[Finding], outcome: str = "") -> None:
        """Note a check that ran."""
        self.findings += found
        words = outcome or ", ".join(finding.kind for finding in found) or "nothing"
        self.checks.append(Check(name, words, time.perf_counter() - started))

    def explain(self, kind: str, words: str) -> None:
        """Add to what was found before, where there is any."""
        self.findings = [
            replace(finding, why=f"{finding.why} {words}") if finding.kind == kind else finding
            for finding in self.findings
        ]

    def skip(self, name: str, reason: str) -> None:
        """Note a check that did not run."""
        self.checks.append(Check(name, reason, 0.0, ran=False))


def examine(
    dataset: Dataset,
    limits: Limits,
    cache: Cache,
    *,
    labels: bool | None = None,
    max_broken: float = 1.0,
    seed: int = 0,
    num_threads: int = 0,
) -> Generator[Stage, None, Examined]:
    """Look for everything that makes a data set's numbers doubtful.

    Args:
        dataset: labelled pictures, with or without a split.
        limits: what pictures are refused.
        cache: where decoded pictures and features are kept.
        labels: look for wrong labels, outliers and what more pictures would bring too, which needs
            the features of a pretrained network; when None, where that is installed.
        max_broken: largest share of pictures that may be broken, 0 to 1; with more the check ends
            at once with an error.
        seed: of folds and samples.
        num_threads: compute threads; 0 takes all cores.

    Yields:
        Progress.

    Raises:
        DataError: more pictures than `max_broken` cannot be decoded; the text lists them.
        MissingExtraError: scikit-learn is not installed, or the network that was asked for.
        WriteError: the cache could not be written.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise MissingExtraError("checking data", "train") from error
    started = time.perf_counter()
    log = _Log()
    known = yield from _staged("looking at every picture", survey(dataset, limits, cache))
    if len(known.broken) > max_broken * len(dataset.items):
        raise _too_many(dataset, known, max_broken)
    log.add("files", started, _files(dataset, known))
    sound = dataset.subset(known.sound.tolist()) if known.broken else dataset
    features = yield from _asked_features(
        sound, known, (limits, cache), labels=labels, num_threads=num_threads, log=log
    )
    # All that follows multiplies small matrices, where more threads only wait for one another.
    with threadpool_limits(limits=1):
        yield Stage("comparing pictures", 0, 1)
        begun = time.perf_counter()
        subject = Subject(sound, known, find_copies(known, features))
        log.add("duplicates and leaks", begun, list(copy_findings(subject)))
        answers, prospect = yield from _judge(subject, features, seed, log)
    health = _summed_up(dataset, subject, log, prospect, started)
    return Examined(health, known.broken, subject, answers)


def _summed_up(
    dataset: Dataset, subject: Subject, log: _Log, prospect: Forecast | None, started: float
) -> Health:
    return Health(
        name=dataset.name,
        location=dataset.location,
        created=f"{dt.datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
        num_pictures=len(dataset.items),
        classes=dataset.classes,
        counts=class_counts(subject),
        shape=shape_facts(subject),
        notices=dataset.notices,
        findings=tuple(sorted(log.findings, key=lambda f: _ORDER[f.severity])),
        checks=tuple(log.checks),
        forecast=prospect,
        seconds=time.perf_counter() - started,
    )


def _judge(
    subject: Subject, features: NDArray[np.float32] | None, seed: int, log: _Log
) -> Generator[Stage, None, tuple[Labelling | None, Forecast | None]]:
    """Run what needs no more pictures read."""
    yield Stage("looking for shortcuts", 0, 1)
    begun = time.perf_counter()
    log.findings += file_findings(subject)
    log.add("classes, sizes and colour", begun, list(shape_findings(subject)))
    begun = time.perf_counter()
    found = [*share_findings(subject), *drift_findings(subject, features, seed)]
    log.add("shares and drift of the split", begun, found)
    begun = time.perf_counter()
    traits = tested_shortcuts(subject, seed)
    tested = ", ".join(trait.name for trait in traits if trait.tested) or "nothing to test"
    log.add("shortcuts", begun, list(shortcut_findings(subject, traits)), f"tested {tested}")
    if features is None:
        return None, None
    return (yield from _judge_labels(subject, features, seed, log))


def _judge_labels(
    subject: Subject, features: NDArray[np.float32], seed: int, log: _Log
) -> Generator[Stage, None, tuple[Labelling | None, Forecast | None]]:
    """Run what needs the features of a pretrained network."""
    yield Stage("looking for wrong labels", 0, 1)
    begun = time.perf_counter()
    log.add("outliers", begun, list(outlier_findings(subject, features, seed)))
    begun = time.perf_counter()
    try:
        answers = labelling(subject, features, seed)
    except DataError as error:
        log.skip("wrong labels, forecast", str(error))
        return None, None
    leaks = leaked(subject, "test")
    if len(leaks):
        log.explain("leaks-into-test", without_leaks(subject, answers, leaks))
    try:
        log.add("wrong labels", begun, list(suspect_findings(subject, answers)))
    except MissingExtraError as error:
        log.skip("wrong labels", str(error))
    yield Stage("forecasting", 0, 1)
    begun = time.perf_counter()
    dataset = subject.dataset
    prospect = forecast(
        answers.features, dataset.labels, subject.copies.together, dataset.classes, seed
    )
    if prospect is None:
        log.skip("forecast", "too few pictures")
    else:
        log.add("forecast", begun, [], f"{100 * prospect.expected:.1f} % with twice the pictures")
    return answers, prospect


def _too_many(dataset: Dataset, known: Survey, max_broken: float) -> DataError:
    items = dataset.items
    bad = [f"{printable(items[i].name)}: {words}" for i, words in sorted(known.broken.items())]
    remedy = "repair or remove them, or leave them out with --on-bad skip; nothing was changed"
    if max_broken:
        remedy = (
            f"these are {len(bad) / len(items):.1%} of the pictures, and at most {max_broken:.1%} "
            "are skipped (--max-bad); nothing was changed"
        )
    return bad_pictures(bad, len(items), remedy)


def _files(dataset: Dataset, known: Survey) -> list[Finding]:
    found = (broken_files(dataset, known.broken), ignored_files(dataset))
    return [finding for finding in found if finding is not None]


def _staged(
    name: str, work: Generator[tuple[int, int], None, Result]
) -> Generator[Stage, None, Result]:
    """Pass on what a generator returns, and its progress under a name."""
    while True:
        try:
            done, total = next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
        yield Stage(name, done, total)


def _asked_features(
    sound: Dataset,
    known: Survey,
    options: tuple[Limits, Cache],
    *,
    labels: bool | None,
    num_threads: int,
    log: _Log,
) -> Generator[Stage, None, NDArray[np.float32] | None]:
    """Return the features, if labels are to be looked at and there is something to look at."""
    asked = "labels, outliers, forecast"
    if labels is False:
        log.skip(asked, "left out; --labels asks for it")
        return None
    if not len(known.sound):
        log.skip(asked, "there are no pictures")
        return None
    begun = time.perf_counter()
    try:
        features = yield from _features(sound, known, options, num_threads)
    except MissingExtraError as error:
        if labels:
            raise
        log.skip(asked, str(error))
        return None
    log.add("features", begun, [], f"{features.shape[1]} a picture")
    return features


def _features(
    sound: Dataset, known: Survey, options: tuple[Limits, Cache], num_threads: int
) -> Generator[Stage, None, NDArray[np.float32]]:
    """Return the features of every picture by a pretrained network."""
    try:
        from kenspeckle.features import default_size, features_of
    except ModuleNotFoundError as error:
        raise MissingExtraError("looking for wrong labels", "train") from error
    traits, (limits, cache) = known.traits, options
    side = default_size(float(np.median(np.sqrt(1.0 * traits.height * traits.width))))
    geometry = Geometry((side, side))
    reading = open_pixels(sound, geometry, limits, cache)
    store = yield from _staged("reading pictures", reading)
    computing = features_of(store, geometry, cache, num_threads=num_threads)
    return (yield from _staged("computing features", computing))


def thumbnails(dataset: Dataset, indices: Iterable[int], limits: Limits) -> dict[int, bytes]:
    """Return small pictures by index, for a page.

    Args:
        dataset: of pictures that can be decoded.
        indices: which of them.
        limits: what pictures are refused.

    Raises:
        DataError: a picture has changed and cannot be read any more.
    """
    return {
        index: thumbnail(original(dataset, index, limits, THUMBNAIL_SIDE), THUMBNAIL_SIDE)
        for index in indices
    }
