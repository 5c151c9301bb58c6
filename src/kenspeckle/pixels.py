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
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import DataError, Geometry, InvalidValueError, Pixels, WriteError
from kenspeckle.files import PART_SUFFIX, replacing, write_file
from kenspeckle.images import DECODER_VERSION, Limits, decode, from_array, prepare
from kenspeckle.sources import Dataset

__all__ = [
    "CHUNK",
    "Batch",
    "Cache",
    "CachedPixels",
    "PixelStore",
    "StreamedPixels",
    "bad_pictures",
    "batches",
    "default_cache_folder",
    "open_pixels",
    "original",
    "over_chunks",
    "permutation",
    "spans",
    "stamps",
]

Task = TypeVar("Task")
Result = TypeVar("Result")

DIGEST_BYTES = 16
BAD_FILES_SHOWN = 10
CHUNK = 32  # pictures decoded between two reports of progress
SECONDS_WORTH_A_THREAD = 5e-4  # a picture
STALE_PART_SECONDS = 24 * 3600.0


def default_cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/kenspeckle``, or ``~/.cache/kenspeckle``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kenspeckle"


@dataclass(frozen=True)
class Cache:
    """Where pictures, frozen features and maps, and their networks are kept, and how many bytes.

    Attributes:
        folder: made when needed.
        limit_bytes: the least recently used files are removed above it; a data set that is larger
            by itself is decoded anew in every epoch instead.
    """

    folder: Path
    limit_bytes: int = 10_000_000_000

    @property
    def pixels(self) -> Path:
        """The folder of cache files."""
        return self.folder / "pixels"

    def holds_file_of(self, num_bytes: int) -> bool:
        """Return whether there is a cache file of that size."""
        return any(path.stat().st_size == num_bytes for path in self._files("pixels", "*.u8"))

    def make_room(self, num_bytes: int) -> None:
        """Remove the least recently used files until `num_bytes` more fit under the limit."""
        files = []
        kinds = ("pixels", "surveys", "features", "maps", "backbones")
        kept = [path for kind in kinds for path in self._files(kind)]
        for path in kept:
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

    def _files(self, kind: str, pattern: str = "*") -> list[Path]:
        return [path for path in (self.folder / kind).glob(pattern) if path.is_file()]


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
    memo = cache.folder / "stamps" / f"{stamps(dataset, DECODER_VERSION, asdict(geometry))}.json"
    known = _remembered(memo)
    key = known
    if key is None and cache.holds_file_of(num_bytes):  # moved or touched, the content may be known
        key = _content_key(geometry, [_source_digest(dataset, i) for i in range(num_items)])
    path = cache.pixels / f"{key}.u8"
    if not (path.is_file() and path.stat().st_size == num_bytes):
        cache.make_room(num_bytes)
        key = yield from _build(streamed, cache)
        path = cache.pixels / f"{key}.u8"
    if key != known:
        write_file(memo, json.dumps({"content": key}).encode())
    os.utime(path)
    return _map(path, num_items, geometry)


def _build(streamed: StreamedPixels, cache: Cache) -> Generator[tuple[int, int], None, str]:
    """Decode everything into a cache file and return the key of the content that was read."""
    whole = cache.pixels / f"{uuid.uuid4().hex}.u8"
    try:
        with replacing(whole) as file:
            sources = yield from _decode_all(streamed, file.write)
            file.write(streamed.digests.tobytes())
    except WriteError as error:
        raise WriteError(
            f"the picture cache {error}; choose another folder with --cache-dir, "
            "or decode in every epoch with --cache-limit 0"
        ) from error
    key = _content_key(streamed.geometry, sources)
    whole.replace(cache.pixels / f"{key}.u8")
    return key


def _decode_all(
    streamed: StreamedPixels, keep: Callable[[bytes], object]
) -> Generator[tuple[int, int], None, list[bytes]]:
    """Hand every picture's bytes to `keep` in order, and note their digests.

    After the last one, raise if any could not be decoded; else return the sources' digests.
    """
    total = len(streamed)
    bad: list[DataError] = []
    sources: list[bytes] = []

    def decode(start: int) -> list[tuple[bytes, Pixels | DataError]]:
        return [_try(streamed, index) for index in range(start, min(start + CHUNK, total))]

    for results in over_chunks(decode, total):
        for source, result in results:
            if isinstance(result, DataError):
                bad.append(result)
            elif not bad:
                data = result.tobytes()
                keep(data)
                digest = np.frombuffer(_blake(data), np.uint8)
                streamed.digests[len(sources)] = digest
            sources.append(source)
        yield len(sources), total
    if bad:
        remedy = "repair or remove them; nothing was changed"
        raise bad_pictures([str(error) for error in bad], total, remedy)
    return sources


def _try(streamed: StreamedPixels, index: int) -> tuple[bytes, Pixels | DataError]:
    """Return the digest of a picture's source, and the picture or what is wrong with it."""
    name = streamed.dataset.items[index].name
    try:
        source = streamed.dataset.reader.read(index)
        picture = prepare(source, name, streamed.geometry, streamed.limits)
    except DataError as error:
        return b"", error
    return _digest(source), picture


