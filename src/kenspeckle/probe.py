"""The linear head on frozen features: multinomial logistic regression, its strength by validation.

    standardised features -> principal axes -> folds x penalties -> choice -> the head of all

Along the principal axes the curvature of the loss is close to diagonal, and conjugate gradients
that are scaled by the diagonal need 5 to 20 steps wherever the penalty helps. The folds are one
problem, of which a step takes two matrix products.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kenspeckle.config import Imbalance, require
from kenspeckle.metrics import METRICS, Metric, score_of
from kenspeckle.plans import Choice, Option

__all__ = ["IMBALANCED", "Probe", "fit_probe", "probe_logits"]

Labels = NDArray[np.int64]
Costs = NDArray[np.float64]
Name = TypeVar("Name")

REMEDIES: tuple[Imbalance, ...] = ("none", "prior", "weights", "sampling")  # from simple to complex

# From strong to weak: of half the sum of squared weights, beside the mean loss of a picture.
PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
IMBALANCED = 1.5
"""Times that the largest class must exceed the smallest before a remedy is looked for."""

# Of a class that was not learned; those of the others have mean 0, so its probability is 0.
ABSENT_LOGIT = -100.0
NUM_FOLDS, FEW_FOLDS = 5, 3
LARGE = 5e9  # pictures x axes x classes that take few folds: 1,000 classes of 4 pictures
CHOICE_WORK = 1e9  # pictures x axes x classes x folds on which each penalty is tried, about
CHOICE_AXES = 256  # at least
ROUGH, FINE = 1e-4, 1e-6  # twice the loss that may be left above its minimum
MAX_STEPS, MAX_ROUGH_STEPS = 200, 80
NUM_EVALUATIONS, LONGEST = 2, 4.0  # of a line search, and how far it goes
MAX_LOGITS = 20_000_000  # of the folds solved together: 80 MB, of which about six exist at a time
BLOCK = 4096  # pictures that are rotated at a time


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear head, how it was chosen, and what it says of pictures that it did not see.

    Attributes:
        weight: ``float32 (K, D)``, for features as they are: standardisation is folded in.
        bias: ``float32 (K,)``; -100 for a class without a learned picture.
        penalty: as in `PENALTIES`, of the weights on standardised features.
        imbalance: the remedy for classes of unequal size, a word of `config.TrainingConfig`.
        score: of `out_of_fold`, 0 to 1.
        out_of_fold: ``float32 (T, K)``, logits of each learned picture by a head that saw neither
            its label nor those of the pictures that belong to it.
        choices: that cross-validation made.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    penalty: float
    imbalance: Imbalance
    score: float
    out_of_fold: NDArray[np.float32]
    choices: tuple[Choice, ...]


def fit_probe(  # noqa: PLR0913 - what is learned from takes five
    features: NDArray[np.floating[Any]],
    labels: Labels,
    learned: Labels,
    together: Labels,
    num_classes: int,
    *,
    metric: Metric,
    imbalance: Imbalance | None = None,
    seed: int,
) -> Probe:
    """Return the linear head that cross-validation finds best.

    The log loss, in which classes weigh as in the metric, chooses penalty and remedy, being less
    noisy; what is within one standard error of the least and stronger, or simpler, wins. Folds
    share the scale and the axes of all learned pictures, which no label enters.

    Accuracy in percent of nested cross-validation, 5 in 5 folds, by what chose the penalty
    (2026-11-24, 400 faces, 2,000 pictures of CIFAR-10; standard errors are 0.2 to 0.8):

    ==================  =======  ==============  ===========  =====  ========  =======
    chosen by           objects  traffic lights  chest X-ray  faces  CIFAR-10  flowers
    ==================  =======  ==============  ===========  =====  ========  =======
    log loss, one s.e.    99.74           99.07        93.75  97.75     83.80    75.33
    accuracy, one s.e.    99.74           98.74        93.60  97.75     83.60    75.26
    ==================  =======  ==============  ===========  =====  ========  =======

    Source: Hastie, Tibshirani, Friedman 2009, "The Elements of Statistical Learning", 7.10 (the
    one-standard-error rule); Menon et al. 2021, "Long-tail learning via logit adjustment" (prior).

    Args:
        features: ``float (N, D)``; read once, may be mapped from a file.
        labels: ``int64 (N,)``, from 0 to K - 1 where learned.
        learned: indices of the pictures to learn from, T of them, at least 1.
        together: ``int64 (N,)``; pictures of equal numbers are never in two folds.
        num_classes: K.
        metric: what is maximised.
        imbalance: the remedy, ``none``, ``weights``, ``sampling`` (the same as ``weights`` where
            all pictures are seen at once) or ``prior``; when None, the best of them, where the
            largest class has at least 1.5 times the pictures of the smallest that has any.
        seed: of the folds.

    Raises:
        InvalidValueError: there is nothing to learn from, a label is out of range, a feature is not
            finite, or a word is unknown.
    """
    require(imbalance in (None, *REMEDIES), "imbalance", f"None or one of {REMEDIES}", imbalance)
    require(metric in METRICS, "metric", f"one of {METRICS}", metric)
    require(len(learned) > 0, "learned", "indices of at least one picture", learned)
    own = labels[learned]
    in_range = bool(own.min() >= 0 and own.max() < num_classes)
    require(in_range, "labels", f"0 to {num_classes - 1}", own)
    classes, local, counts = np.unique(own, return_inverse=True, return_counts=True)
    space = _space(features, learned)
    num_folds = NUM_FOLDS if space.coordinates.numel() * len(classes) <= LARGE else FEW_FOLDS
    folds, groups = _dealt(local, together[learned], num_folds, seed)
    task = _Task(space, torch.from_numpy(local.astype(np.int64)), len(classes), folds, groups)
    remedies: tuple[Imbalance, ...] = (
        "weights" if imbalance == "sampling" else imbalance or "none",
    )
    if imbalance is None and counts.max() >= IMBALANCED * counts.min():
        remedies = REMEDIES[:3]
    remedy, penalty, start, choices = _choose(task, remedies, metric)
    heads, inside = _fold_heads(task, penalty, remedy, start)
    weight = np.zeros((num_classes, features.shape[1]), np.float32)
    bias = np.full(num_classes, ABSENT_LOGIT, np.float32)
    weight[classes], bias[classes] = _final_head(task, penalty, remedy, heads)
    outside = np.full((len(own), num_classes), ABSENT_LOGIT, np.float32)
    outside[:, classes] = inside.numpy()
    score = score_of(metric, own, outside.argmax(axis=1), num_classes)
    return Probe(weight, bias, penalty, imbalance or remedy, score, outside, choices)


def probe_logits(probe: Probe, features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return what the head says of pictures, ``float32 (N, K)``.

    Args:
        probe: the head.
        features: ``float (N, D)``.
    """
    return np.asarray(features @ probe.weight.T + probe.bias, np.float32)


