"""From pictures to a model file: the one place where data, network, loop and evaluation meet.

`fit` is a generator of events, so that progress, logs and tests are ordinary code of the caller;
`train` runs it to the end. With a recipe it runs that; without, the ladder plans. Everything a run
writes lives in its run folder; a model file is written only if its graph answers as the network
does.
"""

import json
import os
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from kenspeckle import recipes, reports
from kenspeckle.backbones import Backbone, open_backbone
from kenspeckle.checkfiles import write_health, write_skipped
from kenspeckle.checks.copies import leaked
from kenspeckle.config import EfficientNetLiteConfig, Recipe
from kenspeckle.core import InvalidValueError, MissingExtraError, Stage, relayed
from kenspeckle.costs import Costs, read_costs
from kenspeckle.export import to_safetensors
from kenspeckle.files import file_stem, new_run_folder, write_file
from kenspeckle.health import Examination, Examined, examine
from kenspeckle.images import Limits
from kenspeckle.ladder import Climbed, climb
from kenspeckle.learning import EpochDone
from kenspeckle.pixels import Cache, default_cache_folder
from kenspeckle.planning import DEFAULT_SECONDS, Planned, duration_words, planned
from kenspeckle.plans import Plan
from kenspeckle.preparation import Prepared, prepare_data
from kenspeckle.results import Report
from kenspeckle.rungs import Budget, Notice, Wish
from kenspeckle.rungs import Event as ClimbEvent
from kenspeckle.settings import to_dict, with_settings
from kenspeckle.shipping import Origin, ship
from kenspeckle.sources import Dataset, open_dataset
from kenspeckle.splits import write_split
from kenspeckle.training import choose_device
from kenspeckle.transfer import Means, Trained, check_effects, train_recipe

__all__ = [
    "EpochDone",
    "Event",
    "Finished",
    "Notice",
    "Options",
    "Planned",
    "Stage",
    "fit",
    "train",
]

DEFAULT_MAX_BAD = 0.25
MOST_PICTURES_ASKED = 10_000  # about their labels without being told to: half a minute on 2 cores

Result = TypeVar("Result")


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
        costs: a CSV of what each mistake costs; the model then answers the class of least expected
            cost. See `costs.read_costs`.
        offline: never use the network, whatever weights are named.
        command: what the user typed, for the report.
        started: `time.perf_counter` in seconds from which on the time of the run is counted; when
            `fit` is called if None.
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
    costs: Path | None = None
    offline: bool = False
    command: str = ""
    started: float | None = None


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


Event = ClimbEvent | Finished
Progress = Generator[ClimbEvent, None, Result]


