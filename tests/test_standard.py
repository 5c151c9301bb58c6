import gzip
import hashlib
import io
import json
import pickle  # noqa: TID251 - CIFAR's own format, written here to be read by torchvision
import socket
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kenspeckle import standard
from kenspeckle.core import DataError, InvalidValueError, MissingExtraError
from kenspeckle.sources import open_dataset
from kenspeckle.standard import (
    SAMPLE_CLASSES,
    STANDARD_SETS,
    default_data_folder,
    load_sample,
    load_standard,
    write_sample_pictures,
)

FASHION = Path("/usr/share/datasets/fashion-mnist")


def silent(line: str) -> None:
    raise AssertionError(f"nothing should be announced: {line}")


def quiet(line: str) -> None:
    assert line.startswith("downloading")


class TestSample:
    def test_sizes(self):
        sample = load_sample()
        assert sample.classes == SAMPLE_CLASSES
        for part, count in ((sample.parts["train"], 1000), (sample.parts["test"], 200)):
            assert isinstance(part.pictures, np.ndarray)
            assert part.pictures.shape == (10 * count, 28, 28)
            assert np.bincount(part.labels).tolist() == [count] * 10

    def test_pictures_are_whole_and_differ(self):
        pictures = load_sample().parts["test"].pictures
        assert isinstance(pictures, np.ndarray)
        assert len({picture.tobytes() for picture in pictures}) == 2000
        # A picture cut across two tiles would have cloth at its left edge; these are centred.
        assert np.mean(pictures[:, :, 0] == 0) > 0.9

    def test_size_in_the_repository(self):
        folder = Path(standard.__file__).parent / "sample"
        assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
        assert "Permission is hereby granted" in (folder / "LICENSE").read_text()

    @pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
    def test_equal_to_the_source(self):
        parts = load_sample().parts
        for part, name, count in ((parts["train"], "train", 1000), (parts["test"], "t10k", 200)):
            raw = gzip.decompress((FASHION / f"{name}-images-idx3-ubyte.gz").read_bytes())
            images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
            raw = gzip.decompress((FASHION / f"{name}-labels-idx1-ubyte.gz").read_bytes())
            labels = np.frombuffer(raw, np.uint8, offset=8)
            first = [images[labels == label][:count] for label in range(10)]
            np.testing.assert_array_equal(part.pictures, np.concatenate(first))


class TestSamplePictures:
    def test_one_of_each_class_in_turn(self, tmp_path):
        paths = write_sample_pictures(tmp_path / "new", 12)
        assert [path.name for path in paths[:3]] == [
            "t-shirt-top-1.png",
            "trouser-1.png",
            "pullover-1.png",
        ]
        assert [path.name for path in paths[9:]] == [
            "ankle-boot-1.png",
            "t-shirt-top-2.png",
            "trouser-2.png",
        ]
        test = load_sample().parts["test"].pictures
        assert isinstance(test, np.ndarray)
        with Image.open(paths[10]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), test[1])
        with Image.open(paths[11]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), test[201])

    @pytest.mark.parametrize("number", [0, 2001])
    def test_a_number_out_of_range(self, tmp_path, number):
        with pytest.raises(InvalidValueError, match=f"must be from 1 to 2,000; got {number}"):
            write_sample_pictures(tmp_path, number)


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_data_folder() == tmp_path / "kenspeckle" / "datasets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_folder() == tmp_path / ".cache" / "kenspeckle" / "datasets"


@pytest.mark.parametrize("name", STANDARD_SETS)
def test_without_torchvision(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingExtraError, match=rf"'{name}' needs .* 'kenspeckle\[zoo\]'"):
        open_dataset(name, data_dir=tmp_path)


class FakeMnist:
    """A reader with the manners of torchvision's: a file, a RuntimeError without it, a download."""

    classes = ("0 - zero", "1 - one")
    downloads: list[str] = []  # noqa: RUF012 - cleared by the fixture
    fault: Exception | None = None

    def __init__(self, root: Path, train: bool, download: bool = False) -> None:
        file = root / "MNIST" / "raw" / "pictures"
        if download and not file.exists():
            file.parent.mkdir(parents=True)
            if self.fault is not None:
                raise self.fault
            self.downloads.append(str(root))
            file.write_bytes(bytes(range(12)))
        if not file.exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        pictures = np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, 2, 2)
        self.data, self.targets = (pictures[:2], [1, 0]) if train else (pictures[2:], [0])


@pytest.fixture
def torchvision(monkeypatch):
    datasets = types.ModuleType("torchvision.datasets")
    datasets.MNIST = FakeMnist  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.setattr(FakeMnist, "downloads", [])
    monkeypatch.setattr(FakeMnist, "fault", None)
    return FakeMnist


