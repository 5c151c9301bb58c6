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
from kenspeckle.backbones import Backbone, open_backbone
from kenspeckle.config import EfficientNetLiteConfig
from kenspeckle.core import (
    Geometry,
    ImageError,
    InvalidValueError,
    ModelFileError,
    Normalisation,
    WriteError,
)
from kenspeckle.export import Deployed, graft
from kenspeckle.features import default_size, features_of, maps_of, template_of
from kenspeckle.files import PART_SUFFIX
from kenspeckle.layers import normalise
from kenspeckle.models import build
from kenspeckle.pixels import Cache, CachedPixels
from kenspeckle.pretrained import NORMALISATION, PRETRAINED, load_

SIZE = (24, 40)
GEOMETRY = Geometry(SIZE)
NUM_FEATURES = 1280


def a_store(num=11, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, *SIZE, 3), np.uint8)
    return CachedPixels(images, rng.integers(0, 256, (num, 16), np.uint8))


def a_backbone(variant=0, sha256="", normalisation=NORMALISATION, dropout=0.2):
    """Return a backbone whose weights are never asked for."""
    config = EfficientNetLiteConfig(variant, dropout)
    sha256 = sha256 or PRETRAINED[variant].sha256
    return Backbone(config, "imagenet", sha256, normalisation, None, lambda _: None)


def extracted(store, cache, geometry=GEOMETRY, backbone=None, **options):
    """Return the features, and the steps of progress."""
    return drained(features_of(store, geometry, cache, backbone or a_backbone(), **options))


def mapped(store, cache, geometry=GEOMETRY, backbone=None, **options):
    """Return the maps, and the steps of progress."""
    return drained(maps_of(store, geometry, cache, backbone or a_backbone(), **options))


def drained(extraction):
    steps = []
    while True:
        try:
            steps.append(next(extraction))
        except StopIteration as end:
            return end.value, steps


def files(cache, kind):
    return sorted((cache.folder / kind).glob("*"))


def mean_graph(size=SIZE, scale=1.0, num_features=NUM_FEATURES):
    """Return a tiny graph in the backbone's place.

    Its embedding is scaled means of R, G, B, over and over; its middle the means of 8 x 8 pixels.
    """
    table = np.zeros((3, num_features), np.float32)
    for feature in range(num_features):
        table[feature % 3, feature] = scale
    sides = [size[0] // 8, size[1] // 8]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["levels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["levels", "axes"], ["means"], keepdims=0),
            helper.make_node("MatMul", ["means", "table"], ["embedding"]),
            helper.make_node("Transpose", ["levels"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node(
                "AveragePool", ["planes"], ["middle"], kernel_shape=[8, 8], strides=[8, 8]
            ),
        ],
        "means",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *size, 3])],
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", num_features]),
            helper.make_tensor_value_info("middle", TensorProto.FLOAT, ["n", 3, *sides]),
        ],
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


