"""Networks of timm answer as timm's own do, and no file is taken for weights that it does not hold.

Weights files are made here, from timm's networks with random weights: nothing is fetched.
"""

import hashlib
import socket
import sys

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from numpy.testing import assert_allclose, assert_array_equal

from kenspeckle.config import EfficientNetLiteConfig, ResNetConfig, TimmConfig
from kenspeckle.core import (
    Geometry,
    InvalidValueError,
    MissingExtraError,
    ModelFileError,
    Normalisation,
)
from kenspeckle.export import Deployed, to_onnx
from kenspeckle.graphs import check_graph
from kenspeckle.layers import reseed
from kenspeckle.models import build
from kenspeckle.zoo_weights import load_zoo_, read_zoo_weights

SMALL = "test_resnet"  # timm's own, for tests: 0.4 million parameters, pictures of 160 x 160
NUM_CLASSES = 5

# Of each way that a network makes an embedding from its map, one: whether that is the average.
NETWORKS = {
    "resnet18": True,
    "efficientnet_lite0": True,
    "dla46_c": True,  # its classifier is a convolution of one pixel
    "ghostnet_100": False,  # a layer after the pooling, and dropout that timm leaves on
    "mobilenetv3_small_100": False,
    "mobilenetv4_conv_small": False,
    "convnext_atto": False,  # a norm after the pooling
    "swin_tiny_patch4_window7_224": True,  # channels last, buffers that no state holds
    "vit_relpos_small_patch16_224": False,  # patches, a norm after the pooling
    "vit_tiny_patch16_224": False,  # a class token, which is the embedding
}

zoo = pytest.mark.zoo


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(network=SMALL, size=(64, 64), seed=0, dropout=0.0):
    return build(TimmConfig(network, dropout), NUM_CLASSES, size, seeded(seed))


def pictures(num_images, size=(64, 64)):
    return torch.randn(num_images, 3, *size, generator=seeded(9))


