"""What several tests need: small sets of pictures, and one small trained model."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# A busy machine is no failure: the suite's own time limits stand in for deadlines.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

CLASSES = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Several torch threads thrash on a busy machine."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (20, 24)):
    """Return a noisy picture of one colour, ``uint8 (H, W, 3)``."""
    noise = np.random.default_rng(seed).normal(0, 25, (*size, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def png(pixels) -> bytes:
    """Return pixels as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_folder(root: Path, num_per_class: int = 20, classes=CLASSES) -> Path:
    """Fill a folder with one folder of pictures per class."""
    for number, (name, colour) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(num_per_class):
            data = png(picture(colour, 1000 * number + index))
            (root / name / f"{index:03d}.png").write_bytes(data)
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of 3 classes with 20 pictures each."""
    return make_folder(tmp_path / "colours")


def quick_recipe(*changes: str):
    """Return a recipe that learns the three colours in a second."""
    from kenspeckle.recipes import named
    from kenspeckle.settings import with_settings

    base = ["size=16", "channels=4,8", "hidden=8", "epochs=2", "batch_size=8", "lr=0.1"]
    return with_settings(named("seed-cnn"), [*base, *changes])


def run(data, out, *changes: str, **options):
    """Train the quick recipe and return what `fit` ends with."""
    from kenspeckle.fit import Finished, Options, fit
    from kenspeckle.pixels import Cache
    from kenspeckle.sources import open_dataset

    out = Path(out)
    options = {
        "cache": Cache(out.parent / "cache"),
        "run_folder": out.parent / f"{out.stem}-run",
        "num_threads": 1,
        "labels": False,
    } | options
    events = fit(
        open_dataset(data), quick_recipe(*changes), out, Options(**options), threading.Event()
    )
    (*_, last) = events
    assert isinstance(last, Finished)
    return last


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run on the three colours."""
    root = tmp_path_factory.mktemp("trained")
    return run(make_folder(root / "colours"), root / "colours.ken", "epochs=4")


@pytest.fixture(scope="session")
def model_path(trained):
    """The model file of `trained`."""
    return trained.model_path


def is_root() -> bool:
    """Return whether permissions do not bind this process."""
    return hasattr(os, "geteuid") and os.geteuid() == 0
