"""The cache holds what the decoder gives, notices every change, and survives what befalls it."""

import os
import threading

import numpy as np
import pytest

from kenspeckle.core import DataError, Geometry, ImageError, InvalidValueError, WriteError
from kenspeckle.files import PART_SUFFIX
from kenspeckle.images import Limits, prepare
from kenspeckle.pixels import (
    Cache,
    CachedPixels,
    StreamedPixels,
    batches,
    open_pixels,
    permutation,
    spans,
)
from kenspeckle.sources import open_dataset
from tests.conftest import picture, png

GEOMETRY = Geometry((16, 12))


def opened(folder, cache, geometry=GEOMETRY):
    """Return the store, and how many steps of decoding it took."""
    reading = open_pixels(open_dataset(folder), geometry, Limits(), cache)
    steps = 0
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return end.value, steps
        steps += 1


def expected(folder):
    dataset = open_dataset(folder)
    return np.stack(
        [
            prepare(dataset.reader.read(i), item.name, GEOMETRY)
            for i, item in enumerate(dataset.items)
        ]
    )


def test_the_cache_holds_what_the_decoder_gives(folder, tmp_path):
    store, steps = opened(folder, Cache(tmp_path / "c"))
    assert isinstance(store, CachedPixels)
    assert steps > 0
    np.testing.assert_array_equal(store.images, expected(folder))
    again, steps = opened(folder, Cache(tmp_path / "c"))
    assert steps == 0  # nothing was decoded
    np.testing.assert_array_equal(again.images, store.images)
    np.testing.assert_array_equal(again.digests, store.digests)


def test_a_streamed_store_gives_the_same(folder, tmp_path):
    cached, _ = opened(folder, Cache(tmp_path / "c"))
    streamed, _ = opened(folder, Cache(tmp_path / "d", limit_bytes=0))
    assert isinstance(streamed, StreamedPixels)
    assert not (tmp_path / "d").exists() or not list((tmp_path / "d").glob("pixels/*"))
    order = np.array([5, 0, 59, 5])
    np.testing.assert_array_equal(streamed.gather(order), cached.gather(order))
    np.testing.assert_array_equal(streamed.digests, cached.digests)


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_picture_is_seen(folder, tmp_path, keep_times):
    cache = Cache(tmp_path / "c")
    before, _ = opened(folder, cache)
    victim = folder / "blue" / "000.png"
    state = victim.stat()
    data = png(picture((250, 250, 0), 7))
    victim.write_bytes(data + b"\0" * (state.st_size - len(data)))
    if keep_times:  # only the time of the inode's change tells
        os.utime(victim, ns=(state.st_atime_ns, state.st_mtime_ns))
    after, steps = opened(folder, cache)
    assert steps > 0
    assert (after.images[0] != before.images[0]).any()


def test_another_geometry_is_another_file(folder, tmp_path):
    cache = Cache(tmp_path / "c")
    opened(folder, cache)
    store, steps = opened(folder, cache, Geometry((12, 16)))
    assert steps > 0
    assert store.images.shape[1:3] == (12, 16)


def test_a_moved_folder_is_known_by_its_content(folder, tmp_path):
    cache = Cache(tmp_path / "c")
    opened(folder, cache)
    moved = folder.rename(tmp_path / "elsewhere")
    _, steps = opened(moved, cache)
    assert steps == 0


def test_a_file_cut_short_is_built_again(folder, tmp_path):
    cache = Cache(tmp_path / "c")
    store, _ = opened(folder, cache)
    wanted = store.images.copy()
    (file,) = (tmp_path / "c" / "pixels").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    again, steps = opened(folder, cache)
    assert steps > 0
    np.testing.assert_array_equal(again.images, wanted)


def test_a_damaged_memo_is_ignored(folder, tmp_path):
    cache = Cache(tmp_path / "c")
    opened(folder, cache)
    for memo in (tmp_path / "c" / "stamps").iterdir():
        memo.write_text('{"content": "../../evil"}')
    store, _ = opened(folder, cache)
    np.testing.assert_array_equal(store.images, expected(folder))


