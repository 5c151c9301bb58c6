"""Pictures that stand in a data set twice: pixel for pixel, or resized, re-encoded and trimmed.

Candidates come from a perceptual hash, looked up in buckets and not by comparing all pairs; what
counts is then decided on small versions of the two pictures themselves.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import InvalidValueError, MissingExtraError, Pixels

__all__ = [
    "HASH_BITS",
    "SKETCH_SIDE",
    "NearPairs",
    "connected",
    "equal_groups",
    "hash_pairs",
    "joined",
    "near_pairs",
    "neighbour_pairs",
    "perceptual_hashes",
]

SKETCH_SIDE = 32
"""Height and width in pixels of the small version of a picture that comparisons look at."""

HASH_BITS = 64

Pairs = NDArray[np.int64]
"""``int64 (M, 2)``, two indices a row, the smaller first."""

_BANDS = 4
_BAND_BITS = HASH_BITS // _BANDS
_PROBE_BITS = 2  # flipped in a band, so that every pair within _MAX_DISTANCE is met in one of them
_MAX_DISTANCE = 10  # of 64 bits; 99 % of re-encoded and resized pictures are within 8
_MOST_MET = 400_000_000  # pairs met in the buckets of a small set, about 10 s
_MOST_KEPT = 100_000  # pairs of a small set whose sketches are compared
_BLOCK_PAIRS = 1_000_000  # looked at together: about 50 MB
_CHUNK = 1_000  # pairs of sketches compared together: about 50 MB

# Correlation of the sketches. Of 8,000 pictures in four real sets, re-encoded or resized ones had
# at least 0.97 after the blur, and no two different photographs had 0.95 (2026-11-24).
_SAME = 0.97
_MAYBE_TRIMMED = 0.6  # below it no crop of up to a twelfth on each side was ever found
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's grey
_FLAT = 3.0  # grey levels of standard deviation: below it there is nothing to compare
_COMMON_SHARE = 0.95  # of random pairs
_TRIMS = (0.04, 0.08, 0.12, 0.16)  # of a side, cut away in all
_CROP_HANDICAP = 0.01  # many windows are tried, and the best of many is better by chance
_NEIGHBOURS = 3
_NEAR_COSINE = 0.8


@dataclass(frozen=True, eq=False)
class NearPairs:
    """Pairs of pictures that show the same thing but are not equal pixel for pixel.

    Attributes:
        pairs: ``int64 (M, 2)``, the most similar first.
        similarity: ``float64 (M,)``, correlation of the two pictures, at most 1.
        threshold: least similarity that counted; higher where all pictures of a set look alike.
    """

    pairs: Pairs
    similarity: NDArray[np.float64]
    threshold: float


def equal_groups(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return a number per picture; equal numbers have equal digests.

    Args:
        digests: ``uint8 (N, B)``.
    """
    return np.unique(digests, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def perceptual_hashes(grey: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the 64-bit pHash of each picture: the signs of its lowest frequencies.

    The bits are those of ``ImageHash.phash``, in rows; here many pictures are hashed at a time.

    Source: https://www.phash.org, and ImageHash 4.3.

    Args:
        grey: ``uint8 (N, 32, 32)``, pictures in grey, resized with a Lanczos filter.

    Returns:
        ``uint64 (N,)``.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    try:
        from scipy.fft import dct
    except ModuleNotFoundError as error:
        raise MissingExtraError("finding near-duplicates", "train") from error
    low = dct(dct(grey.astype(np.float64), axis=1)[:, :8], axis=2)[:, :, :8].reshape(-1, HASH_BITS)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").reshape(-1).astype(np.uint64)


def near_pairs(
    hashes: NDArray[np.uint64],
    sketches: Pixels,
    items: NDArray[np.int64] | None = None,
    candidates: Pairs | None = None,
    *,
    seed: int = 0,
) -> NearPairs:
    """Return the pairs that are the same picture after resizing, re-encoding or slight cropping.

    Memory does not grow with the square of N; time grows with the pairs of similar hash, which for
    unrelated photographs are few.

    Args:
        hashes: ``uint64 (N,)``, from `perceptual_hashes`.
        sketches: ``uint8 (N, 32, 32, 3)``, each picture squashed to that size.
        items: indices of the pictures to compare, rising; all when None. Only sketches that are
            compared are read: the others can stay on the disk.
        candidates: ``int64 (M, 2)``, more pairs to look at, such as those of `neighbour_pairs`.
        seed: of the random pairs that tell how alike the pictures of this set are anyway.

    Raises:
        InvalidValueError: the lengths differ.
    """
    if len(hashes) != len(sketches):
        raise InvalidValueError(
            f"hashes and sketches must have the same length; got {len(hashes)} and {len(sketches)}"
        )
    items = np.arange(len(hashes)) if items is None else items
    found = [items[hash_pairs(hashes[items])]] + ([] if candidates is None else [candidates])
    pairs = np.unique(np.concatenate(found), axis=0)
    common = _common_similarity(sketches, items, seed)
    # Where all pictures look alike (parts on a line, X-rays), being alike proves nothing: a pair
    # must be six times as near to equality as the nearest twentieth of random pairs.
    threshold = max(_SAME, 1 - (1 - common) / 6)
    least_of_crops = max(_MAYBE_TRIMMED, common + (1 - common) / 4)
    chunks = [
        _similarity(sketches, pairs[start : start + _CHUNK], threshold, least_of_crops)
        for start in range(0, len(pairs), _CHUNK)
    ]
    similarity = np.concatenate([np.zeros(0), *chunks])
    kept = np.flatnonzero(similarity >= threshold)
    order = kept[np.argsort(-similarity[kept], kind="stable")]
    return NearPairs(pairs[order], similarity[order], threshold)


def hash_pairs(hashes: NDArray[np.uint64]) -> Pairs:
    """Return the pairs of hashes that differ in at most 10 of 64 bits.

    Where these are too many to look at (a million pictures, or a hundred thousand that are all
    alike), only nearer ones: the bits are lowered until at most about five pairs a picture remain.

    Source: multi-index hashing (Norouzi, Punjani and Fleet 2012, "Fast Search in Hamming Space"):
    of four bands of 16 bits one differs in at most two, so it is enough to look into the buckets of
    each band at up to two flipped bits.

    Args:
        hashes: ``uint64 (N,)``.
    """
    most_met = max(_MOST_MET, 2_000 * len(hashes))
    probe_bits = _PROBE_BITS
    while probe_bits and _num_colliding(hashes, probe_bits) > most_met:
        probe_bits -= 1
    radius = min(_MAX_DISTANCE, _BANDS * (probe_bits + 1) - 1)
    most_kept = _MOST_KEPT + 5 * len(hashes)
    found = np.zeros((0, 2), np.int64)
    for block in _colliding_pairs(hashes, probe_bits):
        near = block[_distance(hashes, block) <= radius]
        if len(near):
            found = np.unique(np.concatenate([found, near]), axis=0)
        while len(found) > most_kept and radius:
            radius -= 1
            found = found[_distance(hashes, found) <= radius]
        if len(found) > most_kept:
            return found[:most_kept]
    return found


def _num_colliding(hashes: NDArray[np.uint64], probe_bits: int) -> int:
    """Return how many pairs the buckets hold, each met once from either side."""
    total = 0
    for keys, _, starts in _buckets(hashes):
        counts = np.diff(starts)
        total += sum(int(counts[keys ^ flip].sum()) for flip in _flips(probe_bits))
    return total


def _distance(hashes: NDArray[np.uint64], pairs: Pairs) -> NDArray[np.int64]:
    differing = (hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).view(np.uint16).reshape(-1, _BANDS)
    return np.asarray(_NUM_ONES[differing].sum(axis=1, dtype=np.int64))


_NUM_ONES = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)


def _flips(probe_bits: int) -> list[int]:
    return [
        sum(1 << bit for bit in chosen)
        for count in range(probe_bits + 1)
        for chosen in itertools.combinations(range(_BAND_BITS), count)
    ]


def _buckets(hashes: NDArray[np.uint64]) -> Iterator[tuple[Pairs, Pairs, Pairs]]:
    """Yield for each band the keys, their order, and where each bucket starts in that order."""
    for band in range(_BANDS):
        keys = (hashes >> np.uint64(band * _BAND_BITS)).astype(np.uint16).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        yield keys, order, np.searchsorted(keys[order], np.arange((1 << _BAND_BITS) + 1))


def _colliding_pairs(hashes: NDArray[np.uint64], probe_bits: int) -> Iterator[Pairs]:
    for keys, order, starts in _buckets(hashes):
        for flip in _flips(probe_bits):
            yield from _bucket_pairs(keys ^ flip, order, starts)


def _bucket_pairs(keys: Pairs, order: Pairs, starts: Pairs) -> Iterator[Pairs]:
    """Yield (i, j), i < j, for every i and every j in the bucket of ``keys[i]``, in blocks."""
    counts = starts[keys + 1] - starts[keys]
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(keys):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + _BLOCK_PAIRS, side="right")))
        count = counts[begin:end]
        left = np.repeat(np.arange(begin, end), count)
        within = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
        right = order[np.repeat(starts[keys[begin:end]], count) + within]
        ahead = left < right
        yield np.stack([left[ahead], right[ahead]], axis=1)
        begin = end


