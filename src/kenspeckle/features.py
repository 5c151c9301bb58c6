"""Frozen features: what a pretrained network sees in each picture, computed once and kept.

The network runs in ONNX Runtime, which takes a quarter of the time of eager PyTorch: 4.3 against
17 ms a picture of 224 x 224 pixels on one core, 2026-11-24.

    <cache>/backbones/<key>.onnx   the network for one size of picture: `uint8` in, embedding out
    <cache>/features/<key>.f32     N·1280 float32, by (network, geometry, content of the pictures)
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kenspeckle.config import EfficientNetLiteConfig, require
from kenspeckle.core import (
    DataError,
    Geometry,
    MissingPathError,
    ModelFileError,
    Pixels,
    WriteError,
)
from kenspeckle.export import Deployed, to_onnx
from kenspeckle.files import read_file, replacing, write_file
from kenspeckle.images import prepare
from kenspeckle.models import build
from kenspeckle.models.efficientnet_lite import NUM_FEATURES
from kenspeckle.pixels import Cache, PixelStore, spans
from kenspeckle.pretrained import NORMALISATION, PRETRAINED, load_
from kenspeckle.references import reference_pictures

__all__ = ["Backbone", "default_size", "features_of"]

GRAPH_VERSION = 1  # raised when the graph changes and its other keys do not
MAX_GRAPH_BYTES = 200_000_000
TOLERANCE = 1e-3
"""Largest difference of a feature, 0 to 6, between the graph and the network; 1.2e-5 was seen."""

BATCH_SIZE = 4  # 4.6 ms a picture of 224 x 224 pixels; 32 at once take 6.0
BLOCK = 256  # pictures between two waits for all threads: bounds what is in flight


def default_size(side: float) -> int:
    """Return the side in pixels at which pictures are worth looking at, a multiple of 32.

    Small pictures gain from being enlarged, up to about 160 pixels; large ones need no more than
    the 224 that the weights were trained at. Accuracy of logistic regression on the standardised
    features of Lite0, 5 folds, pictures squashed to a square, and milliseconds a picture on 2 cores
    that others used too, 2026-11-24:

    =====================================  ====  ====  ====  ====  ====  ==============
    pictures                                 64    96   128   160   224  standard error
    =====================================  ====  ====  ====  ====  ====  ==============
    2,000 of CIFAR-10, 32 pixels           .661  .790  .816  .856  .863            .008
    1,500 flowers, 128 pixels              .683  .713  .711  .719  .729            .012
    762 objects of Caltech-101, about 290  .974  .991  .995  .995  .997            .003
    1,000 chest X-rays, 28 pixels          .924  .923  .925        .912            .008
    1,187 traffic lights, 62 x 30 pixels   .976  .982  .978        .986            .004
    milliseconds, least of 25 runs          0.5   1.2   2.4   3.2   7.2
    =====================================  ====  ====  ====  ====  ====  ==============

    Where time is short, 96 pixels take a third of what 160 take.

    Args:
        side: of the pictures, typically, in pixels: the median of ``sqrt(height * width)``.

    Example:
        >>> default_size(32), default_size(180), default_size(1000)
        (160, 192, 224)
    """
    return min(224, max(160, math.ceil(side / 32) * 32))


@dataclass(frozen=True)
class Backbone:
    """A pretrained network without its classes, for pictures of one size.

    Attributes:
        variant: of EfficientNet-Lite: 0, 1 or 2.
        size: ``(height, width)`` of the pictures in pixels.

    Raises:
        InvalidValueError: there is no such variant.
    """

    variant: int
    size: tuple[int, int]

    def __post_init__(self) -> None:
        require(self.variant in PRETRAINED, "variant", "0, 1 or 2", self.variant)

    @property
    def name(self) -> str:
        """What the network is called."""
        return PRETRAINED[self.variant].name

    @property
    def key(self) -> str:
        """Digest of the weights' SHA-256, the size, and what writes and runs the graph."""
        import onnxruntime

        weights = PRETRAINED[self.variant].sha256
        versions = [GRAPH_VERSION, torch.__version__, onnxruntime.__version__]
        return _digest(json.dumps([weights, self.size, *versions]).encode())


def features_of(
    store: PixelStore,
    geometry: Geometry,
    cache: Cache,
    *,
    variant: int = 0,
    num_threads: int = 0,
) -> Generator[tuple[int, int], None, NDArray[np.float32]]:
    """Return the pretrained network's embedding of every picture, from the cache where known.

    A row depends on its picture alone: not on the number of threads, nor on its neighbours.

    Args:
        store: the pictures at `geometry`.
        geometry: how they were made; part of the key.
        cache: where features are kept. When they are larger than its limit, they are held in
            memory instead.
        variant: of EfficientNet-Lite: 0, 1 or 2.
        num_threads: pictures that are computed at the same time; 0 takes all cores.

    Yields:
        The number of pictures done so far, and of all; nothing when the features are known.

    Returns:
        ``float32 (N, 1280)``, 0 to 6, in the order of the store, not to be written to.

    Raises:
        InvalidValueError: there is no such variant, or `num_threads` is below zero.
        MissingExtraError: the pretrained weights are not installed.
        ModelFileError: the weights are not the published ones, or the graph differs from the
            network.
        DataError: a picture cannot be read.
        WriteError: the cache could not be written, for example because the disk is full.
    """
    require(num_threads >= 0, "num_threads", "at least 0", num_threads)
    backbone = Backbone(variant, geometry.size)
    key = _digest(backbone.key.encode(), _plain(geometry), store.digests.tobytes())
    path = cache.folder / "features" / f"{key}.f32"
    num_bytes = len(store) * NUM_FEATURES * np.dtype(np.float32).itemsize
    if path.is_file() and path.stat().st_size == num_bytes:
        os.utime(path)
        return _map(path)
    session = _session(backbone, cache)
    if num_bytes > cache.limit_bytes:
        parts: list[NDArray[np.float32]] = []
        yield from _embed(session, store, num_threads, parts.append)
        return np.concatenate(parts)
    cache.make_room(num_bytes)
    try:
        with replacing(path) as file:
            yield from _embed(session, store, num_threads, lambda rows: file.write(rows.data))
    except WriteError as error:
        raise _unwritten("feature", error) from error
    return _map(path)


