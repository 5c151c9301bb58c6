"""Feeds give the pictures that were asked for; a balanced order shows every class equally often."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from kenspeckle.augmentation import Stream, mirrored, uniforms
from kenspeckle.config import AugmentationConfig
from kenspeckle.core import Normalisation
from kenspeckle.feeding import MapFeed, PictureFeed, balanced_order, shuffled
from kenspeckle.layers import normalise
from kenspeckle.pixels import CachedPixels

CPU = torch.device("cpu")
CHANCE = np.random.default_rng(0)
IMAGES = CHANCE.integers(0, 256, (11, 6, 5, 3), np.uint8)
STORE = CachedPixels(IMAGES, np.zeros((11, 16), np.uint8))
MAPS = CHANCE.normal(size=(11, 2, 3, 4)).astype(np.float16)
MIRRORED_MAPS = CHANCE.normal(size=(11, 2, 3, 4)).astype(np.float16)


def test_pictures_are_normalised_and_otherwise_as_they_are():
    norm = Normalisation((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    feed = PictureFeed(STORE, norm, AugmentationConfig(shift=2), 0)
    items = np.array([3, 1, 7])
    (inputs,) = feed.plain(items, CPU)
    wanted = normalise(torch.from_numpy(IMAGES[items]), norm.mean, norm.deviation)
    assert torch.equal(inputs, wanted)


def test_an_epoch_shows_every_picture_once_in_the_order_given():
    feed = PictureFeed(STORE, Normalisation(), AugmentationConfig(), 0)
    order = shuffled(np.arange(11), 5, 2)
    batches = list(feed.varied(order, 4, 0, CPU, 0))
    assert_array_equal(np.concatenate([items for _, items in batches]), order)
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 3]
    (plain,) = feed.plain(order, CPU)
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), plain)


def test_maps_are_mirrored_where_pictures_would_be():
    feed = MapFeed(MAPS, MIRRORED_MAPS, seed=3)
    order = np.arange(11)
    for epoch in (0, 1):
        batches = list(feed.varied(order, 5, epoch, CPU, 0))
        found = torch.cat([inputs for inputs, _ in batches]).permute(0, 2, 3, 1).numpy()
        coins = uniforms(3, epoch, torch.arange(11))[Stream.FLIP]
        turn = mirrored(coins, epoch).numpy()
        assert 0 < turn.sum() < 11
        wanted = np.where(turn[:, None, None, None], MIRRORED_MAPS, MAPS)
        assert_array_equal(found, wanted.astype(np.float32))


def test_maps_without_mirror_images_stay_as_they_are():
    feed = MapFeed(MAPS, None, seed=3)
    (plain,) = feed.plain(np.array([2, 9]), CPU)
    assert_array_equal(plain.permute(0, 2, 3, 1).numpy(), MAPS[[2, 9]].astype(np.float32))
    (pair,) = feed.varied(np.array([2, 9]), 4, 1, CPU, 0)
    assert torch.equal(pair[0], plain)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 5))
def test_a_balanced_order_shows_every_class_equally_often(labels, epoch):
    labels = np.array(labels)
    items = np.arange(100, 100 + len(labels))
    order = balanced_order(items, labels, 1, epoch)
    assert len(order) == len(items)
    counts = np.bincount(labels[order - 100], minlength=4)[np.unique(labels)]
    assert counts.max() - counts.min() <= 1
    assert_array_equal(order, balanced_order(items, labels, 1, epoch))


def test_a_balanced_order_shows_other_pictures_of_a_large_class_in_each_epoch():
    labels = np.array([0] * 90 + [1] * 10)
    seen = [set(balanced_order(np.arange(100), labels, 0, epoch).tolist()) for epoch in range(6)]
    assert all(len(some & set(range(90))) == 50 for some in seen)
    assert len(set.union(*seen) & set(range(90))) > 85
    assert all(some >= set(range(90, 100)) for some in seen)
