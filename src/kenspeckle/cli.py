"""The command `ken`: words in, words out. The one place that prints.

Progress and notices go to standard error, results to standard output, so that a program can read
them. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import io
import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from kenspeckle.arguments import cache_of, costs_of, one_of, opened, wanted
from kenspeckle.core import InvalidValueError, KenError
from kenspeckle.progress import say, watch

if TYPE_CHECKING:
    from kenspeckle.fit import Event, Finished

__all__ = ["app", "main"]

STARTED = time.perf_counter()  # of which --time counts
INTERRUPTED = 130

FIRST_STEPS = """\
ken: pictures in, answers you can defend out.

Start here:
  ken train sample                   train on the pictures inside the package (no download)
  ken train FOLDER                   a folder with one folder of pictures per class,
                                     or a .zip of it, or a .csv with the columns path and label
  ken predict MODEL.ken PICTURE...   what is on these pictures
  ken info MODEL.ken                 what a model is, how it was made, how good it is

`ken --help` lists every command, `ken COMMAND --help` shows its options and an example.
"""

app = typer.Typer(
    name="ken",
    help="Image classification whose numbers can be trusted.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
LabelColumn = Annotated[
    str | None, typer.Option(help="A manifest's column of classes, if not label or class.")
]
DataFolder = Annotated[
    Path | None, typer.Option("--data-dir", help="Where standard sets are, or are put.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Group = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="Pictures that belong together (a patient, a film) stay on one side of the split: "
        "'folder', or a regular expression that finds the group in a picture's name.",
    ),
]
Threads = Annotated[int, typer.Option(min=0, help="Compute threads; 0 takes all cores.")]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache-dir", help="Where decoded pictures are kept.")
]
CacheLimit = Annotated[
    float, typer.Option(min=0, help="Largest cache in GB; 0 decodes in every epoch.")
]
CostsFile = Annotated[
    Path | None,
    typer.Option(
        "--costs",
        metavar="FILE.csv",
        help="What each mistake costs: the columns true, answered, cost (what is not named costs "
        "1), or a table of true by answered classes. The answer is what costs least.",
    ),
]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL.ken", help="A model file.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"kenspeckle {version('kenspeckle')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(FIRST_STEPS, end="")


def main() -> None:
    """Run the command; a KenError becomes one message and its exit code, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be valid UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except KenError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away, as with `ken predict … | head`
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@app.command(epilog="Example:  ken check flowers/ --write-fixes fixes.csv")
def check(
    data: Annotated[str, typer.Argument(help="Labelled pictures, in any form that train takes.")],
    labels: Annotated[
        bool | None,
        typer.Option(
            help="Look for wrong labels, outliers and what more pictures would bring too; takes "
            "some milliseconds a picture. [default: where the pretrained network is installed]"
        ),
    ] = None,
    write_fixes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv", help="Write a manifest with the doubtful pictures marked, to edit."
        ),
    ] = None,
    group: Group = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(help="Where the page and the findings go. [default: runs/NAME-TIME]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of folds and samples.")] = 0,
    threads: Threads = 0,
    cache_folder: CacheFolder = None,
    cache_limit: CacheLimit = 10.0,
    label_column: LabelColumn = None,
    data_folder: DataFolder = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with DATA, file by file, before training; nothing is altered.

    Exit code 1 when something would stop training, else 0.
    """
    from kenspeckle import checkfiles, checkpage
    from kenspeckle.files import new_run_folder
    from kenspeckle.health import examine
    from kenspeckle.images import Limits

    dataset = opened(data, label_column, data_folder, offline, min_classes=1, group=group)
    if write_fixes is not None:
        checkfiles.check_fixes(write_fixes, dataset)
    folder = new_run_folder(f"{dataset.name}-check", run_folder)
    limits, cache = Limits(), cache_of(cache_folder, cache_limit)
    examined = watch(
        examine(dataset, limits, cache, labels=labels, seed=seed, num_threads=threads),
        quiet or as_json,
    )
    checkfiles.write_health(folder, examined, limits)
    if write_fixes is not None:
        num_doubts = checkfiles.write_fixes(write_fixes, examined)
        say(
            f"wrote {write_fixes}: {num_doubts:,} doubtful pictures first; edit the column label "
            f"or delete rows, then: ken train {write_fixes}"
        )
    if as_json:
        print(json.dumps(examined.health.to_dict(), indent=1))
    else:
        print(checkpage.summary(examined.health), end="")
        print(f"\npage      {folder / 'check.html'}\nfindings  {folder / 'findings.csv'}")
    if any(finding.severity == "error" for finding in examined.health.findings):
        sys.exit(1)


@app.command(epilog="Example:  ken train sample --out sample.ken")
def train(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of class folders, a folder with train/ val/ test/, a .zip of either, "
            "a .csv, .tsv or .parquet manifest, 'sample', or a standard set such as 'cifar10'."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The model file to write. [default: NAME.ken]")
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="How long the run may take in all, such as 30s, 5m or 2h: what is tried is "
            "planned to fit. [default without --recipe: 5m]"
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="The pretrained network to start from: efficientnet-lite0, -lite1, -lite2 or, "
            "with the extra zoo, any name of timm's. [default: efficientnet-lite0]"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Its weights: imagenet (of an installed package), a file, hub (fetched), or none "
            "to start from nothing."
        ),
    ] = None,
    costs: CostsFile = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Plan nothing, run this: a name (`ken recipes`) or a recipe.json."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, such as lr=0.01."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training pictures.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Input size in pixels: 64, or 48x96 (height x width).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The number all random choices come from.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Threads = 0,
    loader_threads: Annotated[
        int, typer.Option(min=0, help="Threads that fetch pictures ahead of the training.")
    ] = 0,
    run_folder: Annotated[
        Path | None, typer.Option(help="Where logs and reports go. [default: runs/NAME-TIME]")
    ] = None,
    cache_folder: CacheFolder = None,
    cache_limit: CacheLimit = 10.0,
    on_bad: Annotated[
        str, typer.Option(help="Pictures that cannot be decoded: stop before training, or skip.")
    ] = "stop",
    max_bad: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Largest share of pictures that is skipped. [default: 0.25]"
        ),
    ] = None,
    labels: Annotated[
        bool | None,
        typer.Option(
            help="Look for wrong labels, outliers and what more pictures would bring before "
            "training. [default: up to 10,000 pictures]"
        ),
    ] = None,
    group: Group = None,
    label_column: LabelColumn = None,
    data_folder: DataFolder = None,
    offline: Offline = False,
    thumbnails: Annotated[
        bool, typer.Option(help="Keep small pictures of the worst mistakes in the report.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the model file.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train on DATA, evaluate once on the test pictures, and write one model file."""
    from kenspeckle.fit import Options, fit
    from kenspeckle.wording import finished_text

    options = Options(
        device=device,
        num_threads=threads,
        num_loader_threads=loader_threads,
        cache=cache_of(cache_folder, cache_limit),
        thumbnails=thumbnails,
        overwrite=force,
        run_folder=run_folder,
        on_bad=one_of("--on-bad", on_bad, ("stop", "skip")),
        max_bad=max_bad,
        labels=labels,
        costs=costs,
        offline=offline,
        command="ken " + shlex.join(sys.argv[1:]),
        started=STARTED,
    )
    changes = {"epochs": epochs, "size": size, "seed": seed}
    assignments = [f"{name}={value}" for name, value in changes.items() if value is not None]
    plan = {"time": time, "backbone": backbone, "weights": weights}
    chosen = wanted(recipe, [*(set_ or []), *assignments], plan)
    dataset = opened(data, label_column, data_folder, offline, group=group)
    with _stop_on_interrupt() as stop:
        events = fit(dataset, chosen, out, options, stop)
        try:
            finished = watch(_finished(events), quiet or as_json)
        except KeyboardInterrupt:
            _fail("interrupted before there was a model; nothing was written", INTERRUPTED)
    if as_json:
        print(json.dumps(finished.to_dict(), indent=1))
    else:
        print(finished_text(finished), end="")
    if finished.interrupted:
        sys.exit(INTERRUPTED)


