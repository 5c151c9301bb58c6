"""Evaluation: from a model's answers on labelled pictures to `Scores` and the worst mistakes."""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kenspeckle import metrics
from kenspeckle.core import Interval, InvalidValueError
from kenspeckle.costs import Costs, decide
from kenspeckle.results import Averages, ClassScores, Mistake, Scores

__all__ = ["evaluate", "worst_mistakes"]

Labels = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


def evaluate(
    probabilities: Floats,
    labels: Labels,
    classes: tuple[str, ...],
    seed: int = 0,
    costs: Costs | None = None,
) -> Scores:
    """Return what a model is worth, from its answers on pictures whose class is known.

    Intervals are Wilson's for the shares of pictures and for each class, Wilson's with the
    bootstrap's standard error for averages over classes, and the percentile bootstrap for the
    log loss and the mean cost.

    Args:
        probabilities: ``(N, K)``, each row sums to one.
        labels: ``int64 (N,)``, indices of `classes`; a class may have no pictures.
        classes: K names, at least two.
        seed: of the bootstrap.
        costs: decide the answers, by least expected cost; None answers the most probable class.

    Raises:
        InvalidValueError: there are no pictures, the shapes do not match, a label is no class, or
            a row is not a finite distribution over the classes.
    """
    _require_distributions(probabilities, len(classes))
    if not len(labels):
        raise InvalidValueError("labels must have at least one entry; got none")
    predicted = decide(probabilities, costs)
    confusion = metrics.confusion_matrix(labels, predicted, len(classes))
    support = confusion.sum(axis=1)
    accuracy = metrics.wilson(int(np.trace(confusion)), len(labels))
    precision, recall, f1 = _averages(labels, predicted, len(classes), seed)
    majority = int(support.argmax())
    top_k = min(5, len(classes) - 1) if len(classes) > 2 else None
    losses = metrics.log_losses(labels, probabilities)
    return Scores(
        classes=tuple(classes),
        num_items=len(labels),
        accuracy=accuracy,
        top_k=top_k,
        top_k_accuracy=_top_k(labels, probabilities, top_k) if top_k else None,
        balanced_accuracy=recall.macro,
        precision=precision,
        recall=dataclasses.replace(recall, weighted=accuracy),
        f1=f1,
        log_loss=_mean(losses, seed),
        expected_calibration_error=metrics.expected_calibration_error(probabilities, labels),
        majority_class=classes[majority],
        majority_accuracy=int(support[majority]) / len(labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        per_class=_per_class(confusion, classes),
        mean_cost=_mean(costs.array[labels, predicted], seed) if costs else None,
    )


def worst_mistakes(
    probabilities: Floats,
    labels: Labels,
    names: tuple[str, ...],
    num: int = 24,
    costs: Costs | None = None,
) -> tuple[Mistake, ...]:
    """Return the wrong answers, the dearest first and, at equal cost, the most probable first.

    Args:
        probabilities: ``(N, K)``.
        labels: ``int64 (N,)``.
        names: of the N pictures.
        num: at most so many.
        costs: decide the answers too; None answers the most probable class, and every mistake
            costs the same.

    Raises:
        InvalidValueError: the lengths or numbers of classes differ, or a row is not a finite
            distribution.
    """
    _require_distributions(probabilities, probabilities.shape[-1])
    if not len(names) == len(labels) == len(probabilities):
        raise InvalidValueError(
            "probabilities, labels and names must have the same length; "
            f"got {len(probabilities)}, {len(labels)} and {len(names)}"
        )
    predicted = decide(probabilities, costs)
    stated = probabilities[np.arange(len(labels)), predicted]
    wrong = np.flatnonzero(predicted != labels)
    paid = costs.array[labels, predicted] if costs else np.ones(len(labels))
    worst = wrong[np.lexsort((-stated[wrong], -paid[wrong]))][:num]
    return tuple(
        Mistake(
            index=int(index),
            name=names[index],
            label=int(labels[index]),
            predicted=int(predicted[index]),
            probability=float(stated[index]),
        )
        for index in worst
    )


def _require_distributions(probabilities: Floats, num_classes: int) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] != num_classes or num_classes < 2:
        raise InvalidValueError(
            f"probabilities must be (N, K) with a column for each of at least two classes; got "
            f"{probabilities.shape} and {num_classes} classes"
        )
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        raise InvalidValueError(
            f"probabilities must be finite; got {np.sum(~finite)} rows with NaN or infinity, the "
            f"first is row {np.argmin(finite)}; the network has diverged: lower the learning rate"
        )
    # Float16 probabilities miss a sum of one by up to 1e-3.
    fits = (probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) < 2e-3)
    if not fits.all():
        row = int(np.argmin(fits))
        raise InvalidValueError(
            "probabilities must be at least 0 and sum to one in each row; "
            f"row {row} sums to {probabilities[row].sum():.6g} with a minimum of "
            f"{probabilities[row].min():.6g}; pass softmax(logits), not logits"
        )


def _mean(values: Floats, seed: int) -> Interval:
    return metrics.bootstrap(lambda some: float(np.mean(some)), values, seed=seed)


def _top_k(labels: Labels, probabilities: Floats, k: int) -> Interval:
    hits = metrics.top_k_hits(labels, probabilities, k)
    return metrics.wilson(int(hits.sum()), len(hits))


def _averages(
    labels: Labels, predicted: Labels, num_classes: int, seed: int
) -> tuple[Averages, Averages, Averages]:
    """Return the macro and weighted averages of precision, recall and F1."""

    def statistic(labels: Labels, predicted: Labels) -> list[float]:
        rates = metrics.rates(labels, predicted, num_classes)
        every = (rates.precision, rates.recall, rates.f1)
        return [f for v in every for f in (metrics.macro(v), metrics.weighted(v, rates.support))]

    values = statistic(labels, predicted)
    draws = metrics.resamples(statistic, labels, predicted, seed=seed)
    support = np.bincount(labels, minlength=num_classes)
    # A macro average leans on its rarest classes, so that N items are worth as many as this
    # (Kish's effective sample size, for weights in inverse proportion to the class's frequency).
    occurs = support[support > 0]
    effective = len(occurs) ** 2 / float(np.sum(1 / occurs))
    intervals = [
        metrics.share_interval(value, _deviation(column), num_items)
        for value, column, num_items in zip(
            values, draws.T, [effective, len(labels)] * 3, strict=True
        )
    ]
    precision, recall, f1 = (Averages(*intervals[start : start + 2]) for start in (0, 2, 4))
    return precision, recall, f1


def _deviation(draws: NDArray[np.float64]) -> float:
    defined = draws[~np.isnan(draws)]
    return float(np.std(defined)) if len(defined) else math.nan


def _per_class(confusion: Labels, classes: tuple[str, ...]) -> tuple[ClassScores, ...]:
    hits = np.diag(confusion).tolist()
    counts = zip(classes, hits, confusion.sum(axis=1), confusion.sum(axis=0), strict=True)
    return tuple(
        ClassScores(
            name=name,
            num_items=int(num_items),
            num_predicted=int(num_predicted),
            precision=metrics.wilson(hit, int(num_predicted)),
            recall=metrics.wilson(hit, int(num_items)),
            f1=metrics.wilson_f1(hit, int(num_items + num_predicted) - 2 * hit),
        )
        for name, hit, num_items, num_predicted in counts
    )
