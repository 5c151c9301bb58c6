"""The weights are a function of the pictures, the recipe and the seed, and of nothing else."""

import csv
import hashlib
import random
import threading
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from kenspeckle.config import MODEL_CONFIGS
from kenspeckle.export import to_safetensors
from kenspeckle.images import Limits
from kenspeckle.learning import learn
from kenspeckle.pixels import Cache, CachedPixels, StreamedPixels
from kenspeckle.preparation import network_for, prepare_data
from kenspeckle.settings import from_dict, settings, to_dict, with_settings
from kenspeckle.sources import open_dataset
from tests.conftest import CLASSES, make_folder, picture, png, quick_recipe, run

TINY = {
    "cnn": ["channels=4", "hidden=8"],
    "resnet": ["model=resnet", "channels=4,6", "num_blocks=1"],
    "speed": ["model=speed", "channels=6,6,6"],
    "efficientnet-lite": ["model=efficientnet-lite"],
}


def finished(generator):
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def prepared_from(data, recipe, cache):
    return finished(prepare_data(open_dataset(data), recipe, Limits(), cache))


def trained_states(data, recipe, cache, num_loader_threads=0):
    """Return the bytes of the weights that a run keeps, and of those after its last step."""
    prepared = prepared_from(data, recipe, cache)
    network = network_for(prepared, recipe)
    last = [b""]

    def watched():
        learning = learn(
            network,
            prepared.task,
            recipe,
            stop=threading.Event(),
            keep=lambda _: None,
            num_loader_threads=num_loader_threads,
        )
        for event in learning:
            last[0] = to_safetensors(network.state_dict())
            yield event

    finished(watched())
    return to_safetensors(network.state_dict()), last[0]


def weights_of(data, recipe, cache, num_loader_threads=0):
    """Return the SHA-256 of the weights, as a run has it, without exporting them."""
    return hashlib.sha256(trained_states(data, recipe, cache, num_loader_threads)[0]).hexdigest()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Pictures of two sizes, some of them transparent, of classes of different sizes."""
    root = tmp_path_factory.mktemp("uneven") / "data"
    for label, (name, colour) in enumerate(CLASSES.items()):
        (root / name).mkdir(parents=True)
        for index in range(8 + 4 * label):
            pixels = picture(colour, 100 * label + index, (20, 24) if index % 2 else (30, 16))
            image = Image.fromarray(pixels)
            if index % 3 == 0:
                image.putalpha(128)
            image.save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("pixels"))


# The same run gives the same weights.


@pytest.fixture(scope="module")
def expected(trained):
    """The weights' hash of a whole run, and its data and recipe."""
    recipe = quick_recipe("epochs=4", "dropout=0.2", "flip=true", "zoom=0.2")
    data = trained.model_path.parent / "colours"
    return data, recipe, weights_of(data, recipe, Cache(data.parent / "cache"))


def test_a_run_ships_these_weights(trained, tmp_path):
    data = trained.model_path.parent / "colours"
    digest = weights_of(data, quick_recipe("epochs=4"), Cache(tmp_path))
    assert digest == trained.report.provenance["weights_sha256"]


@pytest.mark.parametrize("num_loader_threads", [0, 1, 2])
@pytest.mark.parametrize(("limit", "kind"), [(10**9, CachedPixels), (0, StreamedPixels)])
def test_loaders_and_caches_change_nothing(expected, tmp_path, num_loader_threads, limit, kind):
    data, recipe, digest = expected
    cache = Cache(tmp_path, limit)
    assert isinstance(prepared_from(data, recipe, cache).task.store, kind)
    assert weights_of(data, recipe, cache, num_loader_threads) == digest


def test_another_seed_gives_other_weights(expected, tmp_path):
    data, recipe, digest = expected
    other = with_settings(recipe, ["seed=1"])
    assert weights_of(data, other, Cache(tmp_path)) != digest


def by_name(prepared):
    names = [item.name for item in prepared.dataset.items]
    return dict(zip(names, prepared.parts.tolist(), strict=True))


def test_a_zip_in_any_order_gives_the_folders_weights(expected, tmp_path):
    data, recipe, digest = expected
    files = sorted(data.rglob("*.png"))
    random.Random(5).shuffle(files)  # noqa: S311 - any order will do
    with zipfile.ZipFile(tmp_path / "colours.zip", "w") as archive:
        for path in files:
            archive.write(path, path.relative_to(data))
    found = prepared_from(tmp_path / "colours.zip", recipe, Cache(tmp_path))
    wanted = prepared_from(data, recipe, Cache(tmp_path))
    assert by_name(found) == by_name(wanted)
    assert found.fingerprint == wanted.fingerprint
    assert weights_of(tmp_path / "colours.zip", recipe, Cache(tmp_path)) == digest