def of_timm(network=SMALL, num_classes=NUM_CLASSES, **options):
    """Return timm's network, moved away from every special value that it starts with."""
    import timm

    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(network, num_classes=num_classes, **options)
    generator = seeded(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                factor = torch.empty_like(tensor).uniform_(0.8, 1.2, generator=generator)
                tensor.mul_(factor).add_(0.01 * factor)
    return model.eval()


def saved(model, path):
    """Save the weights of a network of timm as safetensors or as torch does."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors.torch.save(state))
    else:
        torch.save(state, path)
    return path


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for ask in (made, lambda: read_zoo_weights(TimmConfig(), "weights.pth")):
        with pytest.raises(MissingExtraError, match=r"networks of timm .*'kenspeckle\[zoo\]'"):
            ask()


@zoo
class TestNetwork:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_answers_are_timms_with_the_weights_of_a_file(self, name, tmp_path):
        size = (224, 224) if "224" in name else (64, 64)
        reference = of_timm(name)
        weights = saved(reference, tmp_path / "weights.safetensors")
        network = made(name, size).eval()
        load_zoo_(network, read_zoo_weights(TimmConfig(name), str(weights)))
        for own, timms in zip(
            network.last_layer().parameters(), reference.get_classifier().parameters(), strict=True
        ):
            own.data.copy_(timms.reshape(own.shape))
        images = pictures(2, size)
        with torch.no_grad():
            wanted = reference.forward_head(reference.forward_features(images), pre_logits=True)
            embedding = network.embed(network.features(images))
            scale = float(wanted.abs().max())
            assert_allclose(embedding / scale, wanted / scale, rtol=0, atol=1e-5)
            logits = reference(images)
            scale = float(logits.abs().max())
            assert_allclose(network(images) / scale, logits / scale, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_linear_on_average_tells_the_truth(self, name):
        network = made(name).eval()
        features = torch.randn(network.features(pictures(2)).shape, generator=seeded())
        average = features.mean((2, 3))
        with torch.no_grad():
            embedding = network.embed(features)
        is_average = embedding.shape == average.shape and embedding.allclose(average, atol=1e-6)
        assert network.linear_on_average == is_average == NETWORKS[name]

    def test_maps_have_channels_first_and_lie_as_the_picture_does(self):
        images = pictures(2, (128, 224))
        for name, rows, columns in [
            ("swin_tiny_patch4_window7_224", 4, 7),
            ("vit_relpos_small_patch16_224", 8, 14),
        ]:
            network = made(name, (128, 224)).eval()
            with torch.no_grad():
                found = network.network.forward_features(images).reshape(2, rows * columns, -1)
                features = network.features(images)
            assert features.shape == (2, found.shape[2], rows, columns)
            for y, x in [(0, 0), (1, 0), (0, 1), (rows - 1, 2)]:
                assert_array_equal(features[:, :, y, x], found[:, y * columns + x])

    def test_timm_counts_patches_along_the_rows(self):
        network, images = (
            made("vit_relpos_small_patch16_224", (128, 224)),
            torch.zeros(1, 3, 128, 224),
        )
        images[:, :, 32:48, 80:96] = 1.0  # the patch in row 2 and column 5
        with torch.no_grad():
            patches = network.network.patch_embed(images)[0]
        changed = (patches != patches[0]).any(1)
        assert changed.nonzero().tolist() == [[2 * 14 + 5]]

    def test_is_our_own_efficientnet_lite_with_the_same_weights(self):
        own = build(EfficientNetLiteConfig(), NUM_CLASSES, (64, 64), seeded(1)).eval()
        zoo_net = made("tf_efficientnet_lite0").eval()
        tensors = [t for name, t in own.state_dict().items() if not name.startswith("classes.")]
        names = list(zoo_net.network.state_dict())
        zoo_net.network.load_state_dict(dict(zip(names, tensors, strict=True)))
        images = pictures(2)
        with torch.no_grad():
            features = own.features(images)
            assert_allclose(zoo_net.features(images), features, rtol=1e-3, atol=1e-5)
            assert_allclose(zoo_net.embed(features), own.embed(features), rtol=1e-4, atol=1e-6)

    def test_weights_follow_the_generator(self):
        one, same, other = made(), made(), made(seed=1)
        for name, tensor in one.state_dict().items():
            assert_array_equal(tensor, same.state_dict()[name])
        assert any(not torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())

    @pytest.mark.parametrize("name", [SMALL, "ghostnet_100", "swin_tiny_patch4_window7_224"])
    def test_building_and_training_leave_the_global_generator_alone(self, name):
        before = torch.get_rng_state()
        made(name).train()(pictures(2)).sum().backward()
        assert_array_equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("name", [SMALL, "test_convnext", "poolformer_s12", "rdnet_tiny"])
    def test_stages_hold_every_parameter_once(self, name):
        network = made(name)
        stages = network.stages()
        held = [id(p) for stage in stages for p in stage.parameters()]
        assert sorted(held) == sorted(id(p) for p in network.parameters())
        assert stages[-1] is network.last_layer() is network.classes
        first = next(network.parameters())
        assert any(p is first for p in stages[0].parameters())

    def test_every_setting_has_an_effect(self):
        images = pictures(4)
        plain = made().train()(images)
        assert not torch.equal(made("test_convnext").train()(images), plain)
        dropped = made(dropout=0.5).train()
        reseed(dropped, 3, 5)
        first = dropped(images).detach()
        assert not torch.equal(first, plain.detach())
        reseed(dropped, 3, 5)
        assert_array_equal(dropped(images).detach(), first)
        answers = [made(dropout=share).eval()(images).detach() for share in (0.0, 0.5)]
        assert_array_equal(*answers)  # which drop nothing

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("resnt18", "network must be one that timm knows; got 'resnt18'; did you mean 'resn"),
            ("resnet18.a9", "that timm knows; got 'resnet18.a9'; did you mean 'resnet18.a"),
            ("hf-hub:timm/resnet18", "network must be one that timm knows; got 'hf-hub:timm/resn"),
            ("crossvit_9_240", "ends in one linear layer; 'crossvit_9_240' does not; take one"),
            ("levit_128s", "ends in one linear layer; 'levit_128s' does not; take one"),
            ("efficientvit_m0", "ends in one linear layer; 'efficientvit_m0' does not; take one"),
        ],
    )
    def test_what_has_no_exact_embedding_is_refused(self, name, message):
        with pytest.raises(InvalidValueError, match=message):
            made(name, (240, 240) if "cross" in name else (64, 64))

    def test_an_embedding_that_the_map_does_not_give_is_refused(self, monkeypatch):
        from timm.models.resnet import ResNet

        whole = ResNet.forward
        monkeypatch.setattr(ResNet, "forward", lambda self, x: whole(self, x) + 1e-3)
        with pytest.raises(InvalidValueError, match="from its last map alone; that of 'test_resn"):
            made()

    @pytest.mark.parametrize(
        ("name", "size", "message"),
        [
            ("vit_relpos_small_patch16_224", (8, 64), "such as 224 x 224 pixels; got 8 x 64: "),
            ("inception_v3", (20, 64), "such as 299 x 299 pixels; got 20 x 64: "),
        ],
    )
    def test_a_size_that_does_not_fit_is_refused(self, name, size, message):
        with pytest.raises(InvalidValueError, match=f"{name}' must have a size .*{message}"):
            made(name, size)


@zoo
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv3_small_100",
        "mobilenetv4_conv_small",
        "efficientnet_lite0",
        "convnext_atto",
        "convnextv2_atto",
        "test_mambaout",
        "vit_medium_patch16_gap_256",
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_graph_answers_as_the_network(name):
    size = (56, 84) if "patch14" in name else (64, 96)
    network = made(name, size)
    with torch.no_grad():
        network.train()(pictures(8, size))  # so that the norms do something
    deployed = Deployed(network.eval(), Normalisation(), temperature=1.5)
    graph = to_onnx(deployed, Geometry(size))
    check_graph(graph)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for num_images in (1, 3):
        images = np.random.default_rng(0).integers(0, 256, (num_images, *size, 3), np.uint8)
        with torch.no_grad():
            wanted = deployed(torch.from_numpy(images))
        for found, tensor in zip(session.run(None, {"images": images}), wanted, strict=True):
            scale = float(tensor.abs().max())
            assert_allclose(found / scale, tensor / scale, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def reference():
    """timm's network whose weights the files hold."""
    return of_timm()


@zoo
class TestFile:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
    def test_holds_all_but_the_last_layer(self, reference, suffix, tmp_path):
        path = saved(reference, tmp_path / f"weights{suffix}")
        found = read_zoo_weights(TimmConfig(SMALL), str(path))
        state = reference.state_dict()
        assert set(state) - set(found.state) == {"fc.weight", "fc.bias"}
        for name, tensor in found.state.items():
            assert_array_equal(tensor, state[name])
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.normalisation == Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert found.size == (160, 160)
        assert found.licence == "apache-2.0"
        assert found.source == str(path)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"model": state},
            lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
            lambda state: {"state_dict": {f"module.{k}": t for k, t in state.items()}},
            lambda state: {k: t for k, t in state.items() if not k.startswith("fc.")},
            lambda state: state | {"fc.weight": torch.zeros(1000, 9), "fc.bias": torch.zeros(1)},
        ],
    )
    def test_checkpoints_of_training_scripts_are_understood(self, reference, wrap, tmp_path):
        torch.save(wrap(reference.state_dict()), tmp_path / "last.pth")
        found = read_zoo_weights(TimmConfig(SMALL), str(tmp_path / "last.pth"))
        assert set(reference.state_dict()) - set(found.state) == {"fc.weight", "fc.bias"}

    def test_loading_leaves_the_last_layer_and_sets_everything_else(self, reference, tmp_path):
        path = saved(reference, tmp_path / "weights.safetensors")
        one, other = made(seed=1), made(seed=2)
        kept = one.last_layer().weight.clone()
        for network in (one, other):
            load_zoo_(network, read_zoo_weights(TimmConfig(SMALL), str(path)))
        states = one.state_dict(), other.state_dict()
        differing = [
            name for name in states[0] if not torch.equal(states[0][name], states[1][name])
        ]
        assert [name for name in differing if name != "classes.bias"] == ["classes.weight"]
        assert_array_equal(one.last_layer().weight.detach(), kept.detach())

    def test_tables_that_timm_once_saved_are_left_out(self, tmp_path):
        name = "swin_tiny_patch4_window7_224"
        model = of_timm(name)
        table = "layers.0.blocks.0.attn.relative_position_index"
        torch.save(model.state_dict() | {table: model.get_buffer(table)}, tmp_path / "old.pth")
        assert table not in read_zoo_weights(TimmConfig(name), str(tmp_path / "old.pth")).state

    def test_position_embeddings_are_resampled_as_timm_does(self, tmp_path):
        name = "vit_medium_patch16_gap_256"
        model = of_timm(name)
        path = saved(model, tmp_path / "weights.safetensors")
        network = made(name, (64, 128)).eval()
        before = torch.get_rng_state()
        load_zoo_(network, read_zoo_weights(TimmConfig(name), str(path)))
        assert_array_equal(torch.get_rng_state(), before)
        model.set_input_size((64, 128))  # timm's other way to the same
        images = pictures(2, (64, 128))
        with torch.no_grad():
            wanted = model.forward_head(model.forward_features(images), pre_logits=True)
            found = network.embed(network.features(images))
        assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)

    def test_no_socket_is_opened(self, reference, monkeypatch, tmp_path):
        path = saved(reference, tmp_path / "weights.safetensors")

        def refuse(*_, **__):
            raise AssertionError("a socket was opened")

        for name in ("socket", "create_connection", "getaddrinfo"):
            monkeypatch.setattr(socket, name, refuse)
        load_zoo_(made(), read_zoo_weights(TimmConfig(SMALL), str(path), offline=False))


