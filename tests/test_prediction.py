"""One picture, one answer: whatever it comes as, whoever asks, in whatever batch."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from kenspeckle import cli
from kenspeckle.calibration import softmax
from kenspeckle.core import DataError, ImageError, KenError, MissingPathError, ModelFileError
from kenspeckle.images import Limits, prepare
from kenspeckle.learning import Task, logits_of
from kenspeckle.modelfile import ModelFile, pack, read
from kenspeckle.pixels import Cache, open_pixels
from kenspeckle.prediction import Answer, Difference, Model, load, predict_dataset, verify
from kenspeckle.sources import open_dataset
from tests.conftest import CLASSES, make_folder, picture, png
from tests.test_determinism import finished
from tests.test_export import network_of
from tests.test_modelfile import opened


@pytest.fixture(scope="module")
def model(model_path):
    return load(model_path, num_threads=1)


def close(found: Answer, expected: Answer, tolerance=1e-6):
    """Return whether two answers are alike, apart from the picture's name."""
    ours, theirs = dict(found.ranking), dict(expected.ranking)
    assert ours.keys() == theirs.keys()
    return max(abs(ours[name] - theirs[name]) for name in ours) <= tolerance


def test_an_answer_ranks_every_class(model):
    answer = model.predict(picture(CLASSES["green"], 1))
    assert answer.label == "green"
    labels, probabilities = zip(*answer.ranking, strict=True)
    assert set(labels) == {"blue", "green", "red"}
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert (answer.label, answer.probability) == answer.ranking[0]
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_equally_probable_classes_stay_in_order(model):
    answer = model.answer("x", np.array([0.25, 0.5, 0.25], np.float32))
    assert answer.ranking == (("green", 0.5), ("blue", 0.25), ("red", 0.25))


def test_a_picture_is_the_same_as_path_bytes_and_array(model, tmp_path):
    pixels = picture(CLASSES["red"], 7)
    path = tmp_path / "shot.png"
    path.write_bytes(png(pixels))
    expected = model.predict(path)
    assert expected.name == str(path)
    assert model.predict(str(path)) == expected
    assert model.predict(path.read_bytes()).name == "<picture>"
    for source in (path.read_bytes(), pixels, pixels.astype(np.float64) / 255):
        assert close(model.predict(source), expected)
    assert not close(model.predict(255 - pixels), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "1", "I;16"])
def test_arrays_of_other_kinds_are_as_their_files(model, tmp_path, mode):
    pixels = picture(CLASSES["red"], 7)
    if mode == "I;16":
        grey = np.asarray(Image.fromarray(pixels).convert("L")).astype(np.uint16) * 257
        image, array = Image.fromarray(grey), grey
    else:
        image = Image.fromarray(pixels)
        if mode in {"RGBA", "LA"}:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image = image.convert(mode)
        array = np.asarray(image.convert("RGBA") if mode == "LA" else image)
    image.save(tmp_path / "shot.png")
    assert close(model.predict(array), model.predict(tmp_path / "shot.png"))


def test_what_cannot_be_a_picture_is_named(model, tmp_path):
    with pytest.raises(MissingPathError, match=r"nowhere\.png: no such file"):
        model.predict(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"not an ordinary file|cannot be read"):
        model.predict(tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ImageError, match=r"text\.jpg: .*text"):
        model.predict(tmp_path / "text.jpg")
    with pytest.raises(ImageError, match="<picture>"):
        model.predict(np.zeros((3, 4, 5, 6), np.uint8))
    path = tmp_path / "shot.png"
    path.write_bytes(png(picture(CLASSES["red"], 7)))
    with pytest.raises(DataError, match=r"shot\.png"):
        model.prepare(path, Limits(max_bytes=10))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_many_pictures_are_answered_in_order_whatever_the_batch(model, tmp_path, batch_size):
    (tmp_path / "bad.png").write_bytes(b"hello")
    colours = list(CLASSES.values())
    sources = [picture(colours[i % 3], i, (20 + i, 16)) for i in range(9)]
    mixed = [*sources[:2], tmp_path / "bad.png", *sources[2:], tmp_path / "gone.png"]
    answers = list(model.predict_many(iter(mixed), batch_size))
    errors = {i: answer for i, answer in enumerate(answers) if isinstance(answer, KenError)}
    assert {i: type(error) for i, error in errors.items()} == {2: ImageError, 10: MissingPathError}
    good = [answer for answer in answers if isinstance(answer, Answer)]
    for source, answer in zip(sources, good, strict=True):
        assert close(answer, model.predict(source))
        assert answer.label == model.predict(source).label


def test_no_pictures_no_answers(model):
    assert list(model.predict_many([])) == []


def test_many_pictures_are_read_as_they_are_needed(model):
    asked = []

    def sources():
        for index in range(10):
            asked.append(index)
            yield picture(CLASSES["red"], index)

    answers = model.predict_many(sources(), batch_size=2)
    next(answers)
    assert asked == [0, 1]


