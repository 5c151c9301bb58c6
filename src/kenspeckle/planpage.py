"""How a run used its time: in sentences for the page and the terminal, and as a chart."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kenspeckle import pages
from kenspeckle.pages import duration, percent, points, quoted
from kenspeckle.plans import Attempt, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["chart", "kept", "outlook", "span", "time_used"]

_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))  # of a time axis, each in seconds
_MAX_OVER = 15  # seconds, and a tenth of the time, by which a promise may be missed
_CHARACTER = 0.016  # mean width of a letter in a chart, as a share of the axis
_LINE = 0.085  # height of a line of text in a chart, as a share of the axis


def span(seconds: float) -> str:
    """Return a time span without the zeros at its end.

    Example:
        >>> span(30), span(1200), span(1152.4)
        ('30 s', '20 min', '19 min 12 s')
    """
    words = duration(seconds).replace(".0 s", " s")
    return words.removesuffix(" 0 s").removesuffix(" 0 min")


def kept(plan: Plan) -> Attempt | None:
    """Return the step whose model was kept: the best of those that are not called no better."""
    return max(
        _ran(plan), key=lambda a: (a.outcome != "no better", _percentage(a.score)), default=None
    )


def time_used(plan: Plan, taken: float) -> tuple[str, ...]:
    """Return whether the promise was kept, and which step was, a sentence each.

    Args:
        plan: of the run.
        taken: seconds that the whole run took.
    """
    over = taken - plan.seconds
    if over <= 0:
        verdict = "the promise was kept"
    elif over <= min(0.1 * plan.seconds, _MAX_OVER):
        verdict = f"{span(over)} over, within what the promise allows"
    else:
        verdict = f"the promise was not kept, by {span(over)}"
    promised = span(plan.seconds)
    source = f"Asked for {promised}" if plan.asked else f"{promised} by default"
    share = f" ({100 * taken / plan.seconds:.0f} %)" if plan.seconds else ""
    sentence = f"{source}, took {span(taken)}{share}: {verdict}."
    return sentence, *_kept_step(plan)


def _ran(plan: Plan) -> list[Attempt]:
    return [attempt for attempt in plan.attempts if attempt.ran]


def _percentage(score: float | None) -> float:
    return 100 * (score or 0.0)


def _kept_step(plan: Plan) -> Iterator[str]:
    best = kept(plan)
    if best is None or best.score is None:
        return
    first = _ran(plan)[0]
    gain = points(best.score - (first.score or 0.0))
    over = "" if best is first else f", {gain} points over the first step, {quoted(first.name)}"
    yield f"Kept {quoted(best.name)}: {plan.metric} {percent(best.score)} by validation{over}."


def outlook(plan: Plan, taken: float) -> tuple[str, ...]:
    """Return what speaks for and against more time, a sentence each.

    Args:
        plan: of the run.
        taken: seconds that the whole run took.
    """
    return tuple(_outlook(plan, taken))


def _outlook(plan: Plan, taken: float) -> Iterator[str]:
    for last in _ran(plan)[-1:]:
        if last is kept(plan) and last.gain is not None and last.gain > 0:
            gain = points(last.gain).removeprefix("+")
            yield f"The last step still gained {gain} points: more time may help."
        if last.outcome == "no better":
            name = quoted(last.name)
            yield f"The last step, {name}, was no better: more time alone may not help."
    for attempt in plan.attempts:
        # One that would have fitted did not run for another reason, which the table tells.
        planned = attempt.planned_seconds or 0.0
        if not attempt.ran and planned > plan.seconds - taken:
            total = taken + planned
            about = span(60 * round(total / 60) if total >= 600 else total)
            yield f"With {quoted(attempt.name)} the run would have taken about {about}."


def chart(plan: Plan, taken: float) -> str:
    """Return the scores over the time as an SVG element; empty when no step ran.

    Args:
        plan: of the run.
        taken: seconds that the whole run took.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if not (ran := [a for a in _ran(plan) if a.finished is not None]):
        return ""
    told = [f"{a.name} {percent(a.score or 0.0)} after {span(a.finished or 0.0)}" for a in ran]
    return pages.drawing(
        "scores",
        f"{plan.metric} by validation over the time since the start: {'; '.join(told)}",
        functools.partial(_draw, plan, ran, taken),
    )


def _draw(plan: Plan, ran: Sequence[Attempt], taken: float, axes: "Axes") -> None:
    """Draw each step as a bar from its start to its end, and the best score so far."""
    span_seconds = max(plan.seconds, taken)
    unit, unit_name = next((u, n) for u, n in _UNITS if span_seconds >= 3 * u or u == 1)
    ran = sorted(ran, key=lambda a: a.finished or 0.0)
    ends = [(a.finished or 0.0) / unit for a in ran]
    scores = [_percentage(a.score) for a in ran]
    best = list(itertools.accumulate(scores, max))
    axes.axvline(plan.seconds / unit, color=pages.MUTED, linewidth=0.8, dashes=(3, 3))
    until = max(taken / unit, ends[-1])
    axes.step([*ends, until], [*best, best[-1]], "-", where="post", color=pages.ACCENT)
    for attempt, end, score in zip(ran, ends, scores, strict=True):
        chosen = attempt is kept(plan)
        colour = pages.ACCENT if chosen else pages.TRAIN
        start = end - attempt.seconds / unit
        axes.plot([start, end], [score] * 2, color=colour, linewidth=6, alpha=0.3)
        axes.plot([end], [score], color=colour, marker="o", markersize=8 if chosen else 5)
    height = max(max(scores) - min(scores), 2.0)
    axes.set_ylim(min(scores) - 0.3 * height, max(scores) + 0.35 * height)
    axes.set_xlim(-0.02 * span_seconds / unit, 1.02 * span_seconds / unit)
    axes.set_xlabel(f"{unit_name} since the start")
    _label(axes, ran, unit)


def _label(axes: "Axes", ran: Sequence[Attempt], unit: int) -> None:
    """Write the names of steps, in the order of their ends, beside their ends.

    The best score comes to a point from below and leaves it to the right. So there is room below a
    point on its right, and above one on its left, unless a better one came before. A name goes on
    in that direction until it stands over no bar and no other name.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ends = [((a.finished or 0.0) / unit - left) / (right - left) for a in ran]
    levels = [(_percentage(a.score) - bottom) / (top - bottom) for a in ran]
    taken = [  # begin, end and height of what is drawn, as shares of the axes
        (end - a.seconds / unit / (right - left), end, level)
        for a, end, level in zip(ran, ends, levels, strict=True)
    ]
    for i in sorted(range(len(ran)), key=levels.__getitem__, reverse=True):
        upwards = ends[i] > 0.5 and levels[i] == max(levels[: i + 1])
        width = _CHARACTER * len(ran[i].name)
        begin = ends[i] - (width if ends[i] > 0.5 else 0.0)
        beside = [height for first, last, height in taken if first < begin + width and begin < last]
        rows = (levels[i] + (row if upwards else -row) * _LINE for row in itertools.count(1))
        free = next(row for row in rows if all(abs(row - other) >= 0.9 * _LINE for other in beside))
        taken.append((begin, begin + width, free))
        axes.annotate(
            ran[i].name,
            (ends[i], free),
            (-3 if ends[i] > 0.5 else 3, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            horizontalalignment="right" if ends[i] > 0.5 else "left",
            verticalalignment="center",
            parse_math=False,
        )
