"""Mistakes that cost more than others: the file that says so, the rule, and what it changes."""

import codecs
import csv
import io
import json
import re

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from onnx import TensorProto, helper, numpy_helper

from kenspeckle.core import DataError, Geometry, InvalidValueError, MissingPathError, Normalisation
from kenspeckle.costs import MAX_COST, Costs, decide, expected_costs, read_costs
from kenspeckle.evaluation import evaluate
from kenspeckle.judging import judge
from kenspeckle.modelfile import Manifest, pack
from kenspeckle.names import to_cell
from kenspeckle.prediction import Answer, Model, load
from kenspeckle.sources import open_dataset
from kenspeckle.wording import csv_rows, info_text, json_rows, scores_text, text_rows
from tests.conftest import make_folder, png
from tests.test_results import REPORT, SCORES

LIGHTS = ("green", "red", "yellow")
RED_AS_GREEN = Costs(((0.0, 1.0, 1.0), (100.0, 0.0, 1.0), (1.0, 1.0, 0.0)))


@st.composite
def whole_costs(draw, min_classes=2, max_classes=5):
    """Costs that are whole numbers, so that sums of few of them are exact."""
    num_classes = draw(st.integers(min_classes, max_classes))
    rows = []
    for true in range(num_classes):
        right = draw(st.integers(0, 3))
        row = draw(
            st.lists(st.integers(right + 1, 100), min_size=num_classes, max_size=num_classes)
        )
        row[true] = right
        rows.append(tuple(map(float, row)))
    return Costs(tuple(rows))


@st.composite
def problems(draw):
    """Costs, and rows of 64ths that sum to one; equal costs and probabilities are frequent."""
    costs = draw(whole_costs())
    cuts = st.lists(
        st.integers(0, 64), min_size=len(costs.matrix) - 1, max_size=len(costs.matrix) - 1
    )
    rows = [np.diff([0, *sorted(cut), 64]) for cut in draw(st.lists(cuts, min_size=1, max_size=5))]
    return costs, np.array(rows)


# The rule.


@given(problems())
def test_the_answer_has_the_least_expected_cost(problem):
    costs, shares = problem
    expected = [
        [
            sum(map(float.__mul__, map(float, row), column)) / 64
            for column in zip(*costs.matrix, strict=True)
        ]
        for row in shares
    ]
    assert_array_equal(expected_costs(shares / 64, costs), expected)
    slow = [
        min(range(len(row)), key=lambda k: (paid[k], -row[k], k))
        for row, paid in zip(shares, expected, strict=True)
    ]
    found = decide(shares / 64, costs)
    assert found.dtype == np.int64
    assert found.tolist() == slow


@given(problems(), st.permutations(range(5)))
def test_the_order_of_the_classes_does_not_matter(problem, order):
    costs, shares = problem
    order = [k for k in order if k < len(costs.matrix)]
    moved = Costs(tuple(tuple(costs.matrix[i][j] for j in order) for i in order))
    paid = expected_costs(shares / 64, costs)[:, order]
    assert_allclose(expected_costs(shares[:, order] / 64, moved), paid)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("right", "wrong"), [(0.0, 1.0), (0.0, 0.1), (3.0, 7.0), (0.0, MAX_COST)])
def test_where_every_mistake_costs_the_same_the_most_probable_class_is_answered(
    dtype, right, wrong
):
    chance = np.random.default_rng(0)
    probabilities = chance.dirichlet(np.full(30, 0.2), size=500).astype(dtype)
    probabilities[::2, 7] = probabilities[::2].max(axis=1)  # two that are equally probable
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    matrix = np.full((30, 30), wrong)
    np.fill_diagonal(matrix, right)
    found = decide(probabilities, Costs(tuple(map(tuple, matrix.tolist()))))
    assert_array_equal(found, probabilities.argmax(axis=1))
    assert_array_equal(found, decide(probabilities, None))