# The same picture, asked four ways.


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    """Pictures of many colours, so that answers are not all certain."""
    root = tmp_path_factory.mktemp("sixty")
    chance = np.random.default_rng(5)
    for name in CLASSES:
        (root / name).mkdir()
        for index in range(20):
            red, green, blue, height, width = chance.integers(5, [256, 256, 256, 40, 40])
            pixels = picture((red, green, blue), index, (height, width))
            (root / name / f"{index}.png").write_bytes(png(pixels))
    return root


def through_training(path, dataset, cache):
    """Return probabilities from the network in torch, as validation computes its logits."""
    manifest = read(path, ()).manifest
    store = finished(open_pixels(dataset, manifest.geometry, Limits(), cache))
    everything = np.arange(len(dataset.items))
    task = Task(store, dataset.labels, everything, everything, 3, manifest.normalisation)
    logits = logits_of(network_of(path), task, everything, torch.device("cpu"))
    return softmax(logits, manifest.temperature)


def through_runtime(path, dataset):
    """Return probabilities from a bare session, given nothing but the file's own words."""
    members = opened(path)
    shape = json.loads(members["manifest.json"])["geometry"]
    size = (shape["size"][1], shape["size"][0])
    assert (shape["fit"], shape["interpolation"]) == ("squash", "bilinear")
    pictures = []
    for item in dataset.items:
        image = Image.open(Path(dataset.location) / item.name)
        pictures.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR)))
    session = onnxruntime.InferenceSession(
        members["model.onnx"], providers=["CPUExecutionProvider"]
    )
    return session.run(["probabilities"], {"images": np.stack(pictures)})[0]


def through_command(path, dataset, monkeypatch, capsys):
    """Return probabilities from `ken predict --json`."""
    names = [str(Path(dataset.location) / item.name) for item in dataset.items]
    words = ["ken", "predict", str(path), *names, "--json", "--top", "3"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    rows = json.loads(capsys.readouterr().out)
    assert [row["picture"] for row in rows] == names
    tables = [{entry["label"]: entry["probability"] for entry in row["top"]} for row in rows]
    return np.array([[table[name] for name in sorted(CLASSES)] for table in tables])


def test_training_library_command_and_bare_runtime_agree(
    model, model_path, sixty, tmp_path, monkeypatch, capsys
):
    dataset = open_dataset(sixty)
    pixels = [
        prepare(dataset.reader.read(i), item.name, model.manifest.geometry)
        for i, item in enumerate(dataset.items)
    ]
    library = model.run(np.stack(pixels)).probabilities
    everything = np.arange(len(dataset.items))
    ways = {
        "training": through_training(model_path, dataset, Cache(tmp_path)),
        "runtime": through_runtime(model_path, dataset),
        "command": through_command(model_path, dataset, monkeypatch, capsys),
        "dataset": np.concatenate(
            [part.probabilities for part in predict_dataset(model, dataset, everything, 7)]
        ),
    }
    assert len(library) == 60
    assert 0.5 < np.median(library.max(axis=1)) < 0.999  # not so sure that nothing could differ
    np.testing.assert_allclose(library.sum(axis=1), 1, atol=1e-5)
    for name, probabilities in ways.items():
        np.testing.assert_array_equal(probabilities.argmax(1), library.argmax(1), err_msg=name)
        np.testing.assert_allclose(probabilities, library, atol=1e-4, err_msg=name)


def test_predict_dataset_takes_the_items_that_are_asked_for(model, sixty):
    dataset = open_dataset(sixty)
    some = np.array([5, 3, 50])
    (part,) = predict_dataset(model, dataset, some)
    assert part.embedding.shape[0] == 3
    for row, index in zip(part.probabilities, some, strict=True):
        expected = model.predict(Path(dataset.location) / dataset.items[index].name)
        assert close(model.answer("", row), expected)
    assert list(predict_dataset(model, dataset, some[:0])) == []


# Graphs that a stranger might put into a file.


def with_graph(model_path, graph: onnx.ModelProto):
    """Return the model whose file holds another graph."""
    file = read(model_path)
    return Model(ModelFile(file.path, file.manifest, {"model.onnx": graph.SerializeToString()}))


def shipped(model_path):
    return onnx.load_model_from_string(read(model_path).members["model.onnx"])


def test_weights_that_are_no_numbers_are_refused(model_path):
    graph = shipped(model_path)
    for tensor in graph.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim > 1:
            broken = numpy_helper.from_array(np.full_like(array, np.nan), tensor.name)
            tensor.CopyFrom(broken)
    broken_model = with_graph(model_path, graph)
    with pytest.raises(ModelFileError, match="outputs are not probabilities"):
        broken_model.predict(picture(CLASSES["red"], 1))
    with pytest.raises(ModelFileError, match="outputs are not probabilities"):
        list(broken_model.predict_many([picture(CLASSES["red"], 1)]))


def renamed_output(graph):
    graph.graph.output[1].name = "chances"
    for node in graph.graph.node:
        for index, name in enumerate(node.output):
            if name == "probabilities":
                node.output[index] = "chances"


def renamed_input(graph):
    graph.graph.input[0].name = "pictures"
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            if name == "images":
                node.input[index] = "pictures"


def second_input(graph):
    graph.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def odd_graph(outputs, *, size=16, images=True, row=(1 / 3, 1 / 3, 1 / 3)):
    """Return a graph that always answers `row`, and perhaps has no input."""
    shape = ["n", size, size, 3]
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)] if images else []
    answer = numpy_helper.from_array(np.array([row], np.float32), "row")
    nodes, infos = [], []
    for name, kind in outputs.items():
        nodes.append(helper.make_node("Cast", ["row"], [name], to=kind))
        infos.append(helper.make_tensor_value_info(name, kind, [1, len(row)]))
    graph = helper.make_graph(nodes, "g", inputs, infos, initializer=[answer])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


