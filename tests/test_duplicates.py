"""Copies: hashes against ImageHash, pairs against all pairs, planted copies and strangers."""

import io

import imagehash
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from kenspeckle.core import InvalidValueError
from kenspeckle.duplicates import (
    connected,
    equal_groups,
    hash_pairs,
    joined,
    near_pairs,
    neighbour_pairs,
    perceptual_hashes,
)


def scene(seed: int, size=(96, 128)) -> Image.Image:
    """Return a picture with structure at all scales, unlike any other."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((*size, 3))
    for side in (3, 6, 12, 24):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        picture += np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)) / side
    picture -= picture.min()
    return Image.fromarray((255 * picture / picture.max()).astype(np.uint8))


def views(images):
    """Return the hashes and sketches of pictures."""
    lanczos, bilinear = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR
    grey = np.stack([np.asarray(image.convert("L").resize((32, 32), lanczos)) for image in images])
    sketches = np.stack([np.asarray(image.resize((32, 32), bilinear)) for image in images])
    return perceptual_hashes(grey), sketches


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


STRANGERS = [scene(seed) for seed in range(40)]

CHANGES = {
    "re-encoded": lambda image: as_jpeg(image, 40),
    "half": lambda image: image.resize((64, 48)),
    "larger": lambda image: image.resize((200, 150), Image.Resampling.BICUBIC),
    "darker": lambda image: image.point(lambda level: level * 0.8),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "trimmed": lambda image: image.crop((2, 2, 126, 94)),
}


def test_hashes_are_those_of_imagehash():
    hashes, _ = views(STRANGERS)
    wanted = [int(str(imagehash.phash(image)), 16) for image in STRANGERS]
    assert hashes.tolist() == wanted


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_strangers_are_not(change):
    copies = [CHANGES[change](image) for image in STRANGERS[:20]]
    found = near_pairs(*views([*STRANGERS, *copies]))
    pairs = {tuple(pair) for pair in found.pairs.tolist()}
    wanted = {(index, 40 + index) for index in range(20)}
    assert pairs <= wanted
    assert len(pairs) >= 19


def test_similarities_fall_and_reach_the_threshold():
    found = near_pairs(*views([*STRANGERS, *map(CHANGES["half"], STRANGERS)]))
    assert np.all(np.diff(found.similarity) <= 0)
    assert found.similarity.min() >= found.threshold
    assert found.similarity.max() <= 1 + 1e-6


def test_flat_pictures_are_like_nothing():
    flat = [Image.new("RGB", (40, 40), (shade, shade, shade)) for shade in range(100, 110)]
    assert len(near_pairs(*views(flat)).pairs) == 0


def test_the_threshold_rises_where_all_pictures_are_alike():
    base = np.asarray(scene(0)).astype(float)
    rng = np.random.default_rng(1)
    alike = [
        Image.fromarray(
            np.clip(base + np.asarray(scene(100 + i)) * rng.uniform(0.02, 0.05), 0, 255).astype(
                np.uint8
            )
        )
        for i in range(60)
    ]
    assert near_pairs(*views(STRANGERS)).threshold == 0.97
    assert near_pairs(*views(alike)).threshold > 0.97


@given(st.integers(0, 2**32), st.integers(2, 120))
def test_hash_pairs_are_all_pairs_within_ten_bits(seed, num):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, num, np.int64).astype(np.uint64)
    for i in range(0, num - 1, 2):  # close relatives
        flips = rng.choice(64, int(rng.integers(0, 16)), replace=False)
        hashes[i + 1] = hashes[i] ^ np.bitwise_or.reduce(
            np.left_shift(np.uint64(1), flips.astype(np.uint64)), initial=np.uint64(0)
        )
    wanted = {
        (i, j)
        for i in range(num)
        for j in range(i + 1, num)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 10
    }
    assert {tuple(pair) for pair in hash_pairs(hashes).tolist()} == wanted


def test_many_equal_hashes_are_looked_at_in_blocks(monkeypatch):
    monkeypatch.setattr("kenspeckle.duplicates._BLOCK_PAIRS", 100)
    assert len(hash_pairs(np.full(40, 7, np.uint64))) == 40 * 39 // 2


def test_too_many_pairs_are_cut_to_the_nearest(monkeypatch):
    monkeypatch.setattr("kenspeckle.duplicates._MOST_KEPT", 0)
    hashes = np.arange(1000, dtype=np.uint64)  # all within ten bits
    pairs = hash_pairs(hashes)
    assert 1000 < len(pairs) <= 5000
    assert {(int(hashes[i]) ^ int(hashes[j])).bit_count() for i, j in pairs.tolist()} == {1}
    monkeypatch.setattr("kenspeckle.duplicates._MOST_MET", 0)
    hashes = np.full(5000, 3, np.uint64)
    assert len(hash_pairs(hashes)) <= 5 * 5000


@given(st.integers(1, 30), st.data())
def test_connected_is_the_smallest_index_of_each_component(num, data):
    index = st.integers(0, num - 1)
    edges = data.draw(st.lists(st.tuples(index, index), max_size=40))
    roots = connected(num, np.array(edges, np.int64).reshape(-1, 2))
    wanted = list(range(num))
    for _ in range(num):
        for a, b in edges:
            wanted[a] = wanted[b] = min(wanted[a], wanted[b])
    assert roots.tolist() == wanted


@given(hnp.arrays(np.int64, 12, elements=st.integers(0, 5)), st.data())
def test_joined_keeps_together_what_either_does(first, data):
    second = data.draw(hnp.arrays(np.int64, 12, elements=st.integers(0, 8)))
    both = joined(first, second)
    for numbers in (first, second):
        for i, j in zip(*np.nonzero(numbers[:, None] == numbers[None]), strict=True):
            assert both[i] == both[j]


def test_equal_digests_have_equal_numbers():
    digests = np.array([[1, 2], [3, 4], [1, 2]], np.uint8)
    first, second, third = equal_groups(digests)
    assert first == third != second


def test_neighbours_by_features():
    features = np.array([[1, 0], [1, 0.1], [0, 1], [-1, 0]], np.float32)
    assert neighbour_pairs(features).tolist() == [[0, 1]]
    assert neighbour_pairs(features[:1]).shape == (0, 2)
    assert neighbour_pairs(features[:0]).shape == (0, 2)


def test_nothing_to_compare():
    for num in (0, 1):
        sketches = np.zeros((num, 32, 32, 3), np.uint8)
        assert len(near_pairs(np.zeros(num, np.uint64), sketches).pairs) == 0


def test_only_the_items_asked_for_are_compared():
    hashes, sketches = views([*STRANGERS, *map(CHANGES["half"], STRANGERS)])
    items = np.array([*range(40), 42, 47])
    found = near_pairs(hashes, sketches, items)
    assert {tuple(pair) for pair in found.pairs.tolist()} == {(2, 42), (7, 47)}


def test_lengths_must_agree():
    with pytest.raises(InvalidValueError, match="same length; got 2 and 3"):
        near_pairs(np.zeros(2, np.uint64), np.zeros((3, 32, 32, 3), np.uint8))