@zoo
class TestRefusals:
    def read(self, path, network=SMALL):
        return read_zoo_weights(TimmConfig(network), str(path))

    @pytest.mark.parametrize("weights", ["imagenet", "none", "weights.npz", "folder"])
    def test_weights_are_a_file_or_the_hub(self, weights):
        with pytest.raises(InvalidValueError, match=rf"'hub' or a file that .*; got '{weights}'"):
            self.read(weights)

    def test_an_unknown_network_is_named(self):
        with pytest.raises(InvalidValueError, match="timm knows; got 'resnt18'; did you mean 'res"):
            self.read("weights.pth", "resnt18")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ModelFileError, match=r"of 'test_resnet': .*gone.pth: no such file"):
            self.read(tmp_path / "gone.pth")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_a_truncated_file_is_refused(self, reference, suffix, share, tmp_path):
        path = saved(reference, tmp_path / f"weights{suffix}")
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ModelFileError, match=rf"weights{suffix}: must hold whole weights"):
            self.read(path)

    def test_one_bit_of_a_header_is_noticed(self, reference, tmp_path):
        path = saved(reference, tmp_path / "weights.safetensors")
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = data[:end].rstrip()  # blanks follow, which mean nothing
        for position in range(0, len(text), 97):
            changed = bytearray(data)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            with pytest.raises(ModelFileError, match=r"weights.safetensors: must hold"):
                self.read(path)

    def test_code_is_refused_and_not_run(self, tmp_path):
        victim, path = tmp_path / "victim", tmp_path / "weights.pth"
        path.write_bytes(f"cos\nsystem\n(S'touch {victim}'\ntR.".encode())
        with pytest.raises(ModelFileError, match="must hold whole weights, and no code; got 'Weig"):
            self.read(path)
        assert not victim.exists()

    @pytest.mark.parametrize(
        "content",
        [
            *([torch.zeros(1)], {"a": 1}, {}, {"state_dict": {"a": "b"}}),
            *({"a": torch.zeros(2, 2).to_sparse()}, {"a": torch.zeros(2, device="meta")}),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Validating sparse")
    def test_what_is_no_table_of_tensors_is_refused(self, content, tmp_path):
        torch.save(content, tmp_path / "content.pth")
        with pytest.raises(ModelFileError, match=r"content.pth: must hold a table of tensors; got"):
            self.read(tmp_path / "content.pth")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("conv1.0.weight"), r"'conv1.0.weight' is missing \(1 in all\); set"),
            (lambda s: s.update(x=s["fc.bias"]), r"'x' is unexpected \(1 in all\); set network to"),
            (
                lambda s: s.update({"conv.weight": s.pop("conv1.0.weight")}),
                "'conv1.0.weight' is missing, 'conv.weight' is unexpected",
            ),
            (
                lambda s: s.update({"bn1.weight": torch.zeros(3, 2)}),
                "'bn1.weight' is 3 x 2, not 32",
            ),
        ],
    )
    def test_another_architecture_is_refused_by_its_differences(
        self, reference, change, message, tmp_path
    ):
        state = reference.state_dict()
        change(state)
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(
            ModelFileError, match=rf"other.pth: .*timm's 'test_resnet'; .*{message}"
        ):
            self.read(tmp_path / "other.pth")

    def test_the_first_three_differences_of_many_are_named(self, reference, tmp_path):
        path = saved(reference, tmp_path / "weights.safetensors")
        with pytest.raises(ModelFileError, match=r"missing, '.*' is missing, '.*' is m.* in all\)"):
            self.read(path, "test_convnext")

    def test_another_network_is_refused(self, reference, tmp_path):
        weights = self.read(saved(reference, tmp_path / "weights.safetensors"))
        own = build(ResNetConfig((4,)), 3, (8, 8), torch.Generator())
        for network, what in ((own, "ResNet"), (made("test_convnext"), "ZooNet")):
            with pytest.raises(
                ModelFileError, match=f"weights.safetensors are of; got a {what}: '"
            ):
                load_zoo_(network, weights)


