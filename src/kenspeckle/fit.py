"""From pictures to a model file: the one place where data, network, loop and evaluation meet.

`fit` is a generator of events, so that progress, logs and tests are ordinary code of the caller;
`train` runs it to the end. Everything a run writes lives in its run folder; the model file is
written last, and only if its graph answers as the network does.
"""

import datetime as dt
import json
import os
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kenspeckle import recipes, reports
from kenspeckle.config import Recipe
from kenspeckle.core import InvalidValueError
from kenspeckle.export import to_safetensors
from kenspeckle.files import write_file
from kenspeckle.images import Limits
from kenspeckle.learning import EpochDone, Learned, Stage, learn
from kenspeckle.pixels import Cache, default_cache_folder
from kenspeckle.preparation import Prepared, network_for, prepare_data
from kenspeckle.results import Report
from kenspeckle.settings import to_dict, with_settings
from kenspeckle.shipping import Origin, ship
from kenspeckle.sources import Dataset, open_dataset
from kenspeckle.splits import write_split
from kenspeckle.training import choose_device

__all__ = ["EpochDone", "Event", "Finished", "Notice", "Options", "Stage", "fit", "train"]


@dataclass(frozen=True)
class Options:
    """How to run, none of which changes the result on one machine.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        num_threads: compute threads; 0 takes all cores.
        num_loader_threads: threads that fetch pictures ahead.
        cache: where decoded pictures are kept.
        limits: what pictures are refused.
        thumbnails: keep small pictures of the worst mistakes in the report.
        overwrite: replace an existing model file.
        run_folder: where logs and reports go; ``runs/NAME-TIME`` when None.
        command: what the user typed, for the report.
    """

    device: str = "auto"
    num_threads: int = 0
    num_loader_threads: int = 0
    cache: Cache = field(default_factory=lambda: Cache(default_cache_folder()))
    limits: Limits = field(default_factory=Limits)
    thumbnails: bool = True
    overwrite: bool = False
    run_folder: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class Notice:
    """Something the user should know, in one sentence."""

    text: str

    def __str__(self) -> str:
        return f"note: {self.text}"


@dataclass(frozen=True, eq=False)
class Finished:
    """The end of a run.

    Attributes:
        model_path: the model file.
        run_folder: logs, the split, and the report.
        report: everything that was measured.
        interrupted: whether the user stopped the training.
    """

    model_path: Path
    run_folder: Path
    report: Report
    interrupted: bool

    @property
    def report_path(self) -> Path:
        """The report as a page."""
        return self.run_folder / "report.html"

    def to_dict(self) -> dict[str, Any]:
        """Return where everything is, and the report, as plain JSON values."""
        return {
            "model": str(self.model_path),
            "run_folder": str(self.run_folder),
            "report_page": str(self.report_path),
            "interrupted": self.interrupted,
            "report": self.report.to_dict(),
        }


Event = Notice | Stage | EpochDone | Finished


def train(
    data: str | Path | Dataset,
    recipe: Recipe | str | None = None,
    out: str | Path | None = None,
    options: Options | None = None,
    **settings: object,
) -> Finished:
    """Train on `data`, evaluate, and write one model file; see `fit`.

    Args:
        data: a data set, or anything that `sources.open_dataset` opens.
        recipe: a recipe or the name of one; the default recipe when None.
        out: the model file; ``NAME.ken`` in the current folder when None.
        options: how to run.
        settings: changes to the recipe by leaf name, such as ``lr=0.01``.

    Raises:
        InvalidValueError: an option or setting is wrong.
        MissingPathError: the data are not there.
        DataError: the data cannot be used as they stand.
        TrainingError: the loss is no longer finite.
        ModelFileError: the exported graph does not answer as the network does.
        WriteError: a file could not be written.
    """
    if recipe is None or isinstance(recipe, str):
        recipe = recipes.DEFAULT if recipe is None else recipes.named(recipe)
    recipe = with_settings(recipe, [f"{name}={_word(value)}" for name, value in settings.items()])
    last: Event | None = None
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    for event in fit(dataset, recipe, out, options or Options(), threading.Event()):
        last = event
    if not isinstance(last, Finished):
        raise InvalidValueError("a run must end with Finished")
    return last


