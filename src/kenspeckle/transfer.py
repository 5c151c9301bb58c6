"""One training, by a recipe, on prepared data: from nothing, or from a network trained before.

    features of the frozen network -> linear head -> [its tail, on maps] or [all of it, on pictures]

Everything computed on the way is kept in the cache, so that a later step begins where an earlier
one of the same geometry ended.
"""

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kenspeckle.backbones import Backbone
from kenspeckle.config import Imbalance, Recipe
from kenspeckle.core import InvalidValueError, ModelFileError, Stage, staged
from kenspeckle.features import features_of, maps_of, template_of
from kenspeckle.feeding import MapFeed
from kenspeckle.graphs import check_graph
from kenspeckle.images import Limits
from kenspeckle.layers import Classifier, Tail
from kenspeckle.learning import EpochDone, Learned, Task, learn
from kenspeckle.metrics import Metric
from kenspeckle.pixels import Cache
from kenspeckle.preparation import Prepared, network_for
from kenspeckle.probe import Probe, fit_probe, probe_logits
from kenspeckle.settings import settings

__all__ = [
    "Frozen",
    "Means",
    "Trained",
    "check_effects",
    "freeze",
    "metric_of",
    "train_recipe",
]

Result = TypeVar("Result")
Progress = Generator[Stage | EpochDone, None, Result]


@dataclass(frozen=True)
class Means:
    """What a training works with.

    Attributes:
        cache: where pixels, features, maps and graphs are kept.
        limits: what pictures are refused.
        device: where to train.
        num_threads: compute threads; 0 takes all cores.
        num_loader_threads: threads that fetch pictures ahead.
        stop: when set, training ends with the best weights so far.
        keep: called with the weights each time they are the best of a training.
    """

    cache: Cache
    limits: Limits
    device: torch.device
    num_threads: int
    num_loader_threads: int
    stop: threading.Event
    keep: Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True, eq=False)
class Frozen:
    """What a pretrained network sees, as it is, in pictures of one geometry.

    Attributes:
        backbone: the network.
        template: its graph for the geometry's size.
        features: ``float32 (N, D)`` of every picture.
        probe: the head that fits the training pictures' features best.
    """

    backbone: Backbone
    template: bytes
    features: NDArray[np.float32]
    probe: Probe


@dataclass(frozen=True, eq=False)
class Trained:
    """A network that has learnt, and all that is needed to ship it.

    Attributes:
        network: holds the weights to ship.
        prepared: the data that it learnt from, at its geometry.
        learned: how training went.
        recipe: every setting.
        frozen: what it started from; None where it started from nothing.
        embeddings: ``float32 (N, D)`` of every picture, where only the head was trained: they are
            what the shipped graph computes too.
    """

    network: Classifier
    prepared: Prepared
    learned: Learned
    recipe: Recipe
    frozen: Frozen | None
    embeddings: NDArray[np.float32] | None


OF_MAPS = frozenset({"flip", "mixup", "cutmix"})  # what of the augmentation reaches a tail


def check_effects(recipe: Recipe) -> None:
    """Refuse settings of a recipe that its depth of training would ignore.

    Raises:
        InvalidValueError: a setting has no effect.
    """
    if recipe.transfer.weights == "none" or recipe.transfer.depth == "all":
        return
    for name, value in settings(recipe).items():
        section, _, leaf = name.rpartition(".")
        if recipe.transfer.depth == "tail":
            ignored = section == "augmentation" and leaf not in OF_MAPS
        else:
            loop = section in {"augmentation", "loss", "optimizer", "schedule", "training"}
            inside = name in {"model.dropout", "transfer.layer_decay", "transfer.norms"}
            ignored = (loop or inside) and leaf != "imbalance"
        default = settings(replace(Recipe(), model=type(recipe.model)())).get(name)
        if ignored and value != default:
            raise InvalidValueError(
                f"{name} has no effect where the {recipe.transfer.depth} alone is trained; "
                f"leave it at {default!r}, or train more with depth=all"
            )


def metric_of(task: Task) -> Metric:
    """Return the name of what chooses the best of several models."""
    return "balanced accuracy" if task.balanced else "accuracy"


