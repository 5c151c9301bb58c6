"""Reports: from the plain values of a run to one HTML file, and to a few lines for a terminal."""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kenspeckle import pages, planpage
from kenspeckle.core import Interval
from kenspeckle.pages import (
    count,
    listed,
    number,
    percent,
    points,
    quoted,
    setting,
    spread,
)
from kenspeckle.results import Epoch, Report, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Verdict", "render", "summary", "verdict"]

_MAX_MATRIX_CLASSES = 25  # beyond that a confusion matrix is no longer read but searched
_MAX_CONFUSIONS = 20
_SMALL_GAP, _LARGE_GAP = 0.02, 0.1  # of accuracy between training and validation


@dataclass(frozen=True)
class Verdict:
    """A report in plain words.

    Attributes:
        headline: how often the model is right, with the interval.
        baseline: what the simplest answer would reach.
        cautions: what stands against taking the headline at its word, a sentence or two each.
    """

    headline: str
    baseline: str
    cautions: tuple[str, ...]


@dataclass(frozen=True)
class _Confusion:
    """How often one class was taken for another.

    Attributes:
        label: name of the right class.
        predicted: name of the class that was answered.
        num_items: pictures.
        share: of all pictures of the right class.
    """

    label: str
    predicted: str
    num_items: int
    share: float


@dataclass(frozen=True)
class _Gap:
    """How much more often a network is right on what it learnt from than on what it did not.

    Attributes:
        train: accuracy on the training pictures, 0 to 1.
        validation: accuracy on the validation pictures, 0 to 1.
        chance: by how much the latter may be too low by chance, 0 to 1.
        during: whether `train` was measured while it learnt, on pictures altered at random.
    """

    train: float
    validation: float
    chance: float
    during: bool

    @property
    def size(self) -> float:
        """The difference, -1 to 1."""
        return self.train - self.validation

    @property
    def small(self) -> bool:
        """Whether it is none to speak of."""
        return self.size <= max(_SMALL_GAP, self.chance)

    @property
    def large(self) -> bool:
        """Whether it speaks of pictures learnt by heart."""
        return self.size > _LARGE_GAP and not self.small


def verdict(report: Report) -> Verdict:
    """Return what a report says, in plain words."""
    scores, split = report.judged, _split(report)
    pictures = count(scores.num_items, f"{split} picture")
    new = report.test and not report.test_without_leaks
    seen = " it had never seen" if new else ""
    return Verdict(
        headline=f"Right on {percent(scores.accuracy.value)} of {pictures}{seen} "
        f"(95 % interval {spread(scores.accuracy)}).",
        baseline=f"Always saying {quoted(scores.majority_class)} would be right on "
        f"{percent(scores.majority_accuracy)}.",
        cautions=tuple(_cautions(report)),
    )


def summary(report: Report) -> str:
    """Return the verdict as lines for a terminal."""
    words = verdict(report)
    lines = [words.headline, words.baseline]
    worst = _confusions(report.judged)[:3]
    if worst:
        pairs = (
            f"{quoted(c.label)} as {quoted(c.predicted)} ({count(c.num_items, 'time')})"
            for c in worst
        )
        lines.append(f"Most often mistaken: {', '.join(pairs)}.")
    return "\n".join(lines + [f"! {caution}" for caution in words.cautions])


def render(report: Report) -> str:
    """Return a report as one HTML file that opens from disk, without scripts or requests.

    Raises:
        MissingExtraError: Jinja2 or matplotlib is not installed.
    """
    scores, plan, taken = report.judged, report.plan, report.training.seconds
    return pages.render(
        "report.html",
        report=report,
        scores=scores,
        split=_split(report),
        chosen=_chosen(report),
        verdict=verdict(report),
        kept=planpage.kept(plan) if plan else None,
        time_used=planpage.time_used(plan, taken) if plan else (),
        outlook=planpage.outlook(plan, taken) if plan else (),
        scores_over_time=planpage.chart(plan, taken) if plan else "",
        overfitting=_overfitting(report),
        turn=_turn(report),
        charts=_charts(report),
        measures=_measures(report),
        weakest_first=sorted(scores.per_class, key=lambda c: _low_first(c.f1.value)),
        matrix=_matrix(scores) if len(scores.classes) <= _MAX_MATRIX_CLASSES else None,
        confusions=_confusions(scores)[:_MAX_CONFUSIONS],
        recipe=_groups(report.recipe),
        provenance=_groups(report.provenance),
    )


def _split(report: Report) -> str:
    return "test" if report.test else "validation"


def _cautions(report: Report) -> Iterator[str]:
    yield from _cautions_on_evidence(report)
    yield from _cautions_on_training(report)
    yield from _cautions_on_classes(report)


