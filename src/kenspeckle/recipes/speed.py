"""The most accuracy on small photographs for the least arithmetic.

Command: ken train DATA --recipe speed
Source: K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, and
https://github.com/KellerJordan/cifar10-airbench; here in float32 and narrower, for two CPU cores.
"""

from kenspeckle.config import (
    AugmentationConfig,
    LossConfig,
    OptimizerConfig,
    PixelsConfig,
    Recipe,
    ScheduleConfig,
    SpeedConfig,
    TrainingConfig,
)

__all__ = ["RECIPE"]

RECIPE = Recipe(
    name="speed",
    promise="CIFAR-10, 85 % of its training pictures: test accuracy 0.892 ± 0.003 (3 seeds), "
    "about 280 s on 2 CPU cores",
    model=SpeedConfig(channels=(32, 128, 128)),
    pixels=PixelsConfig(size=(32, 32)),
    augmentation=AugmentationConfig(flip=True, shift=2),
    loss=LossConfig(name="cross-entropy", label_smoothing=0.2),
    optimizer=OptimizerConfig(name="muon", lr=0.16),
    schedule=ScheduleConfig(name="linear", warmup=0.2),
    training=TrainingConfig(epochs=10, batch_size=128),
)