class _stop_on_interrupt:  # noqa: N801 - used as a verb: with _stop_on_interrupt()
    """The first Ctrl-C asks training to end with the best model so far, the second ends at once."""

    def __enter__(self) -> threading.Event:
        self._stop = threading.Event()
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self._stop

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()
        say("\nstopping: the best model so far, if there is one, is saved (again to end at once)")


def _finished(events: Iterator["Event"]) -> Generator["Event", None, "Finished"]:
    """Return the last event of a training."""
    from kenspeckle.fit import Finished

    for event in events:
        if isinstance(event, Finished):
            return event
        yield event
    raise KenError("training ended without a result")  # fit's last event is Finished


@app.command(epilog="Example:  ken evaluate flowers.ken new_pictures/")
def evaluate(
    model: ModelPath,
    data: Annotated[str, typer.Argument(help="Labelled pictures, in any form that train takes.")],
    split: Annotated[
        str, typer.Option(help="Which part to use: train, validation, test or all.")
    ] = "all",
    costs: CostsFile = None,
    label_column: LabelColumn = None,
    data_folder: DataFolder = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on labelled pictures; classes are matched by name. Needs no torch."""
    from kenspeckle.judging import judge
    from kenspeckle.wording import scores_text

    one_of("--split", split, ("train", "validation", "test", "all"))
    dataset = opened(data, label_column, data_folder, offline, min_classes=1)
    scores = judge(model, dataset, split, costs_of(costs, model))
    if not quiet:
        for notice in dataset.notices:
            say(f"note: {notice}")
    if as_json:
        print(json.dumps(scores.to_dict(), indent=1))
    else:
        print(scores_text(scores), end="")


@app.command(epilog="Example:  ken predict flowers.ken daisy.jpg holiday/")
def predict(
    model: ModelPath,
    pictures: Annotated[
        list[Path], typer.Argument(help="Picture files, or folders of them.", metavar="PICTURES...")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 1,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the result as CSV.")] = False,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Say what is on pictures: label and probability, one line each. Needs no torch."""
    from kenspeckle.prediction import load
    from kenspeckle.sources import find_pictures
    from kenspeckle.wording import csv_rows, json_rows, text_rows

    if as_json and as_csv:
        raise InvalidValueError("--json and --csv cannot both be asked for")
    paths = find_pictures(pictures)
    loaded = load(model, threads)
    form = json_rows if as_json else csv_rows if as_csv else text_rows
    failed = 0
    for line, error in form(loaded, paths, min(top, len(loaded.classes))):
        if error is not None:
            failed += 1
            say(f"error: {error}")
        if line is not None:
            print(line, end="")
    if failed and not quiet:
        say(f"{failed} of {len(paths)} pictures could not be used")
    if failed:
        sys.exit(1)


@app.command(epilog="Example:  ken info flowers.ken --verify")
def info(
    model: ModelPath,
    verify: Annotated[
        bool, typer.Option("--verify", help="Replay the reference pictures on this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a model is, how it was made, and how good it is. Needs no torch."""
    from kenspeckle.modelfile import read
    from kenspeckle.prediction import verify as replay
    from kenspeckle.results import Report
    from kenspeckle.wording import info_text, verification

    file = read(model, ("report.json",))
    report = Report.from_dict(file.json("report.json"))
    differences = replay(model) if verify else ()
    if as_json:
        plain = asdict(file.manifest) | {"report": report.to_dict()}
        if verify:
            plain["verification"] = [asdict(d) | {"agrees": d.agrees} for d in differences]
        print(json.dumps(plain, indent=1))
    else:
        print(info_text(file.manifest, report), end="")
        for line in verification(differences):
            print(line)
    if not all(difference.agrees for difference in differences):
        sys.exit(1)


@app.command(epilog="Example:  ken recipes")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes and what was measured with each."""
    from kenspeckle.recipes import RECIPES
    from kenspeckle.settings import to_dict

    if as_json:
        print(json.dumps({name: to_dict(recipe) for name, recipe in RECIPES.items()}, indent=1))
        return
    for name, recipe in RECIPES.items():
        print(f"{name}\n  {recipe.promise}")
