"""The graph answers as the network does, is plain ONNX, and says nothing of where it was made."""

import copy
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
from torch import nn

from kenspeckle import export
from kenspeckle.config import ResNetConfig
from kenspeckle.core import Geometry, InvalidValueError, ModelFileError, Normalisation
from kenspeckle.export import (
    Deployed,
    Trunk,
    check_parity,
    cut,
    deployable,
    fold_norms_,
    graft,
    reference_members,
    to_onnx,
    to_safetensors,
)
from kenspeckle.graphs import check_graph
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


def drawn(network, seed):
    """Set weights and statistics at random, so that no two tensors are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                low = 0.5 if name.endswith("running_var") else -0.5
                tensor.uniform_(low, low + 1, generator=generator)
    return network.eval()


def a_resnet(seed, num_classes=3, channels=(4, 6)):
    config = ResNetConfig(channels, num_blocks=1, dropout=0.5)
    return drawn(build(config, num_classes, SIZE, torch.Generator()), seed)


NORMALISATION = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def template(network):
    fold_norms_(network, SIZE)
    return to_onnx(Trunk(network, NORMALISATION), Geometry(SIZE))


@pytest.fixture(scope="module")
def trunk():
    """The graph of a residual network that others can be grafted into."""
    return template(a_resnet(1, num_classes=1))


def outputs(graph, pictures):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": pictures}), strict=True))


class TestFolding:
    def test_answers_stay_and_norms_go(self):
        network, images = a_resnet(2), torch.randn(3, 3, *SIZE, generator=torch.Generator())
        with torch.no_grad():
            wanted = network(images)
            fold_norms_(network, SIZE)
            torch.testing.assert_close(network(images), wanted, atol=1e-5, rtol=1e-5)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())

    @pytest.mark.parametrize("between", [nn.ReLU(inplace=True), nn.ReLU(), nn.MaxPool2d(2)])
    def test_a_norm_after_something_else_is_left(self, between):
        network = OneNorm(between)
        images = torch.randn(3, 3, *SIZE, generator=torch.Generator())
        with torch.no_grad():
            wanted = drawn(network, 3)(images)
            fold_norms_(network, SIZE)
            torch.testing.assert_close(network(images), wanted)
        assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 1

    def test_the_activation_inside_a_norm_is_left(self):
        network = OneNorm(nn.Identity())
        network.layers[2] = NormWithActivation(4)
        images = torch.randn(3, 3, *SIZE, generator=torch.Generator())
        with torch.no_grad():
            wanted = drawn(network, 3)(images)
            fold_norms_(network, SIZE)
            torch.testing.assert_close(network(images), wanted)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class OneNorm(Classifier):
    """A convolution, something, and a norm."""

    def __init__(self, between):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4))
        self.classes = nn.Linear(4, 2)

    def features(self, images):
        return self.layers(images)

    def embed(self, features):
        return features.mean((2, 3))

    def classify(self, embedding):
        return self.classes(embedding)


class NormWithActivation(nn.BatchNorm2d):
    """As timm has them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class TestGraft:
    @pytest.mark.parametrize("num_classes", [3, 17])
    def test_a_grafted_graph_answers_as_the_exported_one(self, trunk, num_classes):
        network = a_resnet(2, num_classes)
        graph = graft(trunk, network, TEMPERATURE)
        wanted = to_onnx(Deployed(network, NORMALISATION, TEMPERATURE), Geometry(SIZE))
        pictures = some_pictures(5)
        found, expected = outputs(graph, pictures), outputs(wanted, pictures)
        assert list(found) == list(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-5, rtol=1e-5, err_msg=name)
        interfaces = []
        for model in map(onnx.load_model_from_string, (graph, wanted)):
            onnx.checker.check_model(model, full_check=True)
            ends = [*model.graph.input, *model.graph.output]
            interfaces.append([(end.name, end.type.SerializeToString()) for end in ends])
        assert interfaces[0] == interfaces[1]
        check_graph(graph)

    def test_a_model_accepts_it(self, trunk):
        network = a_resnet(2)
        model = a_model(graft(trunk, network, TEMPERATURE))
        deployed = Deployed(network, NORMALISATION, TEMPERATURE)
        assert check_parity(deployed, model, some_pictures(20)) < 1e-5

    def test_the_network_stays_as_it_is(self, trunk):
        network = a_resnet(2)
        before = copy.deepcopy(network.state_dict())
        assert graft(trunk, network, 1.0) == graft(trunk, network, 1.0)
        after = network.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_a_last_layer_without_bias(self, trunk):
        network = a_resnet(2)
        wanted = copy.deepcopy(network)
        last = wanted.last_layer()
        network.last_layer().register_parameter("bias", None)
        with torch.no_grad():
            last.bias.zero_()
        pictures = some_pictures(4)
        found, expected = (outputs(graft(trunk, n, 1.0), pictures) for n in (network, wanted))
        np.testing.assert_array_equal(found["logits"], expected["logits"])

    @pytest.mark.parametrize(
        ("channels", "message"),
        [
            ((4, 8), r"weight network.blocks.1.* of shape \(6, 4, 3, 3\); got one of shape \(8,"),
            ((4,), r"weight network.blocks.1.* of shape .*; got none"),
            ((4, 6, 6), r"template must hold every weight; it lacks network.blocks.2"),
        ],
    )
    def test_another_architecture_is_refused(self, trunk, channels, message):
        with pytest.raises(ModelFileError, match=message):
            graft(trunk, a_resnet(2, channels=channels), 1.0)

    def test_weights_that_the_exporter_merged_are_noticed(self):
        network = a_resnet(1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()  # biases are equal when folded, and kept once
        with pytest.raises(ModelFileError, match=r"template must hold every weight; it lacks"):
            graft(template(network), a_resnet(2), 1.0)


class TestDeployable:
    def test_a_template_saves_the_exporter(self, trunk, monkeypatch):
        monkeypatch.delattr(export, "to_onnx")
        network = a_resnet(2)
        graph = deployable(Deployed(network, NORMALISATION, 1.5), Geometry(SIZE), trunk)
        assert graph == graft(trunk, network, 1.5)

    def test_without_one_or_with_anothers_the_exporter_writes_the_graph(self, trunk):
        geometry, pictures = Geometry(SIZE), some_pictures(3)
        deployed = Deployed(a_resnet(2, channels=(4,)), NORMALISATION, 1.5)
        with torch.no_grad():
            wanted = deployed(torch.from_numpy(pictures))[1]
        for given in (None, trunk):
            found = outputs(deployable(deployed, geometry, given), pictures)
            np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-6)