def blocks(store):
    """Return the means of 8 x 8 pixels, ``(N, h, w, 3)``."""
    num, height, width, _ = store.images.shape
    return store.images.reshape(num, height // 8, 8, width // 8, 8, 3).mean((2, 4))


@pytest.fixture
def exports(monkeypatch):
    """Put a tiny graph in the network's place, and count how often it is exported."""
    calls = []

    def exported(backbone, size):
        calls.append(backbone)
        return mean_graph(size)

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
            (store, {"backbone": a_backbone(1)}),
            (store, {"backbone": a_backbone(sha256="00")}),
            (store, {"backbone": a_backbone(normalisation=Normalisation())}),
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
        assert path.read_bytes()[features.DIGEST_BYTES :] == mean_graph()

    def test_one_changed_bit_of_a_graph_is_noticed(self, exports, cache):
        graph = template_of(a_backbone(), SIZE, cache)
        (path,) = files(cache, "backbones")
        damaged = bytearray(path.read_bytes())
        damaged[-50] ^= 1
        path.write_bytes(damaged)
        assert template_of(a_backbone(), SIZE, cache) == graph == mean_graph()
        assert len(exports) == 2

    def test_dropout_is_no_part_of_the_key(self, exports, cache):
        extracted(a_store(), cache)
        _, steps = extracted(a_store(), cache, backbone=a_backbone(dropout=0.0))
        assert steps == []

    @pytest.mark.parametrize("num_features", [7, 512])
    def test_the_network_says_how_many_features_there_are(self, monkeypatch, cache, num_features):
        graph = mean_graph(num_features=num_features)
        monkeypatch.setattr(features, "_exported", lambda *_: graph)
        for _ in range(2):
            found, _ = extracted(a_store(), cache)
            assert_allclose(found, means(a_store())[:, :num_features], rtol=1e-5)

    def test_the_default_is_the_packaged_network(self, exports, cache):
        drained(features_of(a_store(), GEOMETRY, cache))
        (backbone,) = exports
        assert (backbone.name, backbone.weights) == ("efficientnet-lite0", "imagenet")

    def test_features_beyond_the_limit_are_held_in_memory(self, exports, cache):
        small = Cache(cache.folder, limit_bytes=0)
        found, steps = extracted(a_store(), small)
        assert_allclose(found, means(a_store()), rtol=1e-5)
        assert steps
        assert not cache.folder.exists()

    def test_the_least_recently_used_files_make_room(self, exports, cache):
        num_bytes = 11 * NUM_FEATURES * 4
        limited = Cache(cache.folder, limit_bytes=2 * num_bytes + len(mean_graph()) + 1000)
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
        extraction = features_of(a_store(300), GEOMETRY, cache, a_backbone())
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


class TestMaps:
    @pytest.mark.parametrize("num_threads", [1, 3])
    def test_rows_are_the_graphs_with_channels_last(self, exports, cache, num_threads):
        store = a_store(300)
        found, steps = mapped(store, cache, num_threads=num_threads)
        assert (found.shape, found.dtype) == ((300, 3, 5, 3), np.float16)
        assert_allclose(found, blocks(store), rtol=2**-11)
        assert steps[-1] == (300, 300)
        assert not found.flags.writeable

    def test_mirrored_maps_are_those_of_the_mirrored_pictures(self, exports, cache):
        store = a_store()
        plain, _ = mapped(store, cache)
        found, steps = mapped(store, cache, mirrored=True)
        assert steps
        mirrored = CachedPixels(store.images[:, :, ::-1], store.digests)
        assert_allclose(found, blocks(mirrored), rtol=2**-11)
        assert np.abs(found - plain.astype(np.float32)).max() > 1
        assert len(files(cache, "maps")) == 2
        assert len(exports) == 1

    def test_a_second_run_computes_nothing(self, exports, cache):
        first, _ = mapped(a_store(), cache)
        again, steps = mapped(a_store(), cache)
        assert_array_equal(again, first)
        assert steps == []

    def test_maps_make_room_for_others(self, exports, cache):
        store = a_store()
        mapped(store, cache)
        (old,) = files(cache, "maps")
        small = Cache(cache.folder, limit_bytes=old.stat().st_size + len(mean_graph()) + 100)
        os.utime(old, (1, 1))
        mapped(a_store(seed=1), small)
        assert not old.exists()
        assert len(files(cache, "maps")) == 1

    def test_maps_beyond_the_limit_are_held_in_memory(self, exports, cache):
        found, _ = mapped(a_store(), Cache(cache.folder, limit_bytes=0))
        assert_allclose(found, blocks(a_store()), rtol=2**-11)
        assert not cache.folder.exists()

    def test_a_cache_that_cannot_be_written_is_named(self, exports, cache):
        cache.folder.mkdir()
        (cache.folder / "maps").write_bytes(b"a file where a folder should be")
        with pytest.raises(WriteError, match=r"the map cache .*; choose .*--cache-limit 0"):
            mapped(a_store(), cache)

    def test_a_network_without_a_tail_has_none(self, monkeypatch, cache):
        model = onnx.load_model_from_string(mean_graph())
        del model.graph.output[1]
        monkeypatch.setattr(features, "_exported", lambda *_: model.SerializeToString())
        with pytest.raises(InvalidValueError, match=r"one of \['embedding'\]; got 'middle'"):
            mapped(a_store(), cache)


class TestRefusals:
    @pytest.mark.parametrize("compute", [extracted, mapped])
    def test_threads_are_counted_from_zero(self, cache, compute):
        with pytest.raises(InvalidValueError, match="num_threads must be at least 0; got -1"):
            compute(a_store(), cache, num_threads=-1)

    def test_pictures_of_another_size_are_refused(self, exports, cache):
        with pytest.raises(ModelFileError, match=r"the backbone's graph fails: .*dimensions"):
            extracted(a_store(), cache, Geometry((24, 41)))

    @pytest.mark.parametrize("change", [0.01, float("nan")])
    def test_a_graph_that_differs_from_the_network_is_refused(self, monkeypatch, change, exported):
        model = onnx.load_model_from_string(exported)
        (bias,) = [t for t in model.graph.initializer if t.name == "network.head.0.bias"]
        bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + change).tobytes()
        monkeypatch.setattr(features, "to_onnx", lambda *_: model.SerializeToString())
        with pytest.raises(ModelFileError, match="efficientnet-lite0 differs from the network by"):
            features._exported(open_backbone(EfficientNetLiteConfig(), "imagenet"), SIZE)


