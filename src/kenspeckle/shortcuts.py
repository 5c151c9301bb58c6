"""Shortcuts: what predicts the class without showing what the class is.

A network learns whatever separates the classes: the camera, the file format, a white border, a logo
in one corner. Each such trait is tried alone, with a simple classifier, by cross-validation; what
one picture tells about another of its group never counts.

* Traits of the *file* (size, format, resolution, …) are cut into bins, and the class is chosen by
  Bayes' rule from the bin (the one-rule classifier of Holte 1993, "Very simple classification rules
  perform well on most commonly used datasets").
* Traits of the *pixels* (a corner, the border, the mean colour) go through a linear discriminant
  over a piecewise linear basis of every grey level, so that one grey level can give a class away.

Every class weighs the same: the skill of a trait is its balanced accuracy on a scale where chance
is 0. What it tells of a single class is its sensitivity at a specificity of 0.95. Pixels tell of
the classes everywhere, so a corner and the border are held against the same shape elsewhere.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kenspeckle.core import Interval, InvalidValueError, Pixels
from kenspeckle.metrics import UNDEFINED, macro, rates, share_interval, wilson

__all__ = ["NUM_FOLDS", "Shortcut", "Traits", "find_shortcuts"]

NUM_FOLDS = 5
"""Parts of the cross-validation; a class needs as many pictures, or groups of them."""

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]

_MAX_PICTURES = 5000  # a share of 0.5 is known to within 0.014 then
_NUM_EXAMPLES = 6
_MAX_BINS, _MAX_CODES = 32, 64  # of one number, and of things without an order
_KNOTS = np.linspace(0, 1, 5)  # of the basis over grey levels
_SHRINKAGE = 0.01  # of the covariance towards a multiple of the identity
_SIDE, _CORNER = 32, 4  # pixels of a sketch, and of a corner of it
_FAR, _MIDDLE = 28, 14

_CORNERS = {
    "top-left corner": (0, 0),
    "top-right corner": (0, _FAR),
    "bottom-left corner": (_FAR, 0),
    "bottom-right corner": (_FAR, _FAR),
}
# Patches of a corner's size: along the edges, where the background is, and within.
_ALONG = ((0, _MIDDLE), (_FAR, _MIDDLE), (_MIDDLE, 0), (_MIDDLE, _FAR))
_WITHIN = ((_MIDDLE, _MIDDLE), (6, 6), (6, 22), (22, 6), (22, 22))
_FRAMES = (3, 4, 8)  # sketch pixels from the edge; the last is within

# Share of the other pictures that may be taken for a class while sensitivity is measured.
_FALSE_ALARMS = 0.05
_LEAST_GROUPS = 20  # of the class and of the others, before a single class is accused

# What makes a trait suspicious; lower ends of intervals are compared. How well a photograph
# compresses depends on what it shows: of 80 pairs of classes in five real sets the file size is
# suspicious in 7. The margins of places were chosen such that none was suspicious in 360 samples of
# 60 to 2,000 pictures of those sets, X-rays being the ones that needed the most (2026-11-24).
_FILE_SKILL, _SIZE_SKILL = 0.2, 0.5
_COLOUR_SKILL = 0.9  # a colour may be what the classes are about
_CLASS_SENSITIVITY = 0.5
_MARGIN_ALONG, _MARGIN_ANYWHERE = 0.25, 0.1

# Words for what is not suspicious, and for what is.
_FILE_WORDS = "tells little of the class", "tells the class, yet is no part of what is shown"
_COLOUR_WORDS = "does not suffice for the classes", "suffices: are the classes about colour?"
_PLACE_WORDS = (
    "tells no more of the classes than the same area elsewhere does",
    "tells more of a class than the same area elsewhere does: a mark, a frame or a backdrop",
)


@dataclass(frozen=True, eq=False)
class Traits:
    """What is known of N pictures without a network.

    Attributes:
        num_bytes: ``int64 (N,)``, size of the file.
        height: ``int32 (N,)``, pixels.
        width: ``int32 (N,)``, pixels.
        quality: ``int16 (N,)``, estimate of the JPEG quality, 1 to 100; -1 where not JPEG.
        format: ``(N,)``, a number for each file format.
        mode: ``(N,)``, a number for each colour mode (grey, RGB, palette, …).
        camera: ``(N,)``, a number for each camera model in EXIF; 0 for none.
        sketches: ``uint8 (N, 32, 32, 3)``, the picture squashed to 32x32, antialiased.
    """

    num_bytes: NDArray[np.int64]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    quality: NDArray[np.int16]
    format: NDArray[np.integer[Any]]
    mode: NDArray[np.integer[Any]]
    camera: NDArray[np.integer[Any]]
    sketches: Pixels


@dataclass(frozen=True)
class Shortcut:
    """How well one trait alone predicts the class.

    Attributes:
        name: of the trait.
        tested: False where the trait is alike in all pictures, or the pictures are too few.
        words: why it was not tested, or why it is or is not suspicious.
        suspicious: whether a network could learn the trait in place of the classes.
        accuracy: balanced accuracy out of fold, 0 to 1.
        chance: balanced accuracy of guessing.
        permuted: balanced accuracy that the same procedure reaches on permuted labels.
        elsewhere: for corners and the border the best balanced accuracy of the same shape elsewhere
            in the pictures; nan otherwise.
        recall: per class the share of its pictures that are recognised; nan if it has too few.
        given_away: the class that the trait tells most of, if suspicious.
        examples: indices of pictures of that class that the trait tells most surely.
        contrasts: indices of pictures of other classes that are most unlike it in the trait.
    """

    name: str
    tested: bool
    words: str
    suspicious: bool = False
    accuracy: Interval = UNDEFINED
    chance: float = np.nan
    permuted: float = np.nan
    elsewhere: float = np.nan
    recall: tuple[float, ...] = ()
    given_away: int | None = None
    examples: tuple[int, ...] = ()
    contrasts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class _Sample:
    """The M pictures that are used, and the k classes that have enough of them."""

    chosen: Labels  # (M,), indices in the data set
    classes: Labels  # (k,), indices of the classes in the data set
    num_classes: int  # of the data set
    labelings: tuple[Labels, Labels]  # (M,) each, from 0 to k - 1: the true one, and permuted
    folds: Labels  # (M,), from 0 to NUM_FOLDS - 1
    num_groups: Labels  # (k,), independent pictures of every class


@dataclass(frozen=True, eq=False)
class _Skill:
    """What the scores of a trait are worth, out of fold."""

    permuted: float  # balanced accuracy on permuted labels
    leads: Floats  # (M, k), score of each class less that of the best other one
    accuracy: Interval  # balanced
    recall: Floats  # (k,)
    sensitivity: Floats  # (k,), share of the class that is recognised at `_FALSE_ALARMS`
    least: Floats  # (k,), lower end of its interval


def find_shortcuts(
    traits: Traits, labels: Labels, groups: Labels, num_classes: int, seed: int
) -> tuple[Shortcut, ...]:
    """Return for every trait how well it alone predicts the class.

    At most 5,000 pictures are used, of large classes fewer and of small ones all; memory and time
    do not grow beyond that. Marks within the picture are not looked for, and one in a corner stays
    unnoticed where the rest of the picture, or chance in a small class, tells the class as well.

    Args:
        traits: of N pictures.
        labels: ``int64 (N,)``, from 0 to `num_classes` - 1; negative without a label.
        groups: ``int64 (N,)``; pictures of equal numbers belong together (copies, one patient).
        num_classes: K.
        seed: of the choice of pictures, the folds and the permutation.

    Returns:
        All traits, tested or not, in an order that does not depend on the outcome.

    Raises:
        InvalidValueError: lengths differ, or a label is not below `num_classes`.

    Example:
        >>> size = np.repeat([900, 5000], 20)
        >>> alike = np.ones(40, np.int64)
        >>> sketches = np.zeros((40, 32, 32, 3), np.uint8)
        >>> traits = Traits(size, alike, alike, -alike, alike, alike, 0 * alike, sketches)
        >>> found = find_shortcuts(traits, np.repeat([0, 1], 20), np.arange(40), 2, seed=0)
        >>> [shortcut.name for shortcut in found if shortcut.suspicious]
        ['file size']
    """
    arrays = {**vars(traits), "labels": labels, "groups": groups}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidValueError(f"traits, labels and groups must be as many; got {lengths}")
    if len(labels) and labels.max() >= num_classes:
        raise InvalidValueError(f"labels must be below {num_classes}; got {labels.max()}")
    sample = _sample(labels, groups, num_classes, seed)
    if len(sample.classes) < 2:
        few = f"too few pictures: two classes of at least {NUM_FOLDS} independent ones are needed"
        names = (*_FILE_TRAITS, "mean colour", "border", *_CORNERS)
        return tuple(Shortcut(name, tested=False, words=few) for name in names)
    used = Traits(**{name: array[sample.chosen] for name, array in vars(traits).items()})
    return (
        *(_of_file(name, codes(used), sample) for name, codes in _FILE_TRAITS.items()),
        _mean_colour(used.sketches, sample),
        _border(used.sketches, sample),
        *_corners(used.sketches, sample),
    )


# Choice of pictures and folds.


def _sample(labels: Labels, groups: Labels, num_classes: int, seed: int) -> _Sample:
    generator = np.random.default_rng(seed)
    known = np.flatnonzero(labels >= 0)
    counts = np.bincount(labels[known], minlength=num_classes)
    order = known[np.lexsort((generator.random(len(known)), labels[known]))]
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(order)) - starts[labels[order]]
    chosen = np.sort(order[rank < _cap(counts)])

    pairs = np.unique(np.stack([labels[chosen], groups[chosen]], axis=1), axis=0)
    num_groups = np.bincount(pairs[:, 0], minlength=num_classes)
    classes = np.flatnonzero(num_groups >= NUM_FOLDS)
    chosen = chosen[np.isin(labels[chosen], classes)]
    dense = np.searchsorted(classes, labels[chosen])
    labelings = (dense, generator.permutation(dense))
    folds = _folds(dense, groups[chosen], generator)
    return _Sample(chosen, classes, num_classes, labelings, folds, num_groups[classes])


def _cap(counts: Labels) -> int:
    """Return the most pictures of one class such that all classes keep within the limit."""
    ascending = np.sort(counts[counts > 0])
    below = np.cumsum(ascending) - ascending
    share = (_MAX_PICTURES - below) // np.arange(len(ascending), 0, -1)
    over = share[share < ascending]
    return max(NUM_FOLDS, int(over[0])) if len(over) else int(counts.max(initial=0))


def _folds(labels: Labels, groups: Labels, generator: np.random.Generator) -> Labels:
    """Deal groups out to the folds, class by class and the largest first."""
    _, unit, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    label = np.zeros(len(sizes), np.int64)
    label[unit] = labels
    fold = np.empty(len(sizes), np.int64)
    order = np.lexsort((generator.random(len(sizes)), -sizes, label))
    fold[order] = np.arange(len(sizes)) % NUM_FOLDS
    return fold[unit]


# Traits of the file: bins and Bayes' rule.


def _bins(values: NDArray[Any], most: int = _MAX_BINS) -> Labels:
    """Return the bin of each number: one per value where they are few, else quantiles."""
    num_bins = int(np.clip(len(values) ** 0.5, 4, most))
    distinct, codes = np.unique(values, return_inverse=True)
    if len(distinct) <= num_bins:
        return codes.astype(np.int64)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, num_bins + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def _common(values: NDArray[Any]) -> Labels:
    """Return a code per distinct value; rare values beyond `_MAX_CODES` share the last one."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-counts, kind="stable"))
    return np.minimum(rank, _MAX_CODES - 1)[codes]