def test_a_manifest_in_any_order_gives_the_same_split(uneven, tmp_path, cache):
    """Its rows keep their order, so the epochs are shuffled otherwise and the weights differ."""
    recipe = quick_recipe()
    rows = [(str(path), path.parent.name) for path in sorted(uneven.rglob("*.png"))]
    found = []
    for name, order in (("a.csv", rows), ("b.csv", rows[::-1])):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *order])
        found.append(prepared_from(tmp_path / name, recipe, cache))
    assert by_name(found[0]) == by_name(found[1])
    assert found[0].fingerprint == found[1].fingerprint
    digests = [weights_of(tmp_path / name, recipe, cache) for name in ("a.csv", "b.csv")]
    assert digests[0] != digests[1]


def test_the_global_generators_are_left_alone(tmp_path):
    data = make_folder(tmp_path / "data", 6)
    before = (torch.get_rng_state(), np.random.get_state())  # noqa: NPY002
    run(data, tmp_path / "a.ken", "epochs=1", "dropout=0.5", "flip=true")
    after = (torch.get_rng_state(), np.random.get_state())  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    np.testing.assert_equal(before[1], after[1])
    # The module `random` is beartype's in these tests; tests/test_structure.py keeps it out of src.


def test_equal_pictures_stay_on_one_side(tmp_path, cache):
    data = make_folder(tmp_path / "data", 12)
    for name in CLASSES:
        for index in range(6):
            twin = (data / name / f"{index:03d}.png").read_bytes()
            (data / name / f"twin-{index}.png").write_bytes(twin)
    prepared = prepared_from(data, quick_recipe(), cache)
    sides: dict[bytes, list[str]] = {}
    for index, item in enumerate(prepared.dataset.items):
        content = (data / item.name).read_bytes()
        sides.setdefault(content, []).append(str(prepared.parts[index]))
    assert Counter(map(len, sides.values())) == {2: 18, 1: 18}
    assert all(len(set(parts)) == 1 for parts in sides.values())
    assert {"train", "validation", "test"} == set(prepared.parts.tolist())


def test_another_split_or_picture_is_another_fingerprint(uneven, tmp_path, cache):
    recipe = quick_recipe()
    first = prepared_from(uneven, recipe, cache)
    other_split = prepared_from(uneven, with_settings(recipe, ["seed=3"]), cache)
    assert by_name(other_split) != by_name(first)
    assert other_split.fingerprint != first.fingerprint
    copy = tmp_path / "copy"
    for path in uneven.rglob("*.png"):
        where = copy / path.relative_to(uneven)
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(path.read_bytes())
    assert prepared_from(copy, recipe, cache).fingerprint == first.fingerprint
    (copy / "red" / "1.png").write_bytes(png(picture((200, 200, 0), 1)))
    assert prepared_from(copy, recipe, cache).fingerprint != first.fingerprint


# Every setting changes the weights: (family, changes before, setting, value).