def train_recipe(
    prepared: Prepared,
    recipe: Recipe,
    means: Means,
    *,
    backbone: Backbone | None,
    frozen: Frozen | None = None,
    deadline: float | None = None,
) -> Progress[Trained]:
    """Train as a recipe says.

    Args:
        prepared: pictures at their geometry.
        recipe: every setting.
        means: what to work with.
        backbone: what to start from; None to start from nothing.
        frozen: what is known of the backbone at this geometry already.
        deadline: see `learning.learn`.

    Yields:
        Progress and finished epochs.

    Raises:
        InvalidValueError: a setting has no effect, or the network has no tail to train.
        ModelFileError: the backbone's graph differs from the network.
        TrainingError: the loss is no longer finite.
        WriteError: the cache could not be written.
    """
    check_effects(recipe)
    if backbone is None:
        network = network_for(prepared, recipe).to(means.device)
        learned = yield from _learn(network, prepared.task, recipe, means, deadline)
        return Trained(network, prepared, learned, recipe, None, None)
    if frozen is None:
        frozen = yield from freeze(
            prepared, backbone, means, imbalance=recipe.training.imbalance, seed=recipe.seed
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    network = backbone.network(prepared.task.num_classes, prepared.geometry.size, generator)
    head = _starting_head(prepared, recipe, frozen)
    _set_head_(network, head)
    depth = recipe.transfer.depth
    if depth == "head":
        logits = probe_logits(head, frozen.features[prepared.task.validation])
        why = "a head on frozen features is solved for, without epochs"
        learned = Learned((), 0, why, means.stop.is_set(), logits)
        return Trained(network, prepared, learned, recipe, frozen, frozen.features)
    network.to(means.device)
    if depth == "tail":
        learned = yield from _learn_tail(network, prepared, recipe, means, (backbone, deadline))
    else:
        learned = yield from _learn(network, prepared.task, recipe, means, deadline)
    return Trained(network, prepared, learned, recipe, frozen, None)


def freeze(
    prepared: Prepared,
    backbone: Backbone,
    means: Means,
    *,
    imbalance: Imbalance | None,
    seed: int,
    features: NDArray[np.float32] | None = None,
) -> Progress[Frozen]:
    """Return a frozen network's features of every picture, and the head that fits them best.

    Args:
        prepared: pictures at their geometry.
        backbone: the network.
        means: what to work with.
        imbalance: what is done about classes of unequal size; chosen by cross-validation when None.
        seed: of the folds.
        features: where they are known already.

    Yields:
        Progress.

    Raises:
        ModelFileError: the backbone's graph differs from the network, or needs operators that a
            model file must not hold.
        WriteError: the cache could not be written.
    """
    task, geometry = prepared.task, prepared.geometry
    template = template_of(backbone, geometry.size, means.cache)
    try:
        check_graph(template)
    except ModelFileError as error:  # said before an hour of training, not after it
        raise ModelFileError(f"{backbone.name} cannot be shipped: {error}") from error
    if features is None:
        computing = features_of(
            task.store, geometry, means.cache, backbone, num_threads=means.num_threads
        )
        features = yield from staged("computing features", computing)
    yield Stage("fitting a head", 0, 1)
    probe = fit_probe(
        features,
        task.labels,
        task.train,
        prepared.together,
        task.num_classes,
        metric=metric_of(task),
        imbalance=imbalance,
        seed=seed,
    )
    return Frozen(backbone, template, features, probe)


def _starting_head(prepared: Prepared, recipe: Recipe, frozen: Frozen) -> Probe:
    """Return the probe that training starts from; a prior is corrected for after it, not before."""
    imbalance = recipe.training.imbalance
    if recipe.transfer.depth == "head" or imbalance != "prior":
        return frozen.probe
    task = prepared.task
    return fit_probe(
        frozen.features,
        task.labels,
        task.train,
        prepared.together,
        task.num_classes,
        metric=metric_of(task),
        imbalance="none",
        seed=recipe.seed,
    )


def _set_head_(network: Classifier, probe: Probe) -> None:
    last = network.last_layer()
    if last.bias is None:
        raise InvalidValueError(
            f"the last layer of a {type(network).__name__} must have a bias to take a linear head"
        )
    with torch.no_grad():
        last.weight.copy_(torch.from_numpy(probe.weight))
        last.bias.copy_(torch.from_numpy(probe.bias))


def _learn(
    network: Classifier, task: Task, recipe: Recipe, means: Means, deadline: float | None
) -> Progress[Learned]:
    return learn(
        network,
        task,
        recipe,
        stop=means.stop,
        keep=means.keep,
        num_loader_threads=means.num_loader_threads,
        deadline=deadline,
    )


def _learn_tail(
    network: Classifier,
    prepared: Prepared,
    recipe: Recipe,
    means: Means,
    start: tuple[Backbone, float | None],
) -> Progress[Learned]:
    """Train the last blocks and the head on maps of what stands before them."""
    (backbone, deadline), task = start, prepared.task

    def maps(mirrored: bool) -> Progress[NDArray[np.float16]]:
        computing = maps_of(
            task.store,
            prepared.geometry,
            means.cache,
            backbone,
            mirrored=mirrored,
            num_threads=means.num_threads,
        )
        return staged("computing maps", computing)

    plain = yield from maps(False)
    mirrored = (yield from maps(True)) if recipe.augmentation.flip else None
    feed = MapFeed(plain, mirrored, recipe.seed)
    learned = yield from _learn(
        Tail(network), replace(task, feed=feed), recipe, replace(means, keep=_ignore), deadline
    )
    means.keep(network.state_dict())
    network.requires_grad_(True)
    return learned


def _ignore(state: dict[str, Tensor]) -> None:
    """Keep nothing: the weights of a tail alone are no model."""
