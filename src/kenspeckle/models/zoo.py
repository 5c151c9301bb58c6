"""The networks of timm (Wightman 2019, https://github.com/huggingface/pytorch-image-models).

timm has some 1,300 of them, which no suite can try one by one. So each is tried when it is built:
one whose embedding is not made from its last map alone, or whose logits are not linear in the
embedding, is refused, and every other gives exactly what timm gives.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kenspeckle.config import TimmConfig
from kenspeckle.core import InvalidValueError, MissingExtraError, nearest
from kenspeckle.layers import Classifier, Dropout

__all__ = ["Layout", "ZooNet"]

# Of the largest value: rounding, and less than a norm that has seen no picture changes anything
# (by the square root of 1 + 1e-5).
TOLERANCE = 1e-6

TimmNetwork = Any  # a module with the methods of timm's networks, which have no type of their own

REMEDY = "take one such as resnet50, convnext_tiny, or vit_tiny_patch16_224"


@dataclass(frozen=True)
class Layout:
    """How a network of timm lays out its last map.

    Attributes:
        kind: axes ``(n, c, y, x)``, ``(n, y, x, c)`` or ``(n, token, c)``.
        grid: rows and columns of the map; where there are tokens that are no patch of the picture,
            such as a class token, all tokens stand in one row.
    """

    kind: Literal["channels first", "channels last", "tokens"]
    grid: tuple[int, int]

    def to_map(self, found: Float[Tensor, "n ..."]) -> Float[Tensor, "n c y x"]:
        """Return the map of what timm gives."""
        if self.kind == "tokens":
            tokens: Tensor = found.transpose(1, 2).unflatten(2, self.grid)
            return tokens
        return found.permute(0, 3, 1, 2) if self.kind == "channels last" else found

    def from_map(self, features: Float[Tensor, "n c y x"]) -> Float[Tensor, "n ..."]:
        """Return a map as timm takes it."""
        if self.kind == "tokens":
            return features.flatten(2).transpose(1, 2)
        if self.kind == "channels last":
            return features.permute(0, 2, 3, 1)
        # Of a map that lies channels last in memory torch would export timm's average as a gather.
        return features.contiguous()


class ZooNet(Classifier):
    """A network of timm, whose classifier is a layer of its own.

    Its stochastic depth and inner dropout are off: they draw from torch's global generator.

    Attributes:
        size: ``(height, width)`` in pixels of the pictures that it was built for.

    Args:
        config: the settings.
        num_classes: outputs.
        size: ``(height, width)`` of the pictures in pixels.
    """

    def __init__(self, config: TimmConfig, num_classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.name = config.network
        self.num_classes = num_classes
        self.size = size
        self.network = _made(self.name, num_classes, size)
        self.classes = _without_classifier(self.network, self.name)
        self.dropout = Dropout(config.dropout)
        self.layout = _layout(self.network, self.name, size)

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c y x"]:
        """Return the last map."""
        return self.layout.to_map(self.network.forward_features(images))

    def embed(self, features: Float[Tensor, "n c y x"]) -> Float[Tensor, "n d"]:
        """Return what timm calls the pre-logits."""
        embedding = self.network.forward_head(self.layout.from_map(features), pre_logits=True)
        dropped: Tensor = self.dropout(embedding)
        return dropped

    def classify(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the logits."""
        logits: Tensor = self.classes(embedding)
        return logits

    def stages(self) -> list[nn.Module]:
        """Return the parameters of each block, as timm groups them for layer-wise rates.

        The few networks whose blocks timm does not tell apart are one part.
        """
        from timm.models import group_parameters

        own = dict(self.network.named_parameters())
        groups = [list(own)]
        if hasattr(self.network, "group_matcher"):
            matcher = self.network.group_matcher(coarse=False)
            groups = group_parameters(self.network, matcher).values()
        return [
            *(nn.ParameterList([own[name] for name in names]) for names in groups),
            self.classes,
        ]

    def initialise_(self, generator: torch.Generator) -> None:
        """Set the whole network as timm initialises it, and try whether it answers as timm's does.

        timm draws from torch's global generator alone, so that is seeded from `generator` for as
        long as it takes, and then put back.

        Raises:
            InvalidValueError: the embedding is not made from the last map alone, or the logits are
                not linear in it.
        """
        device = generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = _made(self.name, self.num_classes, self.size).to(device).eval()
        images = torch.empty(1, 3, *self.size, device=device).normal_(generator=generator)
        with torch.no_grad():
            wanted = network(images)
            self.network, self.classes = network, _without_classifier(network, self.name)
            self.eval()
            features = self.features(images)
            found = self(images)
        if not _are_close(found, wanted):
            raise InvalidValueError(
                "network must be one of timm whose embedding is made from its last map alone; "
                f"that of {self.name!r} is not; {REMEDY}"
            )
        self.linear_on_average = self._averages(features.normal_(generator=generator))
        self.train()

    @torch.enable_grad()
    def _averages(self, features: Tensor) -> bool:
        """Return whether the embedding of a map is its average, whatever the weights."""
        embedding, average = self.embed(features), features.mean((2, 3))
        has_weights = embedding.requires_grad  # some parameter stands between the map and it
        return not has_weights and _are_close(embedding, average)


