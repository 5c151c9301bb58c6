"""Features are the network's, are computed once, and survive what befalls the cache."""

import dataclasses
import errno
import os
import time
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from onnx import TensorProto, helper

from kenspeckle import features
from kenspeckle.config import EfficientNetLiteConfig
from kenspeckle.core import Geometry, ImageError, InvalidValueError, ModelFileError, WriteError
from kenspeckle.features import Backbone, default_size, features_of
from kenspeckle.files import PART_SUFFIX
from kenspeckle.layers import normalise
from kenspeckle.models import build
from kenspeckle.pixels import Cache, CachedPixels
from kenspeckle.pretrained import NORMALISATION, load_

SIZE = (24, 40)
GEOMETRY = Geometry(SIZE)
NUM_FEATURES = 1280


def a_store(num=11, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, *SIZE, 3), np.uint8)
    return CachedPixels(images, rng.integers(0, 256, (num, 16), np.uint8))


def extracted(store, cache, geometry=GEOMETRY, **options):
    """Return the features, and the steps of progress."""
    extraction, steps = features_of(store, geometry, cache, **options), []
    while True:
        try:
            steps.append(next(extraction))
        except StopIteration as end:
            return end.value, steps


def files(cache, kind):
    return sorted((cache.folder / kind).glob("*"))


