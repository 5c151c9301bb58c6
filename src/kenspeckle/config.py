"""Recipes: every choice of a run as frozen values, with checks.

A recipe holds data only. Names are looked up in closed dictionaries, never imported, so that a
recipe read from a file cannot name code. A setting that the chosen part would ignore is an error.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from kenspeckle.core import Geometry, InvalidValueError, Normalisation

__all__ = [
    "MODEL_CONFIGS",
    "OPTIMIZER_OPTIONS",
    "AugmentationConfig",
    "CnnConfig",
    "EfficientNetLiteConfig",
    "Imbalance",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PixelsConfig",
    "Recipe",
    "ResNetConfig",
    "ScheduleConfig",
    "SpeedConfig",
    "SplitConfig",
    "TimmConfig",
    "TrainingConfig",
    "TransferConfig",
    "require",
]


Imbalance = Literal["none", "weights", "sampling", "prior"]
"""What is done about classes of unequal size; see `TrainingConfig`."""


def require(holds: bool, name: str, allowed: str, got: object) -> None:
    """Raise InvalidValueError in its one form unless `holds`.

    Raises:
        InvalidValueError: it does not hold.
    """
    if not holds:
        raise InvalidValueError(f"{name} must be {allowed}; got {got!r}")


def _at_least(least: int, **values: int | tuple[int, ...]) -> None:
    for name, value in values.items():
        every = value if isinstance(value, tuple) else (value,)
        require(all(v >= least for v in every), name, f"at least {least}", value)


def _fraction(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value < 1, name, "from 0 to below 1", value)


@dataclass(frozen=True)
class CnnConfig:
    """The textbook network: convolutions with pooling, then fully connected layers.

    Attributes:
        channels: output channels of each convolution; its length is the depth.
        kernel_size: side of every kernel, in pixels.
        stride: step of every convolution, in pixels.
        padding: zeros around every map, in pixels.
        pooling: what follows each convolution: the ``max`` or ``average`` of each window, or none.
        pool_size: side and step of the pooling window, in pixels.
        hidden: widths of the fully connected layers before the classes.
        dropout: share of activations dropped after each hidden layer.
        batch_norm: whether each convolution is followed by batch normalisation.
    """

    family: ClassVar[str] = "cnn"
    channels: tuple[int, ...] = (32, 64)
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    pooling: Literal["max", "average", "none"] = "max"
    pool_size: int = 2
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.0
    batch_norm: bool = False

    def __post_init__(self) -> None:
        require(len(self.channels) > 0, "channels", "at least one number", self.channels)
        _at_least(1, channels=self.channels, kernel_size=self.kernel_size, stride=self.stride)
        _at_least(1, pool_size=self.pool_size, hidden=self.hidden)
        _at_least(0, padding=self.padding)
        _fraction(dropout=self.dropout)
        if self.pooling == "none" and self.pool_size != CnnConfig.pool_size:
            raise InvalidValueError("pool_size has no effect with pooling 'none'")
        require(
            not (self.dropout and not self.hidden),
            "dropout",
            "0 without hidden layers, since it acts after them",
            self.dropout,
        )


@dataclass(frozen=True)
class ResNetConfig:
    """A residual network for small pictures (He et al. 2016, section 4.2, arXiv 1512.03385).

    Attributes:
        channels: width of each stage; every stage but the first halves the map.
        num_blocks: residual blocks in each stage.
        dropout: share of the embedding dropped before the classes.
    """

    family: ClassVar[str] = "resnet"
    channels: tuple[int, ...] = (32, 64, 128)
    num_blocks: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(len(self.channels) > 0, "channels", "at least one number", self.channels)
        _at_least(1, channels=self.channels, num_blocks=self.num_blocks)
        _fraction(dropout=self.dropout)


@dataclass(frozen=True)
class SpeedConfig:
    """A network that reaches its accuracy in few operations (airbench, arXiv 2404.00498).

    Attributes:
        channels: width of each of the three blocks.
        logit_scale: factor on the logits, which stands in for the temperature of the softmax.
    """

    family: ClassVar[str] = "speed"
    channels: tuple[int, int, int] = (64, 128, 128)
    logit_scale: float = 1 / 9

    def __post_init__(self) -> None:
        _at_least(1, channels=self.channels)
        require(self.logit_scale > 0, "logit_scale", "above 0", self.logit_scale)


@dataclass(frozen=True)
class EfficientNetLiteConfig:
    """A deep network of few operations, for pretrained weights (EfficientNet-Lite).

    Attributes:
        variant: 0, 1 or 2, each larger than the one before.
        dropout: share of the embedding dropped before the classes.
    """

    family: ClassVar[str] = "efficientnet-lite"
    variant: int = 0
    dropout: float = 0.2

    def __post_init__(self) -> None:
        require(self.variant in {0, 1, 2}, "variant", "0, 1 or 2", self.variant)
        _fraction(dropout=self.dropout)


@dataclass(frozen=True)
class TimmConfig:
    """Any network of the library timm, by its name there (extra ``zoo``).

    Attributes:
        network: what timm calls it, such as ``mobilenetv4_conv_small``.
        dropout: share of the embedding dropped before the classes.
    """

    family: ClassVar[str] = "timm"
    network: str = "resnet18"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(bool(self.network.strip()), "network", "a name that timm knows", self.network)
        _fraction(dropout=self.dropout)


ModelConfig = CnnConfig | ResNetConfig | SpeedConfig | EfficientNetLiteConfig | TimmConfig

MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    "cnn": CnnConfig,
    "resnet": ResNetConfig,
    "speed": SpeedConfig,
    "efficientnet-lite": EfficientNetLiteConfig,
    "timm": TimmConfig,
}


@dataclass(frozen=True)
class PixelsConfig:
    """How pictures become network inputs.

    Attributes:
        size: ``(height, width)`` in pixels, or None to derive it from the data.
        fit: see `Geometry`.
        interpolation: see `Geometry`.
        background: see `Geometry`.
        mean: per channel on the scale 0 to 1, or None for the training set's own.
        deviation: per channel on the scale 0 to 1, or None for the training set's own.
    """

    size: tuple[int, int] | None = None
    fit: Literal["squash", "crop", "pad"] = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    background: tuple[int, int, int] = (255, 255, 255)
    mean: tuple[float, float, float] | None = None
    deviation: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            _at_least(1, size=self.size)
            require(max(self.size) <= 4096, "size", "at most 4096 pixels a side", self.size)
        require(
            all(0 <= level <= 255 for level in self.background),
            "background",
            "three grey levels from 0 to 255",
            self.background,
        )
        require(
            self.deviation is None or min(self.deviation) > 0,
            "deviation",
            "above 0",
            self.deviation,
        )

    def geometry(self, size: tuple[int, int]) -> Geometry:
        """Return the geometry for pictures of `size`, ``(height, width)`` in pixels."""
        return Geometry(self.size or size, self.fit, self.interpolation, self.background)

    def normalisation(self, measured: Normalisation) -> Normalisation:
        """Return the stated normalisation; `measured` stands in where nothing is stated."""
        return Normalisation(self.mean or measured.mean, self.deviation or measured.deviation)


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of the training pictures; every amount is zero (off) by default.

    Attributes:
        flip: whether each picture is mirrored left to right in every second epoch.
        shift: largest translation in pixels, both ways; the border is reflected.
        zoom: largest share of a side that a random crop leaves out, 0 to below 1.
        cutout: side in pixels of a square that is set to the picture's own mean colour.
        brightness: largest relative change of all grey levels.
        contrast: largest relative change of the distance from the mean grey level.
        saturation: largest relative change of the distance from grey.
        mixup: a batch is blended with another order of itself, and so are its labels; the share is
            drawn from a beta distribution with both parameters at this value.
        cutmix: likewise, but a rectangle of the other picture is pasted in; when both are on, a
            coin decides for each batch.
    """

    flip: bool = False
    shift: int = 0
    zoom: float = 0.0
    cutout: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _at_least(0, shift=self.shift, cutout=self.cutout)
        _fraction(zoom=self.zoom, brightness=self.brightness, contrast=self.contrast)
        _fraction(saturation=self.saturation)