def test_two_runs_that_build_at_once_do_each_other_no_harm(folder, tmp_path):
    cache = Cache(tmp_path / "c")
    stores = []
    runs = [
        threading.Thread(target=lambda: stores.append(opened(folder, cache)[0])) for _ in range(4)
    ]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert len(stores) == 4
    for store in stores:
        np.testing.assert_array_equal(store.images, expected(folder))
    assert len(list((tmp_path / "c" / "pixels").iterdir())) == 1


def test_the_least_recently_used_files_go_first(tmp_path):
    cache = Cache(tmp_path, limit_bytes=250)
    (tmp_path / "pixels").mkdir()
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / "pixels" / f"{name}.u8"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    part = tmp_path / "pixels" / f".x{PART_SUFFIX}"
    part.write_bytes(b"x")  # of a run that is writing now
    stale = tmp_path / "pixels" / f".y{PART_SUFFIX}"
    stale.write_bytes(b"x")
    os.utime(stale, (1e9, 1e9))
    cache.make_room(120)
    assert {p.name for p in (tmp_path / "pixels").iterdir()} == {"new.u8", part.name}


def test_a_mapping_survives_its_file(folder, tmp_path):
    cache = Cache(tmp_path / "c")
    store, _ = opened(folder, cache)
    Cache(tmp_path / "c", limit_bytes=0).make_room(0)
    assert not list((tmp_path / "c" / "pixels").iterdir())
    np.testing.assert_array_equal(store.images, expected(folder))


def test_a_full_disk_leaves_nothing_half_and_says_what_to_do(folder, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    cache = Cache(tmp_path / "c")
    (tmp_path / "c").mkdir()
    dataset = open_dataset(folder)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match=r"No space left.*--cache-dir.*--cache-limit 0"):
        list(open_pixels(dataset, GEOMETRY, Limits(), cache))
    assert not list((tmp_path / "c" / "pixels").iterdir())


def test_every_broken_picture_is_named(folder, tmp_path):
    (folder / "blue" / "text.jpg").write_text("not a picture at all")
    with pytest.raises(DataError, match=r"blue/text\.jpg: "):
        opened(folder, Cache(tmp_path / "c"))
    (folder / "red" / "empty.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"(?s)2 of 62 pictures.*text\.jpg.*empty\.png.*nothing was"
    ):
        opened(folder, Cache(tmp_path / "c"))
    assert not list((tmp_path / "c" / "pixels").iterdir())


@pytest.mark.parametrize("num_threads", [0, 1, 2, 5])
def test_batches_do_not_depend_on_threads(folder, tmp_path, num_threads):
    store, _ = opened(folder, Cache(tmp_path / "c"))
    order = permutation(60, seed=1, epoch=2)
    found = list(batches(store, order, 7, num_threads))
    np.testing.assert_array_equal(np.concatenate([b.items for b in found]), order)
    for batch in found:
        np.testing.assert_array_equal(batch.images, store.images[batch.items])
    assert len(found) == len(spans(60, 7))


def test_a_last_batch_of_one_joins_the_one_before():
    store = CachedPixels(np.zeros((9, 1, 1, 3), np.uint8), np.zeros((9, 16), np.uint8))
    sizes = [len(batch.items) for batch in batches(store, np.arange(9), 4)]
    assert sizes == [4, 5]
    assert [len(b.items) for b in batches(store, np.arange(1), 4)] == [1]


def test_an_error_in_a_thread_reaches_the_caller(folder, tmp_path):
    store, _ = opened(folder, Cache(tmp_path / "c", limit_bytes=0))
    (folder / "blue" / "003.png").write_bytes(b"gone bad")
    with pytest.raises(ImageError, match=r"blue/003\.png"):
        list(batches(store, np.arange(60), 8, num_threads=2))
    with pytest.raises(InvalidValueError, match="num_threads"):
        next(batches(store, np.arange(60), 8, num_threads=-1))


def test_the_order_is_a_function_of_seed_and_epoch():
    assert permutation(5, 0, 0).tolist() == permutation(5, 0, 0).tolist()
    orders = {tuple(permutation(20, s, e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    # The same on every machine and numpy: this is Philox with key (7, 3).
    assert sorted(permutation(8, 7, 3).tolist()) == list(range(8))
