"""What the pages share: charts, words, pictures, colours; and the helpers that look at a page."""

import io
import math
import re
import shutil
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kenspeckle import pages
from kenspeckle.core import Interval, InvalidValueError, MissingExtraError

# Most are of the kind that the Big List of Naughty Strings collects.
NAUGHTY = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "{{ 7 * 7 }}{% raw %}",
    "a&amp;b & c &#60;",
    "]]></style></svg>--><!--",
    "javascript:alert(1)",
    "Ω≈ç√ 田中さん 👩‍👩‍👧‍👧",
    "בְּרֵאשִׁית ﷽ الصفحات",
    "x" * 200,
    "%s%n $(rm) `ls` ../../etc/passwd",
)
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
VOID = {"meta", "link", "img", "br", "wbr"}
TEMPLATES = Path(pages.__file__).with_name("templates")


def thumbnail(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(48, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page, and checks that its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]

    def words(self) -> str:
        """Return all text, any white space as one space."""
        return " ".join(" ".join(self.text).split())


def assert_self_contained(text: str) -> None:
    """Raise unless a page runs nothing and loads nothing, and its own policy forbids both."""
    page = Page(text)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}:
            assert value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", text)
    policy = next(v for t, n, v in page.attributes if t == "meta" and v.startswith("default-src"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def browse(folder: Path, texts: Mapping[str, str], widths: tuple[int, ...] = (360, 1400)) -> None:
    """Raise unless every page opens in a browser without complaint, request or overflow."""
    browsers: Any = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    complaints: list[str] = []
    switches = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=switches)
        for name, text in texts.items():
            path = folder / f"{name}.html"
            path.write_text(text, encoding="utf-8")
            for width in widths:
                for scheme in ("light", "dark"):
                    page = browser.new_page(
                        viewport={"width": width, "height": 900}, color_scheme=scheme
                    )
                    page.on("console", lambda message: complaints.append(message.text))
                    page.on("pageerror", lambda error: complaints.append(str(error)))
                    page.on("request", lambda request: complaints.append(request.url[:80]))
                    page.goto(path.as_uri())
                    assert page.evaluate("document.documentElement.scrollWidth") == width
                    # A table may be wider than the page, but then its own frame scrolls.
                    escaped = page.evaluate(
                        "[...document.querySelectorAll('body *')].filter(e =>"
                        " !e.closest('.scroll *')"
                        " && e.getBoundingClientRect().right > innerWidth + 1).length"
                    )
                    assert escaped == 0
                    loaded = page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
                    assert loaded
                    cut = page.evaluate(
                        "[...document.querySelectorAll('.frame img')].filter(i =>"
                        " i.offsetHeight > i.parentElement.clientHeight + 1"
                        " || i.offsetWidth > i.parentElement.clientWidth + 1).length"
                    )
                    assert cut == 0  # a tall picture is shown whole
                    page.close()
        browser.close()
    own = [text for text in complaints if not text.startswith(("file:", "data:"))]
    assert own == []
    opened = [text for text in complaints if text.startswith("file:")]
    assert len(opened) == len(texts) * len(widths) * 2  # the pages, and no file beside them


def fall(axes: Any) -> None:
    axes.plot([1, 2], [3, 1], color=pages.ACCENT)
    axes.set_xlabel("epoch")


def test_a_chart_is_an_element_whose_identifiers_are_its_own():
    svg = pages.drawing("loss", 'falls & "rests"', fall)
    assert svg.startswith('<svg role="img" aria-label="falls &amp; &quot;rests&quot;"')
    page = Page(svg)
    assert page.values("id")
    assert all(name.startswith("loss-") for name in page.values("id"))
    used = {*re.findall(r"url\(#([^)]+)\)", svg), *(v[1:] for v in page.values("xlink:href"))}
    assert used <= set(page.values("id"))
    assert "style" not in page.tags
    assert not {"width", "height"} & {n for t, n, _ in page.attributes if t == "svg"}


def test_a_chart_takes_the_colours_of_the_page_and_leaves_the_users_style_alone():
    mpl: Any = pytest.importorskip("matplotlib")
    first = pages.drawing("a", "", fall)
    assert "var(--accent)" in first
    assert "var(--muted)" in first
    assert "#00a00" not in first
    with mpl.rc_context({"axes.grid": False, "axes.labelsize": 30, "svg.fonttype": "path"}):
        assert pages.drawing("a", "", fall) == first
        assert mpl.rcParams["axes.labelsize"] == 30


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("jinja2", lambda: pages.render("check.html")),
        ("matplotlib", lambda: pages.drawing("a", "", lambda axes: None)),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, make, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="an HTML page needs the extra 'train'"):
        make()


