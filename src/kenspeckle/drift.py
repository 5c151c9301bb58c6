"""Drift between the parts of a split: other shares of the classes, or other pictures.

A test set that differs from the training set measures something else than the network learned. The
two questions are kept apart: whether the classes have other shares, and whether pictures of the
same class look different.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import Interval, InvalidValueError
from kenspeckle.metrics import UNDEFINED, share_interval

__all__ = ["Drift", "ShareShift", "class_share_shift", "feature_drift"]

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]

_REFERENCE = "train"
_NUM_DRAWS, _BLOCK = 9999, 1000  # tables drawn for a p-value, and held at a time
_SIGNIFICANT = 0.001  # several parts are looked at, and nobody wants a false alarm
_MATERIAL = 0.03  # share of the pictures that would have to be of another class

_MAX_PICTURES = 5000  # of both parts together
_LEAST_PICTURES = 20  # of one part, in matched pairs
_NUM_FOLDS = 5
_NUM_EXAMPLES = 6
_RIDGE = 0.1  # of features with a variance of 1
_DRIFTED = 0.55  # AUROC; see `feature_drift`


@dataclass(frozen=True)
class ShareShift:
    """How the shares of the classes differ between the training set and another part.

    Attributes:
        other: name of the other part.
        p_value: probability of shares as different as these, or more, if both parts were drawn from
            the same classes; at least 0.0001.
        distance: share of the other part's pictures that would have to be of another class for the
            shares to agree (total variation), 0 to 1.
        label: the class whose share differs most.
        share: of that class in the training set.
        share_in_other: of that class in the other part.
        flagged: whether the shift is neither chance nor trifling.
    """

    other: str
    p_value: float
    distance: float
    label: int
    share: float
    share_in_other: float
    flagged: bool


@dataclass(frozen=True)
class Drift:
    """How well a classifier tells pictures of the training set from those of another part.

    Attributes:
        other: name of the other part.
        tested: False where too few pictures of the two parts share a class.
        auroc: probability that of two pictures of the same shares of classes, one of each part, the
            classifier takes the right one for that of the other part; 0.5 is chance.
        num_pictures: of each part that were compared.
        flagged: whether the parts differ.
        typical: indices of the pictures of the training set that are least like the other part.
        typical_of_other: indices of those of the other part that are least like the training set.
    """

    other: str
    tested: bool
    auroc: Interval = UNDEFINED
    num_pictures: int = 0
    flagged: bool = False
    typical: tuple[int, ...] = ()
    typical_of_other: tuple[int, ...] = ()


def class_share_shift(
    labels: Labels, parts: Sequence[str | None], num_classes: int, seed: int = 0
) -> tuple[ShareShift, ...]:
    """Return for every part but the training set how the shares of its classes differ from there.

    The p-value is that of the chi-square statistic, by drawing tables of the same margins: exact
    for small counts too.

    Source: Hope 1968, "A Simplified Monte Carlo Significance Test Procedure".

    Args:
        labels: ``int64 (N,)``, from 0 to `num_classes` - 1; negative without a label.
        parts: N names such as ``train`` and ``test``; None for pictures of no part.
        num_classes: K.
        seed: of the drawn tables.

    Returns:
        One for each other part with labelled pictures, by name; empty without a part ``train``.

    Raises:
        InvalidValueError: the lengths differ, or a label is not below `num_classes`.

    Example:
        >>> labels = np.repeat([0, 1, 0, 1], [300, 100, 50, 50])
        >>> shift = class_share_shift(labels, ["train"] * 400 + ["test"] * 100, 2)[0]
        >>> shift.other, shift.share, shift.share_in_other, shift.flagged
        ('test', 0.75, 0.5, True)
    """
    names = _names(parts, labels)
    if len(labels) and labels.max() >= num_classes:
        raise InvalidValueError(f"labels must be below {num_classes}; got {labels.max()}")
    counts = {
        name: np.bincount(labels[(names == name) & (labels >= 0)], minlength=num_classes)
        for name in sorted(set(names.tolist()) - {""})
    }
    reference = counts.pop(_REFERENCE, np.zeros(num_classes, np.int64))
    if not reference.any():
        return ()
    return tuple(
        _share_shift(name, reference, count, np.random.default_rng(seed))
        for name, count in counts.items()
        if count.any()
    )


def _names(parts: Sequence[str | None], *arrays: NDArray[Any]) -> NDArray[np.str_]:
    lengths = [len(parts), *(len(array) for array in arrays)]
    if len(set(lengths)) > 1:
        raise InvalidValueError(
            f"parts and what belongs to them must have the same length; got {lengths}"
        )
    return np.array([part or "" for part in parts], np.str_)


def _share_shift(
    other: str, reference: Labels, counts: Labels, generator: np.random.Generator
) -> ShareShift:
    both = reference + counts
    used = both > 0
    totals, total = both[used], int(counts.sum())
    # With fixed margins the statistic is a constant plus a multiple of this sum of squares.
    expected = totals * (total / totals.sum())
    own = np.sum((counts[used] - expected) ** 2 / totals)
    as_far, left = 0, _NUM_DRAWS
    while left:
        block = min(_BLOCK, left)
        drawn = generator.multivariate_hypergeometric(totals, total, block, method="marginals")
        statistic = np.sum((drawn - expected) ** 2 / totals, axis=1)
        as_far += int(np.sum(statistic >= own * (1 - 1e-9)))
        left -= block
    p_value = (1 + as_far) / (1 + _NUM_DRAWS)
    share, share_in_other = reference / reference.sum(), counts / total
    differences = np.abs(share - share_in_other)
    label, distance = int(differences.argmax()), float(differences.sum() / 2)
    return ShareShift(
        other,
        p_value,
        distance,
        label,
        float(share[label]),
        float(share_in_other[label]),
        flagged=p_value < _SIGNIFICANT and distance >= _MATERIAL,
    )


def feature_drift(
    features: NDArray[np.floating[Any]],
    labels: Labels,
    parts: Sequence[str | None],
    groups: Labels,
    seed: int,
) -> tuple[Drift, ...]:
    """Return for every part but the training set how well its pictures can be told from there.

    From every class as many pictures are taken of one part as of the other, so that another share
    of a class is no drift. A linear classifier learns to tell the parts apart and is judged on
    folds that it has not seen. Groups stay within a fold: parts of different patients, say, are not
    different for that.

    Source: the classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv 1610.06545).

    Args:
        features: ``float (N, D)``, of an embedding or of small versions of the pictures.
        labels: ``int64 (N,)``; negative without a label, which then is a class of its own.
        parts: N names such as ``train`` and ``test``; None for pictures of no part.
        groups: ``int64 (N,)``; pictures of equal numbers belong together.
        seed: of the choice of at most 5,000 pictures, and of the folds.

    Returns:
        One for each other part, by name; empty without a part ``train``. A part is flagged when the
        lower end of the AUROC is above 0.55, a difference of a fifth of a standard deviation along
        one direction.

    Raises:
        InvalidValueError: the lengths differ.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> features = generator.normal(size=(400, 3))
        >>> features[300:, 0] += 2
        >>> parts = ["train"] * 300 + ["test"] * 100
        >>> (drift,) = feature_drift(features, np.zeros(400, int), parts, np.arange(400), seed=0)
        >>> drift.flagged, drift.num_pictures, round(drift.auroc.value, 1)
        (True, 100, 0.9)
    """
    names = _names(parts, features, labels, groups)
    if _REFERENCE not in names:
        return ()
    found = []
    for other in sorted(set(names.tolist()) - {"", _REFERENCE}):
        generator = np.random.default_rng(seed)
        chosen = _matched(labels, names == _REFERENCE, names == other, generator=generator)
        is_other = names[chosen] == other
        groups_of_parts = [np.unique(groups[chosen[side]]) for side in (is_other, ~is_other)]
        if min(map(len, groups_of_parts)) < _LEAST_PICTURES:
            found.append(Drift(other, tested=False))
            continue
        folds = _folds(is_other, groups[chosen], generator)
        scores = _scores(features[chosen].astype(np.float64), is_other, folds)
        found.append(_drift(other, scores, is_other, groups[chosen], chosen))
    return tuple(found)


def _matched(labels: Labels, *sides: NDArray[np.bool_], generator: np.random.Generator) -> Labels:
    """Return the indices of as many pictures of each class from one side as from the other."""
    classes = np.maximum(labels, -1) + 1
    counts = np.array([np.bincount(classes[side], minlength=classes.max() + 1) for side in sides])
    wanted = counts.min(axis=0)
    wanted = wanted * min(_MAX_PICTURES // 2, wanted.sum()) // max(1, wanted.sum())
    chosen = []
    for side, count in zip(sides, counts, strict=True):
        shuffled = generator.permutation(np.flatnonzero(side))
        ordered = shuffled[np.argsort(classes[shuffled], kind="stable")]
        rank = np.arange(len(ordered)) - (np.cumsum(count) - count)[classes[ordered]]
        chosen.append(ordered[rank < wanted[classes[ordered]]])
    return np.sort(np.concatenate(chosen))


def _folds(is_other: NDArray[np.bool_], groups: Labels, generator: np.random.Generator) -> Labels:
    """Deal groups out to the folds, side by side and the largest first."""
    _, unit, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    share = np.bincount(unit, is_other) / sizes
    fold = np.empty(len(sizes), np.int64)
    order = np.lexsort((generator.random(len(sizes)), -sizes, share))
    fold[order] = np.arange(len(sizes)) % _NUM_FOLDS
    return fold[unit]


def _scores(features: Floats, is_other: NDArray[np.bool_], folds: Labels) -> Floats:
    """Return ``(M,)``, higher for the other part: Fisher's discriminant by ridge regression."""
    scores = np.empty(len(features))
    for fold in range(_NUM_FOLDS):
        held = folds == fold
        mean, deviation = features[~held].mean(axis=0), features[~held].std(axis=0)
        x = (features - mean) / np.where(deviation > 1e-12, deviation, 1)
        y = np.where(is_other[~held], 1.0, -1.0)
        training = x[~held]
        gram = training.T @ training / len(y) + _RIDGE * np.eye(x.shape[1])
        scores[held] = x[held] @ np.linalg.solve(gram, training.T @ (y - y.mean()) / len(y))
    return scores


