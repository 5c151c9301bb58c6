"""From pictures to a model file: the one place where data, network, loop and evaluation meet.

`fit` is a generator of events, so that progress, logs and tests are ordinary code of the caller;
`train` runs it to the end. Everything a run writes lives in its run folder; the model file is
written last, and only if its graph answers as the network does.
"""

import json
import os
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from kenspeckle import recipes, reports
from kenspeckle.checkfiles import write_health, write_skipped
from kenspeckle.checks.copies import leaked
from kenspeckle.config import Recipe
from kenspeckle.core import InvalidValueError, Stage
from kenspeckle.export import to_safetensors
from kenspeckle.files import file_stem, new_run_folder, write_file
from kenspeckle.health import Examined, examine
from kenspeckle.images import Limits
from kenspeckle.learning import EpochDone, Learned, learn
from kenspeckle.pixels import Cache, default_cache_folder
from kenspeckle.preparation import Prepared, network_for, prepare_data
from kenspeckle.results import Report
from kenspeckle.settings import to_dict, with_settings
from kenspeckle.shipping import Origin, ship
from kenspeckle.sources import Dataset, open_dataset
from kenspeckle.splits import write_split
from kenspeckle.training import choose_device

__all__ = ["EpochDone", "Event", "Finished", "Notice", "Options", "Stage", "fit", "train"]

DEFAULT_MAX_BAD = 0.25
MOST_PICTURES_ASKED = 10_000  # about their labels without being told to: half a minute on 2 cores


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
        on_bad: what becomes of pictures that cannot be decoded: ``stop`` before the first epoch, or
            ``skip`` them, which writes each with its reason to ``skipped.csv``.
        max_bad: largest share of pictures that is skipped, 0 to 1, a quarter when None; beyond it
            the run stops.
        labels: look for wrong labels, outliers and what more pictures would bring; when None, in
            data of up to 10,000 pictures, where the pretrained network is installed.
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
    on_bad: Literal["stop", "skip"] = "stop"
    max_bad: float | None = None
    labels: bool | None = None
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
    run_folder = new_run_folder(dataset.name, options.run_folder)
    prepared, findings = yield from _prepared(dataset, recipe, options, run_folder)
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
        recipe,
        options.command,
        started,
        options.num_threads,
        options.thumbnails,
        options.limits,
        findings,
    )
    report, model_file = ship(network, prepared, learned, origin, model_path)
    write_file(run_folder / "report.html", reports.render(report).encode())
    write_file(run_folder / "report.json", json.dumps(report.to_dict(), indent=1).encode())
    write_file(model_path, model_file)
    yield Finished(model_path, run_folder, report, learned.interrupted)


def _prepared(
    dataset: Dataset, recipe: Recipe, options: Options, run_folder: Path
) -> Generator[Stage | Notice, None, tuple[Prepared, tuple[str, ...]]]:
    """Check the data, split and measure them, and write down all of it.

    Returns:
        The data, without pictures that cannot be decoded, and what was found, a sentence or two
        each.
    """
    if options.on_bad == "stop" and options.max_bad is not None:
        raise InvalidValueError("--max-bad has no effect without --on-bad skip")
    most = DEFAULT_MAX_BAD if options.max_bad is None else options.max_bad
    few = len(dataset.items) <= MOST_PICTURES_ASKED
    examined = yield from examine(
        dataset,
        options.limits,
        options.cache,
        labels=options.labels if few or options.labels is not None else False,
        max_broken=0.0 if options.on_bad == "stop" else most,
        seed=recipe.seed,
        num_threads=options.num_threads,
    )
    sound = examined.subject.dataset
    prepared = yield from prepare_data(
        sound,
        recipe,
        options.limits,
        options.cache,
        together=examined.subject.copies.together,
        leaked=leaked(examined.subject, "test"),
    )
    yield from _found(dataset, examined, options, run_folder)
    yield from map(Notice, prepared.notices)
    write_file(run_folder / "recipe.json", json.dumps(to_dict(recipe), indent=1).encode())
    write_split(run_folder / "split.csv", sound, prepared.parts.tolist())
    findings = tuple(f"{found.title} {found.remedy}" for found in examined.health.findings)
    return prepared, findings


def _found(
    dataset: Dataset, examined: Examined, options: Options, run_folder: Path
) -> Iterator[Notice]:
    """Write what the check of the data found, and say what matters of it."""
    broken = examined.broken
    if broken:
        write_skipped(run_folder / "skipped.csv", dataset, broken)
        yield Notice(
            f"skipped {len(broken):,} of {len(dataset.items):,} pictures that cannot be decoded; "
            f"listed in {run_folder / 'skipped.csv'}"
        )
    write_health(run_folder, examined, options.limits)
    for finding in examined.health.findings:
        if finding.severity == "warning":
            yield Notice(f"{finding.title} Training {finding.training}")
    if examined.health.findings:
        yield Notice(f"what was found in the data, with pictures: {run_folder / 'check.html'}")


def _model_path(out: str | Path | None, dataset: Dataset, options: Options) -> Path:
    """Return where the model file goes; what stands in the way is said before training."""
    if out is None:
        stem = file_stem(dataset.name)
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
