"""Frozen features and maps: what a pretrained network sees in each picture, computed once and kept.

The network runs in ONNX Runtime, which takes a quarter of the time of eager PyTorch: 4.3 against
17 ms a picture of 224 x 224 pixels on one core, 2026-11-24.

    <cache>/backbones/<key>.graph   a digest, then the `export.Trunk` for one size of picture
    <cache>/features/<key>.npy      float32 (N, D), by (network, geometry, content of the pictures)
    <cache>/maps/<key>.npy          float16 (N, h, w, C), likewise and by mirroring
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

from kenspeckle.backbones import Backbone, open_backbone
from kenspeckle.config import EfficientNetLiteConfig, require
from kenspeckle.core import (
    DataError,
    Geometry,
    MissingPathError,
    ModelFileError,
    Pixels,
    WriteError,
)
from kenspeckle.export import Trunk, cut, fold_norms_, to_onnx
from kenspeckle.files import read_file, replacing, write_file
from kenspeckle.images import prepare
from kenspeckle.pixels import Cache, PixelStore, spans
from kenspeckle.references import reference_pictures

__all__ = ["default_size", "features_of", "has_template", "maps_of", "template_of"]

GRAPH_VERSION = 3  # raised when the graph changes and its other keys do not
MAX_GRAPH_BYTES = 2_000_000_000  # what a protobuf can hold
DIGEST_BYTES = 16
TOLERANCE = 1e-3
"""Largest difference of an output between the graph and the network, over the largest value of it,
or over 1 where that is larger; 1e-5 was seen."""

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


def features_of(
    store: PixelStore,
    geometry: Geometry,
    cache: Cache,
    backbone: Backbone | None = None,
    *,
    num_threads: int = 0,
) -> Generator[tuple[int, int], None, NDArray[np.float32]]:
    """Return the pretrained network's embedding of every picture, from the cache where known.

    A row depends on its picture alone: not on the number of threads, nor on its neighbours.

    Args:
        store: the pictures at `geometry`.
        geometry: how they were made; part of the key.
        cache: where features are kept. When they are larger than its limit, they are held in
            memory instead.
        backbone: the network; EfficientNet-Lite0 with ImageNet's weights when None.
        num_threads: pictures that are computed at the same time; 0 takes all cores.

    Yields:
        The number of pictures done so far, and of all; nothing when the features are known.

    Returns:
        ``float32 (N, D)`` in the order of the store, not to be written to.

    Raises:
        InvalidValueError: `num_threads` is below zero.
        MissingExtraError: the pretrained weights are not installed.
        ModelFileError: the weights are not the published ones, or the graph differs from the
            network.
        DataError: a picture cannot be read.
        WriteError: the cache could not be written, for example because the disk is full.
    """
    backbone = backbone or open_backbone(EfficientNetLiteConfig(), "imagenet")
    work = _Work(store, geometry, backbone, _EMBEDDING)
    return (yield from _known_or_computed(work, cache, num_threads))


def maps_of(
    store: PixelStore,
    geometry: Geometry,
    cache: Cache,
    backbone: Backbone,
    *,
    mirrored: bool = False,
    num_threads: int = 0,
) -> Generator[tuple[int, int], None, NDArray[np.float16]]:
    """Return what goes into the pretrained network's tail for every picture, as `features_of` does.

    The network must have a tail: see `layers.Classifier.middle`.

    Args:
        store: the pictures at `geometry`.
        geometry: how they were made; part of the key.
        cache: where maps are kept. When they are larger than its limit, they are held in memory
            instead; EfficientNet-Lite0 takes 16 kB a picture of 160 x 160 pixels.
        backbone: the network.
        mirrored: take each picture's mirror image, left to right.
        num_threads: pictures that are computed at the same time; 0 takes all cores.

    Yields:
        The number of pictures done so far, and of all; nothing when the maps are known.

    Returns:
        ``float16 (N, h, w, C)`` in the order of the store, not to be written to.

    Raises:
        InvalidValueError: `num_threads` is below zero, or the network has no tail.
        ModelFileError: the graph differs from the network.
        DataError: a picture cannot be read.
        WriteError: the cache could not be written, for example because the disk is full.
    """
    work = _Work(store, geometry, backbone, _MIDDLE, mirrored)
    return (yield from _known_or_computed(work, cache, num_threads))


@dataclass(frozen=True)
class _Output:
    """An output of the graph, and how it is kept.

    Attributes:
        name: in the graph.
        word: what a row is called; the folder is its plural.
        dtype: as which it is kept.
    """

    name: str
    word: str
    dtype: type[np.floating[Any]]


_EMBEDDING = _Output("embedding", "feature", np.float32)
# Half precision halves the disk. It moved a feature of EfficientNet-Lite0, 0 to 6, by up to 0.0005
# and by 1e-5 on average, for noise of 160 and 224 pixels a side.
_MIDDLE = _Output("middle", "map", np.float16)


@dataclass(frozen=True, eq=False)
class _Work:
    """An output of a network for the pictures of a store at a geometry."""

    store: PixelStore
    geometry: Geometry
    backbone: Backbone
    output: _Output
    mirrored: bool = False

    def path(self, cache: Cache) -> Path:
        """Return where the rows are kept: by network, geometry, mirroring and content."""
        settings = json.dumps([asdict(self.geometry), self.mirrored]).encode()
        network = _key(self.backbone, self.geometry.size).encode()
        key = _digest(network, settings, self.store.digests.tobytes()).hex()
        return cache.folder / f"{self.output.word}s" / f"{key}.npy"

    def pixels(self, part: slice) -> Pixels:
        """Return some of the pictures, ``uint8 (B, H, W, 3)``."""
        pixels = self.store.gather(np.arange(part.start, part.stop))
        return np.ascontiguousarray(pixels[:, :, ::-1]) if self.mirrored else pixels


def _known_or_computed(
    work: _Work, cache: Cache, num_threads: int
) -> Generator[tuple[int, int], None, NDArray[Any]]:
    require(num_threads >= 0, "num_threads", "at least 0", num_threads)
    path = work.path(cache)
    known = _known(path)
    if known is not None:
        os.utime(path)
        return known
    session = _session(work, cache)
    shape = (len(work.store), *_channels_last(session.get_outputs()[0].shape[1:]))
    num_bytes = math.prod(shape) * np.dtype(work.output.dtype).itemsize
    if num_bytes > cache.limit_bytes:
        parts: list[NDArray[Any]] = []
        yield from _compute(session, work, num_threads, parts.append)
        return np.concatenate(parts)
    cache.make_room(num_bytes)
    try:
        with replacing(path) as file:
            header = {"descr": np.dtype(work.output.dtype).str, "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            yield from _compute(session, work, num_threads, lambda rows: file.write(rows.data))
    except WriteError as error:
        raise _unwritten(work.output.word, error) from error
    return _map(path)


def _compute(
    session: Any,  # noqa: ANN401 - ONNX Runtime has no type hints
    work: _Work,
    num_threads: int,
    keep: Callable[[NDArray[Any]], object],
) -> Generator[tuple[int, int], None, None]:
    """Hand the rows of every picture to `keep`, in order.

    Many threads with a batch each beat one batch on many threads, which wait for each other at
    every layer (4.6 against 6 to 15 ms a picture on 2 cores, as busy as they were), and fetch
    pictures meanwhile.
    """

    def rows_of(part: slice) -> NDArray[Any]:
        (rows,) = _run(session, work.pixels(part))
        if rows.ndim == 4:
            rows = rows.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(rows, work.output.dtype)

    done, total = 0, len(work.store)
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
        for block in spans(total, BLOCK):
            starts = range(block.start, block.stop, BATCH_SIZE)
            parts = [slice(a, min(a + BATCH_SIZE, block.stop)) for a in starts]
            for rows in pool.map(rows_of, parts):
                keep(rows)
                done += len(rows)
                yield done, total


def _session(work: _Work, cache: Cache) -> Any:  # noqa: ANN401 - see `_compute`
    """Open the part of the backbone's graph that gives the output."""
    template = template_of(work.backbone, work.geometry.size, cache)
    return _opened(cut(template, [work.output.name]))