def test_a_picture_is_known_by_its_content():
    assert pages.data_uri(b"\xff\xd8\xff\xe0") == "data:image/jpeg;base64,/9j/4A=="
    assert pages.data_uri(thumbnail(0)).startswith("data:image/png;base64,iVBORw0KGgo")
    with pytest.raises(InvalidValueError, match=r"must be a PNG or JPEG file; got b'GIF89a'"):
        pages.data_uri(b"GIF89a")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (pages.percent(0), "0.0 %"),
        (pages.percent(1), "100.0 %"),
        (pages.percent(0.99951), ">99.9 %"),
        (pages.percent(0.00049), "<0.1 %"),
        (pages.percent(math.nan), DASH),
        (pages.points(-0.0123), f"{MINUS}1.2"),
        (pages.points(-0.0004), "0.0"),
        (pages.points(math.nan), DASH),
        (pages.spread(Interval(0.5, 0.25, 0.75)), "25.0 to 75.0 %"),
        (pages.spread(Interval(math.nan, math.nan, math.nan)), ""),
        (pages.number(math.nan), DASH),
        (pages.count(1_000_000), "1,000,000"),
        (pages.count(0, "picture"), "0 pictures"),
        (pages.duration(59.94), "59.9 s"),
        (pages.duration(3600), "1 h 0 min"),
        (pages.duration(math.nan), DASH),
        (pages.moment("yesterday"), "yesterday"),
        (pages.moment("2026-01-02T03:04:05"), "2 January 2026, 03:04"),
        (pages.setting(None), DASH),
        (pages.setting((0.5, True, "a")), "0.5, yes, a"),
        (pages.setting(()), "none"),
        (pages.quoted("x" * 61), f"'{'x' * 59}…'"),
        (pages.quoted("a\u202eb"), r"'a\u202eb'"),
        (pages.listed(["a"]), "'a'"),
        (pages.shown("\x1b[31m\udc80"), r"\x1b[31m\udc80"),
    ],
)
def test_values_in_words(words, expected):
    assert words == expected


def colours(css: str, scheme: str) -> dict[str, str]:
    """Return the custom colours of a style sheet as `scheme` sees them."""
    blocks = re.findall(
        r"(?:@media (?:\(prefers-color-scheme: (\w+)\)|(print)) \{\s*)?:root \{(.*?)\}",
        css,
        re.DOTALL,
    )
    found: dict[str, str] = {}
    for dark, printed, body in blocks:
        if (dark or printed or "light") in {"light", scheme}:
            found |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", body))
    return found


def luminance(colour: str) -> float:
    """Return the relative luminance by WCAG 2.2 of a colour such as ``#fff`` or ``#0b6e69``."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    levels = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_stands_out_from_the_paper_by_4_5_to_1(scheme):
    sheets = [(TEMPLATES / name).read_text() for name in ("style.css", "check.css")]
    found = colours("\n".join(sheets), scheme)
    for ground in ("paper", "wash"):
        for text in ("ink", "muted", "accent", "caution", "error", "note"):
            light, dark = sorted((luminance(found[text]), luminance(found[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_the_measure_of_contrast_is_that_of_the_guideline():
    assert luminance("#fff") == pytest.approx(1)
    assert luminance("#777777") == pytest.approx(0.1845, abs=1e-4)
    assert colours(":root { --a: #fff; }\n@media print { :root { --a: #000; } }", "dark") == {
        "a": "#fff"
    }
