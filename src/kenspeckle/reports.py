"""Reports: from the plain values of a run to one HTML file, and to a few lines for a terminal.

The file needs nothing outside itself: styles, charts and pictures are inside, there is no script,
and its own policy forbids every request. Text that came from the user (class names, file names,
paths) is escaped by the template engine, and characters that cannot be shown are spelled out.
"""

import base64
import datetime as dt
import importlib.resources
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from kenspeckle.core import Interval, MissingExtraError
from kenspeckle.results import Epoch, Mistake, Report, Scores

__all__ = ["Verdict", "render", "summary", "verdict"]

_MAX_MATRIX_CLASSES = 25  # beyond that a confusion matrix is no longer read but searched
_MAX_CONFUSIONS = 20
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # of writing direction
_DASH = "\N{EN DASH}"  # stands for what is undefined

# Drawn in these, then replaced: one drawing serves the light and the dark colours of the page.
_CHART_COLOURS = {
    "#00a001": "var(--train)",
    "#00a002": "var(--accent)",
    "#00a003": "var(--rule)",
    "#00a004": "var(--muted)",
}
_TRAIN, _VALIDATION, _RULE, _MUTED = _CHART_COLOURS


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


def verdict(report: Report) -> Verdict:
    """Return what a report says, in plain words."""
    scores, split = report.judged, _split(report)
    pictures = _count(scores.num_items, f"{split} picture")
    seen = " it had never seen" if report.test else ""
    return Verdict(
        headline=f"Right on {_percent(scores.accuracy.value)} of {pictures}{seen} "
        f"(95 % interval {_spread(scores.accuracy)}).",
        baseline=f"Always saying {_quoted(scores.majority_class)} would be right on "
        f"{_percent(scores.majority_accuracy)}.",
        cautions=tuple(_cautions(report)),
    )


def summary(report: Report) -> str:
    """Return the verdict as lines for a terminal."""
    words = verdict(report)
    lines = [words.headline, words.baseline]
    worst = _confusions(report.judged)[:3]
    if worst:
        pairs = (
            f"{_quoted(c.label)} as {_quoted(c.predicted)} ({_count(c.num_items, 'time')})"
            for c in worst
        )
        lines.append(f"Most often mistaken: {', '.join(pairs)}.")
    return "\n".join(lines + [f"! {caution}" for caution in words.cautions])


def render(report: Report) -> str:
    """Return a report as one HTML file that opens from disk, without scripts or requests.

    Raises:
        MissingExtraError: Jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtraError("the HTML report", "train") from error
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "data_uri": _data_uri,
        "duration": _duration,
        "moment": _moment,
        "number": _number,
        "percent": _percent,
        "setting": _setting,
        "spread": _spread,
    }
    source = importlib.resources.files("kenspeckle").joinpath("templates/report.html")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    scores = report.judged
    return template.render(
        report=report,
        scores=scores,
        split=_split(report),
        verdict=verdict(report),
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
            "There is no test split. The validation pictures also chose the best epoch, so this "
            "figure is optimistic: expect less on new pictures."
        )
    if width > 0.1:
        yield (
            f"The interval is {100 * width:.0f} points wide, since there are only "
            f"{_count(scores.num_items, f'{split} picture')}: more would narrow it."
        )
    if scores.accuracy.low <= scores.majority_accuracy:
        yield (
            f"It is not shown to be better than always saying {_quoted(scores.majority_class)}, "
            f"which reaches {_percent(scores.majority_accuracy)}."
        )
    # With fewer pictures, and 15 bins, chance alone puts a perfect model that far off.
    if scores.expected_calibration_error > 0.05 and scores.num_items >= 1500:
        off = 100 * scores.expected_calibration_error
        yield f"Its probabilities are {off:.1f} points off on average: do not take them literally."


def _cautions_on_training(report: Report) -> Iterator[str]:
    history, best = report.training.history, _best(report)
    if best and best.train_accuracy is not None:
        gap = best.train_accuracy - best.validation_accuracy
        if gap > 0.1:
            yield (
                f"Right on {_percent(best.train_accuracy)} of the training pictures, but on "
                f"{_percent(best.validation_accuracy)} of the validation pictures: it learns "
                "pictures by heart. More pictures, augmentation or dropout would help."
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
        yield f"Never answered, although there are pictures of them: {_listed(never)}."
    if absent:
        yield f"No {split} pictures, so that nothing is known of: {_listed(absent)}."
    if few:
        yield (
            f"Fewer than 10 {split} pictures each, so that their own figures say little: "
            f"{_listed(few)}."
        )


def _best(report: Report) -> Epoch | None:
    training = report.training
    return next((e for e in training.history if e.number == training.best_epoch), None)


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
        (name, [(_percent(i.value), _spread(i)) for i in intervals if i])
        for name, intervals in shares.items()
    ]
    losses = [s.log_loss for s in splits]
    rows.append(
        ("Log loss, nats", [(_number(i.value), f"{i.low:.3f} to {i.high:.3f}") for i in losses])
    )
    errors = [s.expected_calibration_error for s in splits]
    rows.append(("Calibration error", [(_percent(error), "") for error in errors]))
    return [row for row in rows if row[1]]


def _groups(plain: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the entries of a table as groups of names and words; loose entries come first."""
    loose = [(key, _setting(v)) for key, v in plain.items() if not isinstance(v, Mapping)]
    nested = [
        (key, [(name, _setting(entry)) for name, entry in value.items()])
        for key, value in plain.items()
        if isinstance(value, Mapping)
    ]
    return [("", loose), *nested] if loose else nested