def _made(name: str, num_classes: int, size: tuple[int, int]) -> TimmNetwork:
    """Return a network of timm that draws no random numbers after it is made.

    Raises:
        InvalidValueError: timm has no such network, or not for pictures of this size.
        MissingExtraError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("networks of timm", "zoo") from error
    tagged = "." in name
    if not timm.is_model(name) or (tagged and name not in timm.list_models(include_tags=True)):
        known = timm.list_models(include_tags=tagged)
        raise InvalidValueError(
            f"network must be one that timm knows; got {name!r}; {nearest(name, known)}"
        )
    pretrained = timm.get_pretrained_cfg(name)
    is_fixed = pretrained is not None and pretrained.fixed_input_size
    try:
        network = timm.create_model(
            name, num_classes=num_classes, **({"img_size": size} if is_fixed else {})
        )
    except Exception as error:  # the constructors of timm raise what they meet
        raise _size_error(name, size, error) from error
    for module in network.modules():
        for share in ("p", "drop_prob", "drop_rate"):  # torch's name, and timm's two
            if isinstance(getattr(module, share, None), float):
                setattr(module, share, 0.0)
    return network


def _without_classifier(network: TimmNetwork, name: str) -> nn.Linear:
    """Take the last layer off a network of timm, and return it.

    Raises:
        InvalidValueError: what leads from the embedding to the logits is not one linear layer.
    """
    classifier = network.get_classifier() if hasattr(network, "get_classifier") else None
    before = len(network.state_dict())
    if isinstance(classifier, nn.Linear | nn.Conv2d):
        network.reset_classifier(0)
        if before - len(network.state_dict()) == len(classifier.state_dict()):
            return _as_linear(classifier)
    raise InvalidValueError(
        f"network must be one of timm that ends in one linear layer; {name!r} does not; {REMEDY}"
    )


def _as_linear(classifier: nn.Linear | nn.Conv2d) -> nn.Linear:
    """Return the layer itself, or the linear one that a convolution of a single pixel is."""
    if isinstance(classifier, nn.Linear):
        return classifier
    # On the meta device, where no weights are drawn that would be replaced.
    linear = nn.Linear(classifier.in_channels, classifier.out_channels, device="meta")
    linear.weight = nn.Parameter(classifier.weight.detach().flatten(1))
    bias = classifier.bias
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return linear


def _layout(network: TimmNetwork, name: str, size: tuple[int, int]) -> Layout:
    """Return the layout of a network's last map, from a forward pass on the network's device.

    Raises:
        InvalidValueError: the network does not take this size, or gives no map.
    """
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            found = network.eval().forward_features(torch.zeros(1, 3, *size, device=device))
    except Exception as error:  # assertions, or what torch meets where no pixel is left
        raise _size_error(name, size, error) from error
    network.train()
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
    if len(shape) == 4 and shape[3 if channels_last else 1] == network.num_features:
        if channels_last:
            return Layout("channels last", (shape[1], shape[2]))
        return Layout("channels first", (shape[2], shape[3]))
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", (0, 0))
    if len(shape) == 3 and shape[2] == network.num_features:
        return Layout("tokens", grid if shape[1] == grid[0] * grid[1] else (1, shape[1]))
    raise InvalidValueError(
        f"network must be one of timm whose last map is one of pixels or tokens; that of {name!r} "
        f"is not: {shape}; {REMEDY}"
    )


def _size_error(name: str, size: tuple[int, int], error: Exception) -> InvalidValueError:
    import timm

    pretrained = timm.get_pretrained_cfg(name)
    _, height, width = pretrained.input_size if pretrained else (3, 224, 224)
    reason = str(error).partition("\n")[0] or type(error).__name__
    return InvalidValueError(
        f"pictures for the network {name!r} must have a size that it takes, such as {height} x "
        f"{width} pixels; got {size[0]} x {size[1]}: {reason[:200]}"
    )


def _are_close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
