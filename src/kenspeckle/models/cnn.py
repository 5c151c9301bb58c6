"""The textbook's network: convolutions with pooling, then fully connected layers.

With the default settings, for pictures of 32 x 32: convolution 3 → 32, pooling, convolution
32 → 64, pooling (64 maps of 8 x 8), fully connected 4096 → 128, fully connected 128 → classes.
Source: LeCun et al. 1998, https://doi.org/10.1109/5.726791, with rectifiers.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kenspeckle.config import CnnConfig
from kenspeckle.core import InvalidValueError
from kenspeckle.layers import Classifier, Dropout

__all__ = ["Cnn", "map_size"]


class Cnn(Classifier):
    """Convolutions with pooling, then fully connected layers.

    Args:
        config: the settings.
        num_classes: outputs.
        size: ``(height, width)`` of the pictures in pixels.

    Raises:
        InvalidValueError: the settings leave no pixel of a map.
    """

    linear_on_average = False

    def __init__(self, config: CnnConfig, num_classes: int, size: tuple[int, int]) -> None:
        height, width = map_size(config, size)
        super().__init__()
        widths = (3, *config.channels)
        stages = [_stage(config, *pair) for pair in pairwise(widths)]
        self.convolutions = nn.Sequential(*stages)
        widths = (height * width * config.channels[-1], *config.hidden)
        layers = [_hidden(config, *pair) for pair in pairwise(widths)]
        self.hidden = nn.Sequential(*layers)
        self.classes = nn.Linear(widths[-1], num_classes)

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c y x"]:
        """Return the map after the last convolution and its pooling."""
        features: Tensor
        if self.training and _has_onednn(images):
            # In oneDNN's own layout training is a tenth faster than with channels last: no map is
            # reordered between layers, and the gradient of a pooling is written once.
            features = self.convolutions(images.to_mkldnn()).to_dense()
        else:
            features = self.convolutions(images)
        return features

    def embed(self, features: Float[Tensor, "n c y x"]) -> Float[Tensor, "n d"]:
        """Return the activations of the last hidden layer, or the flattened map without one."""
        embedding: Tensor = self.hidden(features.flatten(1))
        return embedding

    def classify(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the logits."""
        logits: Tensor = self.classes(embedding)
        return logits


def _has_onednn(images: Tensor) -> bool:
    plain = images.device.type == "cpu" and images.dtype == torch.float32
    mixed = torch.is_autocast_enabled("cpu")  # casts know no such layout
    return plain and not mixed and torch.backends.mkldnn.is_available()


def _stage(config: CnnConfig, in_channels: int, out_channels: int) -> nn.Sequential:
    """One convolution with what follows it.

    Maximum pooling comes before the rectifier: rising functions and maxima change places freely,
    and the rectifier then has a quarter of the work. The average does not change places.
    """
    convolution = nn.Conv2d(
        in_channels, out_channels, config.kernel_size, config.stride, config.padding
    )
    norm = [nn.BatchNorm2d(out_channels)] if config.batch_norm else []
    rectifier = nn.ReLU()
    after: dict[str, list[nn.Module]] = {
        "max": [nn.MaxPool2d(config.pool_size), rectifier],
        "average": [rectifier, nn.AvgPool2d(config.pool_size)],
        "none": [rectifier],
    }
    return nn.Sequential(convolution, *norm, *after[config.pooling])


def _hidden(config: CnnConfig, in_features: int, out_features: int) -> nn.Sequential:
    layer = nn.Sequential(nn.Linear(in_features, out_features), nn.ReLU(inplace=True))
    return layer.append(Dropout(config.dropout)) if config.dropout else layer


def map_size(config: CnnConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Return ``(height, width)`` in pixels of the last map.

    Args:
        config: the settings.
        size: ``(height, width)`` of the pictures in pixels.

    Raises:
        InvalidValueError: the settings leave no pixel of a map.

    Example:
        >>> map_size(CnnConfig(), (32, 48))
        (8, 12)
    """
    for number in range(1, len(config.channels) + 1):
        layer = f"convolution {number} of {len(config.channels)}"
        size = _shrunk(layer, size, config.kernel_size, config.stride, config.padding)
        if config.pooling != "none":
            size = _shrunk(f"the pooling after {layer}", size, config.pool_size, config.pool_size)
    return size


def _shrunk(
    layer: str, size: tuple[int, int], kernel: int, stride: int, padding: int = 0
) -> tuple[int, int]:
    """Size of a map after windows of side `kernel` have slid over it."""
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    if min(height, width) >= 1:
        return height, width
    pooling = layer.startswith("the pooling")
    window = f"pool_size {kernel}" if pooling else f"kernel_size {kernel} and padding {padding}"
    remedy = "a smaller pool_size" if pooling else "a smaller kernel_size, more padding"
    raise InvalidValueError(
        f"{layer} must leave at least one pixel; got a map of {size[0]} x {size[1]} pixels for "
        f"{window}; choose {remedy}, fewer channels (each is a layer), a smaller stride or larger "
        "pictures (size)"
    )