def _cautions_on_evidence(report: Report) -> Iterator[str]:
    scores, split = report.judged, _split(report)
    width = scores.accuracy.high - scores.accuracy.low
    if not report.test:
        yield (
            f"There is no test split. The validation pictures also chose {_chosen(report)}, so "
            "this figure is optimistic: expect less on new pictures."
        )
    if width > 0.1:
        yield (
            f"The interval is {100 * width:.0f} points wide, since there are only "
            f"{count(scores.num_items, f'{split} picture')}: more would narrow it."
        )
    if scores.accuracy.low <= scores.majority_accuracy:
        yield (
            f"It is not shown to be better than always saying {quoted(scores.majority_class)}, "
            f"which reaches {percent(scores.majority_accuracy)}."
        )
    if report.test and (honest := report.test_without_leaks):
        num = scores.num_items - honest.num_items
        yield (
            f"{num:,} of the {scores.num_items:,} test pictures also stand in the training "
            f"pictures, where it may have learnt them by heart. Without them it is right on "
            f"{percent(honest.accuracy.value)} ({spread(honest.accuracy)})."
        )
    # With fewer pictures, and 15 bins, chance alone puts a perfect model that far off.
    if scores.expected_calibration_error > 0.05 and scores.num_items >= 1500:
        off = 100 * scores.expected_calibration_error
        yield f"Its probabilities are {off:.1f} points off on average: do not take them literally."


def _cautions_on_training(report: Report) -> Iterator[str]:
    history, best, gap = report.training.history, _best(report), _gap(report)
    if gap and gap.large:
        more = ", stronger augmentation or dropout" if gap.during else " or stronger regularisation"
        yield (
            f"Right on {percent(gap.train)} of the training pictures, but on "
            f"{percent(gap.validation)} of the validation pictures: it has learnt them by heart. "
            f"More pictures{more} would help."
        )
    if best and len(history) > 1 and best is history[-1]:
        yield "The last epoch was the best one: training longer may do better."


def _cautions_on_classes(report: Report) -> Iterator[str]:
    split = _split(report)
    scored = report.judged.per_class
    never = [c.name for c in scored if c.num_items and not c.num_predicted]
    absent = [c.name for c in scored if not c.num_items]
    few = [c.name for c in scored if 0 < c.num_items < 10]
    if never:
        yield f"Never answered, although there are pictures of them: {listed(never)}."
    if absent:
        yield f"No {split} pictures, so that nothing is known of: {listed(absent)}."
    if few:
        yield (
            f"Fewer than 10 {split} pictures each, so that their own figures say little: "
            f"{listed(few)}."
        )


def _best(report: Report) -> Epoch | None:
    training = report.training
    return next((e for e in training.history if e.number == training.best_epoch), None)


def _chosen(report: Report) -> str:
    """Return what the validation pictures chose."""
    epochs = report.training.history and not report.plan
    return "the best epoch" if epochs else "the model that was kept"


# Overfitting.


def _gap(report: Report) -> _Gap | None:
    accuracy, best = report.validation.accuracy, _best(report)
    kept = planpage.kept(report.plan) if report.plan else None
    chance = accuracy.high - accuracy.value
    if best and best.train_accuracy is not None:
        return _Gap(best.train_accuracy, best.validation_accuracy, chance, during=True)
    if kept is None or kept.score is None or kept.train_score is None:
        return None
    # Balanced accuracy does not compare with accuracy on the training pictures, nor does that of
    # answers that costs decided.
    by_accuracy = report.plan and report.plan.metric == "accuracy"
    if not by_accuracy and report.validation.mean_cost is not None:
        return None
    validation = kept.score if by_accuracy else accuracy.value
    return _Gap(kept.train_score, validation, chance, during=kept.num_epochs > 0)


def _overfitting(report: Report) -> tuple[str, str]:
    """Return how much of it there is, and what tells so, in words."""
    if (gap := _gap(report)) is None:
        return "Not known", "Accuracy on the training pictures was not measured."
    size = "None to speak of" if gap.small else "Much" if gap.large else "Some"
    words = (
        f"Right on {percent(gap.train)} of the training pictures and on "
        f"{percent(gap.validation)} of the validation pictures."
    )
    if gap.small and gap.size > _SMALL_GAP:
        pictures = count(report.validation.num_items, "validation picture")
        words += f" With {pictures}, chance alone explains as much."
    if gap.size < 0 and gap.during:
        words += (
            " Below zero, since training accuracy is measured while the network still learns, on "
            "pictures that augmentation or mixing made harder: it may hide a little."
        )
    return f"{size}: {points(gap.size)} points between training and validation", words


