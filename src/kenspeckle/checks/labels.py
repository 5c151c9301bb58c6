"""Findings on labels: which look wrong, and which pictures look like no other."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kenspeckle.checks import Subject
from kenspeckle.core import DataError
from kenspeckle.findings import Case, Finding
from kenspeckle.heads import head_answers
from kenspeckle.suspects import (
    Suspects,
    compact,
    label_suspects,
    out_of_fold,
    outliers,
)

__all__ = ["Labelling", "labelling", "outlier_findings", "suspect_findings", "without_leaks"]


@dataclass(frozen=True, eq=False)
class Labelling:
    """What a linear head says of pictures that it did not learn from.

    Attributes:
        features: ``float32 (N, d)``, compact.
        probabilities: ``float64 (N, K)``, out of fold.
    """

    features: NDArray[np.float32]
    probabilities: NDArray[np.float64]


def labelling(subject: Subject, features: NDArray[np.float32], seed: int) -> Labelling:
    """Ask a linear head about every picture out of fold; copies stay in one fold.

    Args:
        subject: what is looked at.
        features: ``float32 (N, D)`` of a frozen network.
        seed: of the folds.

    Raises:
        DataError: a picture has no label, or there are fewer than two classes.
        MissingExtraError: scikit-learn is not installed.
    """
    dataset = subject.dataset
    if (dataset.labels < 0).any():
        raise DataError("pictures without a label have none to doubt")
    if len(np.unique(dataset.labels)) < 2:
        raise DataError("labels can be doubted from two classes on")
    small = compact(features)
    probabilities = out_of_fold(
        small, dataset.labels, subject.copies.together, len(dataset.classes), seed
    )
    return Labelling(small, probabilities)


def without_leaks(subject: Subject, found: Labelling, leaks: NDArray[np.int64]) -> str:
    """Return how right a linear head is on the test pictures with and without some, in words.

    Args:
        subject: what is looked at.
        found: its features.
        leaks: indices of the test pictures of which the training pictures hold a copy.
    """
    dataset = subject.dataset
    parts = np.array([item.split or "" for item in dataset.items])
    learned, asked = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
    answers = head_answers(found.features, dataset.labels, learned, asked, len(dataset.classes))
    right = answers == dataset.labels[asked]
    fresh = ~np.isin(asked, leaks)
    if not fresh.any():
        return "No test picture is left without them."
    return (
        "A linear head on the features of a pretrained network, trained on the training pictures, "
        f"is right on {100 * right.mean():.1f} % of the test pictures as given, on "
        f"{100 * right[fresh].mean():.1f} % without these, and on "
        f"{100 * right[~fresh].mean():.1f} % of these alone."
    )


def suspect_findings(subject: Subject, found: Labelling) -> Iterator[Finding]:
    """Yield the pictures whose label looks wrong, the most doubtful first.

    Raises:
        MissingExtraError: cleanlab is not installed.
    """
    dataset = subject.dataset
    suspects = label_suspects(found.probabilities, dataset.labels)
    if not suspects.num_issues:
        return
    chosen = suspects.ranking[: suspects.num_issues]
    accuracy = float((suspects.suggested == dataset.labels).mean())
    yield Finding(
        kind="label-suspects",
        severity="warning",
        title=f"About {suspects.num_issues:,} labels look wrong "
        f"({100 * suspects.num_issues / len(dataset.items):.2g} %).",
        why="A wrong label teaches a mistake in training, and in the test counts a right answer as "
        f"wrong. (A linear head on the features of a pretrained network is right on "
        f"{100 * accuracy:.0f} % of pictures that it did not learn from; the lower that is, the "
        "more of these labels are right and the pictures merely hard.)",
        remedy="Look at them, the most doubtful first; --write-fixes makes a manifest to edit.",
        training="learns from the labels as they are.",
        num_pictures=suspects.num_issues,
        cases=tuple(_suspect(subject, suspects, int(index)) for index in chosen),
    )


def _suspect(subject: Subject, suspects: Suspects, index: int) -> Case:
    suggested = subject.dataset.classes[suspects.suggested[index]]
    return Case(
        subject.exhibits([index]),
        f"its label has probability {suspects.quality[index]:.3f}",
        1 - float(suspects.quality[index]),
        suggested,
    )


def outlier_findings(
    subject: Subject, features: NDArray[np.float32], seed: int
) -> Iterator[Finding]:
    """Yield the pictures that look like no other of the set.

    Args:
        subject: what is looked at.
        features: ``float32 (N, D)`` of a frozen network, as it gives them.
        seed: of the pictures that they are compared with.
    """
    found = outliers(features, subject.dataset.labels, subject.copies.together, seed)
    if not found.num_outliers:
        return
    chosen = found.ranking[: found.num_outliers]
    yield Finding(
        kind="outliers",
        severity="note",
        title=f"{found.num_outliers:,} picture{'s look' if len(chosen) > 1 else ' looks'} like no "
        "other of the set.",
        why="They may be of another kind altogether: a screenshot, a logo, a test picture.",
        remedy="Look at them, and remove those that do not belong.",
        training="learns from them.",
        num_pictures=found.num_outliers,
        cases=tuple(
            Case(
                subject.exhibits([index]),
                f"{found.score[index]:.1f} deviations from what is usual",
                float(found.score[index]),
            )
            for index in chosen.tolist()
        ),
    )
