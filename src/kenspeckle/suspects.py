"""Pictures whose label looks wrong, and pictures that look like no other.

Everything here works on features, one row per picture, of a network that was not trained on these
labels. A linear head says out of fold what each picture seems to be; confident learning compares
that with the labels.

    features -> compact -> out_of_fold -> label_suspects
             -> outliers
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import InvalidValueError, MissingExtraError
from kenspeckle.heads import head_logits

__all__ = [
    "Outliers",
    "Suspects",
    "compact",
    "head_logits",
    "label_suspects",
    "out_of_fold",
    "outliers",
]

Floats = NDArray[np.float64]
Features = NDArray[np.float32]
Labels = NDArray[np.int64]

# On five real sets of up to 2,000 pictures with 5 % of the labels flipped, 128 were as good.
_NUM_DIMENSIONS = 256

# Up to this many pictures of another kind that got into a set together are still seen as outliers:
# they are each other's nearest neighbours.
_NUM_NEIGHBOURS = 50
_MAX_REFERENCES = 5_000  # pictures among which neighbours are sought; time grows with N times this
_BLOCK_PICTURES = 1_000  # compared at a time with the references: 20 MB
_LEAST_CLASS = 20  # pictures of a class that are enough to say what is usual in it
_FAR = 3.5  # robust standard deviations (Iglewicz and Hoaglin 1993, "How to Detect Outliers")


@dataclass(frozen=True, eq=False)
class Suspects:
    """All pictures in the order in which their labels deserve a look.

    Attributes:
        ranking: ``int64 (N,)``, indices of the pictures, the most doubtful label first.
        num_issues: so many at the head of `ranking` are estimated to be mislabelled.
        quality: ``float64 (N,)``, per picture in its own order the probability of its label, 0 to
            1.
        suggested: ``int64 (N,)``, per picture in its own order the most probable class.
    """

    ranking: Labels
    num_issues: int
    quality: Floats
    suggested: Labels


@dataclass(frozen=True, eq=False)
class Outliers:
    """All pictures in the order of their distance from the others.

    Attributes:
        ranking: ``int64 (N,)``, indices of the pictures, the strangest first.
        num_outliers: so many at the head of `ranking` are far from what is usual in the set.
        score: ``float64 (N,)``, per picture in its own order, in robust standard deviations above
            the median.
    """

    ranking: Labels
    num_outliers: int
    score: Floats


def compact(features: Features) -> Features:
    """Return the features on their 256 principal axes, on which a linear head learns fast.

    The signed square root comes first: it makes averaged activations less skewed. Labels play no
    part, so nothing leaks between folds.

    Args:
        features: ``float32 (N, D)``.

    Returns:
        ``float32 (N, d)`` with d the least of 256, D and N.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
    except ModuleNotFoundError as error:
        raise MissingExtraError("checking labels", "train") from error
    even = np.sign(features) * np.sqrt(np.abs(features))
    pca = PCA(min(_NUM_DIMENSIONS, *features.shape), svd_solver="covariance_eigh")
    return np.asarray(pca.fit_transform(even), np.float32)


def out_of_fold(
    features: Features,
    labels: Labels,
    groups: Labels,
    num_classes: int,
    seed: int,
    *,
    num_folds: int = 5,
) -> Floats:
    """Return class probabilities of every picture, from a head that learned from other groups.

    The head is a linear discriminant with a shrunk covariance; one temperature for all folds, which
    minimises the negative log-likelihood of the labels, makes its probabilities honest. The folds
    are stratified as far as the groups allow.

    A class that has fewer than two pictures outside a fold is not learned there. Nothing speaks
    against the labels of its pictures in that fold: they get probability 1.

    Source: Friedman 1989, "Regularized Discriminant Analysis"; Guo et al. 2017, "On Calibration of
    Modern Neural Networks".

    Args:
        features: ``float32 (N, D)``, best from `compact`: time grows with D³.
        labels: ``int64 (N,)``, from 0 to K - 1.
        groups: ``int64 (N,)``; pictures with equal numbers are never on two sides of a fold.
        num_classes: K.
        seed: of the folds.
        num_folds: at least 2; fewer are made where there are fewer groups, or pictures of the
            largest class.

    Returns:
        ``float64 (N, K)``; each row sums to one.

    Raises:
        InvalidValueError: the lengths differ, or a number is out of range.
        MissingExtraError: scikit-learn is not installed.
    """
    _require_labels(labels, num_classes, features=features, groups=groups)
    if num_folds < 2:
        raise InvalidValueError(f"num_folds must be at least 2; got {num_folds}")
    logits = np.full((len(labels), num_classes), -np.inf)
    for learned, asked in _folds(labels, groups, seed, num_folds):
        logits[asked] = head_logits(features, labels, learned, asked, num_classes)
    rows = np.arange(len(labels))
    known = np.isfinite(logits[rows, labels])
    logits[~known] = -np.inf
    logits[rows[~known], labels[~known]] = 0.0
    return _calibrated(logits, labels, known)


