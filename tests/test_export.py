"""The graph answers as the network does, is plain ONNX, and says nothing of where it was made."""

import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch

from kenspeckle.core import Geometry, ModelFileError, Normalisation
from kenspeckle.export import (
    Deployed,
    check_parity,
    reference_members,
    to_onnx,
    to_safetensors,
)
from kenspeckle.images import prepare
from kenspeckle.layers import Classifier
from kenspeckle.modelfile import Manifest, ModelFile, read
from kenspeckle.models import build
from kenspeckle.prediction import Model
from kenspeckle.recipes import named
from kenspeckle.settings import from_dict, with_settings

SIZE = (12, 10)
TEMPERATURE = 2.5
FAMILIES = {
    "cnn": ["channels=4", "hidden=8", "batch_norm=true", "dropout=0.5"],
    "resnet": ["model=resnet", "channels=4,6", "num_blocks=1", "dropout=0.5"],
    "speed": ["model=speed", "channels=6,6,8"],
}


def network_of(path):
    """Return the network that a model file's own weights make."""
    file = read(path, ("weights.safetensors",))
    manifest = file.manifest
    recipe = from_dict(manifest.recipe)
    size = manifest.geometry.size
    network = build(recipe.model, len(manifest.classes), size, torch.Generator())
    network.load_state_dict(safetensors.torch.load(file.members["weights.safetensors"]))
    return network.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request):
    """A network with statistics of its own, and its graph."""
    recipe = with_settings(named("seed-cnn"), FAMILIES[request.param])
    generator = torch.Generator().manual_seed(3)
    network = build(recipe.model, 3, SIZE, generator)
    network.train()
    with torch.no_grad():  # so that the norms do something
        network(torch.empty(16, 3, *SIZE).normal_(generator=generator))
    normalisation = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    deployed = Deployed(network, normalisation, TEMPERATURE)
    return deployed, to_onnx(deployed, Geometry(SIZE))


def some_pictures(num, size=SIZE):
    return np.random.default_rng(num).integers(0, 256, (num, *size, 3), np.uint8)


def a_model(graph, size=SIZE):
    manifest = Manifest(
        classes=("a", "b", "c"),
        geometry=Geometry(size),
        normalisation=Normalisation(),
        temperature=TEMPERATURE,
        rejection=None,
        backbone={},
        recipe={},
        provenance={},
    )
    return Model(ModelFile(Path("m.ken"), manifest, {"model.onnx": graph}), num_threads=1)


@pytest.mark.parametrize("num", [1, 5])
def test_the_graphs_outputs_are_the_networks(exported, num):
    deployed, graph = exported
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    pictures = some_pictures(num)
    found = session.run(None, {"images": pictures})
    with torch.no_grad():
        expected = deployed(torch.from_numpy(pictures))
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits", "probabilities", "embedding", "features"]
    for name, mine, network in zip(names, found, expected, strict=True):
        assert mine.shape == tuple(network.shape), name
        np.testing.assert_allclose(mine, network, atol=1e-4, rtol=1e-4, err_msg=name)
    logits, probabilities, embedding, features = found
    assert logits.shape == probabilities.shape == (num, 3)
    assert embedding.ndim == 2
    assert features.ndim == 4


def test_the_forward_pass_is_normalised_and_calibrated(exported):
    deployed, _ = exported
    pictures = some_pictures(4)
    levels = torch.from_numpy(pictures).double().permute(0, 3, 1, 2) / 255
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in (deployed.normalisation.mean, deployed.normalisation.deviation)
    )
    with torch.no_grad():
        expected = deployed.network(((levels - mean) / deviation).float())
        logits, probabilities, *_ = deployed(torch.from_numpy(pictures))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    powers = np.exp(logits.double().numpy() / TEMPERATURE)
    slow = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, slow, atol=1e-6)
    assert np.abs(slow - torch.softmax(logits, 1).numpy()).max() > 1e-3  # the temperature acts


def test_the_graph_is_plain_onnx(exported):
    model = onnx.load_model_from_string(exported[1])
    onnx.checker.check_model(model, full_check=True)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert all(not tensor.external_data for tensor in model.graph.initializer)
    (image,) = model.graph.input
    dims = image.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [dim.dim_value for dim in dims[1:]] == [*SIZE, 3]
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_the_graph_says_nothing_of_this_machine(exported):
    places = [Path(__file__).parents[1], Path.home(), Path(tempfile.gettempdir()), sys.prefix]
    words = [*map(str, places), "site-packages", "kenspeckle", ".py", "Traceback"]
    assert [word for word in words if word.encode() in exported[1]] == []


def test_parity_holds_and_is_measured(exported):
    deployed, graph = exported
    assert 0 <= check_parity(deployed, a_model(graph), some_pictures(20)) < 1e-4


@pytest.mark.parametrize("gap", [0.01, float("nan")])
def test_a_network_that_differs_from_its_graph_is_refused(exported, gap):
    deployed, graph = exported
    state = {name: value.clone() for name, value in deployed.network.state_dict().items()}
    last = list(deployed.network.parameters())[-1]
    try:
        with torch.no_grad():
            last.view(-1)[0] += gap * 10
        with pytest.raises(ModelFileError, match=r"differs .* in a probability.*nothing was saved"):
            check_parity(deployed, a_model(graph), some_pictures(20))
    finally:
        deployed.network.load_state_dict(state)


class Deciding(Classifier):
    """A network that looks at its values to decide what to do, which no graph can."""

    def features(self, images):
        return images * 2 if images.sum() > 0 else images

    def embed(self, features):
        return features.mean((2, 3))

    def classify(self, embedding):
        return embedding


def test_a_network_that_is_no_graph_is_refused():
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.INFO)
    with pytest.raises(ModelFileError, match="cannot be written as ONNX"):
        to_onnx(Deployed(Deciding(), Normalisation(), 1.0), Geometry(SIZE))
    assert exporter_log.level == logging.INFO
    exporter_log.setLevel(level)


def test_equal_weights_are_equal_bytes_that_come_back():
    state = {"a": torch.arange(24.0).reshape(1, 2, 3, 4), "b": torch.tensor([1, 2])}
    other = {"a": state["a"].to(memory_format=torch.channels_last), "b": state["b"]}
    assert to_safetensors(state) == to_safetensors(other)
    found = safetensors.torch.load(to_safetensors(other))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value)


def test_reference_members_hold_what_the_model_says_of_them(exported):
    model = a_model(exported[1])
    members = dict(reference_members(model))
    expected = json.loads(members.pop("reference/expected.json"))
    assert len(members) >= 16
    assert {f"reference/{name}" for name in expected} == set(members)
    for name, row in expected.items():
        pixels = prepare(members[f"reference/{name}"], name, Geometry(SIZE))
        found = model.run(pixels[np.newaxis]).probabilities[0]
        np.testing.assert_allclose(found, row, atol=1e-6, err_msg=name)
    assert len({tuple(np.round(row, 4)) for row in expected.values()}) > 16  # they tell apart


def test_the_shipped_graph_is_the_shipped_weights(trained):
    file = read(trained.model_path)
    manifest = file.manifest
    network = network_of(trained.model_path)
    deployed = Deployed(network, manifest.normalisation, manifest.temperature)
    pictures = some_pictures(50, manifest.geometry.size)
    assert check_parity(deployed, Model(file, num_threads=1), pictures) < 1e-5