def _charts(report: Report) -> dict[str, str]:
    """Return the learning curves as SVG elements: ``loss`` and ``accuracy``."""
    history, best = report.training.history, _best(report)
    numbers = [e.number for e in history]
    loss = {
        _TRAIN: [e.train_loss for e in history],
        _VALIDATION: [e.validation_loss for e in history],
    }
    accuracy = {_VALIDATION: [100 * e.validation_accuracy for e in history]}
    if all(e.train_accuracy is not None for e in history):
        accuracy[_TRAIN] = [100 * (e.train_accuracy or 0.0) for e in history]
    mark = best.number if best else None
    if not history:
        return {}
    return {
        "loss": _chart("loss", numbers, loss, mark),
        "accuracy": _chart("accuracy", numbers, accuracy, mark),
    }


def _chart(
    name: str, numbers: list[int], curves: Mapping[str, list[float]], mark: int | None
) -> str:
    """Return lines over epochs as one SVG element whose identifiers begin with `name`.

    Args:
        name: of the chart.
        numbers: of the epochs.
        curves: by colour, a value per epoch.
        mark: the epoch that gets a vertical line.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise MissingExtraError("the HTML report", "train") from error
    with mpl.rc_context():
        mpl.rcdefaults()  # the user's own style is for the user's own plots
        mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}
        axes = (figure := Figure(figsize=(4.8, 2.7), layout="constrained")).add_subplot()
        if mark is not None:
            axes.axvline(mark, color=_MUTED, linewidth=0.8, dashes=(3, 3))
        for colour, values in curves.items():
            finite = [value if math.isfinite(value) else math.nan for value in values]
            marker = "o" if len(finite) < 3 else ""
            axes.plot(numbers, finite, color=colour, linewidth=1.8, marker=marker, markersize=4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="y", color=_RULE, linewidth=0.8)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.set_xlabel("epoch", color=_MUTED)
        axes.tick_params(colors=_MUTED, length=0, pad=6)
        stream = StringIO()
        nameless = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nameless)
    return _inline(stream.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Return a drawn SVG file as an element that can stand beside others in one page."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<style.*?</style>", "", element, flags=re.DOTALL)  # it styles the whole page
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element)
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)
    for colour, variable in _CHART_COLOURS.items():
        element = element.replace(colour, variable)
    return element.replace("<svg", f'<svg role="img" aria-label="{name} over the epochs"', 1)


def _data_uri(mistake: Mistake) -> str:
    kind = {"png": "image/png", "jpg": "image/jpeg"}[mistake.suffix]
    return f"data:{kind};base64,{base64.b64encode(mistake.picture or b'').decode()}"


def _shown(value: object) -> object:
    """Return text with what no page can hold, or what turns text around, spelled out."""
    if type(value) is not str:  # markup is ours
        return value
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in {"Cc", "Cs"} or unicodedata.bidirectional(char) in _TURNS
        else char
        for char in value
    )


def _quoted(name: str) -> str:
    return f"'{_shown(name if len(name) <= 60 else name[:59] + '…')}'"


def _listed(names: list[str]) -> str:
    more = len(names) - 5
    return ", ".join(map(_quoted, names[:5])) + (f" and {more:,} more" if more > 0 else "")


def _percent(share: float) -> str:
    """Return a share as a percentage that is 0 or 100 only when the share is."""
    if math.isnan(share):
        return _DASH
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{100 * share:.1f} %"


def _spread(interval: Interval) -> str:
    if math.isnan(interval.value):
        return ""
    return f"{_percent(interval.low).removesuffix(' %')} to {_percent(interval.high)}"


def _number(value: float) -> str:
    return _DASH if math.isnan(value) else f"{value:.3f}"


def _count(number: int, noun: str = "") -> str:
    if not noun:
        return f"{number:,}"
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return _DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _moment(created: str) -> str:
    """Return an ISO 8601 date and time as people write it; any other text as it is."""
    try:
        moment = dt.datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".rstrip()


def _setting(value: object) -> str:
    """Return a plain value in words."""
    if value is None or value == "":
        return _DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_setting(entry) for entry in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting(entry)}" for key, entry in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _low_first(value: float) -> tuple[bool, float]:
    return math.isnan(value), value