def _worth(metric: Metric, labels: Labels, num_classes: int) -> NDArray[np.float64]:
    """Return what each picture counts in the metric, ``(N,)``, one in all."""
    if metric == "accuracy":
        return np.full(len(labels), 1 / len(labels))
    counts = np.bincount(labels, minlength=num_classes)
    return np.asarray(1 / (counts[labels] * np.count_nonzero(counts)))


@dataclass(frozen=True, eq=False)
class _Space:
    """Pictures along the principal axes of their standardised features, with a one for the bias.

    The spread is the mean square of each coordinate; the deviation of a constant feature is one.
    """

    coordinates: Float[Tensor, "t r1"]
    spread: Float[Tensor, " r1"]
    axes: Float[Tensor, "d r"]
    mean: Float[Tensor, " d"]
    deviation: Float[Tensor, " d"]

    def narrowed(self, num_axes: int) -> "_Space":
        """Return the same on fewer axes."""
        if num_axes >= self.axes.shape[1]:
            return self
        kept = [*range(num_axes), -1]
        coordinates, spread = self.coordinates[:, kept], self.spread[kept]
        return replace(self, coordinates=coordinates, spread=spread, axes=self.axes[:, :num_axes])


@dataclass(frozen=True, eq=False)
class _Task:
    """What is to be learned: T pictures of K classes, each class with pictures.

    The head of a fold is asked about the pictures in it; groups number what belongs together.
    """

    space: _Space
    labels: Int[Tensor, " t"]
    num_classes: int
    folds: Int[Tensor, " t"]
    groups: Labels


