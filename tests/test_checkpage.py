"""The page of a check: what it says, what stands in it, and how it behaves in a browser."""

import dataclasses
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kenspeckle import checkpage, pages
from kenspeckle.core import InvalidValueError
from kenspeckle.findings import Case, Check, Exhibit, Finding, Health
from kenspeckle.forecast import ClassForecast
from tests.healths import FLOWERS, WHY, exhibit, finding, make_findings, make_forecast, make_health
from tests.test_pages import MINUS, NAUGHTY, Page, assert_self_contained, browse, thumbnail


def smooth(seed: int) -> bytes:
    """Return a picture of its own shape and colours."""
    pixels = np.random.default_rng(seed).integers(256, size=(3, 3, 3), dtype=np.uint8)
    size = (96, 128) if seed % 3 else (128, 80)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


def make_thumbnails(health: Health) -> dict[int, bytes]:
    return {index: smooth(index) for index in checkpage.wanted(health)}


@pytest.fixture(scope="module")
def health():
    return make_health()


@pytest.fixture(scope="module")
def thumbnails(health):
    return make_thumbnails(health)


@pytest.fixture(scope="module")
def text(health, thumbnails):
    return checkpage.render(health, thumbnails)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def with_findings(*findings: Finding, **changes: Any) -> Health:
    return make_health(findings=findings, **changes)


def singles(num: int, start: int = 0) -> list[Case]:
    return [Case((exhibit(start + i, FLOWERS),)) for i in range(num)]


def section(text: str, number: int) -> str:
    """Return the HTML of the finding with a number, from 1."""
    start = text.index(f'<section id="finding-{number}"')
    return text[start : text.index("</section>", start)]


# What is shown.


def test_a_page_wants_the_pictures_of_the_first_cases():
    health = with_findings(finding("outliers", "note", "Odd.", *singles(30, start=100)))
    assert checkpage.wanted(health) == tuple(range(100, 100 + checkpage.NUM_CASES))


def test_a_page_wants_the_first_pictures_of_a_case_and_each_once():
    many = Case(tuple(exhibit(i, FLOWERS) for i in reversed(range(20))))
    again = Case((exhibit(15, FLOWERS), Exhibit(None, "broken.jpg")))
    health = with_findings(finding("copies", "note", "Copies.", many, again))
    assert checkpage.wanted(health) == tuple(range(20 - checkpage.NUM_PICTURES_OF_CASE, 20))