EFFECTS = [
    ("cnn", [], "seed", 1),
    ("cnn", [], "model.channels", [5]),
    ("cnn", [], "model.kernel_size", 5),
    ("cnn", [], "model.stride", 2),
    ("cnn", [], "model.padding", 0),
    ("cnn", [], "model.pooling", "average"),
    ("cnn", [], "model.pooling", "none"),
    ("cnn", [], "model.pool_size", 3),
    ("cnn", [], "model.hidden", []),
    ("cnn", [], "model.dropout", 0.5),
    ("cnn", [], "model.batch_norm", True),
    ("resnet", [], "model.channels", [4, 8]),
    ("resnet", [], "model.num_blocks", 2),
    ("resnet", [], "model.dropout", 0.5),
    ("speed", [], "model.channels", [6, 6, 8]),
    ("speed", [], "model.logit_scale", 1.0),
    ("efficientnet-lite", [], "model.variant", 1),
    ("efficientnet-lite", [], "model.dropout", 0.5),
    ("cnn", [], "pixels.size", [12, 16]),
    ("cnn", [], "pixels.fit", "crop"),
    ("cnn", [], "pixels.fit", "pad"),
    ("cnn", [], "pixels.interpolation", "bicubic"),
    ("cnn", [], "pixels.background", [0, 0, 0]),
    ("cnn", ["fit=pad"], "pixels.background", [0, 0, 0]),
    ("cnn", [], "pixels.mean", [0.4, 0.5, 0.5]),
    ("cnn", [], "pixels.mean", None),
    ("cnn", [], "pixels.deviation", [0.4, 0.5, 0.5]),
    ("cnn", [], "pixels.deviation", None),
    ("cnn", [], "augmentation.flip", True),
    ("cnn", [], "augmentation.shift", 2),
    ("cnn", [], "augmentation.zoom", 0.3),
    ("cnn", [], "augmentation.cutout", 5),
    ("cnn", [], "augmentation.brightness", 0.3),
    ("cnn", [], "augmentation.contrast", 0.3),
    ("cnn", [], "augmentation.saturation", 0.3),
    ("cnn", [], "loss.name", "mse"),
    ("cnn", [], "loss.name", "focal"),
    ("cnn", [], "loss.name", "binary"),
    ("cnn", [], "loss.label_smoothing", 0.2),
    ("cnn", [], "training.imbalance", "weights"),
    ("cnn", [], "training.imbalance", "sampling"),
    ("cnn", [], "training.imbalance", "prior"),
    ("cnn", [], "augmentation.mixup", 0.4),
    ("cnn", [], "augmentation.cutmix", 0.4),
    ("cnn", ["loss=mse"], "training.imbalance", "weights"),
    ("cnn", ["loss=focal"], "training.imbalance", "weights"),
    ("cnn", ["loss=binary"], "training.imbalance", "weights"),
    ("cnn", ["loss=focal"], "loss.gamma", 1.0),
    ("cnn", [], "optimizer.name", "gd"),
    ("cnn", [], "optimizer.name", "momentum"),
    ("cnn", [], "optimizer.name", "rmsprop"),
    ("cnn", [], "optimizer.name", "adam"),
    ("cnn", ["optimizer=momentum"], "optimizer.name", "nesterov"),
    ("cnn", ["optimizer=adam", "weight_decay=0.1"], "optimizer.name", "adamw"),
    ("cnn", ["optimizer=adam"], "optimizer.name", "muon"),
    ("cnn", [], "optimizer.lr", 0.05),
    *[
        ("cnn", [f"optimizer={name}"], "optimizer.weight_decay", 0.1)
        for name in ("gd", "sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw", "muon")
    ],
    *[
        ("cnn", [f"optimizer={name}"], "optimizer.momentum", 0.5)
        for name in ("momentum", "nesterov", "rmsprop", "muon")
    ],
    ("cnn", ["optimizer=rmsprop"], "optimizer.alpha", 0.5),
    ("cnn", ["optimizer=rmsprop"], "optimizer.eps", 0.01),
    ("cnn", ["optimizer=adam"], "optimizer.eps", 0.01),
    ("cnn", ["optimizer=adamw"], "optimizer.eps", 0.01),
    ("cnn", ["optimizer=adam"], "optimizer.betas", [0.5, 0.9]),
    ("cnn", ["optimizer=adamw"], "optimizer.betas", [0.5, 0.9]),
    ("cnn", [], "schedule.name", "linear"),
    ("cnn", [], "schedule.name", "cosine"),
    ("cnn", [], "schedule.name", "steps"),
    ("cnn", [], "schedule.warmup", 0.5),
    ("cnn", [], "training.epochs", 1),
    ("cnn", [], "training.batch_size", 5),
    ("cnn", [], "training.ema_decay", 0.9),
    ("cnn", [], "training.clip_norm", 0.01),
    ("cnn", ["optimizer=gd"], "training.clip_norm", 0.01),
    ("cnn", [], "split.validation", 0.3),
    ("cnn", [], "split.test", 0.3),
]

# What decides when training ends, and what only an accelerator obeys; tests of their own.
WITHOUT_EFFECT_HERE = {"training.patience", "training.precision"}
# What only a pretrained network obeys: tests/test_transfer.py.
PRETRAINED_ONLY = {f"transfer.{name}" for name in ("weights", "depth", "layer_decay", "norms")}


def base_recipe(family, changes=()):
    words = ["batch_size=8", "epochs=2", "size=16", "lr=0.02", *TINY[family]]
    return with_settings(with_settings(quick_recipe(), words), changes)


def with_one(recipe, setting, value):
    plain = to_dict(recipe)
    section, _, leaf = setting.rpartition(".")
    (plain[section] if section else plain)[leaf] = value
    return from_dict(plain)


@pytest.fixture(scope="module")
def base_weights(uneven, cache):
    """The weights of every base, computed once."""
    known = {}

    def of(recipe):
        key = str(recipe)
        if key not in known:
            known[key] = trained_states(uneven, recipe, cache)
        return known[key]

    return of


@pytest.mark.parametrize(
    ("family", "changes", "setting", "value"),
    EFFECTS,
    ids=["-".join([f, *c, s, str(v)]) for f, c, s, v in EFFECTS],
)
def test_every_setting_changes_the_weights(
    uneven, cache, base_weights, family, changes, setting, value
):
    recipe = base_recipe(family, changes)
    other = with_one(recipe, setting, value)
    assert other != recipe
    assert trained_states(uneven, other, cache) != base_weights(recipe)


def test_no_setting_is_left_out():
    tested = {(f if s.startswith("model.") else "", s) for f, _, s, _ in EFFECTS}
    for family in set(MODEL_CONFIGS) - {"timm"}:  # which tests/test_zoo.py tests
        for setting in settings(base_recipe(family)):
            key = (family if setting.startswith("model.") else "", setting)
            assert key in tested or setting in WITHOUT_EFFECT_HERE | PRETRAINED_ONLY, key
