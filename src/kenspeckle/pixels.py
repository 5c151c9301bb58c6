"""Decode once, then serve: a memory-mapped cache of `uint8` pictures, and batches from it.

The cache is one file per (content of every picture, geometry, decoder version): change a picture
and the key changes, move the folder and it does not. A file is written under a temporary name and
renamed when whole, so two runs that build the same one at the same time do each other no harm, and
a reader keeps its mapping even when the file is evicted.

    <cache>/pixels/<key>.u8     N·H·W·3 bytes of pixels, then N·16 bytes of content digests
    <cache>/stamps/<key>.json   from the data's cheap stamps to the key of its content
"""

import hashlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import DataError, Geometry, ImageError, InvalidValueError, Pixels, WriteError
from kenspeckle.files import PART_SUFFIX, replacing, write_file
from kenspeckle.images import DECODER_VERSION, Limits, prepare
from kenspeckle.sources import Dataset

__all__ = [
    "Batch",
    "Cache",
    "CachedPixels",
    "PixelStore",
    "StreamedPixels",
    "batches",
    "default_cache_folder",
    "num_batches",
    "open_pixels",
    "permutation",
]

Task = TypeVar("Task")
Result = TypeVar("Result")

DIGEST_BYTES = 16
BAD_FILES_SHOWN = 10
STALE_PART_SECONDS = 24 * 3600.0


def default_cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/kenspeckle``, or ``~/.cache/kenspeckle``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kenspeckle"


@dataclass(frozen=True)
class Cache:
    """Where decoded pictures are kept, and how many bytes of them.

    Attributes:
        folder: made when needed.
        limit_bytes: the least recently used files are removed above it; a data set that is larger
            by itself is decoded anew in every epoch instead.
    """

    folder: Path
    limit_bytes: int = 10_000_000_000

    def make_room(self, num_bytes: int) -> None:
        """Remove the least recently used files until `num_bytes` more fit under the limit."""
        files = []
        for path in self._files("pixels/*"):
            state = path.stat()
            if path.name.endswith(PART_SUFFIX):
                if time.time() - state.st_mtime > STALE_PART_SECONDS:  # of a run that was killed
                    path.unlink(missing_ok=True)
                continue
            files.append((state.st_mtime, state.st_size, path))
        excess = sum(size for _, size, _ in files) + num_bytes - self.limit_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _files(self, pattern: str) -> list[Path]:
        return [path for path in self.folder.glob(pattern) if path.is_file()]


class PixelStore(Protocol):
    """Pictures of one size, by index."""

    @property
    def digests(self) -> NDArray[np.uint8]:
        """``uint8 (N, 16)``; equal rows are equal pictures at this geometry."""
        ...

    def __len__(self) -> int:
        """Return the number of pictures."""
        ...

    def gather(self, indices: NDArray[np.int64]) -> Pixels:
        """Return ``uint8 (B, H, W, 3)`` for B indices."""
        ...


@dataclass(frozen=True, eq=False)
class CachedPixels:
    """Pictures that were decoded once.

    Attributes:
        images: ``uint8 (N, H, W, 3)``, mapped from the cache file.
        digests: ``uint8 (N, 16)``; equal rows are equal pictures at this geometry.
    """

    images: Pixels
    digests: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, indices: NDArray[np.int64]) -> Pixels:
        """Return ``uint8 (B, H, W, 3)`` for B indices."""
        return self.images[indices]


@dataclass(frozen=True, eq=False)
class StreamedPixels:
    """Pictures that are decoded anew each time, for sets that outgrow the cache.

    Attributes:
        dataset: where they are.
        geometry: what they become.
        limits: what is refused.
        digests: ``uint8 (N, 16)``; equal rows are equal pictures at this geometry.
    """

    dataset: Dataset
    geometry: Geometry
    limits: Limits
    digests: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.dataset.items)

    def gather(self, indices: NDArray[np.int64]) -> Pixels:
        """Return ``uint8 (B, H, W, 3)`` for B indices.

        Raises:
            ImageError: a picture cannot be decoded.
            DataError: a file cannot be read.
        """
        return np.stack([self.picture(int(index)) for index in indices])

    def picture(self, index: int) -> Pixels:
        """Return picture number `index`, ``uint8 (H, W, 3)``.

        Raises:
            ImageError: it cannot be decoded.
            DataError: its file cannot be read.
        """
        name = self.dataset.items[index].name
        return prepare(self.dataset.reader.read(index), name, self.geometry, self.limits)