@dataclass(frozen=True)
class LossConfig:
    """What training makes small.

    Attributes:
        name: ``cross-entropy``, ``mse`` (on one-hot targets), ``focal`` or ``binary``
            (binary cross-entropy, one against the rest).
        label_smoothing: share of the target spread over all classes; cross-entropy only.
        gamma: focusing exponent of the focal loss, 2 when None.
    """

    name: Literal["cross-entropy", "mse", "focal", "binary"] = "cross-entropy"
    label_smoothing: float = 0.0
    gamma: float | None = None

    def __post_init__(self) -> None:
        _fraction(label_smoothing=self.label_smoothing)
        if self.label_smoothing and self.name != "cross-entropy":
            raise InvalidValueError(
                f"label_smoothing has no effect on the loss '{self.name}'; "
                "it acts on 'cross-entropy' only"
            )
        if self.gamma is not None and self.name != "focal":
            raise InvalidValueError(
                f"gamma has no effect on the loss '{self.name}'; it acts on 'focal' only"
            )
        require(self.gamma is None or self.gamma >= 0, "gamma", "at least 0", self.gamma)


OPTIMIZER_OPTIONS: dict[str, frozenset[str]] = {
    "gd": frozenset(),
    "sgd": frozenset(),
    "momentum": frozenset({"momentum"}),
    "nesterov": frozenset({"momentum"}),
    "rmsprop": frozenset({"momentum", "alpha", "eps"}),
    "adam": frozenset({"betas", "eps"}),
    "adamw": frozenset({"betas", "eps"}),
    "muon": frozenset({"momentum"}),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move.

    Attributes:
        name: ``gd`` (the whole training set per step), ``sgd``, ``momentum``, ``nesterov``,
            ``rmsprop``, ``adam``, ``adamw`` or ``muon``.
        lr: learning rate at its highest; Muon wants about 0.1.
        weight_decay: pull towards zero; norms and biases are left alone, and under Muon all but
            the last layer.
        momentum: share of the last step that is kept; the optimizer's own default when None.
        alpha: smoothing of RMSprop's squared gradients, 0.99 when None.
        betas: smoothing of Adam's gradients and squared gradients, (0.9, 0.999) when None.
        eps: what keeps the division of RMSprop and Adam finite, 1e-8 when None.
    """

    name: Literal["gd", "sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw", "muon"] = "sgd"
    lr: float = 0.01
    weight_decay: float = 0.0
    momentum: float | None = None
    alpha: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", "above 0", self.lr)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        for name in ("momentum", "alpha", "betas", "eps"):
            if getattr(self, name) is not None and name not in OPTIMIZER_OPTIONS[self.name]:
                takers = sorted(n for n, options in OPTIMIZER_OPTIONS.items() if name in options)
                raise InvalidValueError(
                    f"{name} has no effect on the optimizer '{self.name}'; "
                    f"it acts on {', '.join(takers)}"
                )
        for name in ("momentum", "alpha"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, "from 0 to below 1", value)
        betas = self.betas or (0.0, 0.0)
        require(all(0 <= b < 1 for b in betas), "betas", "from 0 to below 1", betas)
        require(self.eps is None or self.eps > 0, "eps", "above 0", self.eps)


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the run.

    Attributes:
        name: ``constant``, ``linear`` (to zero), ``cosine`` (to zero) or ``steps``
            (a tenth after 50 % and again after 75 % of the run).
        warmup: share of the run during which the rate rises from zero.
    """

    name: Literal["constant", "linear", "cosine", "steps"] = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        _fraction(warmup=self.warmup)


@dataclass(frozen=True)
class TrainingConfig:
    """How long, and with which guards.

    Attributes:
        epochs: passes over the training set.
        batch_size: pictures per step.
        patience: epochs without a better validation accuracy before training stops; 0 is never.
        ema_decay: decay per step of the averaged weights that are validated; 0 is off.
        clip_norm: largest norm of the gradient; 0 is off.
        precision: ``auto`` uses bfloat16 only where the hardware has it, ``float32`` never does.
        imbalance: what is done about classes of unequal size: nothing, ``weights`` (each picture's
            loss counts by the inverse of its class's frequency), ``sampling`` (each class is shown
            equally often) or ``prior`` (the logits lose the logarithm of the class's frequency
            after training, as if the classes had been equal).
    """

    epochs: int = 10
    batch_size: int = 64
    patience: int = 0
    ema_decay: float = 0.0
    clip_norm: float = 0.0
    precision: Literal["auto", "float32"] = "auto"
    imbalance: Imbalance = "none"

    def __post_init__(self) -> None:
        _at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        _at_least(0, patience=self.patience)
        _fraction(ema_decay=self.ema_decay)
        require(self.clip_norm >= 0, "clip_norm", "at least 0", self.clip_norm)


@dataclass(frozen=True)
class TransferConfig:
    """What is taken over from a network that was trained on other pictures.

    Whatever is trained, a linear head on the frozen features comes first.

    Attributes:
        weights: ``none`` (every weight is drawn at random), ``imagenet`` (the published ones of a
            package that is installed), ``hub`` (fetched by timm), or the path of a file.
        depth: what is trained: the ``head`` alone, the ``tail`` (the last blocks too, on maps that
            are computed once), or ``all``.
        layer_decay: factor on the learning rate from each block to the one before it.
        norms: whether batch norms take the statistics of the ``batch``, or keep those of the
            pretrained weights (``frozen``).
    """

    weights: str = "none"
    depth: Literal["head", "tail", "all"] = "all"
    layer_decay: float = 1.0
    norms: Literal["batch", "frozen"] = "batch"

    def __post_init__(self) -> None:
        require(bool(self.weights), "weights", "none, imagenet, hub or a file", self.weights)
        require(0 < self.layer_decay <= 1, "layer_decay", "above 0, at most 1", self.layer_decay)
        if self.weights == "none" and (self.depth, self.layer_decay, self.norms) != (
            "all",
            1.0,
            "batch",
        ):
            raise InvalidValueError(
                "depth, layer_decay and norms have no effect without pretrained weights; "
                "name them with weights=imagenet or weights=FILE"
            )


@dataclass(frozen=True)
class SplitConfig:
    """The shares that are held out when the data come without a split.

    Attributes:
        validation: share that chooses the best epoch.
        test: share that is looked at once, at the end.
    """

    validation: float = 0.15
    test: float = 0.15

    def __post_init__(self) -> None:
        _fraction(validation=self.validation, test=self.test)
        require(self.validation > 0, "validation", "above 0", self.validation)
        require(
            self.validation + self.test < 1,
            "validation + test",
            "below 1, so that something is left to train on",
            self.validation + self.test,
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run besides the data.

    Attributes:
        name: what the recipe is called.
        promise: in words, the result that was measured with it, where, and at what cost.
        model: the network and its settings.
        pixels: geometry and normalisation.
        augmentation: random changes of the training pictures.
        loss: what is made small.
        optimizer: how the weights move.
        schedule: how the learning rate moves.
        training: epochs, batch size, guards.
        transfer: what is taken over from a network that was trained before.
        split: shares held out when the data come without a split.
        seed: the one number from which every random choice derives.
    """

    name: str = "custom"
    promise: str = ""
    model: ModelConfig = field(default_factory=CnnConfig)
    pixels: PixelsConfig = field(default_factory=PixelsConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", "from 0 to below 2**63", self.seed)
        mixed = self.augmentation.mixup or self.augmentation.cutmix
        if mixed and self.loss.name != "cross-entropy":
            raise InvalidValueError(
                f"mixup and cutmix have no effect on the loss '{self.loss.name}'; "
                "they act on 'cross-entropy' only"
            )
