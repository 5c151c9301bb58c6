"""What twice the pictures would bring: a learning curve of a linear head, and where it leads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import InvalidValueError, MissingExtraError
from kenspeckle.heads import head_answers

__all__ = ["ClassForecast", "Forecast", "forecast", "power_law"]

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

_LEAST_PICTURES = 160
_LEAST_CLASS = 20  # pictures; an eighth of what four folds hold is then two
_MAX_PICTURES = 5_000  # beyond, the curve is that of a sample, and is led on further
_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the training pictures of a fold
_NUM_FOLDS = 5
_NUM_REPETITIONS = 3
_NUM_RESAMPLES = 400
_EXPONENTS = np.linspace(0.1, 2.0, 20)  # c; above 1 a curve is as good as flat

_Z = 1.6448536269514722  # the standard normal lies within +- this with probability 0.9

# Resampling knows nothing of curves that are no power laws, and its intervals held the truth in 83
# of 100 cases. With the standard error of the share itself added in squares they hold it in nine of
# ten (benchmarks/forecast.py); of a gain, where most of that error cancels, half does.
_PART_OF_GAIN = 0.5


@dataclass(frozen=True)
class ClassForecast:
    """What twice the pictures, of all classes alike, would bring one class.

    Attributes:
        name: of the class.
        recall: now, 0 to 1, by cross-validation.
        gain: expected change of the recall, 0 to 1.
        low: lower end of the 90 % interval of `gain`, often below 0.
        high: upper end.
    """

    name: str
    recall: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """A learning curve of a linear head on fixed features, and where it leads.

    Attributes:
        num_pictures: training pictures at each point of the curve.
        accuracy: mean at each point, 0 to 1.
        deviation: standard deviation over the repetitions at each point.
        expected: accuracy with twice the pictures.
        low: lower end of its 90 % interval.
        high: upper end.
        classes: the classes, the one that gains most first.
    """

    num_pictures: tuple[int, ...]
    accuracy: tuple[float, ...]
    deviation: tuple[float, ...]
    expected: float
    low: float
    high: float
    classes: tuple[ClassForecast, ...]


@dataclass(frozen=True, eq=False)
class _Curve:
    """Who was recognised after how many training pictures.

    Attributes:
        labels: ``int64 (N,)``, from 0 to K - 1, each with pictures.
        groups: ``int64 (N,)``.
        num_pictures: ``float64 (S,)``, training pictures at each point.
        hits: ``bool (R, S, N)``: whether each picture was, out of fold, in each repetition.
    """

    labels: Labels
    groups: Labels
    num_pictures: Floats
    hits: NDArray[np.bool_]


def forecast(
    features: NDArray[np.float32],
    labels: Labels,
    groups: Labels,
    classes: Sequence[str],
    seed: int,
) -> Forecast | None:
    """Return what twice the pictures would bring a linear head, or None for too few pictures.

    In three repetitions of five-fold cross-validation the head learns from an eighth, a quarter,
    half and all of the training pictures. The error is taken to fall as ``a + b n^-c`` with a, b at
    least 0 and c from 0.1 to 2. The interval comes from resampled groups and repetitions, widened
    until it held in nine of ten cases on real data (benchmarks/forecast.py). Beyond 5,000 pictures
    a random sample of groups is looked at, and its curve is led on to twice of all pictures.

    Classes with fewer than 20 pictures are left out. With less than two classes, less than 160
    pictures in them, or less than five groups, nothing can be said.

    Source: Cortes et al. 1993, "Learning Curves: Asymptotic Values and Rate of Convergence";
    Viering and Loog 2021, "The Shape of Learning Curves", arXiv 2103.10948.

    Args:
        features: ``float32 (N, D)``, best from `kenspeckle.suspects.compact`.
        labels: ``int64 (N,)``, indices into `classes`.
        groups: ``int64 (N,)``; pictures with equal numbers are never on two sides of a fold.
        classes: names.
        seed: of folds, samples and resamples.

    Raises:
        InvalidValueError: the lengths differ, or a label is out of range.
        MissingExtraError: scikit-learn is not installed.
    """
    if not len(features) == len(labels) == len(groups):
        raise InvalidValueError(
            "features, labels and groups must have the same length; "
            f"got {len(features)}, {len(labels)} and {len(groups)}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise InvalidValueError(
            f"labels must be from 0 to {len(classes) - 1}; got {labels.min()} to {labels.max()}"
        )
    rng = np.random.default_rng(seed)
    groups = np.unique(groups, return_inverse=True)[1]
    sample = _sample(groups, rng)
    counts = np.bincount(labels[sample], minlength=len(classes))
    kept = sample[counts[labels[sample]] >= _LEAST_CLASS]
    present, own = np.unique(labels[kept], return_inverse=True)
    num_groups = len(np.unique(groups[kept]))
    if len(kept) < _LEAST_PICTURES or len(present) < 2 or num_groups < _NUM_FOLDS:
        return None
    curve = _measured(features[kept].astype(np.float64), own, groups[kept], rng)
    now = len(kept) * len(labels) / len(sample)
    return _extrapolated(curve, [classes[k] for k in present], now, rng)


def _sample(groups: Labels, rng: np.random.Generator) -> Labels:
    """Return at most 5,000 pictures in whole groups, or a single group that is larger."""
    order = _shuffled(groups, rng)
    if len(order) > _MAX_PICTURES:
        order = order[: _MAX_PICTURES + 1]
        whole = order[groups[order] != groups[order[-1]]]
        order = whole if len(whole) else order
    return np.sort(order)


def _shuffled(groups: Labels, rng: np.random.Generator) -> Labels:
    """Return the pictures in random order, those of a group one after another."""
    key = rng.permutation(int(groups.max(initial=-1)) + 1)
    return np.argsort(key[groups], kind="stable")


def _measured(features: Floats, labels: Labels, groups: Labels, rng: np.random.Generator) -> _Curve:
    """Return who is recognised after each share of the training pictures."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ModuleNotFoundError as error:
        raise MissingExtraError("the forecast", "train") from error
    hits = np.zeros((_NUM_REPETITIONS, len(_SHARES), len(labels)), dtype=np.bool_)
    sizes = np.zeros((_NUM_REPETITIONS * _NUM_FOLDS, len(_SHARES)))
    num_classes, fold = int(labels.max()) + 1, 0
    for repetition in range(_NUM_REPETITIONS):
        splitter = StratifiedGroupKFold(
            _NUM_FOLDS, shuffle=True, random_state=int(rng.integers(1 << 31))
        )
        order = _shuffled(groups, rng)
        for pool, asked in splitter.split(order, labels[order], groups[order]):
            for point, share in enumerate(_SHARES):
                learned = _first(order[pool], labels, share)
                predicted = head_answers(features, labels, learned, order[asked], num_classes)
                hits[repetition, point, order[asked]] = predicted == labels[order[asked]]
                sizes[fold, point] = len(learned)
            fold += 1
    return _Curve(labels, groups, sizes.mean(axis=0), hits)