def test_keys_differ_by_network_size_and_versions(monkeypatch):
    sizes = [(64, 64), (64, 96), (96, 64)]
    keys = [features._key(a_backbone(v), size) for v in (0, 1, 2) for size in sizes]
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    keys.append(features._key(a_backbone(), (64, 64)))
    monkeypatch.setattr(features, "GRAPH_VERSION", 0)
    keys.append(features._key(a_backbone(), (64, 64)))
    assert len(set(keys)) == 11


@pytest.fixture(scope="module")
def lite():
    """The packaged network with its weights."""
    return open_backbone(EfficientNetLiteConfig(), "imagenet")


@pytest.fixture(scope="module")
def exported(lite):
    """The pretrained network's graph."""
    return features._exported(lite, SIZE)


class TestRealNetwork:
    @pytest.fixture
    def real(self, exported, monkeypatch, cache):
        monkeypatch.setattr(features, "_exported", lambda *_: exported)
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

    @pytest.mark.parametrize("mirrored", [False, True])
    def test_the_tail_makes_features_of_the_maps(self, real, lite, mirrored):
        store = a_store(9)
        images = store.images[:, :, ::-1] if mirrored else store.images
        wanted, _ = extracted(CachedPixels(images.copy(), store.digests), real)
        maps, _ = mapped(store, real, mirrored=mirrored)
        assert maps.shape == (9, 2, 3, 80)
        network = lite.network(3, SIZE, torch.Generator()).eval()
        inputs = torch.from_numpy(maps.astype(np.float32)).permute(0, 3, 1, 2)
        with torch.no_grad():
            found = network.embed(network.tail(inputs))
        assert_allclose(found, wanted, atol=0.01)  # of 0 to 6, where a map holds few pixels
        assert np.abs(found.numpy() - wanted).mean() < 1e-4

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

    def test_trained_weights_are_grafted_into_the_graph(self, exported, lite):
        generator = torch.Generator().manual_seed(5)
        network = lite.network(3, SIZE, generator)
        pictures = torch.from_numpy(a_store(16).images)
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.empty_like(parameter).normal_(generator=generator)
                parameter.add_(0.05 * parameter.std(correction=0) * noise)
            network.train()(normalise(pictures, *dataclasses.astuple(NORMALISATION)))
            wanted = Deployed(network, NORMALISATION, 1.7).eval()(pictures)
        found = features._run(features._opened(graft(exported, network, 1.7)), pictures.numpy())
        for mine, torchs in zip(found, wanted, strict=True):
            scale = max(1.0, float(torchs.abs().max()))
            assert_allclose(mine / scale, torchs / scale, atol=1e-5)


def test_the_default_size_is_a_multiple_of_32_from_160_to_224():
    sizes = [default_size(side) for side in range(1, 2000)]
    assert sorted(set(sizes)) == [160, 192, 224]
    assert sizes == sorted(sizes)