def label_suspects(probabilities: Floats, labels: Labels) -> Suspects:
    """Return all pictures by how doubtful their label is, and how many labels are wrong.

    The score is self-confidence, the probability of the given label; confident learning estimates
    the number of wrong labels. Both are cleanlab's.

    Source: Northcutt, Jiang and Chuang 2021, "Confident Learning", arXiv 1911.00068.

    Args:
        probabilities: ``float64 (N, K)``, from `out_of_fold`.
        labels: ``int64 (N,)``, from 0 to K - 1.

    Raises:
        InvalidValueError: the lengths differ, a label is out of range, or there are fewer than two
            classes.
        MissingExtraError: cleanlab is not installed.
    """
    _require_labels(labels, probabilities.shape[1], probabilities=probabilities)
    num_found = len(np.unique(labels))
    if num_found < 2:
        raise InvalidValueError(f"labels must be of at least two classes; got {num_found}")
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ModuleNotFoundError as error:
        raise MissingExtraError("finding wrong labels", "check") from error
    quality = get_label_quality_scores(labels, probabilities, method="self_confidence")
    issues = find_label_issues(labels, probabilities, filter_by="low_self_confidence", n_jobs=1)
    return Suspects(
        ranking=np.argsort(quality, kind="stable"),
        num_issues=int(issues.sum()),
        quality=quality,
        suggested=probabilities.argmax(axis=1),
    )


def outliers(features: Features, labels: Labels | None, groups: Labels, seed: int) -> Outliers:
    """Return all pictures by how far they lie from the others, and how many of them are outliers.

    The distance is one minus the cosine to the 50th nearest neighbour (in sets below 1,000
    pictures, the one at a twentieth of the set) among at most 5,000 pictures drawn at random; so
    time grows with N, and memory is that of one block. Its logarithm is measured against the median
    and the median absolute deviation, those of the picture's own class where labels are given and
    the class has 20 pictures.

    In a uniform set, such as X-rays, strangers are counted; among varied photographs few are, yet
    they rank high (benchmarks/labels.py).

    Source: Ramaswamy, Rastogi and Shim 2000, "Efficient Algorithms for Mining Outliers from Large
    Data Sets"; the sample follows Sugiyama and Borgwardt 2013, "Rapid Distance-Based Outlier
    Detection via Sampling".

    Args:
        features: ``float32 (N, D)``, as the network gives them: centred ones hide what a few
            pictures have in common.
        labels: ``int64 (N,)``, or None.
        groups: ``int64 (N,)``; pictures of one group are not neighbours of each other.
        seed: of the sample.

    Raises:
        InvalidValueError: the lengths differ.
    """
    _require_length(len(features), groups=groups, **({} if labels is None else {"labels": labels}))
    if not len(features):
        return Outliers(np.zeros(0, np.int64), 0, np.zeros(0))
    distance = np.log(_neighbour_distances(features, groups, seed))
    score = _robust_score(distance)
    for label in () if labels is None else np.unique(labels):
        members = labels == label
        if members.sum() >= _LEAST_CLASS:
            score[members] = _robust_score(distance[members])
    return Outliers(np.argsort(-score, kind="stable"), int((score > _FAR).sum()), score)


def _folds(
    labels: Labels, groups: Labels, seed: int, num_folds: int
) -> Iterator[tuple[Labels, Labels]]:
    """Yield the pictures to learn from and those to ask about; every picture is asked once."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ModuleNotFoundError as error:
        raise MissingExtraError("checking labels", "train") from error
    num_folds = min(num_folds, len(np.unique(groups)), int(np.bincount(labels).max(initial=0)))
    if num_folds < 2:
        return
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        splits = list(splitter.split(labels, labels, groups))
    yield from ((learned, asked) for learned, asked in splits if len(asked))


def _calibrated(logits: Floats, labels: Labels, known: NDArray[np.bool_]) -> Floats:
    """Return the softmax of the logits over the temperature that suits the known rows best."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.flatnonzero(known)

    def loss(log_scale: float) -> float:
        scaled = log_softmax(logits[rows] * np.exp(log_scale), axis=1)
        return -float(scaled[np.arange(len(rows)), labels[rows]].mean())

    best = minimize_scalar(loss, bounds=(-5.0, 2.0), method="bounded").x if len(rows) else 0.0
    return np.asarray(np.exp(log_softmax(logits * np.exp(best), axis=1)), np.float64)


def _neighbour_distances(features: Features, groups: Labels, seed: int) -> Floats:
    """Return ``float64 (N,)``: 1 minus the cosine to the k-th nearest picture of another group."""
    num_pictures = len(features)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(norms, np.finfo(np.float32).tiny)
    chosen = np.sort(np.random.default_rng(seed).permutation(num_pictures)[:_MAX_REFERENCES])
    k = min(_NUM_NEIGHBOURS, max(1, len(chosen) // 20))
    distances = np.ones(num_pictures)
    for start in range(0, num_pictures, _BLOCK_PICTURES):
        block = slice(start, start + _BLOCK_PICTURES)
        similarity = unit[block] @ unit[chosen].T
        similarity[groups[block, None] == groups[None, chosen]] = -1.0
        nearest = np.partition(similarity, len(chosen) - k, axis=1)[:, len(chosen) - k]
        distances[block] = 1.0 - nearest
    return np.maximum(distances, np.finfo(np.float32).eps)


def _robust_score(values: Floats) -> Floats:
    """Return the distance from the median in median absolute deviations, made standard ones."""
    median = np.median(values)
    deviation = 1.4826 * np.median(np.abs(values - median))  # that of a normal distribution
    return np.asarray((values - median) / max(deviation, np.finfo(np.float32).eps))


def _require_labels(labels: Labels, num_classes: int, **arrays: NDArray[Any]) -> None:
    _require_length(len(labels), **arrays)
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise InvalidValueError(f"labels must be from 0 to {num_classes - 1}; got {wrong[0]}")


def _require_length(length: int, **arrays: NDArray[Any]) -> None:
    for name, array in arrays.items():
        if len(array) != length:
            raise InvalidValueError(
                f"{name} must have one row per picture, {length:,}; got {len(array):,}"
            )