def mean_graph(size=SIZE, scale=1.0):
    """Return a tiny graph in the backbone's place: scaled means of R, G, B, over and over."""
    table = np.zeros((3, NUM_FEATURES), np.float32)
    for feature in range(NUM_FEATURES):
        table[feature % 3, feature] = scale
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["levels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["levels", "axes"], ["means"], keepdims=0),
            helper.make_node("MatMul", ["means", "table"], ["embedding"]),
        ],
        "means",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *size, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", NUM_FEATURES])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.ravel()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def means(store):
    channels = store.images.mean((1, 2))
    return np.tile(channels, NUM_FEATURES // 3 + 1)[:, :NUM_FEATURES]


@pytest.fixture
def exports(monkeypatch):
    """Put a tiny graph in the network's place, and count how often it is exported."""
    calls = []

    def exported(backbone):
        calls.append(backbone)
        graph = mean_graph(backbone.size)
        return graph, features._opened(graph)

    monkeypatch.setattr(features, "_exported", exported)
    return calls


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


class TestCache:
    @pytest.mark.parametrize("num", [1, 5, 300])
    @pytest.mark.parametrize("num_threads", [0, 1, 3])
    def test_rows_are_the_graphs_in_the_order_of_the_store(self, exports, cache, num, num_threads):
        store = a_store(num)
        found, steps = extracted(store, cache, num_threads=num_threads)
        assert (found.shape, found.dtype) == ((num, NUM_FEATURES), np.float32)
        assert_allclose(found, means(store), rtol=1e-5)
        done = [done for done, _ in steps]
        assert done == sorted(set(done))
        assert steps[-1] == (num, num)
        assert {total for _, total in steps} == {num}

    def test_a_second_run_computes_nothing(self, exports, cache):
        first, _ = extracted(a_store(), cache)
        again, steps = extracted(a_store(), cache)
        assert_array_equal(again, first)
        assert steps == []
        assert len(exports) == 1
        assert not again.flags.writeable

    def test_other_pictures_reuse_the_graph(self, exports, cache):
        extracted(a_store(seed=1), cache)
        store = a_store(seed=2)
        found, steps = extracted(store, cache)
        assert_allclose(found, means(store), rtol=1e-5)
        assert steps
        assert len(exports) == 1
        assert len(files(cache, "features")) == 2

    def test_the_key_holds_pictures_order_geometry_and_network(self, exports, cache):
        store = a_store()
        extracted(store, cache)
        changed = store.digests.copy()
        changed[3, 5] ^= 1
        other: list[tuple[CachedPixels, dict[str, Any]]] = [
            (dataclasses.replace(store, digests=changed), {}),
            (CachedPixels(store.images[::-1], store.digests[::-1]), {}),
            (store, {"geometry": Geometry(SIZE, fit="pad")}),
            (store, {"geometry": Geometry(SIZE, interpolation="bicubic")}),
            (store, {"variant": 1}),
        ]
        for num, (pictures, options) in enumerate(other, start=2):
            _, steps = extracted(pictures, cache, **options)
            assert steps
            assert len(files(cache, "features")) == num

    def test_a_file_of_the_wrong_size_is_built_anew(self, exports, cache):
        first, _ = extracted(a_store(), cache)
        wanted = first.copy()
        (path,) = files(cache, "features")
        path.write_bytes(path.read_bytes()[:-4])
        found, steps = extracted(a_store(), cache)
        assert steps
        assert_array_equal(found, wanted)

    @pytest.mark.parametrize("damage", [b"", b"no graph", None])
    def test_a_damaged_graph_is_exported_anew(self, exports, cache, damage):
        extracted(a_store(seed=1), cache)
        (path,) = files(cache, "backbones")
        path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
        store = a_store(seed=2)
        assert_allclose(extracted(store, cache)[0], means(store), rtol=1e-5)
        assert len(exports) == 2
        assert path.read_bytes() == mean_graph()

    def test_features_beyond_the_limit_are_held_in_memory(self, exports, cache):
        small = Cache(cache.folder, limit_bytes=0)
        found, steps = extracted(a_store(), small)
        assert_allclose(found, means(a_store()), rtol=1e-5)
        assert steps
        assert not cache.folder.exists()

    def test_the_least_recently_used_files_make_room(self, exports, cache):
        num_bytes = 11 * NUM_FEATURES * 4
        limited = Cache(cache.folder, limit_bytes=2 * num_bytes + len(mean_graph()))
        pixels = limited.pixels / "old.u8"
        pixels.parent.mkdir(parents=True)
        pixels.write_bytes(b"x" * num_bytes)
        os.utime(pixels, (1, 1))
        extracted(a_store(seed=1), limited)
        assert pixels.exists()  # there was room for both
        (old,) = files(cache, "features")
        (graph,) = files(cache, "backbones")
        os.utime(old, (2, 2))
        extracted(a_store(seed=2), limited)
        assert not pixels.exists()
        (other,) = set(files(cache, "features")) - {old}
        os.utime(other, (3, 3))
        extracted(a_store(seed=1), limited)  # makes it the younger one
        extracted(a_store(seed=3), limited)
        assert old.exists()
        assert not other.exists()
        assert graph.exists()

    def test_what_a_killed_run_left_is_removed_in_time(self, exports, cache):
        (cache.folder / "features").mkdir(parents=True)
        stale, young = (cache.folder / "features" / f".{n}{PART_SUFFIX}" for n in ("a", "b"))
        for path, age in [(stale, 48 * 3600), (young, 0)]:
            path.write_bytes(b"x")
            os.utime(path, (time.time() - age,) * 2)
        extracted(a_store(), cache)
        assert not stale.exists()
        assert young.exists()

    def test_a_run_that_is_stopped_leaves_nothing_behind(self, exports, cache):
        extraction = features_of(a_store(300), GEOMETRY, cache)
        next(extraction)
        extraction.close()
        assert files(cache, "features") == []

    def test_a_picture_that_fails_leaves_nothing_behind(self, exports, cache):
        class Broken(CachedPixels):
            def gather(self, indices):
                if 9 in indices:
                    raise ImageError("9.png", "truncated")
                return super().gather(indices)

        store = a_store()
        with pytest.raises(ImageError, match=r"9.png: truncated"):
            extracted(Broken(store.images, store.digests), cache)
        assert files(cache, "features") == []

    @pytest.mark.parametrize("kind", ["features", "backbones"])
    def test_a_cache_that_cannot_be_written_is_named(self, exports, cache, kind):
        cache.folder.mkdir()
        (cache.folder / kind).write_bytes(b"a file where a folder should be")
        with pytest.raises(
            WriteError, match=rf"the {kind[:-1]} cache .*; choose .*--cache-limit 0"
        ):
            extracted(a_store(), cache)

    def test_a_full_disk_leaves_nothing_behind(self, exports, cache, monkeypatch):
        extracted(a_store(seed=1), cache)

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"the feature cache .*No space left"):
            extracted(a_store(seed=2), cache)
        assert len(files(cache, "features")) == 1