@zoo
class TestHub:
    """The hub's client is replaced by one that finds files in a folder."""

    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError

        asked = []

        def find(repository, file):
            asked.append((repository, file))
            if not (tmp_path / file).exists():
                raise EntryNotFoundError(f"404: no {file}\nmore words")
            return str(tmp_path / file)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", find)
        return asked

    @pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
    def test_the_file_that_timm_names_is_read(self, reference, file, asked, tmp_path):
        path = saved(reference, tmp_path / file)
        found = read_zoo_weights(TimmConfig(SMALL), "hub", offline=False)
        assert asked[-1] == ("timm/test_resnet.r160_in1k", file)
        assert found.source == f"hub:timm/test_resnet.r160_in1k/{file}"
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_is_not_asked_unless_it_may_be(self, asked):
        with pytest.raises(InvalidValueError, match=r"got 'hub'; name a file .* or drop --offline"):
            read_zoo_weights(TimmConfig(SMALL), "hub")
        assert asked == []

    def test_a_failed_fetch_says_what_to_do(self, asked):
        message = r"^hub:timm/test_resnet.r160_in1k: .*: 404: no pytorch_model.bin; .*weights=FILE$"
        with pytest.raises(ModelFileError, match=message):
            read_zoo_weights(TimmConfig(SMALL), "hub", offline=False)
        assert len(asked) == 2

    def test_a_network_without_weights_there_is_named(self, asked):
        with pytest.raises(InvalidValueError, match="file for 'botnet50ts_256', of which"):
            read_zoo_weights(TimmConfig("botnet50ts_256"), "hub", offline=False)
        assert asked == []
