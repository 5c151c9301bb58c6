"""The health of a data set: every check, in order, as a generator of progress.

    survey -> copies -> files, shape, splits, shortcuts -> features -> labels, outliers, forecast

Nothing is altered. What was looked for and did not run is said, with the reason.
"""

import datetime as dt
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

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
from kenspeckle.core import DataError, Geometry, MissingExtraError, Stage, printable, staged
from kenspeckle.findings import Check, Finding, Health
from kenspeckle.forecast import Forecast, forecast
from kenspeckle.images import Limits, thumbnail
from kenspeckle.pixels import Cache, bad_pictures, open_pixels, original
from kenspeckle.sources import Dataset
from kenspeckle.survey import Survey, survey

__all__ = ["Examination", "Examined", "examine", "thumbnails"]

THUMBNAIL_SIDE = 160
_ASKED = "labels, outliers, forecast"
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


class Examination:
    """A check under way: `begin`, then `compare`, then `conclude`.

    What comes between is the caller's: features that a training needs anyway, or a first model.

    Args:
        dataset: labelled pictures, with or without a split.
        limits: what pictures are refused.
        cache: where decoded pictures and features are kept.
        seed: of folds and samples.

    Attributes:
        known: what was seen of each picture, after `begin`.
        sound: the pictures that can be decoded, after `begin`.
        subject: they, and which of them are the same, after `compare`.
    """

    known: Survey
    sound: Dataset
    subject: Subject

    def __init__(self, dataset: Dataset, limits: Limits, cache: Cache, seed: int) -> None:
        self._dataset, self._limits, self._cache, self._seed = dataset, limits, cache, seed
        self._started = time.perf_counter()
        self._log = _Log()

    def begin(self, max_broken: float = 1.0) -> Generator[Stage, None, Survey]:
        """Look at every picture.

        Args:
            max_broken: largest share of pictures that may be broken, 0 to 1.

        Yields:
            Progress.

        Raises:
            DataError: more pictures cannot be decoded; the text lists them.
            WriteError: the cache could not be written.
        """
        dataset = self._dataset
        looking = survey(dataset, self._limits, self._cache)
        known = self.known = yield from staged("looking at every picture", looking)
        if len(known.broken) > max_broken * len(dataset.items):
            raise _too_many(dataset, known, max_broken)
        self._log.add("files", self._started, _files(dataset, known))
        self.sound = dataset.subset(known.sound.tolist()) if known.broken else dataset
        return known

    def features(
        self, labels: bool | None, num_threads: int
    ) -> Generator[Stage, None, NDArray[np.float32] | None]:
        """Return what a pretrained network sees in every picture, if labels are to be looked at.

        Args:
            labels: as `examine` has it.
            num_threads: compute threads; 0 takes all cores.

        Yields:
            Progress.

        Raises:
            MissingExtraError: the network that was asked for is not installed.
            WriteError: the cache could not be written.
        """
        options = (self._limits, self._cache)
        return (
            yield from _asked_features(
                self.sound,
                self.known,
                options,
                labels=labels,
                num_threads=num_threads,
                log=self._log,
            )
        )

    def compare(self, features: NDArray[np.float32] | None) -> Subject:
        """Return which pictures are the same; with features, slight crops are found too.

        Raises:
            MissingExtraError: scikit-learn is not installed.
        """
        begun = time.perf_counter()
        with _one_thread():
            copies = find_copies(self.known, features)
            self.subject = Subject(self.sound, self.known, copies)
            found = list(copy_findings(self.subject))
        self._log.add("duplicates and leaks", begun, found)
        return self.subject

    def conclude(
        self, features: NDArray[np.float32] | None, left_out: str = ""
    ) -> Generator[Stage, None, Examined]:
        """Run all other checks.

        Args:
            features: `float32 (N, D)` of the sound pictures; None leaves the labels alone.
            left_out: why that is so, where it is not known yet.

        Yields:
            Progress.

        Raises:
            MissingExtraError: scikit-learn is not installed.
        """
        if left_out:
            self._log.skip(_ASKED, left_out)
        with _one_thread():
            answers, prospect = yield from _judge(self.subject, features, self._seed, self._log)
        health = _summed_up(self._dataset, self.subject, self._log, prospect, self._started)
        return Examined(health, self.known.broken, self.subject, answers)


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
    with _one_thread():
        pass  # what is not installed is said before anything is read
    examination = Examination(dataset, limits, cache, seed)
    yield from examination.begin(max_broken)
    features = yield from examination.features(labels, num_threads)
    yield Stage("comparing pictures", 0, 1)
    examination.compare(features)
    return (yield from examination.conclude(features))


def _one_thread() -> AbstractContextManager[object]:
    """Multiply small matrices on one thread, where more would only wait for one another."""
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise MissingExtraError("checking data", "train") from error
    limits: AbstractContextManager[object] = threadpool_limits(limits=1)
    return limits


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
    if labels is False:
        log.skip(_ASKED, "left out; --labels asks for it")
        return None
    if not len(known.sound):
        log.skip(_ASKED, "there are no pictures")
        return None
    begun = time.perf_counter()
    try:
        features = yield from _features(sound, known, options, num_threads)
    except MissingExtraError as error:
        if labels:
            raise
        log.skip(_ASKED, str(error))
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
    store = yield from staged("reading pictures", reading)
    computing = features_of(store, geometry, cache, num_threads=num_threads)
    return (yield from staged("computing features", computing))


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