def has_template(backbone: Backbone, size: tuple[int, int], cache: Cache) -> bool:
    """Return whether the cache holds what `template_of` returns; whole or not, is not looked at."""
    return _graph_path(backbone, size, cache).is_file()


def _graph_path(backbone: Backbone, size: tuple[int, int], cache: Cache) -> Path:
    return cache.folder / "backbones" / f"{_key(backbone, size)}.graph"


def template_of(backbone: Backbone, size: tuple[int, int], cache: Cache) -> bytes:
    """Return the graph of a backbone's `export.Trunk`, from the cache or exported anew.

    It maps ``uint8 (N, H, W, 3)`` to embedding, features and, where the network has a tail, middle.

    Args:
        backbone: the network.
        size: ``(height, width)`` of the pictures in pixels.
        cache: where graphs are kept.

    Returns:
        A serialised ONNX model, for `export.graft` or `export.cut`.

    Raises:
        InvalidValueError: the network takes no pictures of this size.
        ModelFileError: the exporter cannot express the network, or its graph answers otherwise.
        WriteError: the cache could not be written, for example because the disk is full.
    """
    path = _graph_path(backbone, size, cache)
    try:
        kept = read_file(path, MAX_GRAPH_BYTES)
    except (MissingPathError, DataError):  # never kept, evicted, or no file
        kept = b""
    digest, graph = kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]
    if digest == _digest(graph):
        os.utime(path)
        return graph
    graph = _exported(backbone, size)
    if len(graph) <= cache.limit_bytes:
        cache.make_room(len(graph))
        try:
            write_file(path, _digest(graph) + graph)
        except WriteError as error:
            raise _unwritten("backbone", error) from error
    return graph