class TestDownload:
    def test_announced_once_and_then_used_as_it_lies_there(self, torchvision, tmp_path):
        said: list[str] = []
        first = open_dataset("mnist", data_dir=tmp_path, notify=said.append)
        assert said == [f"downloading 'mnist', about 12 MB, into {tmp_path}"]
        again = open_dataset("mnist", data_dir=tmp_path, notify=silent, offline=True)
        assert len(torchvision.downloads) == 1
        assert first.classes == again.classes == ("0 - zero", "1 - one")
        assert [(i.name, i.label, i.split) for i in again.items] == [
            ("train/00000", 1, "train"),
            ("train/00001", 0, "train"),
            ("test/00000", 0, "test"),
        ]
        assert np.asarray(again.reader.read(2)).tolist() == [[8, 9], [10, 11]]
        assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]

    def test_offline(self, torchvision, tmp_path):
        with pytest.raises(DataError, match=r"'mnist' is not in .* being offline forbids"):
            load_standard("mnist", tmp_path / "new", silent, offline=True)
        assert torchvision.downloads == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "fault", [OSError("no route\nto host"), RuntimeError("no route to host")]
    )
    def test_a_download_that_fails_leaves_nothing(self, torchvision, tmp_path, fault):
        torchvision.fault = fault
        with pytest.raises(DataError, match="'mnist' could not be downloaded: no route to host"):
            load_standard("mnist", tmp_path, quiet)
        assert list(tmp_path.iterdir()) == []

    def test_what_is_in_the_way_is_kept(self, torchvision, tmp_path):
        (tmp_path / "MNIST").mkdir()
        (tmp_path / "MNIST" / "mine").touch()
        with pytest.raises(DataError, match="MNIST' is in the way, damaged or incomplete"):
            load_standard("mnist", tmp_path, quiet)
        assert [path.name for path in tmp_path.rglob("*")] == ["MNIST", "mine"]

    def test_damaged_files(self, torchvision, tmp_path):
        load_standard("mnist", tmp_path, quiet)
        (tmp_path / "MNIST" / "raw" / "pictures").write_bytes(b"123")
        with pytest.raises(DataError, match=r"'mnist' in .* cannot be read: cannot reshape"):
            load_standard("mnist", tmp_path, silent)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def pictures(num: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, *shape), np.uint8)


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.mark.zoo
class TestTorchvision:
    """Tiny files in the sets' real formats, read by torchvision's real readers, with no network."""

    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch):
        def refuse(*args: object, **more: object) -> None:
            raise AssertionError("the network was asked")

        monkeypatch.setattr(socket, "socket", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    def check(self, name: str, folder: Path, reference, split: str) -> None:
        """Every item equals what torchvision gives for it: pixels and the name of its class."""
        dataset = open_dataset(name, data_dir=folder, notify=silent)
        of_split = [i for i, item in enumerate(dataset.items) if item.split == split]
        assert len(of_split) == len(reference)
        for index, (picture, label) in zip(of_split, reference, strict=True):
            source = dataset.reader.read(index)
            pixels = decoded(source) if isinstance(source, bytes) else source
            np.testing.assert_array_equal(pixels, np.asarray(picture))
            names = getattr(reference, "classes", dataset.classes)
            assert dataset.classes[dataset.labels[index]] == str(names[label])

    @pytest.mark.parametrize(
        ("name", "reader"),
        [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
    )
    def test_mnist_and_its_kin(self, tmp_path, name, reader):
        from torchvision import datasets

        raw = tmp_path / reader / "raw"
        raw.mkdir(parents=True)
        for part, num in (("train", 20), ("t10k", 10)):
            write_idx(raw / f"{part}-images-idx3-ubyte", pictures(num, 28, 28))
            write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(num) % 10)
        self.check(name, tmp_path, getattr(datasets, reader)(tmp_path, train=False), "test")
        self.check(name, tmp_path, getattr(datasets, reader)(tmp_path, train=True), "train")

    @pytest.mark.parametrize(
        ("name", "reader", "key"),
        [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine_labels")],
    )
    def test_cifar(self, tmp_path, monkeypatch, name, reader, key):
        from torchvision import datasets

        cifar = getattr(datasets, reader)
        folder = tmp_path / cifar.base_folder
        folder.mkdir()
        names = [file for file, _ in cifar.train_list + cifar.test_list]
        for file in names:
            entry = {"data": pictures(4, 3072), key: [0, 1, 1, 0]}
            (folder / file).write_bytes(pickle.dumps(entry))
        meta = {cifar.meta["key"]: ["apple", "bear"]}
        (folder / cifar.meta["filename"]).write_bytes(pickle.dumps(meta))
        sums = {file: md5(folder / file) for file in names}
        for attribute in ("train_list", "test_list"):
            listed = [[file, sums[file]] for file, _ in getattr(cifar, attribute)]
            monkeypatch.setattr(cifar, attribute, listed)
        meta_md5 = md5(folder / cifar.meta["filename"])
        monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": meta_md5})
        self.check(name, tmp_path, cifar(tmp_path, train=True), "train")
        self.check(name, tmp_path, cifar(tmp_path, train=False), "test")

    def test_a_pickle_of_another_md5_is_not_opened(self, tmp_path):
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        for file in ("data_batch_1", "test_batch", "batches.meta"):
            (folder / file).write_bytes(pickle.dumps({"data": 1}))
        with pytest.raises(DataError, match="'cifar10' is not in"):
            open_dataset("cifar10", data_dir=tmp_path, offline=True)

    def test_svhn(self, tmp_path, monkeypatch):
        from scipy.io import savemat
        from torchvision.datasets import SVHN

        listed = {}
        for split in ("train", "test"):
            path = tmp_path / f"{split}_32x32.mat"
            labels = np.array([[10], [1], [9]], np.uint8)  # 10 stands for the digit 0
            savemat(path, {"X": pictures(32, 32, 3, 3), "y": labels})
            listed[split] = [SVHN.split_list[split][0], path.name, md5(path)]
        monkeypatch.setattr(SVHN, "split_list", listed)
        self.check("svhn", tmp_path, SVHN(tmp_path, split="train"), "train")
        dataset = open_dataset("svhn", data_dir=tmp_path, notify=silent)
        assert [dataset.classes[label] for label in dataset.labels[:3]] == ["0", "1", "9"]

    def test_stl10(self, tmp_path, monkeypatch):
        from torchvision.datasets import STL10

        folder = tmp_path / STL10.base_folder
        folder.mkdir()
        (folder / "class_names.txt").write_text("airplane\nbird\n")
        for part in ("train", "test", "unlabeled"):
            (folder / f"{part}_X.bin").write_bytes(pictures(2, 3, 96, 96).tobytes())
            (folder / f"{part}_y.bin").write_bytes(bytes([1, 2]))
        for attribute in ("train_list", "test_list"):
            listed = [[file, md5(folder / file)] for file, _ in getattr(STL10, attribute)]
            monkeypatch.setattr(STL10, attribute, listed)
        self.check("stl10", tmp_path, STL10(tmp_path, split="test"), "test")

    def test_flowers102(self, tmp_path, monkeypatch):
        from scipy.io import savemat
        from torchvision.datasets import Flowers102

        folder = tmp_path / "flowers-102"
        self.write_pictures(folder / "jpg", *(f"image_{i:05d}.jpg" for i in range(1, 7)))
        savemat(folder / "imagelabels.mat", {"labels": [[1, 102, 102, 1, 1, 102]]})
        savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
        files = {key: (name, None) for key, (name, _) in Flowers102._file_dict.items()}
        monkeypatch.setattr(Flowers102, "_file_dict", files)
        self.check("flowers102", tmp_path, Flowers102(tmp_path, split="val"), "validation")

    def test_food101(self, tmp_path):
        from torchvision.datasets import Food101

        folder = tmp_path / "food-101"
        self.write_pictures(folder / "images", "pie/1.jpg", "pie/2.jpg", "soup/1.jpg", "soup/2.jpg")
        (folder / "meta").mkdir()
        for index, split in enumerate(("train", "test"), 1):
            of_class = {name: [f"{name}/{index}"] for name in ("pie", "soup")}
            (folder / "meta" / f"{split}.json").write_text(json.dumps(of_class))
        self.check("food101", tmp_path, Food101(tmp_path, split="test"), "test")

    def test_dtd(self, tmp_path):
        from torchvision.datasets import DTD

        folder = tmp_path / "dtd" / "dtd"
        names = [f"{c}/{i}.jpg" for c in ("dotted", "lined") for i in range(3)]
        self.write_pictures(folder / "images", *names)
        (folder / "labels").mkdir()
        for index, split in enumerate(("train", "val", "test")):
            (folder / "labels" / f"{split}1.txt").write_text("\n".join(names[index::3]))
        self.check("dtd", tmp_path, DTD(tmp_path, split="val"), "validation")

    def test_eurosat_has_no_split(self, tmp_path):
        from torchvision.datasets import EuroSAT

        folder = tmp_path / "eurosat" / "2750"
        self.write_pictures(folder, "Forest/1.jpg", "River/1.jpg", "River/2.jpg")
        dataset = open_dataset("eurosat", data_dir=tmp_path, notify=silent)
        assert {item.split for item in dataset.items} == {None}
        assert len(dataset.items) == len(EuroSAT(tmp_path))
        assert dataset.items[1].name == "eurosat/2750/River/1.jpg"
        assert dataset.reader.read(1) == (folder / "River" / "1.jpg").read_bytes()

    @pytest.mark.parametrize("name", STANDARD_SETS)
    def test_classes_have_names_of_their_own(self, name):
        from torchvision import datasets

        source = STANDARD_SETS[name]
        classes = source.classes or tuple(getattr(getattr(datasets, source.reader), "classes", ()))
        assert len(set(classes)) == len(classes)

    def write_pictures(self, folder: Path, *names: str) -> None:
        for index, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures(1, 8, 8 + index, 3)[0]).save(folder / name)
