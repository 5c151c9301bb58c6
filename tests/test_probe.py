from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from kenspeckle import probe as module
from kenspeckle.core import InvalidValueError
from kenspeckle.metrics import score_of
from kenspeckle.probe import fit_probe, probe_logits

WIDTH = 12


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pictures(counts, seed=0, distance=1.0, width=WIDTH):
    """Return features of gaussian classes with so many pictures, all positive, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    centres = distance * rng.normal(size=(len(counts), width))
    scale = rng.uniform(0.1, 2, width)
    features = (5 + scale * (centres[labels] + rng.normal(size=(len(labels), width)))).clip(0)
    return features.astype(np.float32), labels.astype(np.int64)


def fit(
    features,
    labels,
    num_classes=None,
    metric="accuracy",
    *,
    learned=None,
    together=None,
    imbalance="none",
    seed=0,
):
    everything = np.arange(len(labels))
    return fit_probe(
        features,
        labels,
        everything if learned is None else learned,
        everything if together is None else together,
        num_classes or int(labels.max()) + 1,
        metric=metric,
        imbalance=imbalance,
        seed=seed,
    )


def standardised(features):
    return (features - features.mean(0)) / features.std(0)


def on_standardised(head, features):
    """Return weights and biases as they act on standardised features."""
    features = features.astype(np.float64)
    return head.weight * features.std(0), head.bias + head.weight @ features.mean(0)


def gradient(head, features, labels, importance):
    """Return the gradient of the mean loss with the penalty, by the formula."""
    x = standardised(features.astype(np.float64))
    weight, bias = on_standardised(head, features)
    truth = np.eye(len(bias))[labels]
    pull = importance[:, None] * (softmax(x @ weight.T + bias, axis=1) - truth)
    return pull.T @ x + head.penalty * weight, pull.sum(0)


@pytest.mark.parametrize("imbalance", ["none", "weights", "sampling"])
@pytest.mark.parametrize("counts", [(40, 60), (90, 30, 20, 5)])
def test_gradient_vanishes_at_the_head(monkeypatch, counts, imbalance):
    monkeypatch.setattr(module, "FINE", 1e-10)
    features, labels = pictures(counts)
    head = fit(features, labels, imbalance=imbalance)
    importance = np.full(len(labels), 1 / len(labels))
    if imbalance != "none":
        importance = 1 / (len(counts) * np.array(counts)[labels])
    for part in gradient(head, features, labels, importance):
        assert_allclose(part, 0, atol=5e-5)
    shaken = replace(head, weight=head.weight * np.float32(1.2))
    largest = max(abs(part).max() for part in gradient(shaken, features, labels, importance))
    assert largest > 1e-3  # so that the tolerance above says something


@pytest.mark.parametrize("penalty", [1.0, 0.03, 0.001])
@pytest.mark.parametrize("imbalance", ["none", "weights"])
def test_head_equals_scikit_learn(monkeypatch, penalty, imbalance):
    monkeypatch.setattr(module, "PENALTIES", (penalty,))
    monkeypatch.setattr(module, "FINE", 1e-9)
    features, labels = pictures((50, 30, 20), distance=0.5)
    head = fit(features, labels, imbalance=imbalance)
    known = LogisticRegression(
        C=1 / (penalty * len(labels)),
        class_weight="balanced" if imbalance == "weights" else None,
        tol=1e-9,
        max_iter=10_000,
    ).fit(standardised(features.astype(np.float64)), labels)
    weight, bias = on_standardised(head, features)
    assert head.penalty == penalty
    assert_allclose(weight, known.coef_, atol=2e-3)
    assert_allclose(bias - bias.mean(), known.intercept_ - known.intercept_.mean(), atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    width=st.integers(1, 8),
    imbalance=st.sampled_from([None, "none", "weights", "prior"]),
    metric=st.sampled_from(["accuracy", "balanced accuracy"]),
    group_size=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_any_data_give_a_finite_head(counts, width, imbalance, metric, group_size, seed):
    features, labels = pictures(counts, seed, width=width)
    together = np.arange(len(labels)) // group_size
    head = fit(
        features, labels, len(counts), metric, together=together, imbalance=imbalance, seed=seed
    )
    logits = probe_logits(head, features)
    assert logits.shape == head.out_of_fold.shape == (len(labels), len(counts))
    assert logits.dtype == head.out_of_fold.dtype == np.float32
    assert np.isfinite(logits).all()
    assert np.isfinite(head.out_of_fold).all()
    answers = head.out_of_fold.argmax(axis=1)
    assert_allclose(head.score, score_of(metric, labels, answers, len(counts)))
    absent = np.flatnonzero(np.array(counts) == 0)
    assert_array_equal(logits[:, absent], -100)
    assert not np.isin(logits.argmax(axis=1), absent).any()


def test_groups_are_never_in_two_folds_and_folds_share_the_classes():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    together = np.arange(100) // 2 * 7 - 50
    folds, groups = module._dealt(labels, together, 5, seed=0)
    for group in np.unique(groups):
        assert len(np.unique(folds[groups == group])) == 1
        assert len(np.unique(together[groups == group])) == 1
    for fold in range(5):
        assert_array_equal(np.bincount(labels[folds == fold]), [12, 6, 2])
    other, _ = module._dealt(labels, together, 5, seed=1)
    assert (other != folds).any()


def test_random_labels_give_chance_out_of_fold_though_the_head_knows_them():
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 6, (300, 600)).astype(np.float32)
    labels = rng.integers(0, 3, 300)
    head = fit(features, labels)
    assert (probe_logits(head, features).argmax(axis=1) == labels).mean() > 0.95
    assert 0.25 < head.score < 0.42  # 1/3 with a standard error of 0.027


def test_copies_with_random_labels_give_chance_only_when_they_belong_together():
    rng = np.random.default_rng(0)
    features = np.repeat(rng.uniform(0, 6, (150, 600)).astype(np.float32), 2, axis=0)
    labels = np.repeat(rng.integers(0, 3, 150), 2)
    assert fit(features, labels).score > 0.7
    assert fit(features, labels, together=np.arange(300) // 2).score < 0.45


def test_out_of_fold_logits_are_those_of_a_head_without_the_fold():
    features, labels = pictures((40, 30, 30), distance=0.7)
    head = fit(features, labels, together=np.arange(100) % 10)
    folds = module._dealt(labels, np.arange(100) % 10, 5, seed=0)[0].numpy()
    x = standardised(features.astype(np.float64))
    for fold in range(5):
        inside, outside = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        known = LogisticRegression(C=1 / (head.penalty * len(outside)), tol=1e-9, max_iter=10_000)
        known.fit(x[outside], labels[outside])
        assert_allclose(
            softmax(head.out_of_fold[inside], axis=1), known.predict_proba(x[inside]), atol=0.03
        )


def test_prior_subtracts_the_log_frequency_of_the_learned_pictures(monkeypatch):
    monkeypatch.setattr(module, "PENALTIES", (0.1,))
    features, labels = pictures((80, 15, 5))
    learned = np.arange(90)
    plain = fit(features, labels, learned=learned)
    head = fit(features, labels, learned=learned, imbalance="prior")
    frequency = np.bincount(labels[learned], minlength=3) / 90
    assert head.imbalance == "prior"
    assert_array_equal(head.weight, plain.weight)
    assert_allclose(plain.bias - head.bias, np.log(frequency), atol=1e-5)
    folds = module._dealt(labels[learned], learned, 5, seed=0)[0].numpy()
    own = np.bincount(labels[learned][folds != 0], minlength=3) / (folds != 0).sum()
    moved = (plain.out_of_fold - head.out_of_fold)[folds == 0]
    assert_allclose(moved, np.broadcast_to(np.log(own), moved.shape), atol=1e-5)


def named(head, what):
    return next((choice for choice in head.choices if choice.what == what), None)


def test_imbalance_is_a_question_only_where_classes_differ_enough():
    features, labels = pictures((30, 44))
    head = fit(features, labels, imbalance=None)
    assert head.imbalance == "none"
    assert named(head, "imbalance") is None
    features, labels = pictures((30, 45))
    assert named(fit(features, labels, imbalance=None), "imbalance") is not None
    assert named(fit(features, labels, imbalance="weights"), "imbalance") is None


@pytest.mark.parametrize(
    ("metric", "remedy"), [("accuracy", "none"), ("balanced accuracy", "prior")]
)
def test_remedy_is_taken_where_the_metric_gains(metric, remedy):
    features, labels = pictures((500, 40), distance=0.6, seed=1)
    head = fit(features, labels, metric=metric, imbalance=None)
    choice = named(head, "imbalance")
    assert [option.name for option in choice.options] == ["none", "prior", "weights"]
    assert [option.name for option in choice.options if option.chosen] == [head.imbalance]
    assert head.imbalance == remedy
    for option in choice.options:
        if option.chosen:
            assert_allclose(option.score, head.score)
            continue
        stated = fit(features, labels, metric=metric, imbalance=option.name)
        assert stated.imbalance == option.name
        assert_allclose(stated.score, option.score)


def test_sampling_is_weights_under_its_own_name():
    features, labels = pictures((60, 20))
    weights = fit(features, labels, imbalance="weights")
    sampling = fit(features, labels, imbalance="sampling")
    assert (weights.imbalance, sampling.imbalance) == ("weights", "sampling")
    assert_array_equal(weights.weight, sampling.weight)
    assert_array_equal(weights.out_of_fold, sampling.out_of_fold)


def test_penalty_is_the_strongest_within_one_standard_error_of_the_least_log_loss(monkeypatch):
    features, labels = pictures((60, 60, 60), distance=0.4)
    head = fit(features, labels)
    penalties = module.PENALTIES
    losses = {}
    for penalty in penalties:
        monkeypatch.setattr(module, "PENALTIES", (penalty,))
        logits = fit(features, labels).out_of_fold
        losses[penalty] = -log_softmax(logits, axis=1)[np.arange(180), labels]
    least = min(losses.values(), key=np.mean)

    def within(loss):
        difference = loss - least
        return difference.mean() <= np.sqrt((difference**2).sum()) / 180

    wanted = next(penalty for penalty in penalties if within(losses[penalty]))
    assert head.penalty == wanted
    options = named(head, "penalty").options
    assert [option.name for option in options] == [f"{penalty:g}" for penalty in penalties]
    assert [option.chosen for option in options] == [penalty == wanted for penalty in penalties]
    tried = [option.score is not None for option in options]
    assert tried == sorted(tried, reverse=True)
    assert not tried[-1]  # the path ends where the loss only grows


def test_pictures_that_belong_together_count_as_one():
    worth, cost = np.full(8, 1 / 8), np.array([1.0, 1, 0, 0, 0, 0, 0, 0])
    nothing = np.zeros(8)
    alone = module._Judge(worth, np.arange(8))
    pairs = module._Judge(worth, np.arange(8) // 2)
    assert alone.is_worse(cost, nothing)  # 2/8 against sqrt(2)/8
    assert not pairs.is_worse(cost, nothing)  # 2/8 against 2/8
    assert alone.simplest({"a": cost, "b": nothing}) == "b"
    assert pairs.simplest({"a": cost, "b": nothing}) == "a"


def test_class_without_pictures_is_never_the_answer():
    features, labels = pictures((20, 0, 20))
    head = fit(features, labels, num_classes=5)
    assert_array_equal(head.bias[[1, 3, 4]], -100)
    assert_array_equal(head.weight[[1, 3, 4]], 0)
    assert head.score > 0.9


def test_class_of_one_picture_is_learned_but_not_by_the_fold_that_asks_it():
    features, labels = pictures((30, 30, 1), distance=2)
    head = fit(features, labels)
    lone = int(np.flatnonzero(labels == 2)[0])
    assert head.out_of_fold[lone, 2] == -100
    assert probe_logits(head, features)[lone].argmax() == 2


def test_one_class_of_98_percent():
    features, labels = pictures((980, 12, 8), distance=1.5)
    head = fit(features, labels, metric="balanced accuracy", imbalance=None)
    assert head.score > fit(features, labels, metric="balanced accuracy").score - 1e-9
    assert head.score > 0.8


def test_constant_features_say_nothing():
    features, labels = pictures((30, 30))
    constant = np.full((60, 3), 4.7, np.float32)
    constant[::2, 0] = np.nextafter(np.float32(4.7), np.float32(5))  # rounding is no feature
    with_constant = fit(np.hstack([features, constant]), labels)
    assert_allclose(with_constant.out_of_fold, fit(features, labels).out_of_fold, atol=2e-2)
    assert abs(with_constant.weight[:, -3:]).max() < 1e-2
    nothing = fit(constant, np.repeat([0, 1], [45, 15]))
    assert_allclose(nothing.weight, 0, atol=1e-6)
    assert_allclose(softmax(nothing.bias), [0.75, 0.25], atol=1e-3)


def test_alone_a_picture_has_no_head_that_did_not_see_it():
    features, labels = pictures((3, 2))
    head = fit(features, labels, learned=np.array([0]))
    assert_array_equal(head.out_of_fold, [[-100, -100]])
    assert probe_logits(head, features[:1]).argmax() == labels[0]


def test_many_classes_of_few_pictures():
    features, labels = pictures((3,) * 100, distance=3, width=40)
    head = fit(features, labels)
    assert head.score > 0.95


@pytest.mark.parametrize("limit", ["CHOICE_WORK", "LARGE", "MAX_LOGITS"])
def test_large_problems_take_short_cuts_to_a_similar_head(monkeypatch, limit):
    features, labels = pictures((60, 60, 60), distance=0.6, width=30)
    whole = fit(features, labels)
    monkeypatch.setattr(module, limit, 1)
    monkeypatch.setattr(module, "CHOICE_AXES", 10)
    head = fit(features, labels)
    tried = {"CHOICE_WORK": "1 of 5", "LARGE": "3 of 3", "MAX_LOGITS": "5 of 5"}[limit]
    assert f"by {tried} folds" in named(head, "penalty").reason
    assert abs(head.score - whole.score) < 0.05
    if limit == "MAX_LOGITS":
        assert_allclose(head.out_of_fold, whole.out_of_fold, atol=0.15)


def test_weak_penalty_on_separable_pictures_ends_and_fits(monkeypatch):
    monkeypatch.setattr(module, "PENALTIES", (1.0, 1e-6))
    features, labels = pictures((50, 50), distance=4)
    head = fit(features, labels)
    logits = probe_logits(head, features)
    loss = -log_softmax(logits, axis=1)[np.arange(100), labels].mean()
    assert loss < 1e-3


def test_the_same_bits_twice_also_from_a_file(tmp_path):
    features, labels = pictures((40, 20, 20))
    features.tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", np.float32, "r").reshape(features.shape)
    first, second = (fit(array, labels, imbalance=None) for array in (features, mapped))
    assert_array_equal(first.weight, second.weight)
    assert_array_equal(first.out_of_fold, second.out_of_fold)
    assert first.choices == second.choices
    assert_array_equal(features, pictures((40, 20, 20))[0])  # untouched
    other = fit(features, labels, imbalance=None, seed=1)
    assert (other.out_of_fold != first.out_of_fold).any()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_scores_equal_their_definitions(pairs):
    labels, predicted = np.array(pairs).T
    right = [a == b for a, b in pairs]
    assert_allclose(score_of("accuracy", labels, predicted, 4), sum(right) / len(right))
    recalls = []
    for number in sorted(set(labels.tolist())):
        of_class = [a == b for a, b in pairs if a == number]
        recalls.append(sum(of_class) / len(of_class))
    wanted = sum(recalls) / len(recalls)
    assert_allclose(score_of("balanced accuracy", labels, predicted, 4), wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learned": np.array([], np.int64)}, "learned must be indices of at least one"),
        ({"num_classes": 1}, "labels must be 0 to 0"),
        ({"metric": "recall"}, "metric must be one of"),
        ({"imbalance": "focal"}, "imbalance must be None or one of"),
    ],
)
def test_wrong_arguments_are_named(changes, words):
    features, labels = pictures((5, 5))
    with pytest.raises(InvalidValueError, match=words):
        fit(features, labels, **changes)


def test_features_must_be_finite():
    features, labels = pictures((5, 5))
    features[3, 2] = np.nan
    with pytest.raises(InvalidValueError, match="features must be finite"):
        fit(features, labels)
    with pytest.raises(InvalidValueError, match="metric must be"):
        score_of("recall", labels, labels, 2)  # type: ignore[arg-type]