def _resolutions(traits: Traits) -> Labels:
    height, width = traits.height.astype(np.int64), traits.width.astype(np.int64)
    codes = _common(height << 32 | width)
    if codes.max() < _MAX_CODES - 1:
        return codes
    side = int(_MAX_CODES**0.5)
    return _bins(height, side) * side + _bins(width, side)


_FILE_TRAITS: dict[str, Callable[[Traits], Labels]] = {
    "file size": lambda traits: _bins(traits.num_bytes),
    "file format": lambda traits: _common(traits.format),
    "colour mode": lambda traits: _common(traits.mode),
    "resolution": _resolutions,
    "aspect ratio": lambda traits: _bins(traits.width / traits.height),
    "JPEG quality": lambda traits: _bins(traits.quality),
    "camera": lambda traits: _common(traits.camera),
}


def _of_file(name: str, codes: Labels, sample: _Sample) -> Shortcut:
    if codes.min() == codes.max():
        return _alike(name)
    skill = _skill([_bayes(codes, labels, sample) for labels in sample.labelings], sample)
    enough = _SIZE_SKILL if name == "file size" else _FILE_SKILL
    given_away = skill.least[_accusable(sample)] >= _CLASS_SENSITIVITY
    suspicious = _rescaled(skill.accuracy.low, sample) >= enough or bool(given_away.any())
    return _shortcut(Shortcut(name, True, _FILE_WORDS[suspicious], suspicious), skill, sample)


