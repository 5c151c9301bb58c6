"""The report: what it says in words, what stands in the page, and how it behaves in a browser."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kenspeckle import pages, planpage, reports
from kenspeckle.core import Interval, MissingExtraError
from kenspeckle.evaluation import evaluate, worst_mistakes
from kenspeckle.fit import Finished
from kenspeckle.plans import Attempt, Choice, Option, Plan
from kenspeckle.results import (
    ClassCounts,
    DataSummary,
    Epoch,
    ModelSummary,
    Report,
    TrainingSummary,
)
from kenspeckle.wording import finished_text
from tests.test_pages import NAUGHTY, Page, assert_self_contained, browse, thumbnail

TEN = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SECTIONS = (
    "measures",
    "data",
    "overfitting",
    "classes",
    "confusions",
    "mistakes",
    "model",
    "making",
)
DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

HEAD = Attempt("head", "frozen, L2 0.01", "kept", 45.0, 38.25, 0, 0.764, 0.81, None, 52.0)
TAIL = Attempt("tail", "3 blocks", "no better", 130.0, 121.0, 6, 0.7512, 0.86, -0.0128, 181.0)
FULL = Attempt("full", "<all> blocks", "kept", 940.0, 930.0, 12, 0.836, 0.9, 0.072, 1124.0)
NEVER = Attempt("from scratch", "", "too long by far", 2100.0, 0.0, 0, None, None, None, None)
PLAN = Plan(
    1200.0,
    True,
    "accuracy",
    ("First a head.", "Then <b>all</b> of it."),
    (
        Choice(
            "input size",
            (
                Option("160x160", 0.7312, False),
                Option("224x224", 0.7643, True),
                Option("288x288", None, False),
            ),
            "The larger one is better.",
        ),
    ),
    (HEAD, TAIL, FULL, NEVER),
    ("Mixup was chosen: +1.9 points.",),
    "The schedule was done.",
)


def planned(report: Report, seconds: float = 1152.3, **changes: Any) -> Report:
    """Return the report of a run that took `seconds`, with a plan that is changed."""
    training = dataclasses.replace(report.training, seconds=seconds)
    plan = dataclasses.replace(PLAN, **changes)
    return dataclasses.replace(report, plan=plan, training=training)


def without_epochs(report: Report) -> Report:
    training = dataclasses.replace(report.training, history=(), best_epoch=0)
    return dataclasses.replace(report, training=training)


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


def test_without_epochs_there_are_no_charts_and_no_best_one(report):
    text = Page(reports.render(without_epochs(report)))
    assert "svg" not in text.tags
    assert "best epoch" not in text.words()
    assert "epoch 0" not in text.words()
    assert report.training.stopped_because in text.words()


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


@pytest.fixture
def undrawn(monkeypatch):
    """Charts take most of the time of a page, and say nothing in words."""
    monkeypatch.setattr(pages, "drawing", lambda name, *_: f"<svg id='{name}'></svg>")


def learnt(report: Report, train: float, validation: float) -> Report:
    """Return a report whose last epoch, the best one, has these accuracies."""
    epoch = Epoch(8, 0.2, 0.01, 0.6, validation, train, 1.5)
    return dataclasses.replace(
        report, training=TrainingSummary(9.0, (*report.training.history[:7], epoch), 8, "Done.")
    )


def overfitting(report: Report) -> str:
    words = Page(reports.render(report)).words()
    start = words.index("Overfitting", words.index("Overfitting") + 1)
    return words[start : words.index("Classes", start)].replace("\u00a0", " ")


def test_it_warns_of_learning_by_heart(report):
    assert "by heart" not in cautions(report)
    text = cautions(learnt(report, 0.99, 0.75))
    assert (
        "Right on 99.0 % of the training pictures, but on 75.0 % of the validation pictures: it "
        "has learnt them by heart. More pictures, stronger augmentation or dropout would help."
    ) in text
    assert "by heart" not in cautions(learnt(report, 0.84, 0.75))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("train", "words"),
    [
        (0.769, "None to speak of: +1.9 points between training and validation."),
        (0.80, "Some: +5.0 points"),
        (0.849, "Some: +9.9 points"),
        (0.86, "Much: +11.0 points"),
        (0.70, f"None to speak of: {MINUS}5.0 points"),
    ],
)
def test_the_gap_between_training_and_validation_in_words(train, words, report):
    text = overfitting(learnt(report, train, 0.75))
    assert words in text
    assert f"Right on {100 * train:.1f} % of the training pictures and on 75.0 %" in text
    assert ("augmentation or mixing made harder" in text) == (train < 0.75)
    assert "chance" not in text


@pytest.mark.usefixtures("undrawn")
def test_a_gap_that_chance_explains_is_none_to_speak_of():
    few = learnt(make_report(TEN[:2], 20), 0.84, 0.75)
    assert "None to speak of: +9.0 points" in overfitting(few)
    assert "With 20 validation pictures, chance alone explains as much." in overfitting(few)
    wrong_once = learnt(make_report(TEN[:2], 20), 0.86, 0.75)
    assert "by heart" in cautions(wrong_once)


@pytest.mark.usefixtures("undrawn")
def test_a_head_without_epochs_has_a_gap_too(report):
    head = dataclasses.replace(HEAD, train_score=0.99)
    alone = without_epochs(planned(report, attempts=(head,)))
    assert "Much: +22.6 points" in overfitting(alone)
    assert "76.4 % of the validation pictures: it has learnt them by heart" in cautions(alone)
    assert "regularisation would help" in cautions(alone)
    below = without_epochs(planned(report, attempts=(dataclasses.replace(HEAD, train_score=0.7),)))
    assert f"{MINUS}6.4 points" in overfitting(below)
    assert "made harder" not in overfitting(below)  # a head sees the pictures as they are


@pytest.mark.usefixtures("undrawn")
def test_a_gap_is_one_of_accuracy_when_steps_are_scored_by_another_measure(report):
    balanced = without_epochs(planned(report, metric="balanced accuracy", attempts=(HEAD,)))
    validation = report.validation.accuracy.value
    assert f"and on {100 * validation:.1f} % of the validation" in overfitting(balanced)


@pytest.mark.usefixtures("undrawn")
def test_answers_that_costs_decided_tell_no_gap(report):
    balanced = planned(without_epochs(report), metric="balanced accuracy", attempts=(HEAD,))
    costly = dataclasses.replace(report.validation, mean_cost=report.validation.accuracy)
    decided = dataclasses.replace(balanced, validation=costly)
    assert "Right on 81.0 % of the training pictures" in overfitting(balanced)
    assert "was not measured" in overfitting(decided)


@pytest.mark.usefixtures("undrawn")
def test_where_training_accuracy_was_not_measured_overfitting_is_not_known(report):
    assert "Not known." in overfitting(report)
    assert "was not measured" in overfitting(without_epochs(report))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("validation_loss", "train_loss", "words"),
    [
        (0.7, 0.1, "After epoch 1 validation loss rose from 0.600 to 0.700 while training loss"),
        (0.601, 0.1, "After epoch 1 validation loss did not turn upwards (0.600 to 0.601)."),
        (0.7, 0.3, "After epoch 1 validation loss did not turn upwards"),
    ],
)
def test_it_says_whether_validation_loss_turned(validation_loss, train_loss, words, report):
    history = (
        Epoch(1, 0.2, 0.01, 0.6, 0.75, 0.8, 1.0),
        Epoch(2, train_loss, 0.01, validation_loss, 0.7, 0.9, 1.0),
    )
    training = TrainingSummary(9.0, history, 1, "Done.")
    assert words in overfitting(dataclasses.replace(report, training=training))


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


# The plan.


def rows_of(text: str) -> list[str]:
    """Return the words of every row of the tables in a piece of a page."""
    return [Page(row).words() for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)]


def test_without_a_plan_nothing_is_said_of_one(report, page):
    assert not {"time", "choices"} & set(page.values("id"))
    assert report.plan is None


def test_the_page_shows_how_the_time_was_used(report):
    text = reports.render(planned(report))
    assert_self_contained(text)
    page = Page(text)
    words = page.words().replace("\u00a0", " ")
    assert {"time", "choices", "overfitting"} <= set(page.values("id"))
    assert page.tags.count("svg") == 3
    assert "Asked for 20 min, took 19 min 12 s (96 %): the promise was kept." in words
    assert "Kept 'full': accuracy 83.6 % by validation, +7.2 points over the first step" in words
    for sentence in (*PLAN.promise, *PLAN.regularisation, PLAN.ended_because):
        assert sentence in words
    assert "8 epochs of full ; epoch 7 was the best one" in words
    assert rows_of(text[text.index('aria-label="Steps"') :])[1:5] == [
        f"head frozen, L2 0.01 45.0 s 38.2 s {DASH} 76.4 % {DASH} kept",
        f"tail 3 blocks 2 min 10 s 2 min 1 s 6 75.1 % {MINUS}1.3 no better",
        "full <all> blocks 15 min 40 s 15 min 30 s 12 83.6 % +7.2 kept",
        f"from scratch 35 min 0 s {DASH} {DASH} {DASH} {DASH} too long by far",
    ]
    assert text.count('<tr class="idle">') == 1
    assert "the rest: reading, checks, calibration, evaluation, saving 1 min 3 s" in words


@pytest.mark.usefixtures("undrawn")
def test_the_page_shows_what_validation_chose(report):
    text = reports.render(planned(report))
    section = text[text.index('<section id="choices">') : text.index('<section id="overfitting">')]
    expected = ["160x160 73.1 %", "224x224 chosen 76.4 %", "288x288 not tried"]
    assert rows_of(section) == expected
    assert PLAN.choices[0].reason in section
    assert 'id="choices"' not in reports.render(planned(report, choices=()))


@pytest.mark.parametrize(
    ("seconds", "taken", "words"),
    [
        (30, 27.4, "took 27.4 s (91 %): the promise was kept."),
        (30, 32, "took 32 s (107 %): 2 s over, within what the promise allows."),
        (30, 34, "took 34 s (113 %): the promise was not kept, by 4 s."),
        (1200, 1216, "took 20 min 16 s (101 %): the promise was not kept, by 16 s."),
        (7200, 7200, "2 h by default, took 2 h (100 %): the promise was kept."),
    ],
)
def test_a_promise_holds_within_a_tenth_and_15_seconds(seconds, taken, words):
    plan = dataclasses.replace(PLAN, seconds=seconds, asked=False)
    assert planpage.time_used(plan, taken)[0].endswith(words)


def test_the_step_that_was_kept_is_the_best_of_those_not_called_no_better():
    stopped = dataclasses.replace(FULL, outcome="stopped by the user")
    hardly = dataclasses.replace(TAIL, score=0.99)
    for attempts, best in (
        ((HEAD, TAIL, FULL, NEVER), FULL),
        ((HEAD, hardly), HEAD),
        ((HEAD, stopped), stopped),
        ((NEVER,), None),
    ):
        assert planpage.kept(dataclasses.replace(PLAN, attempts=attempts)) is best


def test_it_says_what_speaks_for_more_time():
    def said(*attempts: Attempt) -> str:
        return " ".join(planpage.outlook(dataclasses.replace(PLAN, attempts=attempts), 1152.3))

    assert said(HEAD, FULL) == "The last step still gained 7.2 points: more time may help."
    assert said(HEAD, TAIL) == "The last step, 'tail', was no better: more time alone may not help."
    assert said(HEAD, NEVER) == "With 'from scratch' the run would have taken about 54 min."
    brief = dataclasses.replace(NEVER, planned_seconds=20.0)
    assert said(HEAD, brief) == ""


@pytest.mark.parametrize(
    "attempts",
    [
        (),
        (NEVER,),
        (HEAD,),
        tuple(dataclasses.replace(HEAD, name=f"step ${i}^") for i in range(6)),  # on one spot
    ],
)
def test_plans_with_few_steps_or_many_alike_are_drawn(attempts, report):
    text = reports.render(without_epochs(planned(report, attempts=attempts)))
    drawn = [a.name for a in attempts if a.ran]
    assert text.count("<svg") == bool(drawn)
    chart = text[text.index("<svg") : text.index("</svg>")] if drawn else ""
    for name in drawn:
        assert f">{name}</text>" in chart
    heights = re.findall(r'<text style="[^"]*"[^>]* y="([^"]+)"[^>]*>step', chart)
    assert len(set(heights)) == len(heights)


def test_a_plan_goes_to_json_and_back(report):
    before = planned(report)
    plain = json.loads(json.dumps(before.to_dict()))
    assert Report.from_dict(plain, before.pictures()).plan == PLAN


@pytest.mark.usefixtures("undrawn")
def test_the_mean_cost_of_an_answer_is_a_measure(report):
    assert "Mean cost" not in reports.render(report)
    scores = dataclasses.replace(report.test, mean_cost=Interval(0.1234, 0.1, 0.15))
    costly = dataclasses.replace(report, test=scores, validation=scores)
    words = Page(reports.render(costly)).words()
    assert "Mean cost of an answer 0.123 0.100 to 0.150 0.123 0.100 to 0.150" in words


def test_the_end_of_a_training_says_how_the_time_was_used(report):
    def said(finished: Report) -> str:
        return finished_text(Finished(Path("m.ken"), Path("runs/1"), finished, interrupted=False))

    text = said(planned(report))
    assert (
        "Asked for 20 min, took 19 min 12 s (96 %): the promise was kept.\n"
        "Kept 'full': accuracy 83.6 % by validation, +7.2 points over the first step, 'head'.\n"
        "The schedule was done.\n\nnext:\n"
    ) in text
    assert "promise" not in said(report)


@pytest.mark.slow
def test_in_a_browser_nothing_fails_is_requested_or_overflows(tmp_path):
    sets = {"ten": TEN, "naughty": NAUGHTY, "many": tuple(map(str, range(60)))}
    texts = {name: reports.render(make_report(sets[name])) for name in sets}
    texts["planned"] = reports.render(planned(make_report()))
    browse(tmp_path, texts)