def test_the_unit_of_the_costs_does_not_matter():
    chance = np.random.default_rng(1)
    probabilities = chance.dirichlet(np.ones(3), size=300).astype(np.float32)
    expected = decide(probabilities, RED_AS_GREEN)
    assert 0 < np.mean(expected != probabilities.argmax(axis=1)) < 1
    for unit in (1e-6, 0.3, 1e9):
        scaled = Costs(tuple(tuple(unit * cost for cost in row) for row in RED_AS_GREEN.matrix))
        assert_array_equal(decide(probabilities, scaled), expected)


def test_an_answer_does_not_depend_on_its_batch():
    rows = np.random.default_rng(2).dirichlet(np.ones(3), size=200).astype(np.float32)
    alone = [int(decide(row[np.newaxis], RED_AS_GREEN)[0]) for row in rows]
    assert decide(rows, RED_AS_GREEN).tolist() == alone


def test_a_right_answer_that_is_certain_is_given():
    assert decide(np.eye(3), RED_AS_GREEN).tolist() == [0, 1, 2]
    assert decide(np.zeros((0, 3)), RED_AS_GREEN).shape == (0,)


@pytest.mark.parametrize("shape", [(2,), (2, 4), (3, 3, 3)])
def test_probabilities_of_other_classes_are_refused(shape):
    with pytest.raises(InvalidValueError, match=r"must be \(N, 3\).*got \("):
        decide(np.full(shape, 0.25), RED_AS_GREEN)


@pytest.mark.parametrize(
    ("matrix", "text"),
    [
        ((), r"at least two classes; got 0 rows with widths \[\]"),
        (((0.0,),), "at least two classes; got 1 rows"),
        (((0.0, 1.0), (1.0,)), r"square matrix.*got 2 rows with widths \[1, 2\]"),
        (((0.0, 1.0, 1.0), (1.0, 0.0, 1.0)), r"got 2 rows with widths \[3\]"),
        (((0.0, -1.0), (1.0, 0.0)), r"from 0 to 1e\+12; got -1.0 in row 0, column 1"),
        (((0.0, 1.0), (float("nan"), 0.0)), "got nan in row 1, column 0"),
        (((0.0, float("inf")), (1.0, 0.0)), "got inf in row 0, column 1"),
        (((0.0, 1.0), (1.1e12, 0.0)), "got 1100000000000.0 in row 1, column 0"),
        (((0.0, 1.0), (0.0, 0.0)), "right answer must cost less .*got 0 and 0 in row 1, column 0"),
        (((2.0, 1.0), (1.0, 0.0)), "got 2 and 1 in row 0, column 1"),
    ],
)
def test_what_is_no_cost_matrix_is_refused(matrix, text):
    with pytest.raises(InvalidValueError, match=text):
        Costs(matrix)


@given(whole_costs())
def test_the_dearest_mistake_is_one_and_none_is_dearer(costs):
    true, answered = costs.dearest
    assert true != answered
    mistakes = [c for i, row in enumerate(costs.matrix) for k, c in enumerate(row) if i != k]
    assert costs.matrix[true][answered] == max(mistakes)


def test_the_matrix_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        RED_AS_GREEN.array[0, 1] = 5


# The file.