def test_where_there_is_not_room_for_all_every_finding_is_short_of_it_alike():
    findings = [finding(f"kind-{k}", "note", "T.", *singles(30, start=1000 * k)) for k in range(40)]
    wanted = checkpage.wanted(with_findings(*findings))
    assert len(wanted) == checkpage.NUM_PICTURES
    of_finding = np.bincount(np.array(wanted) // 1000, minlength=40)
    assert of_finding.tolist() == [10] * 40


def test_a_page_of_400_pictures_stays_below_5_mb():
    full = [Case(tuple(exhibit(8 * i + j, FLOWERS) for j in range(8))) for i in range(60)]
    findings = [finding(f"kind-{k}", "warning", "T.", *full[20 * k :]) for k in range(3)]
    health = with_findings(*findings)
    picture = b"\xff\xd8\xff" + bytes(9_000)
    text = checkpage.render(health, dict.fromkeys(range(500), picture))
    assert text.count("<img ") == checkpage.NUM_PICTURES
    assert len(text.encode()) < 5e6


def test_cases_that_are_not_shown_are_counted(text):
    assert "And 6 more in check.json." in section(text, 5)  # 30 suspects
    assert "and 2 more in check.json" in section(text, 6)  # a case of 10 pictures
    assert "more in check.json" not in section(text, 3)


# The page.


def test_the_page_is_whole_and_has_its_sections_once(page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {"verdict", "finding-1", "finding-11", "classes", "shape", "forecast", "checks"} < {*ids}
    for target in page.values("href"):
        assert target == "data:," or target[1:] in ids
    assert page.tags.count("svg") == 1


def test_headings_go_down_one_step_at_a_time(page):
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) == 1
    assert levels.count(2) == 11 + 4


def test_nothing_is_loaded_from_elsewhere(text):
    assert_self_contained(text)


def test_every_wanted_picture_is_there_with_its_name(health, thumbnails, page):
    sources = {value for tag, name, value in page.attributes if (tag, name) == ("img", "src")}
    assert sources == {pages.data_uri(picture) for picture in thumbnails.values()}
    names = {value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")}
    cases = [case for found in health.findings for case in found.cases[:24]]
    drawn = [e for case in cases for e in case.pictures[:8] if e.index is not None]
    assert names == {e.name for e in drawn}
    assert page.tags.count("img") == len(drawn)


def test_the_pictures_of_a_case_stand_side_by_side_with_class_and_split(health, thumbnails, text):
    found = section(text, 4)  # leaks
    (first, second), label = health.findings[3].cases[0].pictures, FLOWERS[0]
    figure = found[found.index('<figure class="case many" style="--n:2">') :]
    figure = figure[: figure.index("distance 2 of 64")]
    assert figure.index(pages.data_uri(thumbnails[first.index])) < figure.index(
        pages.data_uri(thumbnails[second.index])
    )
    words = Page(f"{figure}</bdi></figcaption></figure>").words()
    assert words.startswith(f"{label} · train {label}/")
    assert f"{label} · test {label}/" in words


def test_a_suspect_says_what_it_is_labelled_and_what_it_looks_like(text):
    words = Page(section(text, 5) + "</section>").words()
    assert words.count("labelled") == words.count("looks like") == 24
    assert "labelled daisy looks like rose train daisy/" in words


def test_a_picture_without_thumbnail_is_an_empty_frame_with_its_name(health, thumbnails):
    missing = health.findings[8].cases[0].pictures[0]
    rest = {index: picture for index, picture in thumbnails.items() if index != missing.index}
    found = section(checkpage.render(health, rest), 9)
    assert found.count("<img ") == 8
    assert found.count("no picture") == 1
    words = Page(found + "</section>").words().replace("/ ", "/")
    assert f"no picture daisy · train {missing.name}" in words


def test_a_finding_without_any_thumbnail_is_a_table(health, text):
    found = section(text, 1)  # broken files
    assert "<figure" not in found
    words = Page(found + "</section>").words().replace("/ ", "/")
    for case in health.findings[0].cases:
        (broken,) = case.pictures
        assert f"{broken.name} truncated after 12,345 bytes {broken.label} train" in words


def test_cases_without_pictures_are_sentences(health, text):
    found = section(text, 7)  # class shares
    assert re.findall(r"<li><bdi>(.*?)</bdi>", found) == [c.words for c in health.findings[6].cases]
    assert "<figure" not in found


def test_every_finding_says_why_what_to_do_and_what_training_does(health, text):
    for number, found in enumerate(health.findings, start=1):
        words = Page(section(text, number) + "</section>").words()
        assert found.title in words
        assert f"Why it matters {found.why}" in words
        assert f"What to do {found.remedy}" in words
        assert f"What training does {found.training}" in words
    assert "stops training" in section(text, 1)
    assert "makes numbers doubtful" in section(text, 3)
    assert "worth knowing" in section(text, 11)


def test_the_verdict_links_to_every_finding_in_order(health, text):
    links = re.findall(r'<li class="is-(\w+)"><a href="#finding-(\d+)"><bdi>(.*?)</bdi>', text)
    assert [(grave, int(number)) for grave, number, _ in links] == [
        (found.severity, number) for number, found in enumerate(health.findings, start=1)
    ]


def test_facts_counts_checks_and_notices_are_there(health, page):
    words = page.words()
    for shown in (
        *(f"{name} {value}" for name, value in health.shape.items()),
        "daisy 629 125 102",
        "all 2,855 569 569",
        *health.notices,
        "24 November 2026",
        "wrong labels 30 suspects 1 min 23 s",
        "Not checked check why drift needs two splits",
    ):
        assert shown in words, shown


def bars(text: str) -> list[float]:
    table = text[text.index('class="wide shares"') :]
    table = table[: table.index("</table>")]
    return [float(width) for width in re.findall(r'<i style="width:([\d.]+)%">', table)]


def test_bars_are_shares_of_their_split():
    counts = {"train": (60, 40), "test": (2, 8)}
    text = checkpage.render(make_health(("a", "b"), counts=counts, findings=()), {})
    assert bars(text) == [75.0, 25.0, 50.0, 100.0]


def test_classes_without_pictures_have_no_bar_and_the_largest_stands_first():
    health = make_health(("a", "b", "c"), counts={"all": (0, 1, 9)}, findings=())
    text = checkpage.render(health, {})
    assert bars(text) == [100.0, 11.1]
    assert re.findall(r'<th scope="row"><bdi>(\w)</bdi></th><td class="num">\d', text)[:3] == [
        "c",
        "b",
        "a",
    ]
    empty = dataclasses.replace(health, classes=(), counts={"all": ()}, num_pictures=0)
    assert bars(checkpage.render(empty, {})) == []


def test_the_forecast_is_drawn_and_told(text, page):
    words = page.words().replace("\u00a0", " ")
    assert (
        "With 5,138 training pictures instead of 2,569, a linear head is expected to be right on "
        "91.0 % (90 % interval 90.1 to 91.9 %) instead of 89.3 %."
    ) in words
    assert "'daisy' would gain most: +4.1 points of recall" in words
    assert f"tulip 88.0 % {MINUS}1.2 {MINUS}3.2 to +1.3" in words
    svg = Page(text[text.index("<svg") : text.index("</svg>") + 6]).words()
    for tick in ("160", "321", "642", "1,284", "2,569", "5,138", "training pictures"):
        assert tick in svg


def test_whiskers_share_one_scale_with_its_zero():
    gains = (ClassForecast("a", 0.5, 0.1, 0.0, 0.3), ClassForecast("b", 0.5, 0.0, -0.1, 0.1))
    forecast = dataclasses.replace(make_forecast(), classes=gains)
    text = checkpage.render(make_health(findings=(), forecast=forecast), {})
    table = text[text.index('aria-label="Forecast per class"') :]
    assert re.findall(r'<(\w) style="left:([\d.]+)%', table) == [
        *(("s", "25.0"), ("i", "25.0"), ("b", "50.0")),
        *(("s", "25.0"), ("i", "0.0"), ("b", "25.0")),
    ]


def test_a_forecast_promises_no_gain_where_there_is_none():
    maybe = ClassForecast("a", 0.9, 0.01, -0.02, 0.04)
    forecast = dataclasses.replace(make_forecast(), classes=(maybe,))
    said = checkpage.summary(make_health(forecast=forecast))
    assert "would gain most" not in said
    assert "No class is shown to gain" in said
    none = dataclasses.replace(forecast, classes=())
    assert "Forecast per class" not in checkpage.render(make_health(forecast=none), {})


def test_labels_of_near_points_do_not_touch():
    numbers = (100, 105, 110, 400, 1600, 1610)
    forecast = dataclasses.replace(
        make_forecast(), num_pictures=numbers, accuracy=(0.5,) * 6, deviation=(0.0,) * 6
    )
    text = checkpage.render(make_health(findings=(), forecast=forecast), {})
    svg = Page(text[text.index("<svg") : text.index("</svg>") + 6]).text
    ticks = [part.strip() for part in svg if re.fullmatch(r"\s*[\d,]{3,}\s*", part)]
    assert ticks == ["110", "400", "1,610", "3,220"]


def test_without_forecast_there_is_no_chart():
    text = checkpage.render(make_health(forecast=None), {})
    assert "<svg" not in text
    assert 'href="#forecast"' not in text


def test_a_thumbnail_of_another_kind_is_refused(health):
    index = health.findings[8].cases[0].pictures[0].index
    with pytest.raises(InvalidValueError, match="must be a PNG or JPEG file"):
        checkpage.render(health, {index: b"GIF89a"})


# Names of any kind.


def naughty_health(names: tuple[str, ...] = (*NAUGHTY, "W" * 255)) -> Health:
    found = [
        dataclasses.replace(
            found,
            title=name,
            why=name,
            cases=tuple(dataclasses.replace(c, words=name, suggested=name) for c in found.cases),
        )
        for found, name in zip(make_findings(names), (names * 11)[:11], strict=True)
    ]
    checks = tuple(Check(name, name, 1.0, ran) for name in names for ran in (True, False))
    return make_health(
        names,
        name=names[0],
        location=names[-1],
        shape={name: name for name in names},
        notices=names,
        findings=tuple(found),
        checks=checks,
    )


def test_names_of_any_kind_are_shown_and_never_obeyed():
    health = naughty_health()
    text = checkpage.render(health, make_thumbnails(health))
    assert_self_contained(text)
    page = Page(text)
    assert page.tags.count("img") == len([v for v in page.values("src") if v.startswith("data:")])
    shown = [part.strip() for part in page.text]
    for name in NAUGHTY:
        # A title, a reason, a notice, a fact, a check that ran and one that did not, two tables.
        assert shown.count(name) >= 8, name
        assert name in page.values("title")


def test_what_no_page_can_hold_is_spelled_out():
    names = ("a\nb\tc\x00\x1b[31m", "lone \udc80 surrogate", "turned \u202egnp.exe")
    health = naughty_health(names)
    text = checkpage.render(health, make_thumbnails(health))
    assert text.encode("utf-8").decode("utf-8") == text
    for expected in (r"a\nb\tc\x00\x1b[31m", r"lone \udc80 surrogate", r"turned \u202egnp.exe"):
        assert expected in Page(text).words()
    for said in (text, checkpage.summary(health)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e\udc80]", said)


def test_the_end_of_a_long_path_is_shown():
    path = "folder/" * 30 + "the_file_itself.jpg"
    health = with_findings(finding("odd", "note", "Odd.", Case((Exhibit(0, path, "rose"),))))
    page = Page(checkpage.render(health, {0: thumbnail(0)}))
    assert path in page.values("title")
    assert path not in "".join(page.text)
    assert "…lder/folder/" in "".join(page.text)
    assert "the_file_itself.jpg" in page.text


@pytest.mark.slow
def test_in_a_browser_nothing_fails_is_requested_or_overflows(tmp_path):
    healths = {
        "all": make_health(),
        "naughty": naughty_health(),
        "many": make_health(tuple(f"kind {i}" for i in range(300))),
        "nothing": make_health(findings=(), forecast=None),
    }
    browse(
        tmp_path,
        {name: checkpage.render(h, make_thumbnails(h)) for name, h in healths.items()},
    )


# Words.


@pytest.mark.parametrize(
    ("severities", "expected"),
    [
        ("", "Nothing wrong was found."),
        ("e", "1 thing stops training."),
        ("w", "1 thing makes its numbers doubtful."),
        ("nn", "2 things are worth knowing."),
        (
            "eeewwwwnn",
            "3 things stop training, 4 make its numbers doubtful, 2 are worth knowing.",
        ),
        ("en", "1 thing stops training, 1 is worth knowing."),
    ],
)
def test_the_verdict_counts_what_was_found(severities, expected):
    words = {"e": "error", "w": "warning", "n": "note"}
    health = with_findings(*(finding("kind", words[s], "T.") for s in severities))
    assert checkpage.summary(health).splitlines()[0] == expected
    assert expected in Page(checkpage.render(health, {})).words()


def test_where_nothing_was_found_it_says_what_was_looked_for():
    health = make_health(findings=(), forecast=None)
    assert checkpage.summary(health) == (
        "Nothing wrong was found.\n"
        "3,670 pictures of 5 classes, looked at in 1 min 37 s. Looked for: broken files, exact "
        "duplicates,\nwrong labels. 1 check did not run.\n"
        "\n"
        "Pictures:\n"
        "  train 2,855: daisy 629, dandelion 600, rose 571, sunflower 542, tulip 513\n"
        "  validation 569: daisy 125, dandelion 120, rose 114, sunflower 108, tulip 102\n"
        "  test 569: tulip 125, sunflower 120, rose 114, dandelion 108, daisy 102\n"
        "\n"
        "Not checked:\n"
        "  drift: needs two splits\n"
    )


def block(text: str, title: str) -> list[str]:
    """Return the lines of the paragraph that begins with `title`."""
    (found,) = [part for part in text.split("\n\n") if part.startswith(title)]
    return found.splitlines()


def test_the_summary_names_the_first_cases_and_says_what_to_do(health):
    said = block(checkpage.summary(health), "MAKES NUMBERS DOUBTFUL: 30 labels")
    assert said[0] == "MAKES NUMBERS DOUBTFUL: 30 labels are probably wrong."
    assert said[1] == "  - daisy/657001241_n.jpg (daisy, train): looks like rose"
    assert said[5].startswith("  - tulip/")
    assert said[6:] == [
        "  … and 25 more",
        f"  Why: {WHY}",
        "  What to do: Do this.",
        "  Training: Training does that.",
    ]


def test_a_case_that_does_not_fit_a_line_has_a_line_per_picture():
    long = tuple(exhibit(i, FLOWERS) for i in range(6))
    health = with_findings(finding("copies", "note", "Copies.", Case(long, "the same")))
    assert block(checkpage.summary(health), "WORTH KNOWING")[1:7] == [
        f"  - {long[0].name} (daisy, train)",
        *(f"    {e.name} ({e.label}, train)" for e in long[1:4]),
        "    and 2 more",
        "    the same",
    ]


def test_many_classes_are_told_by_the_most_and_the_fewest():
    classes = tuple("abcdefghijkl")
    health = make_health(classes, counts={"all": tuple(range(1, 13))}, findings=(), forecast=None)
    assert block(checkpage.summary(health), "Pictures")[1:] == [
        "  all 78: l 12, k 11, j 10, i 9, … 4 more …, d 4, c 3, b 2, a 1"
    ]


def test_lines_are_at_most_100_columns_wide(health):
    lines = checkpage.summary(health).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(len(line) > 90 for line in lines) > 5  # and the width is used