def open_pixels(
    dataset: Dataset,
    geometry: Geometry,
    limits: Limits,
    cache: Cache,
) -> Generator[tuple[int, int], None, PixelStore]:
    """Return the data set's pictures at one geometry, from the cache where they are known.

    Every picture is decoded before this returns (or was, when the cache was built): a broken file
    is named before training, not hours into it.

    Yields:
        The number of pictures decoded so far, and of all.

    Raises:
        DataError: pictures cannot be decoded; the text lists them.
        WriteError: the cache could not be written, for example because the disk is full.
    """
    height, width = geometry.size
    num_items = len(dataset.items)
    num_bytes = num_items * (height * width * 3 + DIGEST_BYTES)
    digests = np.zeros((num_items, DIGEST_BYTES), np.uint8)
    streamed = StreamedPixels(dataset, geometry, limits, digests)
    if num_bytes > cache.limit_bytes:
        yield from _decode_all(streamed, lambda data: None)
        return streamed
    path = cache.folder / "pixels" / f"{_content_key(dataset, geometry, cache)}.u8"
    if not (path.is_file() and path.stat().st_size == num_bytes):
        cache.make_room(num_bytes)
        yield from _build(streamed, path)
    os.utime(path)
    return _map(path, len(dataset.items), geometry)


def _build(streamed: StreamedPixels, path: Path) -> Iterator[tuple[int, int]]:
    try:
        with replacing(path) as file:
            yield from _decode_all(streamed, file.write)
            file.write(streamed.digests.tobytes())
    except WriteError as error:
        raise WriteError(
            f"the picture cache {error}; choose another folder with --cache-dir, "
            "or decode in every epoch with --cache-limit 0"
        ) from error


def _decode_all(
    streamed: StreamedPixels, keep: Callable[[bytes], object]
) -> Iterator[tuple[int, int]]:
    """Hand every picture's bytes to `keep` in order, and note their digests.

    After the last one, raise if any could not be decoded.
    """
    total = len(streamed)
    bad: list[DataError] = []

    def decode(start: int) -> list[Pixels | DataError]:
        return [_try(streamed, index) for index in range(start, min(start + 32, total))]

    done = 0
    for results in _in_order(os.cpu_count() or 1, decode, range(0, total, 32)):
        for index, result in enumerate(results, done):
            if isinstance(result, DataError):
                bad.append(result)
            elif not bad:
                data = result.tobytes()
                keep(data)
                digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
                streamed.digests[index] = np.frombuffer(digest, np.uint8)
        done += len(results)
        yield done, total
    if bad:
        raise _bad_pictures(bad, total)


def _try(streamed: StreamedPixels, index: int) -> Pixels | DataError:
    try:
        return streamed.picture(index)
    except DataError as error:
        return error


def _in_order(
    num_threads: int, work: Callable[[Task], Result], tasks: Sequence[Task]
) -> Iterator[Result]:
    """Yield the results in the order of the tasks, with a bounded number of them in flight."""
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _bad_pictures(bad: list[DataError], total: int) -> DataError:
    if len(bad) == 1:
        return bad[0]
    lines = [f"{len(bad):,} of {total:,} pictures cannot be used:"]
    lines += [f"  {error}" for error in bad[:BAD_FILES_SHOWN]]
    if len(bad) > BAD_FILES_SHOWN:
        lines.append(f"  and {len(bad) - BAD_FILES_SHOWN:,} more")
    return DataError("\n".join([*lines, "repair or remove them; nothing was changed"]))


