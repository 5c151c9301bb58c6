"""What a check of a data set found, as one HTML page with the pictures, and as lines of text."""

import functools
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kenspeckle import pages
from kenspeckle.core import Interval, printable
from kenspeckle.findings import Case, Exhibit, Finding, Health, Severity
from kenspeckle.forecast import ClassForecast, Forecast
from kenspeckle.pages import count, percent, points, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NUM_CASES", "NUM_PICTURES", "NUM_PICTURES_OF_CASE", "render", "summary", "wanted"]

NUM_CASES = 24
"""Cases of one finding that a page shows at most."""
NUM_PICTURES_OF_CASE = 8
"""Pictures of one case that a page shows at most."""
NUM_PICTURES = 400
"""Pictures of one page at most: with thumbnails of 9 kB on average it stays below 5 MB."""

_NUM_CASES_SAID = 5  # in text, where nothing can be skimmed
_NUM_PICTURES_SAID = 4
_NUM_CLASSES_SAID = 8
_COLUMNS = 100  # of the text

_WORDS: dict[Severity, tuple[str, str]] = {  # of one thing, of several
    "error": ("stops training", "stop training"),
    "warning": ("makes its numbers doubtful", "make its numbers doubtful"),
    "note": ("is worth knowing", "are worth knowing"),
}
_LABELS = {
    "error": "stops training",
    "warning": "makes numbers doubtful",
    "note": "worth knowing",
}


@dataclass(frozen=True)
class _Section:
    """A finding as the page shows it.

    Attributes:
        finding: the finding.
        heading: its kind in words.
        label: its severity in words.
        remarks: cases without pictures.
        cases: the other cases that are shown, pictures and all.
        num_more: cases that are not shown.
        pictured: whether there is a thumbnail of any.
    """

    finding: Finding
    heading: str
    label: str
    remarks: tuple[Case, ...]
    cases: tuple[Case, ...]
    num_more: int
    pictured: bool


def wanted(health: Health) -> tuple[int, ...]:
    """Return the indices, in the data set, of the pictures that the page shows, in order.

    Every finding shows its first case before any finding shows its second, so that where there is
    not room for all, all are short of it alike.
    """
    exhibits = (e for cases in _selection(health) for case in cases for e in _exhibits(case))
    return tuple(sorted({e.index for e in exhibits if e.index is not None}))


def render(health: Health, thumbnails: Mapping[int, bytes]) -> str:
    """Return what was found as one HTML file that opens from disk, without scripts or requests.

    Args:
        health: what was found.
        thumbnails: small PNG or JPEG files by the index of the picture in the data set, for those
            that `wanted` names; a picture without one is shown as an empty frame.

    Raises:
        MissingExtraError: Jinja2 or matplotlib is not installed.
        InvalidValueError: a thumbnail is neither PNG nor JPEG.
    """
    forecast = health.forecast
    return pages.render(
        "check.html",
        health=health,
        headline=_headline(health),
        scope=_scope(health),
        tally=_tally(health),
        severity_words=_WORDS,
        sections=_sections(health, thumbnails),
        thumbnails=thumbnails,
        num_pictures_of_case=NUM_PICTURES_OF_CASE,
        counts=_counts(health),
        forecast=forecast,
        forecast_words=_forecast_words(forecast) if forecast else (),
        chart=_chart(forecast) if forecast else "",
        gains=_gains(forecast) if forecast else [],
    )


def summary(health: Health) -> str:
    """Return what was found as text for a terminal, most lines at most 100 columns wide."""
    blocks = ["\n".join(map(_filled, (_headline(health), _scope(health))))]
    blocks += ["\n".join(_finding_lines(finding)) for finding in health.findings]
    blocks.append("\n".join(_counts_lines(health)))
    if health.forecast:
        blocks.append(_filled(" ".join(_forecast_words(health.forecast))))
    missing = [_filled(f"{c.name}: {c.outcome}", "  ") for c in health.checks if not c.ran]
    if missing:
        blocks.append("\n".join(["Not checked:", *missing]))
    return "\n\n".join(blocks) + "\n"


# Words.


def _headline(health: Health) -> str:
    """Return the verdict: how much was found, by how grave it is."""
    parts = [
        f"{num:,} {_WORDS[severity][num > 1]}"
        for severity, num in _tally(health).items()
        if num > 0
    ]
    if not parts:
        return "Nothing wrong was found."
    num, words = parts[0].split(" ", 1)
    parts[0] = f"{num} {'thing' if num == '1' else 'things'} {words}"
    return f"{', '.join(parts)}."


