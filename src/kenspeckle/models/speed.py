"""A network for small pictures that reaches its accuracy in few operations.

A frozen whitening layer, then three blocks of two convolutions that start as the identity, the
global maximum, and one linear layer whose logits are scaled down.
Source: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498.
"""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from kenspeckle.config import SpeedConfig
from kenspeckle.core import InvalidValueError
from kenspeckle.layers import Classifier, DiracConv2d, Whitening

__all__ = ["SMALLEST", "SpeedBlock", "SpeedNet"]

SMALLEST = Whitening.kernel_size - 1 + 2**3
"""Least side of a picture in pixels: three poolings halve the whitened map, and one pixel stays."""


class SpeedNet(Classifier):
    """Whitening, three blocks, the global maximum, one linear layer.

    The whitening layer waits for `layers.whiten_` with training pictures.

    Args:
        config: the settings.
        num_classes: outputs.
        size: ``(height, width)`` of the pictures in pixels, each at least `SMALLEST`.

    Raises:
        InvalidValueError: the pictures are too small for the three poolings.
    """

    linear_on_average = False  # the maximum is not the average

    def __init__(self, config: SpeedConfig, num_classes: int, size: tuple[int, int]) -> None:
        if min(size) < SMALLEST:
            raise InvalidValueError(
                f"pictures for the model 'speed' must have at least {SMALLEST} x {SMALLEST} "
                f"pixels, so that the pooling of its third block leaves one; got {size[0]} x "
                f"{size[1]}; choose larger pictures (size) or the model 'resnet'"
            )
        super().__init__()
        self.whitening = Whitening()
        self.activation = nn.GELU()
        widths = (Whitening.out_channels, *config.channels)
        self.blocks = nn.Sequential(*(SpeedBlock(*pair) for pair in pairwise(widths)))
        self.classes = nn.Linear(widths[-1], num_classes, bias=False)
        self.logit_scale = config.logit_scale

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c y x"]:
        """Return the map after the last block."""
        features: Tensor = self.blocks(self.activation(self.whitening(images)))
        return features

    def embed(self, features: Float[Tensor, "n c y x"]) -> Float[Tensor, "n c"]:
        """Return the maximum of the map over its pixels."""
        return F.max_pool2d(features, features.shape[2:]).flatten(1)

    def classify(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the logits."""
        logits: Tensor = self.classes(embedding) * self.logit_scale
        return logits


class SpeedBlock(nn.Module):
    """Convolution, pooling, norm, activation; then convolution, norm, activation.

    The norms' scales are frozen at one: the convolutions carry the scale.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            DiracConv2d(in_channels, out_channels),
            nn.MaxPool2d(2),
            _norm(out_channels),
            nn.GELU(),
            DiracConv2d(out_channels, out_channels),
            _norm(out_channels),
            nn.GELU(),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        """Return the block's map, half as large each way."""
        result: Tensor = self.layers(x)
        return result


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad_(False)
    return norm