def _bayes(codes: Labels, labels: Labels, sample: _Sample) -> Floats:
    """Return ``(M, k)``: log probability of each picture's code in each class, out of fold."""
    num_codes, k = int(codes.max()) + 1, len(sample.classes)
    counts = np.zeros((NUM_FOLDS, num_codes, k))
    np.add.at(counts, (sample.folds, codes, labels), 1)
    training = counts.sum(axis=0) - counts
    # One picture's worth of what all classes have in common keeps unseen codes undecided.
    common = training.sum(axis=2, keepdims=True) + 1.0
    common /= common.sum(axis=1, keepdims=True)
    probability = (training + common) / (training.sum(axis=1, keepdims=True) + 1)
    return np.asarray(np.log(probability)[sample.folds, codes])


# Traits of the pixels: a linear discriminant over a basis of grey levels.


def _mean_colour(sketches: Pixels, sample: _Sample) -> Shortcut:
    colours = sketches.mean(axis=(1, 2))
    if (colours == colours[0]).all():
        return _alike("mean colour")
    skill = _skill_at(colours, sample)
    suspicious = _rescaled(skill.accuracy.low, sample) >= _COLOUR_SKILL
    found = Shortcut("mean colour", True, _COLOUR_WORDS[suspicious], suspicious)
    return _shortcut(found, skill, sample)


