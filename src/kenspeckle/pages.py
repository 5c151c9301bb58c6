"""What every HTML page shares: the template engine, words for numbers, charts, inlined pictures.

A page needs nothing outside itself: styles, charts and pictures are inside, there is no script,
and its own policy forbids every request. Text that came from the user (class names, file names,
paths) is escaped by the template engine, and characters that cannot be shown are spelled out.
"""

import base64
import datetime as dt
import html
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from kenspeckle.core import Interval, InvalidValueError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "ACCENT",
    "MUTED",
    "RULE",
    "TRAIN",
    "count",
    "data_uri",
    "drawing",
    "duration",
    "listed",
    "moment",
    "number",
    "percent",
    "points",
    "quoted",
    "render",
    "setting",
    "shown",
    "spread",
]

_FEATURE = "an HTML page"
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # of writing direction
_DASH = "\N{EN DASH}"  # stands for what is undefined

# Drawn in these, then replaced: one drawing serves the light and the dark colours of the page.
_CHART_COLOURS = {
    "#00a001": "var(--train)",
    "#00a002": "var(--accent)",
    "#00a003": "var(--rule)",
    "#00a004": "var(--muted)",
}
TRAIN, ACCENT, RULE, MUTED = _CHART_COLOURS


def render(template: str, **values: object) -> str:
    """Return a page as one HTML file that opens from disk, without scripts or requests.

    Args:
        template: file name in the folder ``templates`` of this package.
        values: by the names that the template knows them by.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtraError(_FEATURE, "train") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kenspeckle"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (count, data_uri, duration, moment, number, percent, points, setting, spread)
    environment.filters |= {function.__name__: function for function in words}
    return environment.get_template(template).render(values)


def drawing(name: str, description: str, draw: Callable[["Axes"], None]) -> str:
    """Return a chart as one SVG element that can stand beside others in one page.

    Args:
        name: begins the identifiers inside; unique within the page.
        description: what is to be seen, for those who cannot see it.
        draw: draws into the axes, in the colours of this module.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise MissingExtraError(_FEATURE, "train") from error
    with mpl.rc_context():
        mpl.rcdefaults()  # the user's own style is for the user's own plots
        mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}
        axes = (figure := Figure(figsize=(4.8, 2.7), layout="constrained")).add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        draw(axes)
        axes.xaxis.label.set_color(MUTED)
        axes.tick_params(colors=MUTED, length=0, pad=6)
        stream = StringIO()
        nameless = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nameless)
    return _inline(stream.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<style.*?</style>", "", element, flags=re.DOTALL)  # it styles the whole page
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element)
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)
    for colour, variable in _CHART_COLOURS.items():
        element = element.replace(colour, variable)
    label = html.escape(description)
    return element.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def data_uri(picture: bytes) -> str:
    """Return a PNG or JPEG file as an address that holds it.

    Raises:
        InvalidValueError: it is neither.
    """
    kind = next((kind for start, kind in _SIGNATURES.items() if picture.startswith(start)), None)
    if kind is None:
        raise InvalidValueError(
            f"a picture of a page must be a PNG or JPEG file; got {picture[:12]!r}…"
        )
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def shown(value: object) -> object:
    r"""Return text with what no page can hold, or what turns text around, spelled out.

    Example:
        >>> shown("two\nlines")
        'two\\nlines'
    """
    if type(value) is not str:  # markup is ours
        return value
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in {"Cc", "Cs"} or unicodedata.bidirectional(char) in _TURNS
        else char
        for char in value
    )


def quoted(name: str) -> str:
    """Return a name in quotes, cut after 60 characters.

    Example:
        >>> quoted("rose")
        "'rose'"
    """
    return f"'{shown(name if len(name) <= 60 else name[:59] + '…')}'"


def listed(names: Sequence[str]) -> str:
    """Return the first five names in quotes, and how many more there are.

    Example:
        >>> listed("abcdefg")
        "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    more = len(names) - 5
    return ", ".join(map(quoted, names[:5])) + (f" and {more:,} more" if more > 0 else "")


def percent(share: float) -> str:
    """Return a share as a percentage that is 0 or 100 only when the share is.

    Example:
        >>> percent(0.5), percent(0.9999)
        ('50.0 %', '>99.9 %')
    """
    if math.isnan(share):
        return _DASH
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{100 * share:.1f} %"


def points(change: float) -> str:
    """Return a change of a share in percentage points, with its sign.

    Example:
        >>> points(0.031), points(0.0)
        ('+3.1', '0.0')
    """
    if math.isnan(change):
        return _DASH
    rounded = round(100 * change, 1)
    return f"{rounded:+.1f}".replace("-", "\N{MINUS SIGN}") if rounded else "0.0"


def spread(interval: Interval) -> str:
    """Return the ends of the interval of a share, as percentages; nothing when undefined."""
    if math.isnan(interval.value):
        return ""
    return f"{percent(interval.low).removesuffix(' %')} to {percent(interval.high)}"


def number(value: float) -> str:
    """Return a number with three decimals."""
    return _DASH if math.isnan(value) else f"{value:.3f}"


def count(number: int, noun: str = "") -> str:
    """Return a count, with its noun in the right number.

    Example:
        >>> count(1, "class"), count(1200, "class")
        ('1 class', '1,200 classes')
    """
    if not noun:
        return f"{number:,}"
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds: float) -> str:
    """Return a time span in the units that suit it.

    Example:
        >>> duration(83.4)
        '1 min 23 s'
    """
    if math.isnan(seconds):
        return _DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(created: str) -> str:
    """Return an ISO 8601 date and time as people write it; any other text as it is.

    Example:
        >>> moment("2026-11-24T04:17:09+00:00")
        '24 November 2026, 04:17 UTC'
    """
    try:
        time = dt.datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".rstrip()


def setting(value: object) -> str:
    """Return a plain value in words.

    Example:
        >>> setting({"lr": 0.1, "nesterov": True})
        'lr 0.1, nesterov yes'
    """
    if value is None or value == "":
        return _DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(setting(entry) for entry in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {setting(entry)}" for key, entry in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
