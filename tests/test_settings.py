"""Recipes survive JSON, and single settings are changed by name or refused with a remedy."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kenspeckle.config import (
    CnnConfig,
    LossConfig,
    OptimizerConfig,
    PixelsConfig,
    Recipe,
    ResNetConfig,
    SplitConfig,
    TrainingConfig,
)
from kenspeckle.core import InvalidValueError
from kenspeckle.recipes import RECIPES, named
from kenspeckle.settings import from_dict, recipe_hash, settings, to_dict, with_settings


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    recipe = named(name)
    assert recipe.name == name
    assert recipe.promise
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_leaf_names_are_unique_so_that_they_can_stand_alone():
    for recipe in RECIPES.values():
        leaves = [n.split(".")[-1] for n in settings(recipe) if not n.endswith(".name")]
        assert len(leaves) == len(set(leaves))


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer.lr=0.5", "optimizer.lr", 0.5),
        ("size=48", "pixels.size", (48, 48)),
        ("size=48x96", "pixels.size", (48, 96)),
        ("size=none", "pixels.size", None),
        ("channels=8,16,32", "model.channels", (8, 16, 32)),
        ("hidden=", "model.hidden", ()),
        ("batch_norm=yes", "model.batch_norm", True),
        ("seed=7", "seed", 7),
        ("loss=focal", "loss.name", "focal"),
        ("optimizer=adam", "optimizer.name", "adam"),
        ("schedule=cosine", "schedule.name", "cosine"),
        ("schedule.name=steps", "schedule.name", "steps"),
        ("mean=0.5", "pixels.mean", (0.5, 0.5, 0.5)),
    ],
)
def test_a_setting_is_changed_by_name(words, name, value):
    assert settings(with_settings(Recipe(), [words]))[name] == value


def test_another_model_brings_its_own_settings():
    recipe = with_settings(Recipe(), ["channels=16,32", "model=resnet"])
    assert recipe.model == ResNetConfig(channels=(16, 32))


def test_another_optimizer_drops_what_it_would_ignore():
    recipe = with_settings(Recipe(), ["optimizer=momentum", "momentum=0.8"])
    assert with_settings(recipe, ["optimizer=nesterov"]).optimizer.momentum == 0.8
    assert with_settings(recipe, ["optimizer=adam"]).optimizer.momentum is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lrr=1", "no setting named 'lrr'; did you mean 'lr'"),
        ("lr", "must be written name=value"),
        ("lr=fast", "lr must be a number; got 'fast'"),
        ("lr=0", "lr must be above 0"),
        ("lr=nan", "lr must be finite"),
        ("lr=inf", "lr must be finite"),
        ("epochs=1.5", "epochs must be a whole number"),
        ("epochs=0", "epochs must be at least 1"),
        ("size=3x4x5", "size must be 2 numbers"),
        ("size=0", "size must be at least 1"),
        ("batch_norm=maybe", "true or false"),
        ("optimizer=adma", "did you mean 'adam'"),
        ("model=rsnet", "no model named 'rsnet'; did you mean 'resnet'"),
        ("loss=crossentropy", "did you mean 'cross-entropy'"),
        ("momentum=0.9", "momentum has no effect on the optimizer 'sgd'"),
        ("betas=0.9,0.99", "betas has no effect"),
        ("gamma=2", "gamma has no effect"),
        ("kernel_size=-3", "kernel_size must be at least 1"),
        ("seed=-1", "seed must be from 0"),
        ("pooling=min", "pooling must be one of max, average, none"),
    ],
)
def test_a_wrong_setting_is_refused_with_a_remedy(words, message):
    with pytest.raises(InvalidValueError, match=message):
        with_settings(Recipe(), [words])


@pytest.mark.parametrize(
    "plain",
    [
        {"modle": {}},
        {"model": {"family": "os.system"}},
        {"model": {"family": "cnn", "kernel": 3}},
        {"model": {}},
        {"model": 3},
        {"optimizer": {"lr": "0.1; import os"}},
        {"optimizer": [1]},
        {"seed": True},
        {"name": 3},
        {"training": {"epochs": None}},
    ],
)
def test_a_recipe_that_is_none_is_refused(plain):
    with pytest.raises(InvalidValueError):
        from_dict(plain)


@pytest.mark.parametrize(
    "build",
    [
        lambda: CnnConfig(channels=()),
        lambda: CnnConfig(hidden=(), dropout=0.5),
        lambda: CnnConfig(pooling="none", pool_size=3),
        lambda: OptimizerConfig(name="adam", momentum=0.9),
        lambda: OptimizerConfig(name="momentum", momentum=1.0),
        lambda: LossConfig(name="mse", label_smoothing=0.1),
        lambda: PixelsConfig(background=(0, 0, 256)),
        lambda: PixelsConfig(deviation=(0.0, 0.5, 0.5)),
        lambda: SplitConfig(validation=0.5, test=0.5),
        lambda: TrainingConfig(batch_size=0),
    ],
)
def test_values_out_of_range_and_without_effect_are_refused(build):
    with pytest.raises(InvalidValueError):
        build()


@given(st.integers(0, 2**40), st.floats(1e-6, 10), st.integers(1, 500))
def test_the_hash_changes_with_every_setting(seed, lr, epochs):
    words = [f"seed={seed}", f"lr={lr!r}", f"epochs={epochs}"]
    recipe = with_settings(named("small-cnn"), words)
    assert recipe_hash(recipe) == recipe_hash(with_settings(named("small-cnn"), words))
    assert recipe_hash(recipe) != recipe_hash(with_settings(recipe, [f"seed={seed + 1}"]))
    assert from_dict(to_dict(recipe)) == recipe
