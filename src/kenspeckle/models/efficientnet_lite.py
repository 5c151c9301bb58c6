"""EfficientNet-Lite, the networks whose ImageNet weights `pretrained` loads.

Sources: Tan and Le 2019, arXiv 1905.11946; Sandler et al. 2018, arXiv 1801.04381 (the blocks);
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (the variants:
no squeeze-and-excitation, ReLU6, a stem and a head that are not scaled).
"""

import itertools
import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from kenspeckle.config import EfficientNetLiteConfig
from kenspeckle.layers import Classifier, Dropout

__all__ = ["NUM_FEATURES", "EfficientNetLite", "InvertedResidual", "SameConv2d", "StageSpec"]

EPS = 1e-3  # of every norm; what the pretrained weights were trained with
STEM_CHANNELS = 32

NUM_FEATURES = 1280
"""Length of the embedding, in every variant."""


class StageSpec(NamedTuple):
    """Blocks of one width.

    Attributes:
        num_blocks: how many.
        kernel_size: side of their filters in pixels.
        stride: step of the first block's filters in pixels; the others' is 1.
        expansion: how much wider a block is inside.
        channels: what each gives out.
    """

    num_blocks: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    StageSpec(1, 3, 1, 1, 16),
    StageSpec(2, 3, 2, 6, 24),
    StageSpec(2, 5, 2, 6, 40),
    StageSpec(3, 3, 2, 6, 80),
    StageSpec(3, 5, 1, 6, 112),
    StageSpec(4, 5, 2, 6, 192),
    StageSpec(1, 3, 1, 6, 320),
)
TAIL_STAGE = 4
"""The first of the stages that make the tail: from a 16th of the picture to a 32nd.

One stage less trains in half the time and is 1.4 points less accurate on flowers, by validation.
"""

_WIDTH_AND_DEPTH = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}  # factors, by variant


class EfficientNetLite(Classifier):
    """A convolution, inverted residual blocks, a wide 1 x 1 convolution, the average, the classes.

    Args:
        config: the settings.
        num_classes: outputs.
        size: ``(height, width)`` of the pictures in pixels; every size works.
    """

    linear_on_average = True
    has_tail = True

    def __init__(
        self, config: EfficientNetLiteConfig, num_classes: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        stages = _scaled(*_WIDTH_AND_DEPTH[config.variant])
        self.stem = _unit(SameConv2d(3, STEM_CHANNELS, kernel_size=3, stride=2))
        self.blocks = nn.Sequential()
        self.num_before_tail = sum(stage.num_blocks for stage in stages[:TAIL_STAGE])
        widths = (STEM_CHANNELS, *(stage.channels for stage in stages))
        for stage, (in_channels, out_channels) in zip(
            stages, itertools.pairwise(widths), strict=True
        ):
            self.blocks.append(InvertedResidual(in_channels, stage, stage.stride))
            for _ in range(stage.num_blocks - 1):
                self.blocks.append(InvertedResidual(out_channels, stage, stride=1))
        self.head = _unit(SameConv2d(widths[-1], NUM_FEATURES, kernel_size=1))
        self.dropout = Dropout(config.dropout)
        self.classes = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c y x"]:
        """Return the map after the head, a 32nd as large each way, rounded up."""
        return self.tail(self.middle(images))

    def middle(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c y x"]:
        """Return the map before the last three stages, a 16th as large each way, rounded up."""
        middle: Tensor = self.stem(images)
        for block in list(self.blocks)[: self.num_before_tail]:
            middle = block(middle)
        return middle

    def tail(self, middle: Float[Tensor, "n c y x"]) -> Float[Tensor, "n d v u"]:
        """Return the map after the head from the one before the last three stages."""
        for module in self.tail_modules():
            middle = module(middle)
        return middle

    def tail_modules(self) -> list[nn.Module]:
        """Return the blocks of the last three stages, and the head."""
        return [*list(self.blocks)[self.num_before_tail :], self.head]

    def stages(self) -> list[nn.Module]:
        """Return the stem, each block, the head and the classes."""
        return [self.stem, *self.blocks, self.head, self.classes]

    def embed(self, features: Float[Tensor, "n c y x"]) -> Float[Tensor, "n c"]:
        """Return the average of the map over its pixels."""
        embedding: Tensor = self.dropout(features.mean((2, 3)))
        return embedding

    def classify(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the logits."""
        logits: Tensor = self.classes(embedding)
        return logits


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; add what came in where the shape is the same.

    Args:
        in_channels: channels that come in.
        stage: kernel side, expansion and outgoing channels.
        stride: step of the filters in pixels.
    """

    def __init__(self, in_channels: int, stage: StageSpec, stride: int) -> None:
        super().__init__()
        wide = in_channels * stage.expansion
        self.expand = nn.Sequential()
        if stage.expansion != 1:
            self.expand = _unit(SameConv2d(in_channels, wide, kernel_size=1))
        self.depthwise = _unit(SameConv2d(wide, wide, stage.kernel_size, stride, groups=wide))
        self.project = _unit(SameConv2d(wide, stage.channels, kernel_size=1), rectified=False)
        self.is_residual = stride == 1 and in_channels == stage.channels

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        """Return the block's map."""
        change: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + change if self.is_residual else change


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose map has ``ceil(side / stride)`` pixels a side.

    This is TensorFlow's padding "SAME": what is missing is added half on each side, and an odd
    pixel at the bottom and the right. Torch's own padding would add it at the top and the left
    too, and move the map of an even side by one pixel.
    Source: https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        kernel_size: side of the kernel in pixels, odd.
        stride: step in pixels.
        groups: see `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
    ) -> None:
        # With stride 1 half the kernel on every side is the same, and needs no copy of the map.
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        """Return the map."""
        kernel_size, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return super().forward(x)
        height, width = (_missing(side, kernel_size, stride) for side in x.shape[2:])
        sides = (width // 2, width - width // 2, height // 2, height - height // 2)
        return super().forward(F.pad(x, sides))


def _missing(side: int, kernel_size: int, stride: int) -> int:
    """Return how many pixels a side lacks for ``ceil(side / stride)`` windows."""
    return max(0, (math.ceil(side / stride) - 1) * stride + kernel_size - side)


def _unit(convolution: SameConv2d, *, rectified: bool = True) -> nn.Sequential:
    # Torch's momentum, 0.1: with the original's 0.01 the statistics of a short run stay at zero.
    unit = nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels, EPS))
    return unit.append(nn.ReLU6(inplace=True)) if rectified else unit


def _scaled(width: float, depth: float) -> list[StageSpec]:
    """Return the stages, each wider and deeper; the first and the last are not deepened."""
    last = len(_STAGES) - 1
    return [
        stage._replace(
            channels=_rounded(stage.channels * width),
            num_blocks=math.ceil(stage.num_blocks * (depth if 0 < number < last else 1)),
        )
        for number, stage in enumerate(_STAGES)
    ]


def _rounded(channels: float) -> int:
    """Return the nearest multiple of 8 that takes at most a tenth away."""
    nearest = int(channels + 4) // 8 * 8
    return nearest if nearest >= 0.9 * channels else nearest + 8