def _content_key(dataset: Dataset, geometry: Geometry, cache: Cache) -> str:
    """Return a key of all pictures' content and the geometry.

    Reading every file only to name the cache would cost a pass over the disk in every run, so the
    cheap stamps (size, times, inode; or a zip's checksums) remember the content's key.
    """
    stamps = hashlib.blake2b(digest_size=DIGEST_BYTES)
    stamps.update(json.dumps([dataset.location, DECODER_VERSION, asdict(geometry)]).encode())
    for index, item in enumerate(dataset.items):
        stamps.update(
            f"{item.name}\0{dataset.reader.stamp(index)}\0".encode(errors="surrogatepass")
        )
    memo = cache.folder / "stamps" / f"{stamps.hexdigest()}.json"
    known = _remembered(memo)
    if known:
        return known
    content = hashlib.blake2b(digest_size=DIGEST_BYTES)
    content.update(json.dumps([DECODER_VERSION, asdict(geometry)]).encode())
    for index in range(len(dataset.items)):
        content.update(_digest(dataset, index))
    key = content.hexdigest()
    write_file(memo, json.dumps({"content": key}).encode())
    return key


def _remembered(memo: Path) -> str | None:
    try:
        key = json.loads(memo.read_bytes())["content"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # never written, or damaged: the content is read again
    return key if isinstance(key, str) and key.isalnum() else None


def _digest(dataset: Dataset, index: int) -> bytes:
    try:
        source = dataset.reader.read(index)
    except ImageError:
        raise
    except DataError:
        return b"unreadable"  # named, with all others, when the pictures are decoded
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=DIGEST_BYTES).digest()
    head = f"{source.shape}{source.dtype}".encode()
    return hashlib.blake2b(head + source.tobytes(), digest_size=DIGEST_BYTES).digest()


def _map(path: Path, num_items: int, geometry: Geometry) -> CachedPixels:
    height, width = geometry.size
    whole = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    cut = num_items * height * width * 3
    return CachedPixels(
        images=whole[:cut].reshape(num_items, height, width, 3),
        digests=whole[cut:].reshape(num_items, DIGEST_BYTES),
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """Some pictures of a data set.

    Attributes:
        images: ``uint8 (B, H, W, 3)``.
        items: ``int64 (B,)``, their indices in the data set.
    """

    images: Pixels
    items: NDArray[np.int64]


def permutation(num_items: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of one epoch: a function of (seed, epoch), alike on every machine."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(num_items)


def num_batches(num_items: int, batch_size: int) -> int:
    """Return how many batches `batches` makes of so many pictures."""
    return len(_cuts(num_items, batch_size))


def _cuts(num_items: int, batch_size: int) -> list[int]:
    cuts = list(range(0, num_items, batch_size))
    if len(cuts) > 1 and num_items - cuts[-1] == 1:
        cuts.pop()
    return cuts


def batches(
    store: PixelStore,
    items: NDArray[np.int64],
    batch_size: int,
    num_threads: int = 0,
) -> Iterator[Batch]:
    """Yield the pictures of `items` in that order, `batch_size` at a time.

    A last batch of a single picture joins the one before it, since batch normalisation cannot
    learn from one. The batches are the same for every number of threads.

    Args:
        store: where the pictures are.
        items: ``int64 (N,)``, indices into the store.
        batch_size: pictures per batch, at least 1.
        num_threads: threads that fetch ahead; 0 fetches when asked.

    Raises:
        InvalidValueError: `num_threads` is below zero.
        ImageError: a picture cannot be decoded.
        DataError: a file cannot be read.
    """
    if num_threads < 0:
        raise InvalidValueError(f"num_threads must be at least 0; got {num_threads}")
    cuts = _cuts(len(items), batch_size)
    parts = [items[a:b] for a, b in itertools.pairwise([*cuts, len(items)])]

    def fetch(part: NDArray[np.int64]) -> Batch:
        return Batch(store.gather(part), part)

    if num_threads == 0:
        yield from map(fetch, parts)
        return
    yield from _in_order(num_threads, fetch, parts)
