"""Data sets that are known by name: `sample`, inside this package, and those of torchvision.

torchvision's own readers do the reading, from its own folder layout, so a set that is on disk for
any other program is used as it lies there. The network is asked only for what is not there, and
says so first. CIFAR's files are Python pickles; torchvision opens them only after their MD5 has
matched.
"""

import importlib
import importlib.resources
import io
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kenspeckle.core import DataError, InvalidValueError, MissingExtraError, printable
from kenspeckle.files import write_file
from kenspeckle.names import Split

__all__ = [
    "SAMPLE_CLASSES",
    "STANDARD_SETS",
    "Part",
    "Source",
    "StandardSet",
    "default_data_folder",
    "load_sample",
    "load_standard",
    "write_sample_pictures",
]

SAMPLE_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Fashion-MNIST's classes under torchvision's names, so that models of either fit the other."""

_SAMPLE_SIDE = 28  # pixels

_TRAIN_OR_NOT: dict[Split | None, dict[str, object]] = {
    "train": {"train": True},
    "test": {"train": False},
}
_TWO: dict[Split | None, dict[str, object]] = {
    "train": {"split": "train"},
    "test": {"split": "test"},
}
_THREE: dict[Split | None, dict[str, object]] = {
    "train": {"split": "train"},
    "validation": {"split": "val"},
    "test": {"split": "test"},
}


@dataclass(frozen=True)
class Source:
    """How torchvision names and reads a set.

    Attributes:
        reader: its class in `torchvision.datasets`.
        megabytes: about how much is downloaded.
        holds: ``targets``: arrays ``(N, H, W[, 3])`` with labels of that name; ``labels``: arrays
            ``(N, 3, H, W)`` with labels of that name; ``files``: pictures on disk.
        parts: arguments of the reader for each split; the split None when there is none.
        classes: where the reader does not name them.
        needs: modules that torchvision needs for this set.
    """

    reader: str
    megabytes: int
    holds: Literal["targets", "labels", "files"] = "targets"
    parts: Mapping[Split | None, Mapping[str, object]] = field(
        default_factory=lambda: _TRAIN_OR_NOT
    )
    classes: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()


STANDARD_SETS: dict[str, Source] = {
    "cifar10": Source("CIFAR10", 170),
    "cifar100": Source("CIFAR100", 169),
    "mnist": Source("MNIST", 12),
    "fashion-mnist": Source("FashionMNIST", 31),
    "kmnist": Source("KMNIST", 21),
    "svhn": Source("SVHN", 246, "labels", _TWO, tuple("0123456789"), ("scipy",)),
    "stl10": Source("STL10", 2640, "labels", _TWO),
    "flowers102": Source("Flowers102", 345, "files", _THREE, needs=("scipy",)),
    "food101": Source("Food101", 4997, "files", _TWO),
    "dtd": Source("DTD", 626, "files", _THREE),
    "eurosat": Source("EuroSAT", 94, "files", {None: {}}),
}
"""The sets by name. To add one: a line here, if its reader gives pictures with one label each."""


@dataclass(frozen=True, eq=False)
class Part:
    """One split of a set.

    Attributes:
        pictures: ``uint8 (N, H, W)`` or ``(N, H, W, 3)``, or N files.
        labels: ``int64 (N,)``, indices into the classes.
    """

    pictures: NDArray[np.uint8] | tuple[Path, ...]
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StandardSet:
    """A set with its classes, in their official order.

    Attributes:
        classes: their names.
        parts: by split; the split None when the set has none of its own.
    """

    classes: tuple[str, ...]
    parts: Mapping[Split | None, Part]


def default_data_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/kenspeckle/datasets``, or the same under ``~/.cache``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kenspeckle" / "datasets"


def load_standard(
    name: str, folder: Path, notify: Callable[[str], None], *, offline: bool = False
) -> StandardSet:
    """Read a standard set; download it first when it is not in `folder`.

    Args:
        name: a key of `STANDARD_SETS`.
        folder: where torchvision's layout starts, its ``root``.
        notify: receives one line before a download starts.
        offline: whether a download is an error.

    Raises:
        MissingExtraError: torchvision, or what it needs for this set, is not installed.
        DataError: not there while offline, damaged, or the download failed.
    """
    source = STANDARD_SETS[name]
    reader = _reader(name, source)
    found = _read(name, source, reader, folder)
    if found is None:
        if offline:
            raise DataError(
                f"'{name}' is not in '{printable(str(folder))}', and being offline forbids its "
                "download; name the folder that holds it, or go online"
            )
        notify(
            f"downloading '{name}', about {source.megabytes:,} MB, into {printable(str(folder))}"
        )
        _download(name, source, reader, folder)
        found = _read(name, source, reader, folder)
    if found is None:
        raise DataError(f"'{name}' was downloaded into '{printable(str(folder))}' but is not there")
    return found


def _reader(name: str, source: Source) -> Callable[..., Any]:
    try:
        # By name, since the answering side must load without these, and sees this module.
        for module in source.needs:
            importlib.import_module(module)
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise MissingExtraError(f"the standard set '{name}'", "zoo") from error
    reader: Callable[..., Any] = getattr(datasets, source.reader)
    return reader


def _read(
    name: str, source: Source, reader: Callable[..., Any], folder: Path
) -> StandardSet | None:
    """Return the set, or None when torchvision does not find it in `folder`."""
    extra = {"loader": Path} if source.holds == "files" else {}  # the path stands for the picture
    parts: dict[Split | None, Part] = {}
    names: tuple[str, ...] = source.classes or ()
    try:
        for split, arguments in source.parts.items():
            data = reader(root=folder, **arguments, **extra)
            parts[split] = _part(data, source.holds)
            names = names or tuple(data.classes)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        if isinstance(error, RuntimeError) and "not found" in str(error):
            return None
        raise DataError(
            f"'{name}' in '{printable(str(folder))}' cannot be read: {error}; remove it there, and "
            "it is downloaded again"
        ) from error
    return StandardSet(names, parts)


def _part(data: Any, holds: str) -> Part:  # noqa: ANN401 - one of torchvision's readers
    if holds == "files":
        pairs = [data[index] for index in range(len(data))]
        files = tuple(path for path, _ in pairs)
        return Part(files, np.array([label for _, label in pairs], np.int64))
    pixels = np.asarray(data.data)
    if holds == "labels":
        pixels = pixels.transpose(0, 2, 3, 1)
    return Part(pixels, np.asarray(getattr(data, holds), np.int64))


def _download(name: str, source: Source, reader: Callable[..., Any], folder: Path) -> None:
    # Into a folder of its own first: torchvision takes some sets for whole once their folder is
    # there, so a download that was cut short must not leave one.
    part = folder / f".{name}-{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        for arguments in source.parts.values():
            reader(root=part, download=True, **arguments)
        for child in sorted(part.iterdir()):
            _move(child, folder / child.name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"'{name}' could not be downloaded: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    if target.exists():
        raise DataError(
            f"'{printable(str(target))}' is in the way, damaged or incomplete; "
            "remove it, and try again"
        )
    source.rename(target)


def load_sample() -> StandardSet:
    """Return the sample: 10,000 + 2,000 pictures of Fashion-MNIST, ``uint8 (N, 28, 28)``.

    Source: H. Xiao, K. Rasul, R. Vollgraf, arXiv 1708.07747; MIT licence, see ``sample/``.
    """
    return StandardSet(SAMPLE_CLASSES, {split: _sample_part(split) for split in ("train", "test")})


def _sample_part(split: Split) -> Part:
    sheets = _sample_sheets(split)
    labels = np.repeat(np.arange(len(sheets)), [len(of_class) for of_class in sheets])
    return Part(np.concatenate(sheets), labels)


def _sample_sheets(split: Split) -> list[NDArray[np.uint8]]:
    folder = importlib.resources.files("kenspeckle") / "sample"
    sheets = []
    for label in range(len(SAMPLE_CLASSES)):
        with (folder / f"{split}-{label}.png").open("rb") as file, Image.open(file) as sheet:
            sheets.append(_cut(np.asarray(sheet)))
    return sheets


def _cut(sheet: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pictures ``(N, 28, 28)`` of a sheet, row by row."""
    rows, columns = sheet.shape[0] // _SAMPLE_SIDE, sheet.shape[1] // _SAMPLE_SIDE
    tiles = sheet.reshape(rows, _SAMPLE_SIDE, columns, _SAMPLE_SIDE).swapaxes(1, 2)
    return tiles.reshape(-1, _SAMPLE_SIDE, _SAMPLE_SIDE)


def write_sample_pictures(folder: Path, num_pictures: int) -> tuple[Path, ...]:
    """Write test pictures of the sample as PNG files, one of each class in turn.

    Args:
        folder: made when needed.
        num_pictures: 1 to 2,000.

    Returns:
        The files; each is named after its class.

    Raises:
        InvalidValueError: `num_pictures` is out of range.
        WriteError: a file cannot be written.
    """
    sheets = _sample_sheets("test")
    available = sum(len(of_class) for of_class in sheets)
    if not 1 <= num_pictures <= available:
        raise InvalidValueError(f"num_pictures must be from 1 to {available:,}; got {num_pictures}")
    paths = []
    for index in range(num_pictures):
        turn, label = divmod(index, len(SAMPLE_CLASSES))
        words = re.sub("[^a-z]+", "-", SAMPLE_CLASSES[label].lower())
        encoded = io.BytesIO()
        Image.fromarray(sheets[label][turn]).save(encoded, "PNG")
        paths.append(folder / f"{words}-{turn + 1}.png")
        write_file(paths[-1], encoded.getvalue())
    return tuple(paths)