def neighbour_pairs(features: NDArray[np.float32]) -> Pairs:
    """Return for every picture its three nearest neighbours by the angle of their features.

    A crop moves every bit of a hash, but hardly an embedding.

    Args:
        features: ``float32 (N, D)``.
    """
    num_items = len(features)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, num_items, 1000):
        cosine = unit[start : start + 1000] @ unit.T
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = -1
        count = min(_NEIGHBOURS, num_items - 1)
        nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count] if count else cosine[:, :0]
        left = np.repeat(rows, count)
        right = nearest.reshape(-1).astype(np.int64)
        near = cosine[left, right] >= _NEAR_COSINE
        pairs = np.stack([start + left[near], right[near]], axis=1)
        found.append(np.sort(pairs, axis=1))
    return np.unique(np.concatenate(found), axis=0)


def joined(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number per item, equal where either of two numberings has equal ones.

    Args:
        first: ``int64 (N,)``.
        second: ``int64 (N,)``.

    Example:
        >>> joined(np.array([0, 0, 1, 2]), np.array([5, 6, 6, 7])).tolist()
        [0, 0, 0, 3]
    """
    pairs = []
    for numbers in (first, second):
        _, starts, places = np.unique(numbers, return_index=True, return_inverse=True)
        pairs.append(np.stack([starts[places], np.arange(len(numbers))], axis=1))
    return connected(len(first), np.concatenate(pairs))


def connected(num_items: int, pairs: Pairs) -> NDArray[np.int64]:
    """Return for each item the smallest index among those that it is joined to, by any chain.

    Args:
        num_items: N.
        pairs: ``int64 (M, 2)``.

    Returns:
        ``int64 (N,)``.
    """
    roots = np.arange(num_items)
    while True:
        low = np.minimum(roots[pairs[:, 0]], roots[pairs[:, 1]])
        joined = roots.copy()
        np.minimum.at(joined, roots[pairs[:, 0]], low)
        np.minimum.at(joined, roots[pairs[:, 1]], low)
        joined = joined[joined]
        while not np.array_equal(joined, joined[joined]):
            joined = joined[joined]
        if np.array_equal(joined, roots):
            return roots
        roots = joined[roots]


# Comparison of sketches.


def _blurred(sketches: Pixels) -> NDArray[np.float32]:
    """Return grey sketches without the detail that resizing loses, mean 0 and length 1.

    Flat ones become zero, so that they are like nothing.
    """
    grey = sketches.astype(np.float32) @ _LUMINANCE
    for axis in (1, 2):
        before, after = np.roll(grey, 1, axis), np.roll(grey, -1, axis)
        first = [slice(None)] * 3
        last = [slice(None)] * 3
        first[axis], last[axis] = slice(0, 1), slice(-1, None)
        before[tuple(first)], after[tuple(last)] = grey[tuple(first)], grey[tuple(last)]
        grey = (before + 2 * grey + after) / 4
    flat = grey.std(axis=(1, 2), keepdims=True) < _FLAT
    return np.where(flat, 0, _unit(grey))


def _unit(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return pictures with mean 0 and length 1, so that their product is their correlation."""
    centred = grey - grey.mean(axis=(1, 2), keepdims=True)
    length = np.sqrt((centred**2).sum(axis=(1, 2), keepdims=True))
    return np.asarray(centred / np.maximum(length, 1e-6))


def _common_similarity(sketches: Pixels, items: NDArray[np.int64], seed: int) -> float:
    """Return the correlation that only a twentieth of random pairs exceed."""
    if len(items) < 3:
        return 0.0
    generator = np.random.default_rng(seed)
    left, right = items[generator.integers(0, len(items), (2, 4000))]
    apart = left != right
    a, b = _blurred(sketches[left[apart]]), _blurred(sketches[right[apart]])
    return float(np.quantile(np.einsum("nhw,nhw->n", a, b), _COMMON_SHARE))


def _similarity(
    sketches: Pixels, pairs: Pairs, threshold: float, least_of_crops: float
) -> NDArray[np.float64]:
    """Return the correlation of each pair, where one may be a slight crop of the other.

    Args:
        sketches: ``uint8 (N, 32, 32, 3)``.
        pairs: ``int64 (M, 2)``.
        threshold: pairs that reach it are not tried as crops.
        least_of_crops: neither are pairs below it.
    """
    a, b = _blurred(sketches[pairs[:, 0]]), _blurred(sketches[pairs[:, 1]])
    similarity = np.einsum("nhw,nhw->n", a, b).astype(np.float64)
    maybe = np.flatnonzero((similarity < threshold) & (similarity >= least_of_crops))
    one, other = _halved(a[maybe]), _halved(b[maybe])
    best = np.maximum(_trimmed(one, other), _trimmed(other, one)) - _CROP_HANDICAP
    similarity[maybe] = np.maximum(similarity[maybe], best)
    return np.asarray(similarity, np.float64)


def _halved(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    side = SKETCH_SIDE // 2
    return _unit(grey.reshape(-1, side, 2, side, 2).mean(axis=(2, 4)))


def _trimmed(whole: NDArray[np.float32], part: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the best correlation of `part` with a crop of `whole`.

    Args:
        whole: ``float32 (n, s, s)``.
        part: ``float32 (n, s, s)``, mean 0 and length 1.
    """
    n, s = whole.shape[:2]
    best = np.full(n, -1, np.float32)
    if n == 0:
        return best
    for trim in _TRIMS:
        places = (0.0, 0.25, 0.5, 0.75, 1.0)
        windows = np.concatenate([_window(trim * place, 1 - trim, s) for place in places])
        w = len(places)
        # One product for all windows of all pictures: (n, h, wx) and then (n, wx, wy).
        across = (whole.reshape(n * s, s) @ windows.T).reshape(n, s, w * s)
        cuts = np.ascontiguousarray(across.transpose(0, 2, 1)).reshape(n * w * s, s) @ windows.T
        cuts = cuts.reshape(n, w, s, w, s)
        count = s * s
        product = np.einsum("naxby,nyx->nab", cuts, part)
        mean = cuts.mean(axis=(2, 4))
        length = np.sqrt(np.maximum((cuts**2).sum(axis=(2, 4)) - count * mean**2, 1e-12))
        best = np.maximum(best, (product / length).max(axis=(1, 2)))
    return best


def _window(start: float, length: float, num: int) -> NDArray[np.float32]:
    """Return the matrix ``(num, num)`` that stretches a part of a line over the whole, linearly.

    Args:
        start: where the part begins, as a share of the line.
        length: how long it is, as a share of the line.
        num: points on the line.
    """
    places = np.clip((start + length * (np.arange(num) + 0.5) / num) * num - 0.5, 0, num - 1)
    left = np.minimum(places.astype(int), num - 2)
    weight = (places - left).astype(np.float32)
    matrix = np.zeros((num, num), np.float32)
    matrix[np.arange(num), left] = 1 - weight
    matrix[np.arange(num), left + 1] = weight
    return matrix