def _embed(
    session: Any,  # noqa: ANN401 - ONNX Runtime has no type hints
    store: PixelStore,
    num_threads: int,
    keep: Callable[[NDArray[np.float32]], object],
) -> Generator[tuple[int, int], None, None]:
    """Hand the features of every picture to `keep`, in order.

    Many threads with a batch each beat one batch on many threads, which wait for each other at
    every layer (4.6 against 6 to 15 ms a picture on 2 cores, as busy as they were), and fetch
    pictures meanwhile.
    """

    def rows_of(part: slice) -> NDArray[np.float32]:
        return _run(session, store.gather(np.arange(part.start, part.stop)))

    done = 0
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
        for block in spans(len(store), BLOCK):
            starts = range(block.start, block.stop, BATCH_SIZE)
            parts = [slice(a, min(a + BATCH_SIZE, block.stop)) for a in starts]
            for rows in pool.map(rows_of, parts):
                keep(rows)
                done += len(rows)
                yield done, len(store)


def _session(backbone: Backbone, cache: Cache) -> Any:  # noqa: ANN401 - see `_embed`
    """Open the backbone's graph, from the cache or exported anew."""
    path = cache.folder / "backbones" / f"{backbone.key}.onnx"
    try:
        session = _opened(read_file(path, MAX_GRAPH_BYTES))
        os.utime(path)
    except (MissingPathError, DataError, ModelFileError):  # never kept, evicted or damaged
        graph, session = _exported(backbone)
        if len(graph) <= cache.limit_bytes:
            cache.make_room(len(graph))
            try:
                write_file(path, graph)
            except WriteError as error:
                raise _unwritten("backbone", error) from error
    return session


def _exported(backbone: Backbone) -> tuple[bytes, Any]:
    """Return the backbone's graph and a session that was seen to agree with the network."""
    geometry = Geometry(backbone.size)
    config = EfficientNetLiteConfig(variant=backbone.variant)
    network = build(config, 1, backbone.size, torch.Generator())  # its class is never asked
    load_(network, backbone.variant)
    deployed = Deployed(network, NORMALISATION, temperature=1.0).eval()
    pictures = reference_pictures().items()
    pixels = np.stack([prepare(data, name, geometry) for name, data in pictures])
    with torch.no_grad():
        wanted = deployed(torch.from_numpy(pixels))[2].numpy()
    _fold_norms_(network)
    graph = to_onnx(deployed, geometry)
    session = _opened(graph)
    gap = float(np.abs(_run(session, pixels) - wanted).max())
    if not gap <= TOLERANCE:
        raise ModelFileError(
            f"the exported graph of {backbone.name} differs from the network by {gap:.2g} in a "
            f"feature; at most {TOLERANCE:g} is allowed; update onnxruntime and torch"
        )
    return graph, session


def _fold_norms_(network: nn.Module) -> None:
    """Put each norm into the convolution before it; export then takes 3.1 seconds and not 5.5."""
    for module in network.modules():
        if isinstance(module, nn.Sequential) and len(module) > 1:
            convolution, norm = module[0], module[1]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[0] = fuse_conv_bn_eval(convolution, norm)
                module[1] = nn.Identity()


def _opened(graph: bytes) -> Any:  # noqa: ANN401 - see `_embed`
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # see `_embed`
    options.log_severity_level = 4  # what goes wrong is raised; a log line beside it confuses
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no narrower class
        raise ModelFileError(f"ONNX Runtime refuses the backbone's graph: {error}") from error


def _run(session: Any, pixels: Pixels) -> NDArray[np.float32]:  # noqa: ANN401 - see `_embed`
    try:
        rows: NDArray[np.float32] = session.run(["embedding"], {"images": pixels})[0]
    except Exception as error:  # ONNX Runtime's errors share no narrower class
        raise ModelFileError(f"the backbone's graph fails: {error}") from error
    return rows


def _map(path: Path) -> NDArray[np.float32]:
    rows = np.memmap(path, dtype=np.float32, mode="r").view(np.ndarray)
    return rows.reshape(-1, NUM_FEATURES)


def _plain(geometry: Geometry) -> bytes:
    return json.dumps(asdict(geometry)).encode()


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _unwritten(what: str, error: WriteError) -> WriteError:
    return WriteError(
        f"the {what} cache {error}; choose another folder with --cache-dir, "
        "or keep nothing with --cache-limit 0"
    )