def _word(value: object) -> object:
    """Return a setting's value as a command line has it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "none" if value is None else value


def fit(
    dataset: Dataset,
    recipe: Recipe,
    out: str | Path | None,
    options: Options,
    stop: threading.Event,
) -> Iterator[Event]:
    """Train on a data set, evaluate once on the test pictures, and write one model file.

    Args:
        dataset: labelled pictures.
        recipe: every setting.
        out: the model file; ``NAME.ken`` in the current folder when None.
        options: how to run.
        stop: when set, training ends and the best model so far is evaluated and saved.

    Yields:
        Notices, stages with their progress, finished epochs, and `Finished` at the end.

    Raises:
        InvalidValueError: an option or setting is wrong.
        DataError: the data cannot be used as they stand.
        TrainingError: the loss is no longer finite.
        ModelFileError: the exported graph does not answer as the network does.
        WriteError: a file could not be written.
    """
    started = time.perf_counter()
    device = choose_device(options.device)
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    model_path = _model_path(out, dataset, options)
    run_folder = _run_folder(dataset, options)
    prepared = yield from prepare_data(dataset, recipe, options.limits, options.cache)
    yield from map(Notice, prepared.notices)
    write_file(run_folder / "recipe.json", json.dumps(to_dict(recipe), indent=1).encode())
    write_split(run_folder / "split.csv", dataset, prepared.parts.tolist())
    yield Notice(_plan(prepared, recipe, device, run_folder))

    network = network_for(prepared, recipe).to(device)
    log: list[str] = []

    def keep(state: dict[str, torch.Tensor]) -> None:
        write_file(run_folder / "best.safetensors", to_safetensors(state))

    learning = learn(
        network,
        prepared.task,
        recipe,
        device,
        stop=stop,
        keep=keep,
        num_loader_threads=options.num_loader_threads,
    )
    learned = yield from _logged(learning, run_folder / "log.jsonl", log)
    yield Stage("evaluating and saving", 0, 1)
    origin = Origin(
        recipe, options.command, started, options.num_threads, options.thumbnails, options.limits
    )
    report, model_file = ship(network, prepared, learned, origin, model_path)
    write_file(run_folder / "report.html", reports.render(report).encode())
    write_file(run_folder / "report.json", json.dumps(report.to_dict(), indent=1).encode())
    write_file(model_path, model_file)
    yield Finished(model_path, run_folder, report, learned.interrupted)


def _run_folder(dataset: Dataset, options: Options) -> Path:
    if options.run_folder is None:
        now = dt.datetime.now().astimezone()
        name = f"{_stem(dataset)}-{now:%Y%m%d-%H%M%S}"
        tries = [Path("runs") / name, *(Path("runs") / f"{name}-{n}" for n in range(2, 1000))]
        return next(path for path in tries if not path.exists())
    folder = options.run_folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValueError(f"--run-folder must be new or empty; {folder} is not")
    return folder


def _stem(dataset: Dataset) -> str:
    kept = "".join(c if c.isalnum() or c in "-_" else "-" for c in dataset.name)
    return kept.strip("-")[:60] or "pictures"


def _model_path(out: str | Path | None, dataset: Dataset, options: Options) -> Path:
    """Return where the model file goes; what stands in the way is said before training."""
    if out is None:
        stem = _stem(dataset)
        names = [f"{stem}.ken", *(f"{stem}-{number}.ken" for number in range(2, 10_000))]
        return next(path for path in map(Path, names) if not path.exists())
    path = Path(out)
    if path.suffix != ".ken":
        raise InvalidValueError(f"--out must end in .ken; got '{path}'")
    if path.is_dir() or (path.exists() and not options.overwrite):
        raise InvalidValueError(f"{path} exists already; choose another --out, or use --force")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK):
        raise InvalidValueError(f"--out must be in a folder that can be written; {folder} cannot")
    return path


def _plan(prepared: Prepared, recipe: Recipe, device: torch.device, run_folder: Path) -> str:
    height, width = prepared.geometry.size
    sizes = [f"{len(prepared.part(p)):,} {p}" for p in ("train", "validation", "test")]
    return (
        f"{', '.join(sizes)} pictures of {len(prepared.dataset.classes)} classes; recipe "
        f"'{recipe.name}': {recipe.model.family} at {height}x{width}, {recipe.training.epochs} "
        f"epochs on {device}; logs in {run_folder}"
    )


def _logged(
    learning: Generator[Stage | EpochDone, None, Learned], path: Path, lines: list[str]
) -> Generator[Stage | EpochDone, None, Learned]:
    """Pass the events on, and keep one JSON line per epoch."""
    while True:
        try:
            event = next(learning)
        except StopIteration as end:
            learned: Learned = end.value
            return learned
        if isinstance(event, EpochDone):
            lines.append(json.dumps(vars(event.epoch)))
            write_file(path, "".join(f"{line}\n" for line in lines).encode())
        yield event
