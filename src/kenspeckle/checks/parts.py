"""Findings on a split that the data bring: other shares of the classes, other pictures."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kenspeckle.checks import Subject
from kenspeckle.core import Pixels, printable
from kenspeckle.drift import class_share_shift, feature_drift
from kenspeckle.findings import Case, Finding

__all__ = ["drift_findings", "share_findings"]

_COARSE_SIDE = 8  # of the pictures that are compared where there are no features


def share_findings(subject: Subject) -> Iterator[Finding]:
    """Yield the parts whose shares of the classes differ from those of the training pictures."""
    dataset = subject.dataset
    parts = [item.split for item in dataset.items]
    for shift in class_share_shift(dataset.labels, parts, len(dataset.classes)):
        if not shift.flagged:
            continue
        name = printable(dataset.classes[shift.label])
        asked = sum(part == shift.other for part in parts)
        yield Finding(
            kind="class-shares",
            severity="warning",
            title=f"The shares of the classes in {shift.other} differ from training: '{name}' has "
            f"{100 * shift.share_in_other:.3g} % there, {100 * shift.share:.3g} % in training.",
            why="Accuracy depends on the shares, and probabilities that were learnt under one "
            "share are wrong under another.",
            remedy="Find out which shares hold where the model will be used; read the balanced "
            "accuracy and the recall of each class, which do not depend on them.",
            training="keeps the split as it is given, and reports the balanced accuracy too.",
            num_pictures=asked,
        )


def drift_findings(
    subject: Subject, features: NDArray[np.float32] | None, seed: int
) -> Iterator[Finding]:
    """Yield the parts whose pictures look different from the training pictures of the same class.

    Args:
        subject: what is looked at.
        features: ``float32 (N, D)`` of a frozen network; coarse pictures stand in for them.
        seed: of the sample and the folds.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    dataset = subject.dataset
    parts = [item.split for item in dataset.items]
    if len(set(parts) - {None}) < 2:
        return
    seen = _coarse(subject.survey.traits.sketches) if features is None else features
    for drift in feature_drift(seen, dataset.labels, parts, subject.copies.together, seed):
        if not drift.flagged:
            continue
        auroc = drift.auroc
        ours = [Case(subject.exhibits([i]), "typical of training") for i in drift.typical]
        theirs = [
            Case(subject.exhibits([i]), f"typical of {drift.other}") for i in drift.typical_of_other
        ]
        yield Finding(
            kind="drift",
            severity="warning",
            title=f"The {drift.other} pictures look different from the training pictures of the "
            f"same class: they can be told apart with AUROC {auroc.value:.2f} "
            f"({auroc.low:.2f} to {auroc.high:.2f}; alike would be 0.5).",
            why="They may come from another camera, place or time. Then the number says how the "
            "model does there, and validation cut from the training pictures is too hopeful.",
            remedy="If the model will be used on pictures like these, bring some into training; if "
            "not, test on others.",
            training="keeps the split as it is given.",
            num_pictures=sum(part == drift.other for part in parts),
            cases=tuple(ours + theirs),
        )


def _coarse(sketches: Pixels) -> NDArray[np.float32]:
    """Return the sketches at 8 x 8 pixels, ``float32 (N, 192)``."""
    step = sketches.shape[1] // _COARSE_SIDE
    parts = [
        some.reshape(-1, _COARSE_SIDE, step, _COARSE_SIDE, step, 3).mean(axis=(2, 4))
        for some in np.array_split(sketches, max(1, len(sketches) // 4096))
    ]
    return np.concatenate(parts).reshape(len(sketches), -1).astype(np.float32)