def _exported(backbone: Backbone, size: tuple[int, int]) -> bytes:
    """Return the backbone's graph, which was seen to agree with the network."""
    geometry = Geometry(size)
    network = backbone.network(1, size, torch.Generator())  # its class is never asked
    trunk = Trunk(network, backbone.normalisation).eval()
    pictures = reference_pictures().items()
    pixels = np.stack([prepare(data, name, geometry) for name, data in pictures])
    with torch.no_grad():
        wanted = [output.numpy() for output in trunk(torch.from_numpy(pixels))]
    fold_norms_(network, size)
    graph = to_onnx(trunk, geometry)
    found = _run(_opened(graph), pixels)
    gaps = [_gap(*pair) for pair in zip(found, wanted, strict=True)]
    if not all(gap <= TOLERANCE for gap in gaps):  # so written, nan is refused too
        raise ModelFileError(
            f"the exported graph of {backbone.name} differs from the network by {max(gaps):.2g} "
            f"of an output; at most {TOLERANCE:g} is allowed; update onnxruntime and torch"
        )
    return graph


def _gap(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(found - wanted).max() / max(1, np.abs(wanted).max()))


def _opened(graph: bytes) -> Any:  # noqa: ANN401 - see `_compute`
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # see `_compute`
    options.log_severity_level = 4  # what goes wrong is raised; a log line beside it confuses
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no narrower class
        raise ModelFileError(f"ONNX Runtime refuses the backbone's graph: {error}") from error


def _run(session: Any, pixels: Pixels) -> list[NDArray[np.float32]]:  # noqa: ANN401 - see `_compute`
    try:
        rows: list[NDArray[np.float32]] = session.run(None, {"images": pixels})
    except Exception as error:  # ONNX Runtime's errors share no narrower class
        raise ModelFileError(f"the backbone's graph fails: {error}") from error
    return rows


def _channels_last(shape: list[int]) -> list[int]:
    return [*shape[1:], shape[0]] if len(shape) == 3 else shape


def _known(path: Path) -> NDArray[Any] | None:
    try:
        return _map(path)
    except (OSError, ValueError, EOFError):  # never kept, evicted, or cut short
        return None


def _map(path: Path) -> NDArray[Any]:
    rows: NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    return rows


def _key(backbone: Backbone, size: tuple[int, int]) -> str:
    """Return a digest of the weights, the architecture, and what writes and runs the graph."""
    import onnxruntime

    settings = asdict(backbone.config) | {"dropout": 0}  # which a frozen network has not
    expected = asdict(backbone.normalisation)
    versions = [GRAPH_VERSION, torch.__version__, onnxruntime.__version__]
    network = [backbone.sha256, backbone.config.family, settings, expected]
    return _digest(json.dumps([*network, size, *versions]).encode()).hex()


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()


def _unwritten(what: str, error: WriteError) -> WriteError:
    return WriteError(
        f"the {what} cache {error}; choose another folder with --cache-dir, "
        "or keep nothing with --cache-limit 0"
    )
