"""Claim: what each recipe promises, by the main job itself on CIFAR-10.

    python benchmarks/recipes.py small-cnn --data DATA

The training archive is split 85/15 into training and validation by the seed, the best epoch is
chosen by validation, and the test archive is looked at once, by the run. Mean of three seeds.
"""

import argparse
import statistics
import tempfile
import threading
import zipfile
from pathlib import Path

from kenspeckle.fit import Finished, Options, fit
from kenspeckle.pixels import Cache
from kenspeckle.recipes import RECIPES, named
from kenspeckle.settings import with_settings
from kenspeckle.sources import open_dataset


def unpack(data: Path, target: Path) -> Path:
    """Put both archives into one folder with train/ and test/."""
    for part in ("train", "test"):
        with zipfile.ZipFile(data / f"cifar10-{part}.zip") as archive:
            for member in archive.namelist():
                if not member.endswith("/"):
                    path = target / part / member
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(member))
    return target


def main(recipe: str, data: Path, seeds: int) -> None:
    """Print test accuracy and seconds of each seed, and their mean."""
    accuracies, seconds = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = open_dataset(unpack(data, folder / "cifar10"))
        for seed in range(seeds):
            options = Options(cache=Cache(folder / "cache"), run_folder=folder / f"run-{seed}")
            chosen = with_settings(named(recipe), [f"seed={seed}"])
            events = fit(dataset, chosen, folder / f"{seed}.ken", options, threading.Event())
            (*_, last) = events
            assert isinstance(last, Finished)
            assert last.report.test is not None
            accuracies.append(last.report.test.accuracy.value)
            seconds.append(last.report.training.seconds)
            print(f"seed {seed}: {accuracies[-1]:.4f} in {seconds[-1]:.0f} s", flush=True)
    spread = statistics.stdev(accuracies) if seeds > 1 else 0.0
    print(
        f"{recipe}: {statistics.mean(accuracies):.4f} ± {spread:.4f} over {seeds} seeds, "
        f"{min(seconds):.0f} to {max(seconds):.0f} s each, all included"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    main(options.recipe, options.data, options.seeds)
