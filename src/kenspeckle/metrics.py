"""Measures of a classifier, as functions over arrays, and the intervals around them.

What the measures have in common:

* A measure that divides by zero is undefined and is nan, never a silent zero: the recall of a
  class without items, the precision of a class that was never predicted, F1 where both hold.
  (A class that has items and was never predicted has an F1 of 0, by the formula.)
* An average over classes takes the classes for which the measure is defined. Both conventions are
  those of scikit-learn with ``zero_division=np.nan``; its default puts 0 in place of nan.
* Shares lie from 0 to 1, and every interval is one of 95 %.

N is the number of items, K the number of classes; labels are class indices from 0 to K - 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kenspeckle.core import Interval, InvalidValueError

__all__ = [
    "METRICS",
    "UNDEFINED",
    "Metric",
    "PerClass",
    "accuracy",
    "balanced_accuracy",
    "bootstrap",
    "confusion_matrix",
    "expected_calibration_error",
    "log_loss",
    "log_losses",
    "macro",
    "per_class",
    "rates",
    "resamples",
    "score_of",
    "share_interval",
    "top_k_accuracy",
    "top_k_hits",
    "weighted",
    "wilson",
    "wilson_f1",
]

Metric = Literal["accuracy", "balanced accuracy"]
"""What chooses the best of several models."""

METRICS = get_args(Metric)

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]

UNDEFINED = Interval(math.nan, math.nan, math.nan)
"""The interval of a measure that divides by zero."""

_Z = 1.959963984540054  # the standard normal lies within ± this with probability 0.95

# The spacing of float32 at 1: what a network computes cannot tell a smaller probability from zero.
_LEAST_PROBABILITY = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class PerClass:
    """Measures of each class against all others.

    Attributes:
        precision: ``(K,)``, share of the items predicted as the class that are of it.
        recall: ``(K,)``, share of the items of the class that were predicted as it.
        f1: ``(K,)``, harmonic mean of precision and recall.
        support: ``int64 (K,)``, items of the class.
        num_predicted: ``int64 (K,)``, items predicted as the class.
    """

    precision: Floats
    recall: Floats
    f1: Floats
    support: Labels
    num_predicted: Labels


def accuracy(labels: Labels, predicted: Labels) -> float:
    """Return the share of items whose predicted class is their label; nan without items.

    Args:
        labels: ``int64 (N,)``.
        predicted: ``int64 (N,)``.

    Raises:
        InvalidValueError: the arrays differ in length.

    Example:
        >>> accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0]))
        0.75
    """
    _require_same_length(labels=labels, predicted=predicted)
    return float(np.mean(labels == predicted)) if len(labels) else math.nan


def top_k_hits(
    labels: Labels, probabilities: NDArray[np.floating[Any]], k: int
) -> NDArray[np.bool_]:
    """Return ``bool (N,)``: whether the label is among the k most probable classes.

    Of equally probable classes the one of lower index comes first, as in ``argmax``.

    Args:
        labels: ``int64 (N,)``.
        probabilities: ``(N, K)``; anything with the same order per row does, such as logits.
        k: from 1 to K.

    Raises:
        InvalidValueError: the arrays differ in length, or `k` is out of range.
    """
    _require_same_length(labels=labels, probabilities=probabilities)
    num_classes = probabilities.shape[1]
    if not 1 <= k <= num_classes:
        raise InvalidValueError(f"k must be from 1 to the {num_classes} classes; got {k!r}")
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)
    before = np.arange(num_classes) < labels[:, None]
    rank = np.sum((probabilities > own) | ((probabilities == own) & before), axis=1)
    return np.asarray(rank < k)


def top_k_accuracy(labels: Labels, probabilities: NDArray[np.floating[Any]], k: int) -> float:
    """Return the share of items whose label is among the k most probable; nan without items.

    Raises:
        InvalidValueError: see `top_k_hits`.

    Example:
        >>> top_k_accuracy(np.array([1, 2]), np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]), k=2)
        0.5
    """
    return float(np.mean(top_k_hits(labels, probabilities, k))) if len(labels) else math.nan


def confusion_matrix(labels: Labels, predicted: Labels, num_classes: int) -> Labels:
    """Return ``int64 (K, K)``: how many items of the class of each row went to each column.

    Raises:
        InvalidValueError: the arrays differ in length, or an entry is no class index.

    Example:
        >>> confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 0]), 2).tolist()
        [[1, 0], [1, 1]]
    """
    _require_same_length(labels=labels, predicted=predicted)
    for name, indices in (("labels", labels), ("predicted", predicted)):
        wrong = indices[(indices < 0) | (indices >= num_classes)]
        if len(wrong):
            raise InvalidValueError(f"{name} must be from 0 to {num_classes - 1}; got {wrong[0]}")
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def per_class(confusion: Labels) -> PerClass:
    """Return precision, recall, F1 and support of each class, nan where undefined.

    Args:
        confusion: ``int64 (K, K)``, rows are the true classes.

    Example:
        >>> per_class(np.array([[2, 0], [1, 0]])).f1.tolist()
        [0.8, 0.0]
        >>> per_class(np.array([[2, 0], [1, 0]])).precision.tolist()
        [0.6666666666666666, nan]
    """
    return _per_class(np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0))


def rates(labels: Labels, predicted: Labels, num_classes: int) -> PerClass:
    """Return `per_class` of the labels in time N + K; the confusion matrix has K² cells.

    Args:
        labels: ``int64 (N,)``, from 0 to K - 1.
        predicted: ``int64 (N,)``, from 0 to K - 1.
        num_classes: K.
    """
    hits, support, num_predicted = (
        np.bincount(indices, minlength=num_classes)
        for indices in (labels[labels == predicted], labels, predicted)
    )
    return _per_class(hits, support, num_predicted)


def macro(values: Floats) -> float:
    """Return the mean over the classes for which the measure is defined.

    Example:
        >>> macro(np.array([1.0, 0.5, np.nan]))
        0.75
    """
    return weighted(values, np.ones(len(values), dtype=np.int64))


def weighted(values: Floats, support: Labels) -> float:
    """Return the mean over the classes with a defined measure, each weighing its support.

    Example:
        >>> weighted(np.array([1.0, 0.5, np.nan]), np.array([3, 1, 7]))
        0.875
    """
    defined = ~np.isnan(values)
    return float(_divide(values[defined] @ support[defined], support[defined].sum()))


def balanced_accuracy(confusion: Labels) -> float:
    """Return the mean recall over the classes that have items, which is the macro recall."""
    return macro(per_class(confusion).recall)


def score_of(metric: Metric, labels: Labels, predicted: Labels, num_classes: int) -> float:
    """Return the share of right answers, or the mean of that share over classes with items.

    Args:
        metric: ``accuracy`` or ``balanced accuracy``.
        labels: ``int64 (N,)``, from 0 to K - 1, at least one.
        predicted: ``int64 (N,)``.
        num_classes: K.

    Raises:
        InvalidValueError: the metric is unknown, or the arrays differ in length.

    Example:
        >>> labels, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
        >>> score_of("accuracy", labels, predicted, 2)
        0.75
        >>> score_of("balanced accuracy", labels, predicted, 2)
        0.5
    """
    if metric not in METRICS:
        raise InvalidValueError(f"metric must be one of {METRICS}; got {metric!r}")
    if metric == "accuracy":
        return accuracy(labels, predicted)
    return balanced_accuracy(confusion_matrix(labels, predicted, num_classes))


def log_losses(labels: Labels, probabilities: NDArray[np.floating[Any]]) -> Floats:
    """Return ``(N,)``: the negative natural logarithm of each label's probability.

    A probability below 1.2e-7, the resolution of float32, counts as that: one certain mistake
    costs 15.9 and not infinity.

    Raises:
        InvalidValueError: the arrays differ in length.
    """
    _require_same_length(labels=labels, probabilities=probabilities)
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return -np.log(np.clip(own.astype(np.float64), _LEAST_PROBABILITY, 1))


def log_loss(labels: Labels, probabilities: NDArray[np.floating[Any]]) -> float:
    """Return the mean of `log_losses`, in nats; nan without items.

    Raises:
        InvalidValueError: the arrays differ in length.

    Example:
        >>> round(log_loss(np.array([0, 1]), np.array([[0.5, 0.5], [0.5, 0.5]])), 6)
        0.693147
    """
    return float(np.mean(log_losses(labels, probabilities))) if len(labels) else math.nan


def expected_calibration_error(
    probabilities: NDArray[np.floating[Any]], labels: Labels, num_bins: int = 15
) -> float:
    """Return by how much the top probability misses the share that is right, on average.

    Items are sorted by their top probability and cut into bins of equal numbers; each bin
    contributes its distance between the mean top probability and the share right.

    Source: Guo et al. 2017, section 2 (arXiv 1706.04599), with the equal-mass bins of Nixon et
    al. 2019 (arXiv 1904.01685).

    Args:
        probabilities: ``(N, K)``.
        labels: ``int64 (N,)``.
        num_bins: at least 1; at most N are used.

    Returns:
        From 0 to 1; nan without items.

    Raises:
        InvalidValueError: the arrays differ in length, or `num_bins` is below 1.

    Example:
        >>> sure = np.array([[1.0, 0.0], [1.0, 0.0]])
        >>> expected_calibration_error(sure, np.array([0, 1]))
        0.5
    """
    _require_same_length(labels=labels, probabilities=probabilities)
    if num_bins < 1:
        raise InvalidValueError(f"num_bins must be at least 1; got {num_bins!r}")
    if not len(labels):
        return math.nan
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    # Equal confidences share their mean, or a bin border between them would count their order.
    _, group = np.unique(confidence, return_inverse=True)
    share_right = (np.bincount(group, right) / np.bincount(group))[group]
    gap = (confidence - share_right)[np.argsort(confidence, kind="stable")]
    bins = np.array_split(gap, min(num_bins, len(gap)))
    return float(sum(abs(part.sum()) for part in bins) / len(gap))


def wilson(successes: float, trials: float) -> Interval:
    """Return the share of successes with Wilson's interval; undefined without trials.

    It covers well for few trials and for shares near 0 or 1, and stays within 0 to 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Args:
        successes: from 0 to `trials`; need not be whole.
        trials: at least 0; need not be whole.

    Raises:
        InvalidValueError: `successes` or `trials` is out of range.

    Example:
        >>> wilson(9, 10)
        Interval(value=0.9, low=0.595..., high=0.982...)
    """
    if not 0 <= successes <= trials:
        raise InvalidValueError(
            f"successes must be from 0 to the trials, {trials!r}; got {successes!r}"
        )
    if trials == 0:
        return UNDEFINED
    share = successes / trials
    centre = share + _Z**2 / (2 * trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    scale = 1 + _Z**2 / trials
    # By the formula the ends lie within 0 to 1 and enclose the share; rounding may miss by a bit.
    low, high = max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
    return Interval(share, min(low, share), max(high, share))


def wilson_f1(hits: int, misses: int) -> Interval:
    """Return the F1 of one class with its interval; undefined when both counts are zero.

    Of the items that are of the class or were predicted as it, the share J that is both follows
    a binomial distribution, and F1 = 2 J / (1 + J) rises with J: Wilson's ends map onto F1's.

    Args:
        hits: items of the class that were predicted as it (true positives).
        misses: items for which only one of the two holds (false positives and negatives).

    Raises:
        InvalidValueError: a count is negative.

    Example:
        >>> wilson_f1(8, 4)
        Interval(value=0.8, low=0.561..., high=0.925...)
    """
    both = wilson(hits, hits + misses)
    value, low, high = (2 * share / (1 + share) for share in (both.value, both.low, both.high))
    return Interval(value, low, high)


def share_interval(value: float, standard_error: float, num_items: float) -> Interval:
    """Return Wilson's interval for an average of shares, from its standard error.

    A percentile bootstrap of such an average is too narrow where errors are few, and has no width
    at all where there are none. Wilson's interval for the number of trials that would give the
    standard error does not have that fault.

    Source: the effective sample size of Korn and Graubard 1998, "Confidence intervals for
    proportions with small expected number of positive counts estimated from survey data".

    Args:
        value: from 0 to 1; nan gives `UNDEFINED`.
        standard_error: of the value, for example the standard deviation of `resamples`.
        num_items: the largest number of trials to assume, above 0.

    Raises:
        InvalidValueError: `value` is out of range.
    """
    if math.isnan(value) or math.isnan(standard_error):
        return UNDEFINED
    trials = num_items
    if standard_error > 0 and 0 < value < 1:
        trials = min(num_items, value * (1 - value) / standard_error**2)
    return wilson(value * trials, trials)


def resamples(
    statistic: Callable[..., ArrayLike],
    *arrays: NDArray[Any],
    seed: int,
    num_resamples: int = 1000,
) -> Floats:
    """Return a statistic of many resamples of the items, drawn with replacement.

    Args:
        statistic: called with the resampled arrays; returns a number or S numbers.
        arrays: each with N items along its first axis; the same items are drawn from all.
        seed: decides the draws.
        num_resamples: at least 1.

    Returns:
        ``(num_resamples,)`` or ``(num_resamples, S)``.

    Raises:
        InvalidValueError: the arrays differ in length or are empty.
    """
    _require_same_length(**{f"array {index}": array for index, array in enumerate(arrays)})
    num_items = len(arrays[0])
    if num_items == 0:
        raise InvalidValueError("what is resampled must have at least one item; got none")
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(num_resamples):
        chosen = generator.integers(num_items, size=num_items)
        draws.append(statistic(*(array[chosen] for array in arrays)))
    return np.asarray(draws, dtype=np.float64)


def bootstrap(
    statistic: Callable[..., float],
    *arrays: NDArray[Any],
    seed: int,
    num_resamples: int = 1000,
) -> Interval:
    """Return a statistic with its percentile bootstrap interval.

    Resamples in which the statistic is undefined are left out. For shares near 0 or 1 prefer
    `wilson` or `share_interval`.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        statistic: called with the (resampled) arrays.
        arrays: each with N items along its first axis.
        seed: decides the draws.
        num_resamples: at least 1.

    Raises:
        InvalidValueError: the arrays differ in length or are empty.

    Example:
        >>> bootstrap(np.mean, np.arange(100.0), seed=0)
        Interval(value=49.5, low=43.8..., high=54.9...)
    """
    draws = resamples(statistic, *arrays, seed=seed, num_resamples=num_resamples)
    value = float(statistic(*arrays))
    defined = draws[~np.isnan(draws)]
    if math.isnan(value) or not len(defined):
        return UNDEFINED
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _per_class(hits: Labels, support: Labels, num_predicted: Labels) -> PerClass:
    return PerClass(
        precision=_divide(hits, num_predicted),
        recall=_divide(hits, support),
        f1=_divide(2 * hits, support + num_predicted),
        support=support,
        num_predicted=num_predicted,
    )


def _divide(numerator: ArrayLike, denominator: ArrayLike) -> Floats:
    """Return the quotient, nan where the denominator is zero."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    quotient = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=quotient, where=bottom != 0)
    return quotient


def _require_same_length(**arrays: NDArray[Any]) -> None:
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name}: {len(array)}" for name, array in arrays.items())
        raise InvalidValueError(f"arrays must have the same length; got {lengths}")