def written(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


MATRIX = "true,yellow,green,red\nred,1,100,0\n\nyellow,0,1,1\ngreen,1.0,0,1e0\n"


@pytest.mark.parametrize(
    "text",
    [
        MATRIX,
        MATRIX.replace(",", ";"),
        MATRIX.replace(",", "\t"),
        MATRIX.replace(",", ", "),
        MATRIX.replace("\n", "\r\n"),
        "\n\n" + MATRIX.rstrip("\n") + "\n,,,\n",
        MATRIX.replace("true", ""),
        '"";"yellow";"green";"red"\n"red";"1";"100";"0"\nyellow;0;1;1\ngreen;1;0;1',
        codecs.BOM_UTF8 + MATRIX.encode(),
        "true,answered,cost\nred,green,100\n",
        "True;Answered;Cost\r\nred;green;1.0E2\r\nred;red;0\r\n",
        codecs.BOM_UTF8 + b"true\tanswered\tcost\nred\tgreen\t+100.\nyellow\tred\t1\n",
    ],
)
def test_every_form_says_the_same(tmp_path, text):
    assert read_costs(written(tmp_path / "costs.csv", text), LIGHTS) == RED_AS_GREEN


NAMES = ("=cmd()", "'quoted", "a,b", "c;d", "e\tf", 'say "x"', "two\nlines", "žluťoučký", "☃", "1")


@given(
    costs=whole_costs(2, len(NAMES)),
    names=st.permutations(NAMES),
    order=st.permutations(range(len(NAMES))),
    delimiter=st.sampled_from(",;\t"),
)
def test_what_a_table_holds_is_read_back(tmp_path_factory, costs, names, order, delimiter):
    num_classes = len(costs.matrix)
    names, order = names[:num_classes], [k for k in order if k < num_classes]
    text = io.StringIO()
    table = csv.writer(text, delimiter=delimiter)
    table.writerow(["true class", *(to_cell(names[k]) for k in order)])
    for i in reversed(order):
        table.writerow([to_cell(names[i]), *(costs.matrix[i][k] for k in order)])
    path = written(tmp_path_factory.mktemp("costs") / "costs.csv", text.getvalue())
    assert read_costs(path, tuple(names)) == costs


def test_a_name_in_two_spellings_is_one_class(tmp_path):
    path = written(tmp_path / "costs.csv", "true,answered,cost\ncafe\u0301,bar,5\n")
    assert read_costs(path, ("bar", "caf\u00e9")).matrix == ((0, 1), (5, 0))


def test_classes_may_be_named_like_the_columns_of_a_list(tmp_path):
    path = written(tmp_path / "costs.csv", "true,answered,cost\ncost,3,0\nanswered,1,2\n")
    assert read_costs(path, ("answered", "cost")).matrix == ((1, 2), (3, 0))


HEAD = "true,green,red,yellow\n"
LIST = "true,answered,cost\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a line of names and lines of numbers below it; got 0$"),
        ("\n \n", "lines of numbers below it; got 0$"),
        (HEAD, "got 1$"),
        (LIST, "got 1$"),
        ("true,gren,red,yellow\nred,1,1,1\n", "line 1: .*got 'gren'; did you mean 'green'?"),
        (
            "true,red,red,yellow\nred,1,1,1\n",
            "line 1: .*once in each direction; got 'red' a second",
        ),
        ("true,red,yellow\nred,0,1\n", "line 1: .*column for every class; got none for 'green'"),
        (HEAD + "rad,1,0,1\n", "line 2: .*got 'rad'; did you mean 'red'?"),
        (HEAD + "red,1,0,1\nred,1,0,1\n", "line 3: .*got 'red' a second time"),
        (HEAD + "red,1,0,1\n", "a line for every class; got none for 'green', 'yellow'"),
        (HEAD + "red,1,0\n", "line 2: a line must have 4 cells, as the first one; got 3"),
        (HEAD + "red,1,0,1,\n", "line 2: a line must have 4 cells.*got 5"),
        (HEAD + "red,one,0,1\n", "line 2: the cost of answering 'green' must be.*got 'one'"),
        (HEAD + "red,1,0,\n", "line 2: the cost of answering 'yellow' must be.*got ''"),
        (HEAD + "red,-1,0,1\n", "number from 0 to .*got '-1'"),
        (HEAD + "red,nan,0,1\n", "got 'nan'"),
        (HEAD + "red,inf,0,1\n", "got 'inf'"),
        (HEAD + "red,1e999,0,1\n", "got '1e999'"),
        (HEAD + "red,1_0,0,1\n", "got '1_0'"),
        (HEAD + "red,٣,0,1\n", "got '٣'"),
        (HEAD.replace(",", ";") + "red;1,5;0;1\n", "with a decimal point; got '1,5'"),
        (
            HEAD + "red,0,0,0\n",
            "line 2: a right answer must cost less than a wrong one; got 0 for ",
        ),
        (HEAD + "red,9,5,4\n", "got 5 for 'red' answered 'red' and 4 for 'red' answered 'yellow'"),
        (HEAD + 'red,"1,0,1\n', "line 2: unexpected end of data"),
        (HEAD + 'red,"1"2,0,1\n', "line 2: "),
        (LIST + "red,gren,5\n", "line 2: .*got 'gren'; did you mean 'green'?"),
        (LIST + "rad,green,5\n", "line 2: .*got 'rad'; did you mean 'red'?"),
        (LIST + "red,green\n", "line 2: a line must have 3 cells.*got 2"),
        (LIST + "red,green,5\nred,green,5\n", "line 3: .*got 'red' answered 'green' a second time"),
        (LIST + "red,green,x\n", "line 2: the cost of answering 'green' must be.*got 'x'"),
        (LIST + "red,green,0\n", "line 2: a right answer must cost less"),
        (LIST + "red,green,9\nred,red,2\n", "line 3: .*got 2 for 'red' answered 'red' and 1 for"),
        ("x" * 200_000 + "\n", "the first line must be the names of classes: field larger"),
        (MATRIX.encode("utf-16"), "must be UTF-8 text.*save as 'CSV UTF-8'"),
        (b"true,answered,cost\nr\xe9d,green,5\n", "must be UTF-8 text"),
        ("\x00\x01\x02", "costs must be|must be that of a class"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path, text, message):
    path = written(tmp_path / "odd\n.csv", text)
    with pytest.raises(InvalidValueError) as caught:
        read_costs(path, LIGHTS)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / r"odd\n.csv") + ": ")
    assert len(str(caught.value)) < 500


