"""Make the sample inside the package from Debian's package `dataset-fashion-mnist`.

    sudo apt-get install dataset-fashion-mnist
    python tools/make_sample.py

Takes the first 1,000 training and the first 200 test pictures of each class, in the order of the
files, and writes one greyscale sheet for each split and class.
"""

import gzip
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kenspeckle.files import write_file

SOURCE = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).parent.parent / "src" / "kenspeckle" / "sample"
SIDE = 28  # pixels
NUM_CLASSES = 10
PARTS = {"train": ("train", 1000, 40), "test": ("t10k", 200, 20)}
"""Name in the package: name in the source, pictures per class, pictures in a row of the sheet."""


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the array of an IDX file; `shape` is that of one item.

    Source: http://yann.lecun.com/exdb/mnist, "the IDX file format".

    Raises:
        ValueError: the file's header or length does not fit the shape.
    """
    data = gzip.decompress(path.read_bytes())
    header = 4 + 4 * (1 + len(shape))
    sizes = np.frombuffer(data[4:header], ">u4").tolist()
    if data[:4] != bytes([0, 0, 8, 1 + len(shape)]) or tuple(sizes[1:]) != shape:
        raise ValueError(f"{path}: not an IDX file of uint8 items of shape {shape}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(sizes)


def sheet(pictures: NDArray[np.uint8], num_columns: int) -> bytes:
    """Return a PNG that shows `pictures` ``(N, 28, 28)`` side by side, row by row."""
    rows = pictures.reshape(-1, num_columns, SIDE, SIDE).swapaxes(1, 2)
    encoded = io.BytesIO()
    pixels = rows.reshape(-1, num_columns * SIDE)
    Image.fromarray(pixels).save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def main() -> None:
    """Write all sheets."""
    for split, (name, num_pictures, num_columns) in PARTS.items():
        pictures = read_idx(SOURCE / f"{name}-images-idx3-ubyte.gz", (SIDE, SIDE))
        labels = read_idx(SOURCE / f"{name}-labels-idx1-ubyte.gz", ())
        for label in range(NUM_CLASSES):
            chosen = pictures[labels == label][:num_pictures]
            write_file(TARGET / f"{split}-{label}.png", sheet(chosen, num_columns))


if __name__ == "__main__":
    main()
