"""The networks, by name; a family is one file, read from top to bottom."""

from collections.abc import Callable
from typing import Any

import torch

from kenspeckle.config import ModelConfig
from kenspeckle.core import InvalidValueError
from kenspeckle.layers import Classifier, initialise
from kenspeckle.models.cnn import Cnn
from kenspeckle.models.efficientnet_lite import EfficientNetLite
from kenspeckle.models.resnet import ResNet
from kenspeckle.models.speed import SpeedNet
from kenspeckle.models.zoo import ZooNet

__all__ = ["MODELS", "build"]

# Each takes its own family's settings, which a dictionary of callables cannot say.
MODELS: dict[str, Callable[[Any, int, tuple[int, int]], Classifier]] = {
    "cnn": Cnn,
    "resnet": ResNet,
    "speed": SpeedNet,
    "efficientnet-lite": EfficientNetLite,
    "timm": ZooNet,
}


def build(
    config: ModelConfig, num_classes: int, size: tuple[int, int], generator: torch.Generator
) -> Classifier:
    """Return a new network on the CPU, with weights drawn from `generator`.

    Args:
        config: family and settings.
        num_classes: outputs of the network, at least 1.
        size: ``(height, width)`` of the pictures in pixels.
        generator: the only source of chance, on the CPU.

    Raises:
        InvalidValueError: the settings leave no pixel of a map of this size, or there is no class.

    Example:
        >>> from kenspeckle.config import CnnConfig
        >>> network = build(CnnConfig(), 10, (32, 32), torch.Generator())
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if num_classes < 1:
        raise InvalidValueError(f"num_classes must be at least 1; got {num_classes!r}")
    with torch.device("meta"):  # shapes without weights: torch would draw them from its global seed
        model = MODELS[config.family](config, num_classes, size)
    model = model.to_empty(device="cpu")
    initialise(model, generator)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its hints
    return model
