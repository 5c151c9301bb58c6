"""What every network here is made of, beside the layers that torch has.

Nothing reads torch's global random generator: weights are drawn from a generator that is passed
in, and dropout has one of its own.
"""

import abc
import math
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from kenspeckle.core import InvalidValueError

__all__ = [
    "Classifier",
    "DiracConv2d",
    "Dropout",
    "Initialisable",
    "Tail",
    "Whitening",
    "initialise",
    "normalise",
    "reseed",
    "whiten_",
]

Network = TypeVar("Network", bound=nn.Module)


class Classifier(nn.Module, abc.ABC):
    """A network in three parts: pictures → feature map → embedding → logits.

    Attributes:
        linear_on_average: whether the embedding is the average of the feature map over its pixels
            and the last layer is linear; class activation maps are exact then.
        has_tail: whether `middle`, `tail` and `tail_modules` cut it in two; the maps of a frozen
            first part can be kept then, and the second trained on them.
        norms_frozen: whether batch norms keep their statistics in training.
    """

    linear_on_average: bool = False
    has_tail: bool = False
    norms_frozen: bool = False

    @abc.abstractmethod
    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c y x"]:
        """Return the last feature map."""

    @abc.abstractmethod
    def embed(self, features: Float[Tensor, "n c y x"]) -> Float[Tensor, "n d"]:
        """Return the input of the last layer."""

    @abc.abstractmethod
    def classify(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the logits."""

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k"]:
        """Return the logits of normalised pictures."""
        return self.classify(self.embed(self.features(images)))

    def train(self: "Network", mode: bool = True) -> "Network":
        """Set training mode, in which frozen norms take no part."""
        super().train(mode)
        if self.norms_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def stages(self) -> list[nn.Module]:
        """Return disjoint parts, from the input to the classes, that hold every parameter."""
        return [self]

    def last_layer(self) -> nn.Linear:
        """Return the layer that maps the embedding to logits: the last linear one.

        Raises:
            InvalidValueError: no layer is linear.
        """
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise InvalidValueError(
                f"a {type(self).__name__} must have a linear layer; it has none"
            )
        return linear[-1]

    def middle(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c y x"]:
        """Return the map that goes into the tail.

        Raises:
            InvalidValueError: the network has no tail.
        """
        raise self._without_tail()

    def tail(self, middle: Float[Tensor, "n c y x"]) -> Float[Tensor, "n d v u"]:
        """Return the last feature map; ``tail(middle(images))`` is ``features(images)``.

        Raises:
            InvalidValueError: the network has no tail.
        """
        raise self._without_tail()

    def tail_modules(self) -> list[nn.Module]:
        """Return the parts that `tail` runs, which hold all of its parameters.

        Raises:
            InvalidValueError: the network has no tail.
        """
        raise self._without_tail()

    def _without_tail(self) -> InvalidValueError:
        return InvalidValueError(
            f"the network must be one that has a tail; got a {type(self).__name__}"
        )


class Tail(Classifier):
    """The second part of a network by itself: maps in, logits out; the first part stays as it is.

    Args:
        network: one that has a tail, whose modules are shared.
    """

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network
        self.linear_on_average = network.linear_on_average
        self.requires_grad_(False)
        for module in self.stages():
            module.requires_grad_(True)

    def stages(self) -> list[nn.Module]:
        """Return the parts that are trained."""
        return [*self.network.tail_modules(), self.network.last_layer()]

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Return the logits of maps."""
        return self.classify(self.embed(self.features(images)))

    def last_layer(self) -> nn.Linear:
        """Return the network's."""
        return self.network.last_layer()

    def features(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        """Return the last feature map."""
        return self.network.tail(images)

    def embed(self, features: Float[Tensor, "n c y x"]) -> Float[Tensor, "n d"]:
        """Return the input of the last layer."""
        return self.network.embed(features)

    def classify(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the logits."""
        return self.network.classify(embedding)


def normalise(
    images: UInt8[Tensor, "n h w 3"],
    mean: tuple[float, float, float],
    deviation: tuple[float, float, float],
) -> Float[Tensor, "n 3 h w"]:
    """Return network inputs: grey levels scaled to 0 to 1, less the mean, over the deviation.

    The result is a view with channels last in memory, so that the pictures are not transposed.

    Args:
        images: RGB, 0 to 255.
        mean: per channel, on the scale 0 to 1.
        deviation: per channel, on the scale 0 to 1, above zero.

    Example:
        >>> black = torch.zeros(1, 4, 6, 3, dtype=torch.uint8)
        >>> normalise(black, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).shape
        torch.Size([1, 3, 4, 6])
    """
    _, H, W, _ = images.shape
    factor = torch.tensor([1 / (255 * d) for d in deviation], device=images.device)
    offset = torch.tensor([-m / d for m, d in zip(mean, deviation, strict=True)])
    # A row of pixels at a time: vectors of 3 * W levels are five times as fast as vectors of 3.
    rows = images.reshape(-1, H, W * 3).float()
    levels = torch.addcmul(offset.to(images.device).repeat(W), rows, factor.repeat(W))
    return levels.view(-1, H, W, 3).permute(0, 3, 1, 2)


class Dropout(nn.Module):
    """Sets each activation to zero with probability `p` in training, and scales the others up.

    Source: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html

    Args:
        p: share of the activations that is dropped, from 0 to below 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.seed = 0
        self._generator: torch.Generator | None = None

    def reseed(self, seed: int) -> None:
        """Start the sequence of masks that belongs to `seed`, from 0 to below 2**64."""
        self.seed = seed
        self._generator = None

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `x`, in training with some activations dropped."""
        if not self.training or self.p == 0:
            return x
        if self._generator is None or self._generator.device != x.device:
            self._generator = torch.Generator(x.device).manual_seed(self.seed)
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self._generator)
        return x * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        """Return the share, for printing."""
        return f"p={self.p}"


def reseed(model: nn.Module, seed: int, epoch: int) -> None:
    """Seed every stochastic layer of `model` from the run's seed, the epoch and its own place.

    Args:
        model: the network, on any device.
        seed: the run's seed, at least 0.
        epoch: number of the epoch, from 0.
    """
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    for index, layer in enumerate(layers):
        words = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
        layer.reseed(int(words[0]))


@runtime_checkable
class Initialisable(Protocol):
    """A module that sets its own parameters and buffers."""

    def initialise_(self, generator: torch.Generator) -> None:
        """Set every parameter and buffer of the module and of those in it, from `generator`."""


class DiracConv2d(nn.Conv2d):
    """A convolution without bias, size preserving, that starts by passing its input through.

    The first filters hold a one in the middle of "their" input channel; any further filters are
    drawn at random. Source: airbench, section 3.3, arXiv 2404.00498; Zagoruyko and Komodakis
    2017, arXiv 1706.00388.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)

    def initialise_(self, generator: torch.Generator) -> None:
        """Set the filters."""
        _fan_in_uniform_(self.weight, self.weight, generator)
        nn.init.dirac_(self.weight.data[: self.in_channels])


class Whitening(nn.Module):
    """A first layer of frozen 2 x 2 filters that decorrelate the pixels of a patch.

    The filters are the principal components of the training patches, each scaled to unit power
    and taken with both signs, since a rectifier follows. Only the bias is trained.
    Source: Page 2019, https://myrtle.ai/how-to-train-your-resnet-8-bag-of-tricks/ and airbench,
    section 3.2, arXiv 2404.00498.

    Attributes:
        weight: the filters, ``(24, 3, 2, 2)``; random until `whiten_` has seen pictures.
        bias: one trained offset per filter.
    """

    kernel_size = 2
    out_channels = 2 * 3 * kernel_size**2
    # Added to the power of a component: keeps those that hold only noise from being blown up.
    eps = 5e-4
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        shape = (self.out_channels, 3, self.kernel_size, self.kernel_size)
        self.register_buffer("weight", torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(self.out_channels))

    def initialise_(self, generator: torch.Generator) -> None:
        """Set the filters at random and the bias to zero."""
        _fan_in_uniform_(self.weight, self.weight, generator)
        nn.init.zeros_(self.bias)

    def whiten_(self, images: Float[Tensor, "n 3 h w"]) -> None:
        """Set the filters in closed form from the patches of normalised training pictures.

        Args:
            images: at least one picture of at least 2 x 2 pixels.
        """
        size = 3 * self.kernel_size**2
        power = torch.zeros(size, size, dtype=torch.float64, device=images.device)
        num_patches = 0
        for some in images.split(256):  # bounds the memory: a patch is four times its pixel
            patches = F.unfold(some, self.kernel_size).transpose(1, 2).reshape(-1, size)
            power += (patches.T @ patches).double()
            num_patches += len(patches)
        # On the CPU: not every accelerator has an eigenvalue solver, or double precision in it.
        eigenvalues, eigenvectors = torch.linalg.eigh((power / num_patches).cpu())
        filters = (eigenvectors / (eigenvalues + self.eps).sqrt()).T
        # The sign of an eigenvector is arbitrary: fixing it makes the layer reproducible.
        largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
        filters = (filters * largest.sign()).view(size, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 24 h-1 w-1"]:
        """Return the whitened map, one pixel smaller each way."""
        return F.conv2d(images, self.weight, self.bias)


@torch.no_grad()
def whiten_(model: nn.Module, images: Float[Tensor, "n 3 h w"]) -> None:
    """Set every whitening layer of `model` from normalised training pictures.

    A network without such a layer is left as it is.
    """
    for module in model.modules():
        if isinstance(module, Whitening):
            module.whiten_(images)


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Set every parameter and buffer of `model`, in the order of its modules.

    The distributions are PyTorch's own: convolutions and fully connected layers are uniform
    within ``1 / sqrt(fan in)``, batch normalisation starts as the identity. A module with an
    ``initialise_`` method sets itself, and all that it contains.

    Args:
        model: the network, on the device of `generator`; what its tensors hold is not read.
        generator: the only source of chance.

    Raises:
        InvalidValueError: a layer has parameters or buffers and no rule sets them.
    """
    _initialise("", model, generator)


def _initialise(name: str, module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, Initialisable):
        module.initialise_(generator)
        return
    if isinstance(module, nn.Conv2d | nn.Linear):
        _fan_in_uniform_(module.weight, module.weight, generator)
        if module.bias is not None:
            _fan_in_uniform_(module.bias, module.weight, generator)
    elif isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()
    elif module._parameters or module._buffers:
        raise InvalidValueError(
            f"the layer '{name}' must be one that can be initialised; got a "
            f"{type(module).__name__}; give it a method initialise_(generator)"
        )
    for child_name, child in module.named_children():
        _initialise(f"{name}.{child_name}" if name else child_name, child, generator)


def _fan_in_uniform_(tensor: Tensor, weight: Tensor, generator: torch.Generator) -> None:
    """Kaiming's uniform distribution with a = sqrt(5), which is torch's for these layers."""
    bound = 1 / math.sqrt(weight[0].numel())
    with torch.no_grad():
        tensor.uniform_(-bound, bound, generator=generator)