class TestRefusals:
    def test_there_is_no_fourth_variant(self, cache):
        with pytest.raises(InvalidValueError, match="variant must be 0, 1 or 2; got 3"):
            extracted(a_store(), cache, variant=3)

    def test_threads_are_counted_from_zero(self, cache):
        with pytest.raises(InvalidValueError, match="num_threads must be at least 0; got -1"):
            extracted(a_store(), cache, num_threads=-1)

    def test_pictures_of_another_size_are_refused(self, exports, cache):
        with pytest.raises(ModelFileError, match=r"the backbone's graph fails: .*dimensions"):
            extracted(a_store(), cache, Geometry((24, 41)))

    @pytest.mark.parametrize("scale", [1.0, float("nan")])
    def test_a_graph_that_differs_from_the_network_is_refused(self, monkeypatch, scale):
        monkeypatch.setattr(features, "to_onnx", lambda *_: mean_graph(scale=scale))
        with pytest.raises(ModelFileError, match="efficientnet-lite0 differs from the network by"):
            features._exported(Backbone(0, SIZE))


class TestBackbone:
    def test_keys_differ_by_network_size_and_versions(self, monkeypatch):
        keys = [Backbone(v, size).key for v in (0, 1, 2) for size in ((64, 64), (64, 96), (96, 64))]
        monkeypatch.setattr(torch, "__version__", "0.0.1")
        keys.append(Backbone(0, (64, 64)).key)
        monkeypatch.setattr(features, "GRAPH_VERSION", 0)
        keys.append(Backbone(0, (64, 64)).key)
        assert len(set(keys)) == 11

    def test_has_the_name_of_its_weights(self):
        assert [Backbone(v, SIZE).name for v in (0, 2)] == [
            "efficientnet-lite0",
            "efficientnet-lite2",
        ]


@pytest.fixture(scope="module")
def exported():
    """The pretrained network's graph, opened."""
    return features._exported(Backbone(0, SIZE))


class TestRealNetwork:
    @pytest.fixture
    def real(self, exported, monkeypatch, cache):
        monkeypatch.setattr(features, "_exported", lambda _: exported)
        return cache

    def test_features_are_the_pretrained_networks(self, real):
        network = build(EfficientNetLiteConfig(), 3, SIZE, torch.Generator()).eval()
        load_(network)
        store = a_store(9)
        inputs = normalise(torch.from_numpy(store.images), *dataclasses.astuple(NORMALISATION))
        with torch.no_grad():
            wanted = network.embed(network.features(inputs))
        found, _ = extracted(store, real)
        assert_allclose(found, wanted, atol=1e-4)
        assert np.abs(found - found.mean(0)).max() > 0.1  # pictures are told apart

    def test_a_row_depends_on_its_picture_alone(self, real):
        store = a_store(21)
        found, _ = extracted(store, real, num_threads=1)
        order = np.random.default_rng(3).permutation(21)
        shuffled = CachedPixels(store.images[order], store.digests[order])
        again, steps = extracted(shuffled, real, num_threads=3)
        assert steps
        assert_array_equal(again, found[order])

    def test_the_kept_graph_opens_without_the_network(self, real, monkeypatch):
        first, _ = extracted(a_store(), real)
        wanted = first.copy()
        for path in files(real, "features"):
            path.unlink()
        monkeypatch.delattr(features, "_exported")
        assert_array_equal(extracted(a_store(), real)[0], wanted)


def test_the_default_size_is_a_multiple_of_32_from_160_to_224():
    sizes = [default_size(side) for side in range(1, 2000)]
    assert sorted(set(sizes)) == [160, 192, 224]
    assert sizes == sorted(sizes)