FLOATS = dict.fromkeys(["logits", "probabilities", "embedding"], TensorProto.FLOAT)


@pytest.mark.parametrize("change", [renamed_output, renamed_input, second_input])
def test_a_graph_with_other_names_is_refused(model_path, change):
    graph = shipped(model_path)
    change(graph)
    with pytest.raises(ModelFileError, match="does not fit its manifest"):
        with_graph(model_path, graph)


@pytest.mark.parametrize(
    "graph",
    [
        odd_graph(FLOATS, size=17),
        odd_graph(FLOATS, images=False),
        odd_graph(FLOATS | {"probabilities": TensorProto.STRING}),
        odd_graph(FLOATS | {"logits": TensorProto.DOUBLE}),
        odd_graph(dict.fromkeys(FLOATS, TensorProto.DOUBLE)),
        odd_graph(FLOATS, row=[0.25] * 4),
        odd_graph({"logits": TensorProto.FLOAT}),
    ],
    ids=["size", "no input", "text", "a double", "doubles", "four classes", "outputs missing"],
)
def test_a_graph_of_another_shape_is_refused(model_path, graph):
    with pytest.raises(ModelFileError, match="does not fit its manifest"):
        with_graph(model_path, graph)


def test_a_graph_that_answers_for_fewer_pictures_is_refused(model_path):
    one = with_graph(model_path, odd_graph(FLOATS))
    assert one.predict(picture(CLASSES["red"], 1)).probability == pytest.approx(1 / 3)
    with pytest.raises(ModelFileError, match="outputs are not probabilities"):
        one.run(np.zeros((2, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("row", [[0.5, 0.5, 0.5], [1.5, -0.25, -0.25], [np.inf, 0, 0]])
def test_a_graph_whose_answers_are_no_probabilities_is_refused(model_path, row):
    odd = with_graph(model_path, odd_graph(FLOATS, row=row))
    with pytest.raises(ModelFileError, match=r"colours\.ken: .*not probabilities of 3 classes"):
        odd.predict(picture(CLASSES["red"], 1))


def test_a_graph_that_is_none_is_refused(model_path):
    file = read(model_path)
    with pytest.raises(ModelFileError, match=r"colours\.ken: ONNX Runtime refuses the graph"):
        Model(ModelFile(file.path, file.manifest, {"model.onnx": b"\x08\x07"}))


def test_pixels_of_another_size_are_refused(model):
    with pytest.raises(ModelFileError, match="the graph fails"):
        model.run(np.zeros((1, 17, 16, 3), np.uint8))


# Verification.


def test_a_difference_within_the_tolerance_agrees():
    assert Difference("x", 1e-4).agrees
    assert not Difference("x", 1.1e-4).agrees
    assert not Difference("x", float("nan")).agrees


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference/expected.json": b"[]"}, "is not one"),
        ({"reference/expected.json": b"{}"}, "does not fit the classes"),
        ({"reference/expected.json": b'{"rgb.png": [0.5, 0.5]}'}, "does not fit the classes"),
        ({"reference/expected.json": b'{"rgb.png": ["a", "b", "c"]}'}, "is not one"),
        ({"reference/expected.json": b'{"nope.png": [0.5, 0.5, 0]}'}, "no reference picture"),
        ({"reference/rgb.png": b"hello"}, "reference/rgb.png: "),
    ],
)
def test_references_that_cannot_be_replayed_are_refused(model_path, tmp_path, change, words):
    members = opened(model_path) | change
    members.pop("manifest.json")
    copy = tmp_path / "odd.ken"
    copy.write_bytes(pack(read(model_path, ()).manifest, members))
    with pytest.raises(ModelFileError, match=rf"odd\.ken: .*{words}"):
        verify(copy)


def test_the_public_names_answer(model_path, tmp_path):
    import kenspeckle as ken

    (shot,) = make_folder(tmp_path / "shots", 1, {"red": CLASSES["red"]}).rglob("*.png")
    answer = ken.load(str(model_path)).predict(shot)
    assert answer.label == "red"
    assert all(difference.agrees for difference in ken.verify(model_path))