def _border(sketches: Pixels, sample: _Sample) -> Shortcut:
    inner = [_skill_at(_frame(sketches, inset), sample) for inset in _FRAMES]
    return _place("border", _frame(sketches, 0), inner[:2], inner[2:], sample)


def _corners(sketches: Pixels, sample: _Sample) -> list[Shortcut]:
    along = [_skill_at(_patch(sketches, *place), sample) for place in _ALONG]
    within = [_skill_at(_patch(sketches, *place), sample) for place in _WITHIN]
    own = {place: _skill_at(_patch(sketches, *place), sample) for place in _CORNERS.values()}
    found = []
    for name, place in _CORNERS.items():
        near = along + [skill for other, skill in own.items() if other != place]
        found.append(_place(name, _patch(sketches, *place), near, within, sample))
    return found


def _place(
    name: str, pixels: NDArray[Any], near: list[_Skill], within: list[_Skill], sample: _Sample
) -> Shortcut:
    """Judge a place in the pictures by what the same shape tells elsewhere.

    The object may tell the class from any patch that it reaches, and the background from any patch
    of it; a mark tells it from one place.
    """
    if (pixels == pixels[0]).all():
        return _alike(name)
    skill = _skill_at(pixels, sample)
    along = np.max([other.sensitivity for other in near], axis=0)
    anywhere = np.maximum(along, np.max([other.sensitivity for other in within], axis=0))
    margin = np.minimum(_MARGIN_ANYWHERE, (1 - anywhere) / 2)
    beats = (skill.least - along >= _MARGIN_ALONG) | (skill.least - anywhere >= margin)
    beats &= _accusable(sample) & (anywhere < 1)
    suspicious = bool(beats.any())
    best = max(other.accuracy.value for other in (*near, *within))
    found = Shortcut(name, True, _PLACE_WORDS[suspicious], suspicious, elsewhere=best)
    return _shortcut(found, skill, sample, np.where(beats, along, np.inf))


def _skill_at(pixels: NDArray[Any], sample: _Sample) -> _Skill:
    return _skill(_discriminant(pixels, sample), sample)


def _patch(sketches: Pixels, top: int, left: int) -> Pixels:
    return sketches[:, top : top + _CORNER, left : left + _CORNER]


def _frame(sketches: Pixels, inset: int) -> Floats:
    """Return ``(N, 24, 3)``: means along a frame of one pixel, six on each side.

    The corners are left out, or a mark in one would be reported twice.
    """
    inner = sketches[:, inset : _SIDE - inset, inset : _SIDE - inset]
    sides = np.stack([inner[:, 0], inner[:, -1], inner[:, :, 0], inner[:, :, -1]], axis=1)
    ends = np.linspace(0, inner.shape[1], 9).astype(int)[1:-1]
    parts = [sides[:, :, start:end].mean(axis=2) for start, end in itertools.pairwise(ends)]
    return np.concatenate(parts, axis=1)


def _basis(grey: NDArray[Any]) -> Floats:
    """Return ``(N, D)``: piecewise linear functions of each grey level, without constant ones."""
    level = grey.reshape(len(grey), -1, 1) / 255
    hats = np.maximum(0, 1 - np.abs(level - _KNOTS) / _KNOTS[1]).reshape(len(grey), -1)
    centred = hats - hats.mean(axis=0)
    return np.asarray(centred[:, centred.std(axis=0) > 1e-3])