def _drift(
    other: str, scores: Floats, is_other: NDArray[np.bool_], groups: Labels, chosen: Labels
) -> Drift:
    auroc = _auroc(scores, is_other, groups)
    order = np.argsort(scores, kind="stable")
    typical, typical_of_other = order[~is_other[order]], order[is_other[order]][::-1]
    return Drift(
        other,
        tested=True,
        auroc=auroc,
        num_pictures=int(is_other.sum()),
        flagged=auroc.low > _DRIFTED,
        typical=tuple(chosen[typical[:_NUM_EXAMPLES]].tolist()),
        typical_of_other=tuple(chosen[typical_of_other[:_NUM_EXAMPLES]].tolist()),
    )


def _auroc(scores: Floats, positive: NDArray[np.bool_], groups: Labels) -> Interval:
    """Return the area under the ROC curve; pictures of one group are not independent.

    Source: DeLong et al. 1988, and Obuchowski 1997, "Nonparametric analysis of clustered ROC curve
    data".
    """
    above = np.empty(len(scores))  # of each picture, the share of the other side on its right side
    for side, sign in ((positive, 1), (~positive, -1)):
        others = np.sort(sign * scores[~side])
        ends = (np.searchsorted(others, sign * scores[side], end) for end in ("left", "right"))
        above[side] = sum(ends) / (2 * len(others))
    value = float(above[positive].mean())
    weight = 1 / np.where(positive, positive.sum(), (~positive).sum())
    _, unit = np.unique(groups, return_inverse=True)
    errors = np.bincount(unit, weight * (above - value))
    return share_interval(value, float(np.sqrt(np.sum(errors**2))), len(errors))