def over_chunks(work: Callable[[int], Result], total: int) -> Iterator[Result]:
    """Yield ``work(start)`` for the start of every `CHUNK` pictures of `total`, in order.

    Threads help where they can: decoders of large pictures let other threads run, tiny pictures
    only fight for the interpreter. The first chunk tells which it is.
    """
    if total == 0:
        return
    started = time.perf_counter()
    first = work(0)
    seconds = (time.perf_counter() - started) / min(CHUNK, total)
    yield first
    num_threads = (os.cpu_count() or 1) if seconds > SECONDS_WORTH_A_THREAD else 0
    yield from _in_order(num_threads, work, range(CHUNK, total, CHUNK))


def _in_order(
    num_threads: int, work: Callable[[Task], Result], tasks: Sequence[Task]
) -> Iterator[Result]:
    """Yield the results in the order of the tasks, with a bounded number of them in flight."""
    if num_threads == 0:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def bad_pictures(bad: Sequence[str], total: int, remedy: str) -> DataError:
    """Return an error that lists pictures that cannot be used.

    Args:
        bad: the name and the reason of each.
        total: pictures in all.
        remedy: what to do, said at the end.
    """
    if len(bad) == 1:
        return DataError(f"{bad[0]}; {remedy}")
    lines = [f"{len(bad):,} of {total:,} pictures cannot be used:"]
    lines += [f"  {words}" for words in bad[:BAD_FILES_SHOWN]]
    if len(bad) > BAD_FILES_SHOWN:
        lines.append(f"  and {len(bad) - BAD_FILES_SHOWN:,} more; `ken check` lists them all")
    return DataError("\n".join([*lines, remedy]))


def stamps(dataset: Dataset, *what: object) -> str:
    """Return a key of the pictures' cheap stamps: sizes, times and inodes, or a ZIP's checksums.

    Reading every file only to name the cache would cost a pass over the disk in every run, so the
    stamps remember the key of the content.

    Args:
        dataset: whose pictures.
        what: is kept under the key; JSON values.
    """
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    found.update(json.dumps([dataset.location, *what]).encode(errors="surrogatepass"))
    for index, item in enumerate(dataset.items):
        line = f"{item.name}\0{dataset.reader.stamp(index)}\0"
        found.update(line.encode(errors="surrogatepass"))
    return found.hexdigest()


def _remembered(memo: Path) -> str | None:
    try:
        key = json.loads(memo.read_bytes())["content"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # never written, or damaged: the content is read again
    return key if isinstance(key, str) and key.isalnum() else None


def _content_key(geometry: Geometry, sources: Sequence[bytes]) -> str:
    head = json.dumps([DECODER_VERSION, asdict(geometry)]).encode()
    return _blake(head + b"".join(sources)).hex()


def _source_digest(dataset: Dataset, index: int) -> bytes:
    try:
        return _digest(dataset.reader.read(index))
    except DataError:
        return b""  # named, with all others, when the pictures are decoded


def _digest(source: bytes | NDArray[np.generic]) -> bytes:
    if isinstance(source, bytes):
        return _blake(source)
    return _blake(f"{source.shape}{source.dtype}".encode() + source.tobytes())


def _blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _map(path: Path, num_items: int, geometry: Geometry) -> CachedPixels:
    height, width = geometry.size
    whole = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    cut = num_items * height * width * 3
    return CachedPixels(
        images=whole[:cut].reshape(num_items, height, width, 3),
        digests=whole[cut:].reshape(num_items, DIGEST_BYTES),
    )


def original(dataset: Dataset, index: int, limits: Limits, side: int) -> Pixels:
    """Return a picture in its own shape, ``uint8 (H, W, 3)``, with sides of `side` pixels or more.

    A small picture keeps its size; a camera's is decoded at a scale that is cheap.

    Raises:
        ImageError: it cannot be decoded.
        DataError: its file cannot be read.
    """
    source, name = dataset.reader.read(index), dataset.items[index].name
    if isinstance(source, bytes):
        return decode(source, name, target=(side, side), limits=limits)
    return from_array(source, name)


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


def spans(num_items: int, batch_size: int) -> list[slice]:
    """Return the batches of so many pictures; a last one of a single picture joins the one before.

    Batch normalisation cannot learn from one picture.

    Example:
        >>> spans(5, 2)
        [slice(0, 2, None), slice(2, 5, None)]
    """
    cuts = list(range(0, num_items, batch_size))
    if len(cuts) > 1 and num_items - cuts[-1] == 1:
        cuts.pop()
    return [slice(a, b) for a, b in itertools.pairwise([*cuts, num_items])]


def batches(
    store: PixelStore,
    items: NDArray[np.int64],
    batch_size: int,
    num_threads: int = 0,
) -> Iterator[Batch]:
    """Yield the pictures of `items` in that order, cut as `spans` says.

    The batches are the same for every number of threads.

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
    parts = [items[part] for part in spans(len(items), batch_size)]

    def fetch(part: NDArray[np.int64]) -> Batch:
        return Batch(store.gather(part), part)

    yield from _in_order(num_threads, fetch, parts)