def _tally(health: Health) -> dict[Severity, int]:
    numbers = Counter(finding.severity for finding in health.findings)
    return {severity: numbers[severity] for severity in _WORDS}


def _scope(health: Health) -> str:
    """Return what the verdict rests on."""
    ran = [check.name for check in health.checks if check.ran]
    num_missing = len(health.checks) - len(ran)
    data = f"{count(health.num_pictures, 'picture')} of {count(len(health.classes), 'class')}"
    looked = f"{data}, looked at in {pages.duration(health.seconds)}."
    if not health.findings and ran:
        looked += f" Looked for: {', '.join(ran)}."
    if num_missing:
        looked += f" {count(num_missing, 'check')} did not run."
    return looked


def _forecast_words(forecast: Forecast) -> tuple[str, ...]:
    """Return what twice the pictures would bring, a sentence or two."""
    now, num = forecast.accuracy[-1], forecast.num_pictures[-1]
    interval = Interval(forecast.expected, forecast.low, forecast.high)
    whole = (
        f"With {2 * num:,} training pictures instead of {num:,}, a linear head is expected to be "
        f"right on {percent(forecast.expected)} (90 % interval {spread(interval)}) instead of "
        f"{percent(now)}."
    )
    if not forecast.classes:
        return (whole,)
    best = next((found for found in forecast.classes if found.low > 0), None)
    if best is None:
        return whole, "No class is shown to gain from more pictures: every interval reaches zero."
    single = (
        f"{pages.quoted(best.name)} would gain most: {points(best.gain)} points of recall (90 % "
        f"interval {points(best.low)} to {points(best.high)})."
    )
    return whole, single


# The text.


def _filled(text: str, indent: str = "", first: str | None = None) -> str:
    return textwrap.fill(
        printable(text),
        _COLUMNS,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,  # names are there to be copied
        break_on_hyphens=False,
    )


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield _filled(f"{_LABELS[finding.severity].upper()}: {finding.title}")
    for case in finding.cases[:_NUM_CASES_SAID]:
        yield from _case_lines(case)
    more = len(finding.cases) - _NUM_CASES_SAID
    if more > 0:
        yield f"  … and {more:,} more"
    reasons = {"Why": finding.why, "What to do": finding.remedy, "Training": finding.training}
    for name, words in reasons.items():
        if words:
            yield _filled(words, "    ", f"  {name}: ")


def _case_lines(case: Case) -> Iterator[str]:
    """Yield a case: in one line if it fits, else a line per picture and the words below."""
    said = [_exhibit_words(picture) for picture in case.pictures[:_NUM_PICTURES_SAID]]
    if len(case.pictures) > len(said):
        said.append(f"and {len(case.pictures) - len(said):,} more")
    looks = f"looks like {printable(case.suggested)}" if case.suggested is not None else ""
    remarks = "; ".join(words for words in (looks, printable(case.words)) if words)
    line = ": ".join(words for words in (", ".join(said), remarks) if words)
    if len(line) + 4 <= _COLUMNS:
        yield f"  - {line}"
        return
    for number, words in enumerate(said):
        yield f"    {words}" if number else f"  - {words}"
    if remarks:
        yield _filled(remarks, "    ", None if said else "  - ")


def _exhibit_words(exhibit: Exhibit) -> str:
    facts = ", ".join(printable(fact) for fact in (exhibit.label, exhibit.split) if fact)
    return f"{printable(exhibit.name)} ({facts})" if facts else printable(exhibit.name)


def _counts_lines(health: Health) -> Iterator[str]:
    """Yield, per split, how many pictures there are, and of which classes most and fewest."""
    yield "Pictures:"
    for split, numbers in health.counts.items():
        ranked = sorted(zip(numbers, health.classes, strict=True), key=lambda c: -c[0])
        said = [f"{name} {num:,}" for num, name in ranked]
        if len(said) > _NUM_CLASSES_SAID:
            half = _NUM_CLASSES_SAID // 2
            said = [*said[:half], f"… {len(said) - 2 * half:,} more …", *said[-half:]]
        yield _filled(f"{split} {sum(numbers):,}: {', '.join(said)}", "    ", "  ")


# The page.


def _exhibits(case: Case) -> tuple[Exhibit, ...]:
    return case.pictures[:NUM_PICTURES_OF_CASE]