def train(
    data: str | Path | Dataset,
    recipe: Recipe | str | None = None,
    out: str | Path | None = None,
    options: Options | None = None,
    *,
    time: str | float | None = None,
    **settings: object,
) -> Finished:
    """Train on `data`, evaluate, and write one model file; see `fit`.

    Args:
        data: a data set, or anything that `sources.open_dataset` opens.
        recipe: a recipe or the name of one; when None the run is planned.
        out: the model file; ``NAME.ken`` in the current folder when None.
        options: how to run.
        time: that a planned run may take, in seconds or as ``"5m"``.
        settings: changes to the recipe by leaf name, such as ``lr=0.01``; of a planned run, the
            ``seed``, the ``size`` and ``fit`` of the pictures, and the shares of the split. A
            planned run takes ``backbone`` and ``weights`` too.

    Raises:
        InvalidValueError: an option or setting is wrong.
        MissingPathError: the data are not there.
        DataError: the data cannot be used as they stand.
        TrainingError: the loss is no longer finite.
        ModelFileError: the exported graph does not answer as the network does.
        WriteError: a file could not be written.
    """
    if isinstance(recipe, str):
        recipe = recipes.named(recipe)
    wanted: Recipe | Planned
    if recipe is None:
        backbone, weights = (settings.pop(name, None) for name in ("backbone", "weights"))
        words = [f"{name}={_word(value)}" for name, value in settings.items()]
        given = None if time is None else str(time)
        wanted = planned(words, time=given, backbone=_text(backbone), weights=_text(weights))
    else:
        if time is not None:
            raise InvalidValueError("time has no effect with a recipe, which is not planned")
        words = [f"{name}={_word(value)}" for name, value in settings.items()]
        wanted = with_settings(recipe, words)
    last: Event | None = None
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    for event in fit(dataset, wanted, out, options or Options(), threading.Event()):
        last = event
    if not isinstance(last, Finished):
        raise InvalidValueError("a run must end with Finished")
    return last


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _word(value: object) -> object:
    """Return a setting's value as a command line has it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "none" if value is None else value


def fit(
    dataset: Dataset,
    recipe: Recipe | Planned,
    out: str | Path | None,
    options: Options,
    stop: threading.Event,
) -> Iterator[Event]:
    """Train on a data set, evaluate once on the test pictures, and write one model file.

    Args:
        dataset: labelled pictures.
        recipe: every setting, or a run to be planned.
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
        KeyboardInterrupt: it was stopped before there was a model.
    """
    started = time.perf_counter() if options.started is None else options.started
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if options.on_bad == "stop" and options.max_bad is not None:
        raise InvalidValueError("--max-bad has no effect without --on-bad skip")
    costs = None if options.costs is None else read_costs(options.costs, dataset.classes)
    model_path = _model_path(out, dataset, options)
    device = choose_device(options.device)
    run_folder = new_run_folder(dataset.name, options.run_folder)

    def keep(state: dict[str, Tensor]) -> None:
        write_file(run_folder / "best.safetensors", to_safetensors(state))

    means = Means(
        options.cache,
        options.limits,
        device,
        options.num_threads,
        options.num_loader_threads,
        stop,
        keep,
    )
    run = _Run(dataset, options, means, costs, started, model_path, run_folder)
    if isinstance(recipe, Recipe):
        trained, plan, findings = yield from _run_recipe(run, recipe)
    else:
        trained, plan, findings = yield from _run_planned(run, recipe)
    yield Stage("evaluating and saving", 0, 1)
    report, model_file = run.shipped(trained, plan, findings)
    write_file(run_folder / "report.html", reports.render(report).encode())
    write_file(run_folder / "report.json", json.dumps(report.to_dict(), indent=1).encode())
    write_file(model_path, model_file)
    yield Finished(model_path, run_folder, report, stop.is_set())


@dataclass(frozen=True, eq=False)
class _Run:
    """What both kinds of run need."""

    dataset: Dataset
    options: Options
    means: Means
    costs: Costs | None
    started: float
    model_path: Path
    folder: Path

    @property
    def max_bad(self) -> float:
        """Largest share of pictures that may be broken."""
        if self.options.on_bad == "stop":
            return 0.0
        return DEFAULT_MAX_BAD if self.options.max_bad is None else self.options.max_bad

    def shipped(
        self, trained: Trained, plan: Plan | None, findings: tuple[str, ...]
    ) -> tuple[Report, bytes]:
        """Return the report, and the content of the model file."""
        options = self.options
        origin = Origin(
            options.command,
            self.started,
            options.num_threads,
            options.thumbnails,
            options.limits,
            self.costs,
            findings,
        )
        return ship(trained, origin, self.model_path, plan)

    def note_down(self, prepared: Prepared, recipe: Recipe) -> None:
        """Write the recipe and the split."""
        plain = json.dumps(to_dict(recipe), indent=1)
        write_file(self.folder / "recipe.json", plain.encode())
        write_split(self.folder / "split.csv", prepared.dataset, prepared.parts.tolist())


Outcome = tuple[Trained, Plan | None, tuple[str, ...]]


def _run_recipe(run: _Run, recipe: Recipe) -> Progress[Outcome]:
    """Run one recipe, from the check of the data to the trained network."""
    options, dataset = run.options, run.dataset
    check_effects(recipe)
    if options.num_loader_threads and recipe.transfer.depth != "all":
        raise InvalidValueError(
            "--loader-threads has no effect where everything that is trained on is in memory"
        )
    backbone = None
    if recipe.transfer.weights != "none":
        backbone = open_backbone(recipe.model, recipe.transfer.weights, offline=options.offline)
    few = len(dataset.items) <= MOST_PICTURES_ASKED
    examined = yield from _until_stopped(
        examine(
            dataset,
            options.limits,
            options.cache,
            labels=options.labels if few or options.labels is not None else False,
            max_broken=run.max_bad,
            seed=recipe.seed,
            num_threads=options.num_threads,
        ),
        run.means.stop,
    )
    prepared = yield from _until_stopped(
        prepare_data(
            examined.subject.dataset,
            recipe,
            options.limits,
            options.cache,
            together=examined.subject.copies.together,
            leaked=leaked(examined.subject, "test"),
            backbone=backbone,
        ),
        run.means.stop,
    )
    yield from _found(dataset, examined, options, run.folder)
    yield from map(Notice, prepared.notices)
    run.note_down(prepared, recipe)
    yield Notice(_summary(prepared, recipe, run))
    training = train_recipe(prepared, recipe, run.means, backbone=backbone)
    trained = yield from _logged(training, run.folder / "log.jsonl")
    return trained, None, _sentences(examined)


def _run_planned(run: _Run, wanted: Planned) -> Progress[Outcome]:
    """Plan a run, from the check of the data to the best of what was tried."""
    options, dataset = run.options, run.dataset
    budget = Budget(wanted.seconds or DEFAULT_SECONDS, wanted.seconds is not None, run.started)
    ends = time.localtime(time.time() + budget.started + budget.seconds - time.perf_counter())
    yield Notice(
        f"{'--time' if budget.asked else 'planned for'} {duration_words(budget.seconds)}"
        f"{'' if budget.asked else ' (--time decides)'}: ends at {time.strftime('%H:%M:%S', ends)} "
        "or earlier"
    )
    backbone, why = _backbone_for(wanted, options)
    if why:
        yield Notice(why)
    examination = Examination(dataset, options.limits, options.cache, wanted.recipe.seed)
    yield from _until_stopped(examination.begin(run.max_bad), run.means.stop)

    def save(trained: Trained, plan: Plan) -> None:
        run.note_down(trained.prepared, trained.recipe)
        _, model_file = run.shipped(trained, plan, ())
        write_file(run.model_path, model_file)

    wish = Wish(wanted.recipe, wanted.pinned, backbone, options.labels)
    climbing = climb(examination, wish, budget, run.means, save)
    climbed: Climbed = yield from _logged(climbing, run.folder / "log.jsonl")
    prepared = climbed.best.prepared
    yield from _found(dataset, climbed.examined, options, run.folder)
    yield from map(Notice, prepared.notices)
    run.note_down(prepared, climbed.best.recipe)
    return climbed.best, climbed.plan, _sentences(climbed.examined)


def _backbone_for(wanted: Planned, options: Options) -> tuple[Backbone | None, str]:
    """Return what a planned run starts from, and why it is nothing where nobody asked for that."""
    if wanted.weights == "none":
        return None, ""
    model = wanted.model or EfficientNetLiteConfig()
    try:
        return open_backbone(model, wanted.weights or "imagenet", offline=options.offline), ""
    except MissingExtraError as error:
        if wanted.model is not None or wanted.weights is not None:
            raise
        return None, f"{error}; training starts from nothing"


def _until_stopped(
    work: Generator[Stage, None, Result], stop: threading.Event
) -> Generator[Stage, None, Result]:
    """Pass on some work that comes before any training; a stop ends the run."""

    def unless_stopped(event: Stage) -> Stage:
        if stop.is_set():
            raise KeyboardInterrupt
        return event

    return relayed(work, unless_stopped)


def _sentences(examined: Examined) -> tuple[str, ...]:
    return tuple(f"{found.title} {found.remedy}" for found in examined.health.findings)


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


def _summary(prepared: Prepared, recipe: Recipe, run: _Run) -> str:
    height, width = prepared.geometry.size
    sizes = [f"{len(prepared.part(p)):,} {p}" for p in ("train", "validation", "test")]
    depth = recipe.transfer.depth if recipe.transfer.weights != "none" else "all"
    work = "a head" if depth == "head" else f"{recipe.training.epochs} epochs"
    return (
        f"{', '.join(sizes)} pictures of {len(prepared.dataset.classes)} classes; recipe "
        f"'{recipe.name}': {recipe.model.family} at {height}x{width}, {work} on "
        f"{run.means.device}; logs in {run.folder}"
    )


def _logged(work: Progress[Result], path: Path) -> Progress[Result]:
    """Pass the events on, and keep one JSON line per epoch."""
    lines: list[str] = []

    def note(event: ClimbEvent) -> ClimbEvent:
        if isinstance(event, EpochDone):
            lines.append(json.dumps(vars(event.epoch)))
            write_file(path, "".join(f"{line}\n" for line in lines).encode())
        return event

    return relayed(work, note)