def _discriminant(grey: NDArray[Any], sample: _Sample) -> list[Floats]:
    """Return ``(M, k)`` per labeling: log likelihoods up to a constant, out of fold.

    Source: linear discriminant analysis with a shrunk covariance (Friedman 1989, "Regularized
    Discriminant Analysis"), classes of equal prior.
    """
    x = _basis(grey)
    k, num_features = len(sample.classes), x.shape[1]
    in_fold = [x[sample.folds == fold] for fold in range(NUM_FOLDS)]
    scatters = [part.T @ part for part in in_fold]
    all_scatter = np.sum(scatters, axis=0)
    results = []
    for labels in sample.labelings:
        counts = np.zeros((NUM_FOLDS, k))
        np.add.at(counts, (sample.folds, labels), 1)
        sums = np.zeros((NUM_FOLDS, k, num_features))
        np.add.at(sums, (sample.folds, labels), x)
        scores = np.empty((len(x), k))
        for fold, part in enumerate(in_fold):
            count = counts.sum(axis=0) - counts[fold]
            means = (sums.sum(axis=0) - sums[fold]) / np.maximum(count, 1)[:, None]
            within = all_scatter - scatters[fold] - (means.T * count) @ means
            within /= max(1, count.sum() - k)
            ridge = _SHRINKAGE * np.trace(within) / max(1, num_features) + 1e-9
            within[np.diag_indices(num_features)] += ridge
            weights = np.linalg.solve(within, means.T)
            score = part @ weights - 0.5 * (means.T * weights).sum(axis=0)
            score[:, count == 0] = -np.inf
            scores[sample.folds == fold] = score
        results.append(scores)
    return results


# What scores are worth.


def _skill(scores_of_labelings: list[Floats], sample: _Sample) -> _Skill:
    scores, permuted = scores_of_labelings
    labels, trials = sample.labelings[0], sample.num_groups
    k = len(trials)
    best = scores.argmax(axis=1)
    second, first = np.partition(scores, k - 2, axis=1)[:, -2:].T
    leads = scores - np.where(np.arange(k) == best[:, None], second[:, None], first[:, None])
    recall = rates(labels, best, k).recall
    # Pictures of one group count once: they may all be right for the same reason.
    error = float(np.sqrt(np.sum(recall * (1 - recall) / trials)) / k)
    accuracy = share_interval(float(recall.mean()), error, int(trials.sum()))
    shares = [_sensitivity(leads[:, label], labels == label) for label in range(k)]
    least = [wilson(cautious * n, n).low for (_, cautious), n in zip(shares, trials, strict=True)]
    sensitivity = np.array([share for share, _ in shares])
    control = macro(rates(sample.labelings[1], permuted.argmax(axis=1), k).recall)
    return _Skill(control, leads, accuracy, recall, sensitivity, np.array(least))


def _sensitivity(leads: Floats, own: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the share of a class above the threshold that `_FALSE_ALARMS` of the others pass.

    The second value is for a threshold higher by the standard error of that share of the others.
    """
    others = np.sort(leads[~own])
    expected = _FALSE_ALARMS * len(others)
    cautious = max(0.0, expected - (expected * (1 - _FALSE_ALARMS)) ** 0.5)
    plain, higher = (others[-1 - int(allowed)] for allowed in (expected, cautious))
    return float(np.mean(leads[own] > plain)), float(np.mean(leads[own] > higher))


def _accusable(sample: _Sample) -> NDArray[np.bool_]:
    others = sample.num_groups.sum() - sample.num_groups
    return np.asarray(np.minimum(sample.num_groups, others) >= _LEAST_GROUPS)


def _rescaled(accuracy: float, sample: _Sample) -> float:
    """Return the skill of a balanced accuracy: 0 at chance, 1 for no errors."""
    k = len(sample.classes)
    return (k * accuracy - 1) / (k - 1)


def _alike(name: str) -> Shortcut:
    return Shortcut(name, tested=False, words="alike in all pictures")


def _shortcut(found: Shortcut, skill: _Skill, sample: _Sample, usual: ArrayLike = 0) -> Shortcut:
    """Add the figures; `usual` is the sensitivity that needs no mark."""
    recall = np.full(sample.num_classes, np.nan)
    recall[sample.classes] = skill.recall
    found = dataclasses.replace(
        found,
        accuracy=skill.accuracy,
        chance=1 / len(sample.classes),
        permuted=skill.permuted,
        recall=tuple(recall.tolist()),
    )
    if not found.suspicious:
        return found
    given_away = int(np.argmax(np.subtract(skill.least, usual)))
    order = np.argsort(skill.leads[:, given_away], kind="stable")
    own = sample.labelings[0] == given_away
    examples, contrasts = order[own[order]][::-1], order[~own[order]]
    return dataclasses.replace(
        found,
        given_away=int(sample.classes[given_away]),
        examples=tuple(sample.chosen[examples[:_NUM_EXAMPLES]].tolist()),
        contrasts=tuple(sample.chosen[contrasts[:_NUM_EXAMPLES]].tolist()),
    )