def _selection(health: Health) -> list[list[Case]]:
    """Return the cases that are shown, per finding."""
    chosen: list[list[Case]] = [[] for _ in health.findings]
    room = NUM_PICTURES
    for rank in range(NUM_CASES):
        for cases, finding in zip(chosen, health.findings, strict=True):
            following = finding.cases[rank : rank + 1]
            size = sum(len(_exhibits(case)) for case in following)
            if len(cases) == rank and size <= room:
                cases.extend(following)
                room -= size
    return chosen


def _sections(health: Health, thumbnails: Mapping[int, bytes]) -> list[_Section]:
    return [
        _Section(
            finding,
            heading=finding.kind.replace("-", " ").capitalize(),
            label=_LABELS[finding.severity],
            remarks=tuple(case for case in cases if not case.pictures),
            cases=tuple(case for case in cases if case.pictures),
            num_more=len(finding.cases) - len(cases),
            pictured=any(e.index in thumbnails for case in cases for e in _exhibits(case)),
        )
        for finding, cases in zip(health.findings, _selection(health), strict=True)
    ]


def _counts(health: Health) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return per class, the largest first, its name and per split its pictures and its bar.

    A bar is the share of the split, as a part of the largest share in any split: equal bars are
    equal shares, however many pictures a split has.
    """
    shares = [[num / max(1, sum(numbers)) for num in numbers] for numbers in health.counts.values()]
    most = max((share for split in shares for share in split), default=0.0) or 1.0
    rows = [
        (name, [(num, share / most) for num, share in zip(numbers, of_class, strict=True)])
        for name, numbers, of_class in zip(
            health.classes,
            zip(*health.counts.values(), strict=True),
            zip(*shares, strict=True),
            strict=True,
        )
    ]
    return sorted(rows, key=lambda row: -sum(num for num, _ in row[1]))


def _gains(forecast: Forecast) -> list[tuple[ClassForecast, tuple[float, float, float, float]]]:
    """Return every class and where low, gain, high and zero stand on one scale from 0 to 1."""
    start = min([0.0, *(c.low for c in forecast.classes)])
    length = max([0.0, *(c.high for c in forecast.classes)]) - start or 1.0
    return [
        (
            c,
            (
                (c.low - start) / length,
                (c.gain - start) / length,
                (c.high - start) / length,
                -start / length,
            ),
        )
        for c in forecast.classes
    ]


def _chart(forecast: Forecast) -> str:
    return pages.drawing(
        "forecast",
        "accuracy over the number of training pictures. " + " ".join(_forecast_words(forecast)),
        functools.partial(_draw_forecast, forecast),
    )


def _draw_forecast(forecast: Forecast, axes: "Axes") -> None:
    """Draw the curve with its spread, and its continuation to twice the pictures."""
    x, last = list(forecast.num_pictures), forecast.num_pictures[-1]
    y = [100 * value for value in forecast.accuracy]
    spreads = [100 * value for value in forecast.deviation]
    ends = [100 * forecast.low, 100 * forecast.high]
    low = [value - spread for value, spread in zip(y, spreads, strict=True)]
    high = [value + spread for value, spread in zip(y, spreads, strict=True)]
    onward = [last, 2 * last]
    axes.set_xscale("log", base=2)
    axes.fill_between(x, low, high, color=pages.ACCENT, alpha=0.18, linewidth=0)
    axes.fill_between(
        onward, [low[-1], ends[0]], [high[-1], ends[1]], color=pages.TRAIN, alpha=0.25, linewidth=0
    )
    axes.plot(x, y, color=pages.ACCENT, linewidth=1.8, marker="o", markersize=4)
    axes.plot(
        onward, [y[-1], 100 * forecast.expected], color=pages.TRAIN, linewidth=1.8, dashes=(3, 2)
    )
    axes.plot([2 * last] * 2, ends, color=pages.TRAIN, linewidth=1.8)
    axes.plot([2 * last], [100 * forecast.expected], color=pages.TRAIN, marker="o", markersize=5)
    ticks = _apart([*x, 2 * last])
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training pictures")


def _apart(numbers: list[int]) -> list[int]:
    """Return those of rising numbers whose labels do not touch on a logarithmic axis."""
    span = math.log(numbers[-1] / numbers[0])
    kept: list[int] = []
    for number in reversed(numbers):
        if not kept or math.log(kept[-1] / number) >= 0.12 * span:
            kept.append(number)
    return kept[::-1]
