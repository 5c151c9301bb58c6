"""The report: what it says in words, what stands in the page, and how it behaves in a browser."""

import dataclasses
import math
import re
import sys
from typing import Any

import numpy as np
import pytest

from kenspeckle import reports
from kenspeckle.core import MissingExtraError
from kenspeckle.evaluation import evaluate, worst_mistakes
from kenspeckle.results import (
    ClassCounts,
    DataSummary,
    Epoch,
    ModelSummary,
    Report,
    TrainingSummary,
)
from tests.test_pages import NAUGHTY, Page, assert_self_contained, browse, thumbnail

TEN = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SECTIONS = ("measures", "data", "training", "classes", "confusions", "mistakes", "model", "making")
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def make_report(classes: tuple[str, ...] = TEN, num_items: int = 400, seed: int = 0) -> Report:
    """Return the report of a network that is right about four times in five."""
    generator = np.random.default_rng(seed)
    num_classes = len(classes)
    labels = np.arange(num_items) % num_classes
    probabilities = generator.dirichlet(np.ones(num_classes), size=num_items)
    wrong = np.arange(num_items) % 5 == 4
    answers = np.where(wrong, generator.integers(num_classes, size=num_items), labels)
    probabilities[np.arange(num_items), answers] += 1
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    names = tuple(f"{classes[label]}/{index:04d}.jpg" for index, label in enumerate(labels))
    mistakes = worst_mistakes(probabilities, labels, names, num=6)
    scores = evaluate(probabilities, labels, classes, seed)
    history = tuple(
        Epoch(number, 2 / number, 0.01, 0.3 + 2 / number, 0.8 - 0.5 / number, None, 1.5)
        for number in range(1, 9)
    )
    return Report(
        title="model.ken",
        created="2026-11-24T04:17:09+00:00",
        data=DataSummary(
            "pictures",
            "/data/<pictures>",
            tuple(ClassCounts(name, 1234, 56, num_items // num_classes) for name in classes),
            notices=("1 hidden file was ignored: <.DS_Store>.",),
        ),
        model=ModelSummary("resnet", 1_070_794, (32, 48), 1.25, 4_300_000, 0.831),
        training=TrainingSummary(83.4, history, 7, "All 8 epochs are done."),
        validation=scores,
        test=scores,
        mistakes=tuple(
            dataclasses.replace(mistake, picture=thumbnail(mistake.index)) for mistake in mistakes
        ),
        recipe={"name": "small-cnn", "optimizer": {"name": "sgd", "lr": 0.01, "betas": None}},
        provenance={"seed": 0, "versions": {"torch": "2.13.0"}},
        command="ken train '/data/<pictures>' --out model.ken",
        next_commands=("ken predict model.ken PICTURES",),
    )


def answering(confusion: list[list[int]], report: Report, classes: tuple[str, ...]) -> Report:
    """Return the report with test scores that have the given confusion matrix."""
    cells = [(i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) for _ in range(n)]
    labels, predicted = np.array(cells).T
    scores = evaluate(np.eye(len(classes))[predicted], labels, classes)
    return dataclasses.replace(report, test=scores, mistakes=())


@pytest.fixture(scope="module")
def report():
    return make_report()


@pytest.fixture(scope="module")
def page(report):
    return Page(reports.render(report))


def test_the_page_is_whole_and_has_its_sections_once(page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert set(SECTIONS) < set(ids)
    for target in page.values("href"):
        assert target == "data:," or target[1:] in ids
    assert page.tags.count("h1") == 1
    assert page.tags.count("svg") == 2


def test_nothing_is_loaded_from_elsewhere(report):
    assert_self_contained(reports.render(report))


def test_references_within_the_charts_are_to_their_own_identifiers(report, page):
    used = re.findall(r"url\(#([^)]+)\)", reports.render(report))
    used += [value[1:] for name in ("xlink:href", "href") for value in page.values(name)]
    assert set(used) - {""} <= {*page.values("id"), "ata:,"}
    assert any(name.startswith("loss-") for name in used)
    assert any(name.startswith("accuracy-") for name in used)


def test_the_page_shows_the_values_of_the_report(report, page):
    text = " ".join(" ".join(page.text).split())
    scores = report.test
    verdict = reports.verdict(report)
    assert verdict.headline.replace("\u00a0", " ") in text.replace("\u00a0", " ")
    for shown in (
        "1,234",
        "1,070,794",
        f"32 {TIMES} 48",
        "4.3 MB",
        "0.831 ms",
        "1.250",
        "24 November 2026",
    ):
        assert shown in text, shown
    for share in (
        scores.accuracy,
        scores.balanced_accuracy,
        scores.f1.macro,
        scores.recall.weighted,
    ):
        assert f"{100 * share.value:.1f} %" in text
        assert f"{100 * share.low:.1f} to {100 * share.high:.1f} %" in text
    assert f"{scores.log_loss.value:.3f}" in text
    for one in scores.per_class:
        assert f"{100 * one.precision.low:.1f} to {100 * one.precision.high:.1f} %" in text
    for mistake in report.mistakes:
        assert mistake.name.split("/")[-1] in text
        assert f"{100 * mistake.probability:.1f} %" in text
    assert report.command in text
    assert report.next_commands[0] in text
    assert report.data.notices[0] in text
    assert sum(value.startswith("data:image/png;base64,") for value in page.values("src")) == 6


def test_the_matrix_shows_every_count(report):
    text = reports.render(report)
    table = text[text.index('class="matrix"') :]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table[: table.index("</table>")])
    shown = [0 if cell == "·" else int(cell.replace(",", "")) for cell in cells]
    assert shown == [cell for row in report.test.confusion for cell in row]


def test_the_same_report_gives_the_same_page_whatever_the_users_plot_style(report):
    mpl: Any = pytest.importorskip("matplotlib")
    first = reports.render(report)
    with mpl.rc_context({"axes.grid": False, "axes.labelsize": 30, "svg.fonttype": "path"}):
        assert reports.render(report) == first
        assert mpl.rcParams["axes.labelsize"] == 30


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(package, report, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="an HTML page needs the extra 'train'"):
        reports.render(report)


def test_names_of_any_kind_are_shown_and_never_obeyed():
    page = Page(reports.render(make_report(NAUGHTY)))
    assert not {"script", "iframe"} & set(page.tags)
    assert page.tags.count("img") == len([v for v in page.values("src") if v.startswith("data:")])
    shown = [text.strip() for text in page.text]
    for name in NAUGHTY:
        # The tables of data and classes, both headings of the matrix.
        assert shown.count(name) >= 4, name
        assert name in page.values("title")


def test_what_no_page_can_hold_is_spelled_out():
    names = (
        "a\nb\tc\x00\x1b[31m",
        "lone \udc80 surrogate",
        "turned \u202egnp.exe",
        "plain\u00a0space",
    )
    text = reports.render(make_report(names))
    assert text.encode("utf-8").decode("utf-8") == text
    shown = [part.strip("\n") for part in Page(text).text]
    for expected in (
        r"a\nb\tc\x00\x1b[31m",
        r"lone \udc80 surrogate",
        r"turned \u202egnp.exe",
        "plain\u00a0space",
    ):
        assert expected in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e]", reports.summary(make_report(names)))


def test_many_classes_give_a_list_of_confusions_and_no_matrix():
    few, many = make_report(TEN), make_report(tuple(f"kind {i}" for i in range(26)))
    assert 'class="matrix"' in reports.render(few)
    text = reports.render(many)
    assert 'class="matrix"' not in text
    table = text[text.index('aria-label="Most frequent confusions"') :]
    assert table[: table.index("</table>")].count("<tr>") == 1 + 20


def test_a_thousand_classes_and_24_of_the_largest_pictures_stay_below_5_mb():
    report = make_report(tuple(f"a rather long class name {i}" for i in range(1000)), 2000)
    picture = b"\x89PNG\r\n\x1a\n" + bytes(99_000)
    mistakes = tuple(dataclasses.replace(report.mistakes[0], picture=picture) for _ in range(24))
    text = reports.render(dataclasses.replace(report, mistakes=mistakes))
    assert len(text.encode()) < 5e6


def test_undefined_numbers_are_dashes():
    classes = ("a", "b", "c")
    report = answering([[9, 1, 0], [2, 8, 0], [0, 0, 0]], make_report(classes), classes)
    rows = reports.render(report).split("<tr>")
    (absent,) = [
        row for row in rows if "<bdi>c</bdi>" in row and "whisker" not in row and DASH in row
    ]
    assert absent.count(DASH) == 3  # recall, precision, F1
    assert "nan" not in absent


def test_all_right_and_curves_that_are_not_finite_are_drawn():
    classes = ("a", "b")
    report = answering([[5, 0], [0, 5]], make_report(classes), classes)
    diverged = (
        Epoch(1, math.inf, 0.1, math.nan, 0.5, 0.5, 1.0),
        Epoch(2, math.nan, 0.1, math.nan, 0.5, 0.5, 1.0),
    )
    training = dataclasses.replace(report.training, history=diverged, best_epoch=1)
    text = reports.render(dataclasses.replace(report, training=training))
    assert "No test picture was taken for another class." in text
    assert "None: every test picture was right." in text


def test_without_epochs_there_are_no_charts(report):
    training = dataclasses.replace(report.training, history=(), best_epoch=0)
    assert "<svg" not in reports.render(dataclasses.replace(report, training=training))


def test_the_verdict_in_words():
    classes = ("rose", "tulip")
    report = answering([[90, 10], [20, 80]], make_report(classes), classes)
    words = reports.verdict(report)
    assert words.headline == (
        "Right on 85.0 % of 200 test pictures it had never seen (95 % interval 79.4 to 89.3 %)."
    )
    assert words.baseline == "Always saying 'rose' would be right on 50.0 %."
    assert words.cautions == ()
    assert reports.summary(report).splitlines() == [
        words.headline,
        words.baseline,
        "Most often mistaken: 'tulip' as 'rose' (20 times), 'rose' as 'tulip' (10 times).",
    ]


def cautions(report: Report) -> str:
    return "\n".join(reports.verdict(report).cautions)


def test_it_warns_that_validation_alone_is_optimistic(report):
    alone = dataclasses.replace(report, test=None)
    assert "There is no test split." in cautions(alone)
    assert "no test split" not in cautions(report)
    verdict = reports.verdict(alone)
    assert "validation pictures (95" in verdict.headline
    assert "never seen" not in verdict.headline
    assert '<th class="num">test</th><th class="num">95' not in reports.render(alone)


def test_it_warns_of_few_pictures():
    classes = ("rose", "tulip")
    base = make_report(classes)
    few = cautions(answering([[18, 2], [4, 16]], base, classes))
    assert "points wide, since there are only 40 test pictures" in few
    assert "points wide" not in cautions(answering([[180, 20], [40, 160]], base, classes))


def test_it_warns_when_the_baseline_is_not_beaten():
    classes = ("rose", "tulip")
    base = make_report(classes)
    text = cautions(answering([[900, 0], [95, 5]], base, classes))
    assert "not shown to be better than always saying 'rose', which reaches 90.0 %" in text
    assert "not shown" not in cautions(answering([[890, 10], [30, 70]], base, classes))


def test_it_warns_of_classes_never_answered_absent_or_rare():
    classes = ("rose", "tulip", "daisy", "violet")
    rows = [[90, 0, 0, 0], [20, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 3]]
    text = cautions(answering(rows, make_report(classes), classes))
    assert "Never answered, although there are pictures of them: 'tulip'." in text
    assert "nothing is known of: 'daisy'." in text
    assert (
        "Fewer than 10 test pictures each, so that their own figures say little: 'violet'." in text
    )


def test_it_lists_five_classes_and_counts_the_rest():
    classes = tuple("abcdefgh")
    rows = [[1 if i == j else 0 for j in range(8)] for i in range(8)]
    text = cautions(answering(rows, make_report(classes), classes))
    assert "'a', 'b', 'c', 'd', 'e' and 3 more" in text


def test_it_warns_of_learning_by_heart(report):
    assert "by heart" not in cautions(report)
    history = tuple(dataclasses.replace(e, train_accuracy=0.99) for e in report.training.history)
    training = dataclasses.replace(report.training, history=history)
    text = cautions(dataclasses.replace(report, training=training))
    assert "Right on 99.0 % of the training pictures, but on 72.9 % of the validation" in text


def test_it_says_when_training_could_go_on(report):
    training = dataclasses.replace(report.training, best_epoch=8)
    assert "training longer may do better" in cautions(
        dataclasses.replace(report, training=training)
    )
    assert "training longer" not in cautions(report)


def test_it_warns_of_probabilities_that_mislead():
    classes = ("rose", "tulip")
    text = cautions(answering([[800, 100], [100, 800]], make_report(classes), classes))
    assert "probabilities are 11.1 points off" in text


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0.0 %"), (1, "100.0 %"), (0.9999, ">99.9 %"), (0.0001, "<0.1 %"), (math.nan, DASH)],
)
def test_a_percentage_is_0_or_100_only_when_the_share_is(share, words, report):
    scores = dataclasses.replace(report.test, majority_accuracy=share)
    assert reports.verdict(dataclasses.replace(report, test=scores)).baseline.endswith(f"{words}.")


@pytest.mark.slow
def test_in_a_browser_nothing_fails_is_requested_or_overflows(tmp_path):
    sets = {"ten": TEN, "naughty": NAUGHTY, "many": tuple(map(str, range(60)))}
    browse(tmp_path, {name: reports.render(make_report(sets[name])) for name in sets})