def _turn(report: Report) -> str:
    """Return whether validation loss rose after the best epoch, in words; empty if unknown."""
    history, best = report.training.history, _best(report)
    if best is None or len(history) < 2:
        return ""
    last = history[-1]
    if best is last:
        return "The last epoch was the best one: validation had not turned."
    before, after = best.validation_loss, last.validation_loss
    turned = after > 1.01 * before and last.train_loss < best.train_loss  # less is no rise
    losses = f"{number(before)} to {number(after)}"
    if turned:
        return (
            f"After epoch {best.number} validation loss rose from {losses} while training loss "
            "went on falling: what was learnt from there on holds for the training pictures only."
        )
    return f"After epoch {best.number} validation loss did not turn upwards ({losses})."


def _confusions(scores: Scores) -> list[_Confusion]:
    """Return the pairs of classes that were mistaken for one another, most frequent first."""
    found = [
        _Confusion(label, predicted, num_items, num_items / sum(row))
        for label, row in zip(scores.classes, scores.confusion, strict=True)
        for predicted, num_items in zip(scores.classes, row, strict=True)
        if num_items and predicted != label
    ]
    return sorted(found, key=lambda c: (c.num_items, c.share), reverse=True)


def _matrix(scores: Scores) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return, per true class, its name and per predicted class the count and the shade, 0 to 1."""
    return [
        # The root lets rare confusions be seen beside frequent ones.
        (name, [(cell, math.sqrt(cell / max(1, sum(row)))) for cell in row])
        for name, row in zip(scores.classes, scores.confusion, strict=True)
    ]


def _measures(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return, per measure, its name and per split the value and the interval in words."""
    splits = [report.test, report.validation] if report.test else [report.validation]
    top_k = report.validation.top_k
    shares: dict[str, list[Interval | None]] = {
        "Accuracy": [s.accuracy for s in splits],
        f"Among the {top_k} most probable": [s.top_k_accuracy for s in splits],
        "Balanced accuracy": [s.balanced_accuracy for s in splits],
        "Precision, macro": [s.precision.macro for s in splits],
        "Precision, weighted": [s.precision.weighted for s in splits],
        "F1, macro": [s.f1.macro for s in splits],
        "F1, weighted": [s.f1.weighted for s in splits],
    }
    rows = [
        (name, [(percent(i.value), spread(i)) for i in intervals if i])
        for name, intervals in shares.items()
    ]
    amounts: dict[str, list[Interval | None]] = {
        "Log loss, nats": [s.log_loss for s in splits],
        "Mean cost of an answer": [s.mean_cost for s in splits],
    }
    rows += [
        (name, [(number(i.value), f"{i.low:.3f} to {i.high:.3f}") for i in intervals if i])
        for name, intervals in amounts.items()
    ]
    errors = [s.expected_calibration_error for s in splits]
    rows.append(("Calibration error", [(percent(error), "") for error in errors]))
    return [row for row in rows if row[1]]


def _groups(plain: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the entries of a table as groups of names and words; loose entries come first."""
    loose = [(key, setting(v)) for key, v in plain.items() if not isinstance(v, Mapping)]
    nested = [
        (key, [(name, setting(entry)) for name, entry in value.items()])
        for key, value in plain.items()
        if isinstance(value, Mapping)
    ]
    return [("", loose), *nested] if loose else nested


def _charts(report: Report) -> dict[str, str]:
    """Return the learning curves as SVG elements: ``loss`` and ``accuracy``."""
    history, best = report.training.history, _best(report)
    numbers = [e.number for e in history]
    loss = {
        pages.TRAIN: [e.train_loss for e in history],
        pages.ACCENT: [e.validation_loss for e in history],
    }
    accuracy = {pages.ACCENT: [100 * e.validation_accuracy for e in history]}
    if all(e.train_accuracy is not None for e in history):
        accuracy[pages.TRAIN] = [100 * (e.train_accuracy or 0.0) for e in history]
    mark = best.number if best else None
    if not history:
        return {}
    return {
        name: pages.drawing(
            name, f"{name} over the epochs", functools.partial(_draw_curves, numbers, curves, mark)
        )
        for name, curves in (("loss", loss), ("accuracy", accuracy))
    }


def _draw_curves(
    numbers: list[int], curves: Mapping[str, list[float]], mark: int | None, axes: "Axes"
) -> None:
    """Draw curves, each by its colour, over the numbers of the epochs, and mark an epoch."""
    if mark is not None:
        axes.axvline(mark, color=pages.MUTED, linewidth=0.8, dashes=(3, 3))
    for colour, values in curves.items():
        finite = [value if math.isfinite(value) else math.nan for value in values]
        marker = "o" if len(finite) < 3 else ""
        axes.plot(numbers, finite, color=colour, linewidth=1.8, marker=marker, markersize=4)
    axes.set_xlabel("epoch")


def _low_first(value: float) -> tuple[bool, float]:
    return math.isnan(value), value