def _axes(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Return eigenvalues, from small to large, and eigenvectors."""
    try:
        spread, axes = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of few pictures most are zero: single precision can fail
        spread, axes = torch.linalg.eigh(covariance.double())
    return spread.float(), axes.float()


def _space(features: NDArray[np.floating[Any]], learned: Labels) -> _Space:
    """Return the learned pictures, in one copy that is standardised and rotated in place."""
    num_pictures, width = len(learned), features.shape[1]
    coordinates = torch.empty(num_pictures, width + 1)
    blocks = [slice(i, i + BLOCK) for i in range(0, num_pictures, BLOCK)]
    for block in blocks:
        coordinates[block, :width] = torch.from_numpy(features[learned[block]])
    plain = coordinates[:, :width]
    variance, mean = torch.var_mean(plain, dim=0, correction=0)
    finite = bool(torch.isfinite(variance).all())
    require(finite, "features", "finite", "NaN or infinity")
    deviation = variance.sqrt()
    # Features that one picture of a million has lie above; those that only rounding moves, below.
    least = torch.maximum(1e-4 * deviation.max(), 1e-6 * mean.abs())
    deviation = torch.where(deviation > least, deviation, 1.0)
    plain.sub_(mean).div_(deviation)
    spread, axes = _axes(plain.T @ plain / num_pictures)
    spread, axes = spread.flip(0), axes.flip(1)
    num_axes = max(1, int((spread > 1e-6 * spread[0]).sum()))  # the rest is rounding
    spread, axes = spread[:num_axes].clamp_min(0), axes[:, :num_axes].contiguous()
    for block in blocks:
        coordinates[block, :num_axes] = plain[block] @ axes
    coordinates, spread = coordinates[:, : num_axes + 1], torch.cat([spread, torch.ones(1)])
    coordinates[:, -1] = 1
    return _Space(coordinates, spread, axes, mean, deviation)


def _dealt(
    labels: Labels, together: Labels, num_folds: int, seed: int
) -> tuple[Int[Tensor, " t"], Labels]:
    """Return the fold of each picture and its group, both numbered from 0.

    Groups are dealt out in the order of their classes, so that each fold has its share of each.
    """
    _, first, groups = np.unique(together, return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(first))
    order = np.lexsort((shuffled, labels[first]))
    folds = np.empty(len(first), np.int64)
    folds[order] = np.arange(len(first)) % num_folds
    return torch.from_numpy(folds[groups]), groups.astype(np.int64)


def _weights(task: _Task, folds: Sequence[int], remedy: str) -> Float[Tensor, "p t"]:
    """Return what each picture counts for in the head of each fold: one in sum, 0 in the fold."""
    weights = (task.folds != torch.tensor(folds)[:, None]).float()
    if remedy == "weights":
        weights = weights / _counts(task, weights).clamp_min(1)[:, task.labels]
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-30)


def _counts(task: _Task, weights: Float[Tensor, "p t"]) -> Float[Tensor, "p k"]:
    """Return the sum of the weights of each class's pictures."""
    return torch.zeros(len(weights), task.num_classes).index_add_(1, task.labels, weights)


def _shift(task: _Task, weights: Float[Tensor, "p t"], remedy: str) -> Float[Tensor, "p k"]:
    """Return what is added to the logits of each head: for absent classes, and by the prior."""
    frequency = _counts(task, weights)
    prior = frequency.log() if remedy == "prior" else torch.zeros_like(frequency)
    return torch.where(frequency > 0, -prior, ABSENT_LOGIT)


def _solve(
    task: _Task,
    weights: Float[Tensor, "p t"],
    penalty: float,
    start: Float[Tensor, "p k r1"],
    tolerance: float,
) -> Float[Tensor, "p k r1"]:
    """Return the heads that minimise the weighted cross-entropy with the penalty.

    Conjugate gradients, scaled by the diagonal of the curvature along the axes. Only products with
    the coordinates take long; the line search needs none.

    Source: Nocedal and Wright 2006, "Numerical Optimization", 5.2 (Polak-Ribière with restarts).
    """
    x, spread = task.space.coordinates, task.space.spread
    ridge = torch.full_like(spread, penalty)
    ridge[-1] = 0
    share = weights.T[:, :, None].contiguous()
    truth = F.one_hot(task.labels, task.num_classes).float()[:, None]
    shape = (len(x), *start.shape[:2])
    heads = start
    logits = (x @ start.flatten(0, 1).T).view(shape) + _shift(task, weights, "none")
    gradient = direction = torch.zeros_like(start)
    before = torch.full((len(start),), math.inf)
    step = torch.full_like(before, 0.5)  # the usual length
    for _ in range(MAX_STEPS if tolerance == FINE else MAX_ROUGH_STEPS):
        likely = logits.softmax(dim=2)
        curvature = ((likely - likely.square()) * share).sum(dim=0).clamp_min(1e-6)
        last, pull = gradient, likely.sub_(truth).mul_(share)
        gradient = (pull.flatten(1).T @ x).view_as(heads) + ridge * heads
        scaled = gradient / (curvature[:, :, None] * spread + ridge)
        decrement = _dot(gradient, scaled)
        if decrement.max() <= tolerance:
            break
        turn = (_dot(gradient - last, scaled) / before).clamp_min(0)
        direction = turn[:, None, None] * direction - scaled
        uphill = _dot(direction, gradient) >= 0
        direction = torch.where(uphill[:, None, None], -scaled, direction)
        before = decrement.clamp_min(1e-30)
        change = (x @ direction.flatten(0, 1).T).view(shape)
        slope = _dot(ridge * heads, direction) - (share * truth * change).sum(dim=(0, 2))
        bend = _dot(ridge * direction, direction)
        step = _step((logits, change, share), slope, bend, step)
        heads = heads + step[:, None, None] * direction
        logits += step[:, None] * change
    return heads


def _dot(a: Float[Tensor, "p k r1"], b: Float[Tensor, "p k r1"]) -> Float[Tensor, " p"]:
    return (a * b).sum(dim=(1, 2))


def _step(
    pictures: tuple[Float[Tensor, "t p k"], Float[Tensor, "t p k"], Float[Tensor, "t p 1"]],
    slope: Float[Tensor, " p"],
    bend: Float[Tensor, " p"],
    step: Float[Tensor, " p"],
) -> Float[Tensor, " p"]:
    """Return how far each head goes: Newton's method in one dimension, kept inside a bracket.

    Args:
        pictures: their logits at step 0, the change per step, and their weights.
        slope: derivative of the loss at step 0 but for the log-sum-exp of the logits.
        bend: second derivative of the penalty.
        step: to try first, above 0.
    """
    logits, change, share = pictures
    best, least = step, torch.full_like(slope, math.inf)
    low, high = torch.zeros_like(slope), torch.full_like(slope, LONGEST)
    for _ in range(NUM_EVALUATIONS):
        moved = torch.addcmul(logits, step[:, None], change).softmax(dim=2).mul_(change)
        mean = moved.sum(dim=2, keepdim=True)
        square = moved.mul_(change).sum(dim=2, keepdim=True)
        rise = (share * mean).sum(dim=(0, 2)) + slope + step * bend
        bends = (share * (square - mean.square())).sum(dim=(0, 2)) + bend
        best = torch.where(rise.abs() < least, step, best)
        least = torch.minimum(rise.abs(), least)
        low, high = torch.where(rise > 0, low, step), torch.where(rise > 0, step, high)
        newton = step - rise / bends.clamp_min(1e-30)
        step = torch.where((low <= newton) & (newton <= high), newton, (low + high) / 2)
    return best


def _fold_heads(
    task: _Task, penalty: float, remedy: str, start: Float[Tensor, "f k r1"]
) -> tuple[Float[Tensor, "f k r1"], Float[Tensor, "t k"]]:
    """Return the heads of the first F folds, from `start`, and what they say of their pictures."""
    heads = torch.empty_like(start)
    logits = torch.zeros(len(task.labels), task.num_classes)
    per_batch = max(1, MAX_LOGITS // logits.numel())
    for folds in torch.arange(len(start)).split(per_batch):
        weights = _weights(task, folds.tolist(), remedy)
        heads[folds] = _solve(task, weights, penalty, start[folds], ROUGH)
        shift = _shift(task, weights, remedy)
        for fold, moved in zip(folds.tolist(), shift, strict=True):
            asked = task.folds == fold
            logits[asked] = task.space.coordinates[asked] @ heads[fold].T + moved
    return heads, logits


def _final_head(
    task: _Task, penalty: float, remedy: str, heads: Float[Tensor, "f k r1"]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weights and biases of the head of all pictures, for features as they are."""
    weights = _weights(task, [-1], remedy)
    head = _solve(task, weights, penalty, heads.mean(dim=0, keepdim=True), FINE)[0].double()
    space = task.space
    weight = head[:, :-1] @ space.axes.T.double() / space.deviation.double()
    shift = _shift(task, weights, remedy)[0].double()
    bias = head[:, -1] + shift - weight @ space.mean.double()
    return weight.numpy(), bias.numpy()


@dataclass(frozen=True, eq=False)
class _Trial:
    """Heads of some folds, ``(F, K, R + 1)``, and what each of the M pictures in these costs."""

    heads: Tensor
    loss: Costs
    wrong: Costs


@dataclass(frozen=True, eq=False)
class _Judge:
    """Compares costs of the same M pictures by their worth; groups are drawn as one."""

    worth: NDArray[np.float64]
    groups: Labels

    def total(self, cost: Costs) -> float:
        """Return the weighted mean."""
        return float(self.worth @ cost)

    def is_worse(self, cost: Costs, least: Costs) -> bool:
        """Return whether a cost is higher by more than one standard error of the difference."""
        excess = np.bincount(self.groups, self.worth * (cost - least))
        return float(excess.sum()) > math.sqrt(float(np.square(excess).sum()))

    def simplest(self, costs: Mapping[Name, Costs]) -> Name:
        """Return the first that is no worse than the least."""
        least = min(costs.values(), key=self.total)
        return next(name for name, cost in costs.items() if not self.is_worse(cost, least))


def _choose(
    task: _Task, remedies: Sequence[Imbalance], metric: Metric
) -> tuple[Imbalance, float, Float[Tensor, "f k r1"], tuple[Choice, ...]]:
    """Return the remedy, the penalty, heads of all folds to begin with, and the choices made.

    Penalties of a large problem are tried on fewer folds and axes. Remedies go from simple to
    complex.
    """
    pairs, num_folds = len(task.labels) * task.num_classes, int(task.folds.max()) + 1
    small = replace(task, space=task.space.narrowed(max(CHOICE_AXES, int(CHOICE_WORK / pairs))))
    affordable = int(CHOICE_WORK / (pairs * len(small.space.spread)))
    num_tried = min(max(affordable, 1), num_folds)
    start = torch.zeros(num_tried, task.num_classes, len(small.space.spread))
    asked = (task.folds < num_tried).numpy()
    worth = _worth(metric, task.labels.numpy()[asked], task.num_classes)
    judge = _Judge(worth, task.groups[asked])
    trials: dict[Imbalance, dict[float, _Trial]] = {}
    for remedy in remedies:
        known = trials.get("none", {}) if remedy == "prior" else {}  # its heads are the same
        trials[remedy] = _path(small, remedy, judge, start, known)
    chosen = {r: judge.simplest({p: t.loss for p, t in trials[r].items()}) for r in remedies}
    best = {r: trials[r][chosen[r]] for r in remedies}
    remedy = judge.simplest({r: trial.loss for r, trial in best.items()})
    tried, penalty = trials[remedy], chosen[remedy]
    by = f"{num_tried} of {num_folds} folds, {len(worth):,} pictures, weighted as for {metric}"
    reason = f"the {{}} within one standard error of the least log loss by {by}"
    scores = {f"{p:g}": 1 - judge.total(t.wrong) for p, t in tried.items()}
    names = [f"{p:g}" for p in PENALTIES]
    choices = [_choice("penalty", names, scores, f"{penalty:g}", reason.format("strongest"))]
    if len(remedies) > 1:
        scores = {str(r): 1 - judge.total(trial.wrong) for r, trial in best.items()}
        choices.append(_choice("imbalance", remedies, scores, remedy, reason.format("simplest")))
    heads = tried[penalty].heads
    if heads.shape != (num_folds, task.num_classes, len(task.space.spread)):
        heads = torch.zeros(num_folds, task.num_classes, len(task.space.spread))
    return remedy, penalty, heads, tuple(choices)


def _path(
    task: _Task,
    remedy: str,
    judge: _Judge,
    start: Float[Tensor, "f k r1"],
    known: Mapping[float, _Trial],
) -> dict[float, _Trial]:
    """Return what each penalty costs, from the strongest until it gets worse; known are near."""
    trials: dict[float, _Trial] = {}
    asked = task.folds < len(start)
    labels = task.labels[asked]
    for penalty in PENALTIES:
        near = known[penalty].heads if penalty in known else start
        start, every = _fold_heads(task, penalty, remedy, near)
        logits = every[asked]
        loss = F.cross_entropy(logits, labels, reduction="none")
        absent = logits.gather(1, labels[:, None])[:, 0] == ABSENT_LOGIT  # no penalty helps there
        wrong = (logits.argmax(dim=1) != labels).double().numpy()
        trial = _Trial(start, torch.where(absent, 0, loss).double().numpy(), wrong)
        trials[penalty] = trial
        if judge.is_worse(trial.loss, min((t.loss for t in trials.values()), key=judge.total)):
            break
    return trials


def _choice(
    what: str, names: Iterable[str], scores: Mapping[str, float], chosen: str, reason: str
) -> Choice:
    options = (Option(name, scores.get(name), name == chosen) for name in names)
    return Choice(what, tuple(options), reason)
