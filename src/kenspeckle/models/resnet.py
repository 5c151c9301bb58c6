"""A residual network for small pictures.

Source: He et al. 2016, section 4.2, arXiv 1512.03385, with projections (their option B) where the
shape changes.
"""

from jaxtyping import Float
from torch import Tensor, nn

from kenspeckle.config import ResNetConfig
from kenspeckle.layers import Classifier, Dropout

__all__ = ["ResNet", "ResidualBlock"]


class ResNet(Classifier):
    """A convolution, stages of residual blocks, the global average, one linear layer.

    Args:
        config: the settings.
        num_classes: outputs.
        size: ``(height, width)`` of the pictures in pixels; every size works.
    """

    linear_on_average = True

    def __init__(self, config: ResNetConfig, num_classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        in_channels = config.channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, in_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential()
        for stage, out_channels in enumerate(config.channels):
            for index in range(config.num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(ResidualBlock(in_channels, out_channels, stride))
                in_channels = out_channels
        self.dropout = Dropout(config.dropout)
        self.classes = nn.Linear(in_channels, num_classes)

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c y x"]:
        """Return the map after the last block."""
        features: Tensor = self.blocks(self.stem(images))
        return features

    def embed(self, features: Float[Tensor, "n c y x"]) -> Float[Tensor, "n c"]:
        """Return the average of the map over its pixels."""
        embedding: Tensor = self.dropout(features.mean((2, 3)))
        return embedding

    def classify(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the logits."""
        logits: Tensor = self.classes(embedding)
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions whose result is added to what came in.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        stride: step of the first convolution in pixels; above 1 it shrinks the map.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.rectifier = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        """Return the block's map."""
        result: Tensor = self.rectifier(self.change(x) + self.shortcut(x))
        return result
