"""Losses, one number a picture, and the objective that a recipe asks for.

Every loss maps logits and labels to one loss per item. The loss of a batch is the plain mean of
its items, so that batches add up exactly to the whole training set.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from kenspeckle.config import LossConfig
from kenspeckle.core import InvalidValueError

__all__ = [
    "LOSSES",
    "ItemLoss",
    "balanced_weights",
    "binary_cross_entropy",
    "cross_entropy",
    "focal",
    "mixed_cross_entropy",
    "objective",
    "squared_error",
]

ItemLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (N, K), labels (N,)) -> (N,)``."""


def cross_entropy(
    logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"], label_smoothing: float = 0.0
) -> Float[Tensor, " n"]:
    """Return ``-sum(target * log softmax(logits))`` in nats.

    Args:
        logits: outputs of the network.
        labels: class numbers, 0 to K - 1.
        label_smoothing: share of the target that is spread evenly over all K classes
            (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor([4.])
    """
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def squared_error(logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the mean over the classes of ``(logit - target)**2``, with one-hot targets.

    The outputs enter as they are, as in linear regression, without a softmax: this is the
    textbook's mean squared error, convex in the last layer.

    Example:
        >>> squared_error(torch.tensor([[0.0, 3.0]]), torch.tensor([1]))
        tensor([2.])
    """
    return (logits - _one_hot(logits, labels)).square().mean(1)


def focal(
    logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"], gamma: float = 2.0
) -> Float[Tensor, " n"]:
    """Return ``-(1 - p)**gamma * log(p)``, p being the softmax's probability of the label.

    Source: Lin et al. 2017, arXiv 1708.02002, equation 4.

    Args:
        logits: outputs of the network.
        labels: class numbers, 0 to K - 1.
        gamma: at least 0; how much less a picture counts that is already classified well.
    """
    surprise = cross_entropy(logits, labels)
    miss = -torch.expm1(-surprise)  # 1 - p, exact also where p is nearly 1
    # At p = 1 the power's slope is infinite for gamma below 1, and infinity times 0 not a number.
    return miss.clamp_min(1e-12) ** gamma * surprise


def binary_cross_entropy(
    logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return the mean over the classes of the two-class cross-entropy, one against the rest.

    Each logit answers its own question, "this class or not", through the logistic function.

    Example:
        >>> binary_cross_entropy(torch.zeros(1, 3), torch.tensor([0])).exp()
        tensor([2.])
    """
    targets = _one_hot(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def _one_hot(logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"]) -> Float[Tensor, "n k"]:
    return F.one_hot(labels, logits.shape[1]).to(logits.dtype)


LOSSES: dict[str, ItemLoss] = {
    "cross-entropy": cross_entropy,
    "mse": squared_error,
    "focal": focal,
    "binary": binary_cross_entropy,
}


def balanced_weights(counts: Sequence[int]) -> Float[Tensor, " k"]:
    """Return a weight per class, inverse to its number of pictures.

    The mean weight over the training set is one, so that the learning rate keeps its meaning.
    A class without pictures gets the weight zero.

    Args:
        counts: pictures of each class in the training set.

    Raises:
        InvalidValueError: no class has a picture.

    Example:
        >>> balanced_weights([1, 3])
        tensor([2.0000, 0.6667])
    """
    sizes = torch.tensor(counts, dtype=torch.float64)
    filled = sizes > 0
    if not filled.any():
        raise InvalidValueError(
            f"class counts must be above 0 for at least one class; got {list(counts)!r}"
        )
    weights = torch.where(filled, sizes.sum() / (filled.sum() * sizes.clamp_min(1)), 0.0)
    return weights.float()


def objective(config: LossConfig, balanced: Sequence[int] | None = None) -> ItemLoss:
    """Return the loss per item that `config` describes.

    Args:
        config: which loss, with its settings.
        balanced: pictures of each class in the training set, to weigh each by the inverse; None
            weighs all pictures alike.

    Raises:
        InvalidValueError: weights are to be balanced and no class has a picture.
    """
    loss = LOSSES[config.name]
    if config.label_smoothing:
        loss = functools.partial(cross_entropy, label_smoothing=config.label_smoothing)
    if config.gamma is not None:
        loss = functools.partial(focal, gamma=config.gamma)
    if balanced is None:
        return loss
    return functools.partial(_weighted, loss, balanced_weights(balanced))


def mixed_cross_entropy(
    logits: Float[Tensor, "n k"],
    targets: Float[Tensor, "n k"],
    label_smoothing: float = 0.0,
    weights: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, " n"]:
    """Return the cross-entropy with targets that are shares of several classes, in nats.

    Args:
        logits: outputs of the network.
        targets: the share of each class; rows sum to one.
        label_smoothing: share of the target that is spread evenly over all classes.
        weights: of each class; a picture counts by the mean weight of its classes.
    """
    smooth = targets * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    losses = -(smooth * logits.log_softmax(1)).sum(1)
    return losses if weights is None else losses * (targets @ weights.to(logits))


def _weighted(
    loss: ItemLoss,
    weights: Float[Tensor, " k"],
    logits: Float[Tensor, "n k"],
    labels: Int64[Tensor, " n"],
) -> Float[Tensor, " n"]:
    return loss(logits, labels) * weights.to(logits)[labels]