def _first(pool: Labels, labels: Labels, share: float) -> Labels:
    """Return the first pictures of each class in the pool, that share of them."""
    by_class = pool[np.argsort(labels[pool], kind="stable")]
    counts = np.bincount(labels[pool])
    place = np.arange(len(pool)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen: Labels = by_class[place < np.ceil(share * counts)[labels[by_class]]]
    return chosen


def _extrapolated(
    curve: _Curve, names: Sequence[str], num_now: float, rng: np.random.Generator
) -> Forecast:
    """Return where the curve leads when `num_now` training pictures become twice as many."""
    labels = curve.labels
    by_repetition = np.stack([_accuracies(hits, labels) for hits in curve.hits])
    measured = by_repetition.mean(axis=0)
    resampled = np.stack([_resampled(curve, rng) for _ in range(_NUM_RESAMPLES)])
    ends = np.array([num_now, 2 * num_now])
    expected = 1.0 - power_law(1.0 - measured, curve.num_pictures, ends)
    draws = 1.0 - power_law(1.0 - resampled, curve.num_pictures, ends)
    accuracy = float(measured[0, -1])
    low, high = _interval(expected[0, 1], draws[:, 0, 1], _standard_error(accuracy, len(labels)))
    gains, gain_draws = (values[..., 1:, 1] - values[..., 1:, 0] for values in (expected, draws))
    per_class = []
    for index, name in enumerate(names):
        recall, gain = float(measured[1 + index, -1]), float(gains[index])
        error = _PART_OF_GAIN * _standard_error(recall, int((labels == index).sum()))
        ends_of_gain = _interval(gain, gain_draws[:, index], error)
        per_class.append(ClassForecast(name, recall, gain, *ends_of_gain))
    return Forecast(
        num_pictures=tuple(round(size) for size in curve.num_pictures),
        accuracy=tuple(measured[0].tolist()),
        deviation=tuple(by_repetition[:, 0].std(axis=0, ddof=1).tolist()),
        expected=float(expected[0, 1]),
        low=max(0.0, low),
        high=min(1.0, high),
        classes=tuple(sorted(per_class, key=lambda found: -found.gain)),
    )


def _accuracies(
    hits: NDArray[np.bool_] | Floats, labels: Labels, weights: Floats | None = None
) -> Floats:
    """Return ``float64 (1 + K, S)``: accuracy, then the recall of each class, at each point.

    Args:
        hits: ``(S, N)``, or their mean over repetitions.
        labels: ``int64 (N,)``.
        weights: ``float64 (N,)``, how often each picture counts; once without.
    """
    weights = np.ones(len(labels)) if weights is None else weights
    totals = np.bincount(labels, weights)
    right = np.stack([np.bincount(labels, weights * row, len(totals)) for row in hits], axis=1)
    recalls = np.full(right.shape, np.nan)  # where a resample lacks the class
    np.divide(right, totals[:, None], out=recalls, where=totals[:, None] > 0)
    return np.concatenate([right.sum(axis=0, keepdims=True) / totals.sum(), recalls])


def _resampled(curve: _Curve, rng: np.random.Generator) -> Floats:
    """Return `_accuracies` of groups and repetitions drawn with replacement."""
    units, members = np.unique(curve.groups, return_inverse=True)
    times = np.bincount(rng.integers(len(units), size=len(units)), minlength=len(units))
    repetitions = rng.integers(len(curve.hits), size=len(curve.hits))
    chosen = curve.hits[repetitions].mean(axis=0)
    return _accuracies(chosen, curve.labels, times[members].astype(np.float64))


def power_law(errors: Floats, num_pictures: Floats, targets: Floats) -> Floats:
    """Return the errors at `targets` by the best fit of ``a + b n^-c`` to those measured.

    Squares are weighted with n, so that the later points, which decide where the curve leads,
    count most. For each c of a grid a and b have a closed form.

    Args:
        errors: ``float64 (..., S)``, shares; a row with nan gives nan.
        num_pictures: ``float64 (S,)``, n at each point, above 0.
        targets: ``float64 (T,)``, n to look at.

    Returns:
        ``float64 (..., T)``.

    Example:
        >>> n = np.array([100.0, 200.0, 400.0])
        >>> power_law(0.1 + 2 * n**-0.5, n, np.array([800.0])).round(6)
        array([0.170711])
    """
    largest = num_pictures[-1]
    x = (num_pictures / largest) ** -_EXPONENTS[:, None]  # (C, S); scaled for good numbers
    weights = num_pictures / num_pictures.sum()
    y = errors[..., None, :]
    x_mean, y_mean = x @ weights, y @ weights
    spread = (x - x_mean[:, None]) * weights
    b = np.maximum((spread * y).sum(axis=-1) / (spread * x).sum(axis=-1), 0.0)
    a = y_mean - b * x_mean
    through_zero = (x * y) @ weights / ((x * x) @ weights)
    a, b = np.where(a < 0, 0.0, a), np.where(a < 0, through_zero, b)
    loss = (y - a[..., None] - b[..., None] * x) ** 2 @ weights
    best = loss.argmin(axis=-1)[..., None]
    a, b = (np.take_along_axis(values, best, axis=-1) for values in (a, b))
    return np.asarray(a + b * (targets / largest) ** -_EXPONENTS[best])


def _interval(expected: float, draws: Floats, error: float) -> tuple[float, float]:
    """Return a 90 % interval around `expected`, from the draws and a standard error beside them."""
    below, above = np.nanpercentile(draws, [5, 95]) - expected
    low = np.hypot(min(below, 0.0), _Z * error)
    high = np.hypot(max(above, 0.0), _Z * error)
    return float(expected - low), float(expected + high)


def _standard_error(share: float, num_pictures: int) -> float:
    """Return the binomial standard error of a share, above zero for shares of 0 and 1 too.

    Source: the rule of succession, Laplace 1774.
    """
    smooth = (share * num_pictures + 1) / (num_pictures + 2)
    return float(np.sqrt(smooth * (1 - smooth) / num_pictures))
