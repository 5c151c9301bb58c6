"""Weights of networks of timm: from a file, or from the hub where the user allows the network.

Nothing of a file is executed, and none is taken for what it is not: its tensors must be, by name
and shape, those that timm's network has. The last layer is left out, whatever its classes.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from kenspeckle.config import TimmConfig
from kenspeckle.core import (
    InvalidValueError,
    KenError,
    MissingExtraError,
    ModelFileError,
    Normalisation,
    nearest,
    printable,
)
from kenspeckle.files import read_file
from kenspeckle.layers import Classifier

__all__ = ["ZooWeights", "load_zoo_", "read_zoo_weights"]

MAX_BYTES = 4_000_000_000  # a thousand million parameters in float32, as timm's largest have
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model")  # where training scripts put the weights in a checkpoint
TimmNetwork = Any  # a module with the methods of timm's networks, which have no type of their own
PREFIX = "network."  # of timm's names in the networks of models.zoo


@dataclass(frozen=True, eq=False)
class ZooWeights:
    """The weights of a network of timm, without its last layer.

    Attributes:
        state: the tensors under timm's names.
        sha256: of the file, in hexadecimal digits.
        normalisation: what the weights expect, as timm states it for this network.
        size: ``(height, width)`` in pixels of the pictures that they were trained on.
        licence: of the weights, where timm states one.
        source: the file's path, or ``hub:`` and the name there.
    """

    state: dict[str, Tensor]
    sha256: str
    normalisation: Normalisation
    size: tuple[int, int]
    licence: str | None
    source: str


def read_zoo_weights(config: TimmConfig, weights: str, *, offline: bool = True) -> ZooWeights:
    """Return the weights of a network of timm, checked against its names and shapes.

    The bytes that are hashed are the bytes that are parsed, and parsing builds tensors only.

    Args:
        config: which network; its name may carry timm's tag, as in ``resnet18.a1_in1k``.
        weights: path of a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, or ``hub``.
        offline: whether the network is off limits, so that ``hub`` is an error.

    Raises:
        InvalidValueError: there is no such network, `weights` is neither a file nor ``hub``, or
            is ``hub`` while the network is off limits or timm knows none there.
        MissingExtraError: timm is not installed.
        ModelFileError: the file is missing, cannot be fetched, is damaged, holds code, or holds
            the weights of another network.
    """
    reference = _reference(config.network)
    pretrained: dict[str, Any] = reference.pretrained_cfg
    if weights == "hub":
        path, source = _fetched(config.network, pretrained, offline=offline)
    else:
        path, source = Path(weights), weights
    if path.suffix not in SUFFIXES:
        raise InvalidValueError(
            f"weights of a network of timm must be 'hub' or a file that ends in "
            f"{', '.join(SUFFIXES)}; got {weights!r}"
        )
    name = printable(source)
    try:
        data = read_file(path, MAX_BYTES)
    except KenError as error:
        raise ModelFileError(f"the weights of {config.network!r}: {error}") from error
    _, height, width = pretrained["input_size"]
    return ZooWeights(
        state=_fitting(_table(data, path.suffix, name), reference, name),
        sha256=hashlib.sha256(data).hexdigest(),
        normalisation=Normalisation(tuple(pretrained["mean"]), tuple(pretrained["std"])),
        size=(height, width),
        licence=pretrained.get("license"),
        source=source,
    )


def load_zoo_(network: Classifier, weights: ZooWeights) -> None:
    """Set the weights of a network, except for its last layer.

    Where a tensor's shape depends on the pictures' size, as that of position embeddings, timm
    resamples it.

    Args:
        network: built by `models.build` from the configuration that the weights were read for.
        weights: what `read_zoo_weights` returned.

    Raises:
        ModelFileError: the network is another.
    """
    zoo: Any = network
    own = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in network.state_dict().items()
        if name.startswith(PREFIX)
    }
    state = weights.state
    if state.keys() == own.keys() and zoo.size != weights.size and _differences(state, own):
        state = _resampled(zoo.name, zoo.size, weights)
    differences = _differences(state, own)
    if differences:
        raise ModelFileError(
            f"the network must be the one of timm that the weights in "
            f"{printable(weights.source)} are of; got a {type(network).__name__}: {differences}"
        )
    zoo.network.load_state_dict(state)


def _reference(network: str) -> TimmNetwork:
    """Return the network without memory for weights: its names and shapes, and what timm states."""
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("networks of timm", "zoo") from error
    try:
        with torch.device("meta"):
            return timm.create_model(network)
    except (RuntimeError, ValueError) as error:  # no such network, or no such tag
        raise InvalidValueError(
            f"network must be one that timm knows; got {network!r}; "
            f"{nearest(network, timm.list_models(include_tags='.' in network))}"
        ) from error


def _fetched(network: str, pretrained: Mapping[str, Any], *, offline: bool) -> tuple[Path, str]:
    """Return where the hub's own client keeps the file, fetched if need be, and its name there."""
    if offline:
        raise InvalidValueError(
            "weights must be a file, since the network is not used unless it is allowed; got "
            "'hub'; name a file with weights=FILE, or drop --offline"
        )
    repository = pretrained.get("hf_hub_id")
    if not repository:
        raise InvalidValueError(
            f"weights must be a file for {network!r}, of which timm knows none on the hub; got "
            "'hub'; name a file with weights=FILE"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            file = "model.safetensors"
            path = hf_hub_download(repository, file)
        except EntryNotFoundError:
            file = "pytorch_model.bin"  # as repositories from before safetensors have it
            path = hf_hub_download(repository, file)
    except Exception as error:  # the hub's client raises what the connection raises
        reason = str(error).partition("\n")[0]
        raise ModelFileError(
            f"hub:{repository}: the weights of {network!r} cannot be fetched: {reason[:200]}; "
            "look at the connection, or name a file with weights=FILE"
        ) from error
    return Path(path), f"hub:{repository}/{file}"


def _table(data: bytes, suffix: str, name: str) -> dict[str, Tensor]:
    """Return the tensors in a file, by name."""
    remedy = "save the network's state_dict() alone, as safetensors"
    try:
        if suffix == ".safetensors":
            found: Any = safetensors.torch.load(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # both raise what they meet: EOFError, RuntimeError, their own
        reason = str(error).partition("\n")[0]
        raise ModelFileError(
            f"{name}: must hold whole weights, and no code; got {reason[:200]!r}; {remedy}"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not found or not all(map(_is_plain, found.values())):
        raise ModelFileError(
            f"{name}: must hold a table of tensors; got a {type(found).__name__} "
            f"of other things, or of none; {remedy}"
        )
    table = {str(key): tensor for key, tensor in found.items()}
    if all(key.startswith("module.") for key in table):  # trained on several devices
        table = {key.removeprefix("module."): tensor for key, tensor in table.items()}
    return table


def _is_plain(value: object) -> bool:
    """Return whether a value is a tensor whose numbers are all there."""
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    )


def _fitting(table: Mapping[str, Tensor], reference: TimmNetwork, name: str) -> dict[str, Tensor]:
    """Return what a file holds of the reference network, which must be all but the classifier."""
    pretrained = reference.pretrained_cfg
    named = pretrained.get("classifier") or ()
    layers = tuple(f"{layer}." for layer in ([named] if isinstance(named, str) else named))
    wanted = {k: t for k, t in reference.state_dict().items() if not k.startswith(layers)}
    # Tables of indices, which timm once saved and now computes.
    computed = {k for k, _ in reference.named_buffers()} - set(wanted)
    state = {k: t for k, t in table.items() if not k.startswith(layers) and k not in computed}
    differences = _differences(state, wanted)
    if differences:
        raise ModelFileError(
            f"{name}: must hold the weights of timm's {pretrained['architecture']!r}; got those of "
            f"another network, or under the names of another library: {differences}; set network "
            "to what was trained, or save the state_dict() of timm's network again"
        )
    return state


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return in words the first three differences in names and shapes; nothing if there are none.

    Example:
        >>> _differences({"a": torch.zeros(2)}, {"a": torch.zeros(3, 1), "b": torch.zeros(1)})
        "'b' is missing, 'a' is 2, not 3 x 1 (2 in all)"
    """
    words = [f"{k!r} is missing" for k in wanted if k not in found]
    words += [f"{printable(k)[:100]!r} is unexpected" for k in found if k not in wanted]
    words += [
        f"{k!r} is {_by(found[k])}, not {_by(wanted[k])}"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    return f"{', '.join(words[:3])} ({len(words):,} in all)" if words else ""


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _resampled(network: str, size: tuple[int, int], weights: ZooWeights) -> dict[str, Tensor]:
    """Return the state for pictures of another size, by the filter that timm has for each network.

    Args:
        network: what timm calls it.
        size: ``(height, width)`` in pixels of the pictures to come.
        weights: as they were trained.
    """
    import timm

    stated = {"state_dict": dict(weights.state), "num_classes": 0, "label_offset": 0}
    with torch.random.fork_rng(devices=[]):  # timm first fills the network at random
        resampled = timm.create_model(
            network, pretrained=True, pretrained_cfg_overlay=stated, img_size=size
        )
    state: dict[str, Tensor] = resampled.state_dict()
    return state