def test_a_file_that_is_not_there_is_a_missing_path(tmp_path):
    with pytest.raises(MissingPathError, match=r"none\.csv: no such file"):
        read_costs(tmp_path / "none.csv", LIGHTS)
    with pytest.raises(DataError, match="not an ordinary file"):
        read_costs(tmp_path, LIGHTS)


@given(st.binary(max_size=80))
def test_no_bytes_are_more_than_refused(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("costs") / "costs.csv", data)
    with pytest.raises(InvalidValueError, match=r"costs\.csv: "):
        read_costs(path, LIGHTS)


# The model.

COLOURS = ("blue", "green", "red")
DOUBTFUL = (100, 150, 0)  # green with probability 0.96, red 0.04


def colour_graph() -> bytes:
    """Return a graph whose logits are the mean blue, green and red of a picture, over 16."""
    weights = numpy_helper.from_array(np.eye(3, dtype=np.float32)[::-1] / 16, "weights")
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["embedding"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["embedding", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 8, 8, 3])
    names = ("logits", "probabilities", "embedding")
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in names]
    graph = helper.make_graph(nodes, "g", [images], outputs, initializer=[weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def manifest_with(costs: Costs | None) -> Manifest:
    return Manifest(
        classes=COLOURS,
        geometry=Geometry((8, 8)),
        normalisation=Normalisation(),
        temperature=1.0,
        rejection=None,
        backbone={"family": "mean", "num_parameters": 9},
        recipe={},
        provenance={},
        costs=costs.matrix if costs else None,
    )


RED_IS_DEAR = Costs(((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 100.0, 0.0)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The paths of a model that answers the most probable colour, and of one that fears for red."""
    root = tmp_path_factory.mktemp("models")
    members = {"model.onnx": colour_graph(), "reference/expected.json": b"{}"}
    for name, costs in (("plain", None), ("careful", RED_IS_DEAR)):
        written(root / f"{name}.ken", pack(manifest_with(costs), members))
    return root / "plain.ken", root / "careful.ken"


@pytest.fixture
def careful(models) -> Model:
    return load(models[1], num_threads=1)


def plane(colour) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (10, 12, 3))


def test_costs_change_the_answer_and_no_probability(models, careful):
    plain = load(models[0], num_threads=1)
    assert plain.costs is None
    assert careful.costs == RED_IS_DEAR
    usual, wary = plain.predict(plane(DOUBTFUL)), careful.predict(plane(DOUBTFUL))
    assert usual.ranking == wary.ranking
    assert (usual.label, usual.probability) == usual.ranking[0]
    assert usual.label == "green"
    assert (wary.label, wary.probability) == ("red", dict(wary.ranking)["red"])
    assert wary.probability == pytest.approx(0.04, abs=0.01)
    for colour in ((0, 250, 0), (250, 0, 0), (0, 0, 250)):
        assert careful.predict(plane(colour)).label == plain.predict(plane(colour)).label


def test_answers_are_those_of_the_rule(careful):
    chance = np.random.default_rng(3)
    pictures = [plane(colour) for colour in chance.integers(0, 256, (40, 3))]
    answers = list(careful.predict_many(pictures, 7))
    rows = careful.run(np.stack([careful.prepare(shot) for shot in pictures])).probabilities
    labels = [answer.label for answer in answers if isinstance(answer, Answer)]
    assert labels == [COLOURS[k] for k in decide(rows, RED_IS_DEAR)]
    assert labels != [COLOURS[k] for k in rows.argmax(axis=1)]


def test_the_answer_comes_first_whatever_is_shown(careful, tmp_path):
    shot = written(tmp_path / "shot.png", png(plane(DOUBTFUL)))
    answer = careful.predict(shot)
    assert [name for name, _ in answer.top(3)] == ["red", "green", "blue"]
    assert answer.top(1) == (("red", answer.probability),)
    ((line, _),) = text_rows(careful, [shot], 2)
    assert line is not None
    assert re.fullmatch(r".*shot\.png  red 4\.\d%  green 95\.\d%\n", line)
    _, (line, _) = csv_rows(careful, [shot], 3)
    assert line is not None
    (cells,) = csv.reader([line])
    assert cells[1::2] == ["red", "green", "blue"]
    assert float(cells[2]) == pytest.approx(answer.probability, abs=1e-6)
    (entry,) = json.loads("".join(line or "" for line, _ in json_rows(careful, [shot], 2)))
    assert entry["label"] == "red"
    assert [one["label"] for one in entry["top"]] == ["red", "green"]
    assert entry["probability"] == entry["top"][0]["probability"]


def test_what_a_model_is_names_its_rule():
    text = info_text(manifest_with(RED_IS_DEAR), REPORT)
    assert "\ncosts         least expected cost; dearest: 'red' called 'green', 100\n" in text
    assert "\ncosts         every mistake alike\n" in info_text(manifest_with(None), REPORT)


def test_a_model_is_judged_by_its_own_costs_or_by_others(models, tmp_path):
    colours = {"green": (60, 150, 60), "red": (120, 150, 60)}
    dataset = open_dataset(make_folder(tmp_path / "data", 15, colours))
    usual, wary = (judge(path, dataset, "all") for path in models)
    assert usual.mean_cost is None
    assert wary.mean_cost is not None
    assert usual.accuracy.value == 0.5
    assert usual.confusion[2][1] == 15  # every red is taken for green
    assert wary.confusion[2] == (0, 0, 15)
    assert wary.confusion[1] == (0, 15, 0)
    assert wary.log_loss == usual.log_loss
    alike = Costs(((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)))
    for path in models:
        same = judge(path, dataset, "all", alike)
        assert same.mean_cost is not None
        assert same.mean_cost.value == pytest.approx(1 - usual.accuracy.value)
        assert same.to_dict() | {"mean_cost": None} == usual.to_dict()
    assert judge(models[0], dataset, "all", RED_IS_DEAR).to_dict() == wary.to_dict()
    with pytest.raises(InvalidValueError, match="a column for each class that the costs name"):
        judge(models[0], dataset, "all", Costs(((0.0, 1.0), (1.0, 0.0))))


def test_the_table_of_measures_shows_the_mean_cost_where_there_is_one():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    costs = Costs(((0.0, 1.0), (7.0, 0.0)))
    scores = evaluate(probabilities, np.array([0, 1, 1]), ("ant", "bee"), costs=costs)
    assert scores.mean_cost is not None
    text = scores_text(scores)
    assert f"\nmean cost                    {scores.mean_cost.value:.4f}   0.0000 to " in text
    assert "mean cost" not in scores_text(SCORES)