class TestCut:
    def test_a_part_holds_what_its_outputs_need(self, trunk):
        part = cut(trunk, ["features"])
        names = [output.name for output in onnx.load_model_from_string(part).graph.output]
        assert names == ["features"]
        pictures = some_pictures(3)
        found, whole = outputs(part, pictures), outputs(trunk, pictures)
        np.testing.assert_array_equal(found["features"], whole["features"])
        num_nodes = [len(onnx.load_model_from_string(g).graph.node) for g in (part, trunk)]
        assert num_nodes[0] == num_nodes[1] - 1  # the average

    def test_weights_that_are_not_needed_are_left_out(self):
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [
                onnx.helper.make_node("Mul", ["x", "a"], ["middle"]),
                onnx.helper.make_node("Mul", ["middle", "b"], ["end"]),
            ],
            "two",
            [value("x", 1, [1])],
            [value("middle", 1, [1]), value("end", 1, [1])],
            [onnx.helper.make_tensor(name, 1, [1], [2.0]) for name in "ab"],
        )
        part = cut(onnx.helper.make_model(graph).SerializeToString(), ["middle"])
        found = onnx.load_model_from_string(part).graph
        assert [node.output[0] for node in found.node] == ["middle"]
        assert [tensor.name for tensor in found.initializer] == ["a"]

    def test_an_output_that_is_not_there_is_named(self, trunk):
        with pytest.raises(InvalidValueError, match=r"\['embedding', 'features'\]; got 'middle'"):
            cut(trunk, ["middle"])


def test_layers_are_after_an_export_what_they_were_before():
    network = OneNorm(nn.ReLU(inplace=True))
    network.layers.append(nn.AdaptiveAvgPool2d(1))
    before = {name: set(vars(module)) for name, module in network.named_modules()}
    graph = to_onnx(Deployed(network, NORMALISATION, 1.0), Geometry(SIZE))
    check_graph(graph)
    assert {name: set(vars(module)) for name, module in network.named_modules()} == before
    assert isinstance(network.layers[1], nn.ReLU)
    assert network.layers[1].inplace


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


class TokenNet(Classifier):
    """Tokens of four patches and one of the class, which is the embedding."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 6, generator=generator))
        self.mixer = nn.Linear(6, 6)
        self.classes = nn.Linear(6, 3)

    def features(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)
        tokens = tokens + self.mixer(tokens).softmax(1).mean(1, keepdim=True)
        return tokens.transpose(1, 2)[:, :, None]

    def embed(self, features):
        return features.flatten(2).transpose(1, 2)[:, 0]

    def classify(self, embedding):
        return self.classes(embedding)


def test_a_class_token_is_written_with_allowed_operators():
    network = TokenNet()
    deployed = Deployed(network, Normalisation(), 1.0).eval()
    graph = to_onnx(deployed, Geometry((8, 8)))
    check_graph(graph)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for num_images in (1, 5):
        images = np.random.default_rng(1).integers(0, 256, (num_images, 8, 8, 3), np.uint8)
        with torch.no_grad():
            wanted = deployed(torch.from_numpy(images))
        for found, tensor in zip(session.run(None, {"images": images}), wanted, strict=True):
            np.testing.assert_allclose(found, tensor, atol=1e-5)
