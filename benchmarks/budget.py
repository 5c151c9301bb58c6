"""Claim: `ken train --time` ends within 10 % of its promise, never 15 s over, and time pays.

    python benchmarks/budget.py flowers.zip pneumonia.zip --data DATA
    python benchmarks/budget.py --data DATA --interrupt-after 60 --budgets 5m

For each archive in DATA, each seed and each time, a whole process with an empty cache is timed,
from before it starts until it is gone. A run may end earlier if it says why. Its model file is then
asked about the test pictures of its split anew. With --interrupt-after it is Ctrl-C that ends the
run; it must leave a model whose stored answers are reproduced, where one had been saved before.
"""

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from kenspeckle.core import printable
from kenspeckle.evaluation import evaluate
from kenspeckle.planning import seconds_of
from kenspeckle.planpage import kept
from kenspeckle.plans import Plan
from kenspeckle.prediction import load, predict_dataset, verify
from kenspeckle.results import Report, Scores
from kenspeckle.sources import open_dataset

DATA = Path(__file__).resolve().parents[2] / "shared/data"
MOST_OFF = 0.10  # of the promise
MOST_SECONDS_OVER = 15.0


@dataclass(frozen=True)
class Ended:
    """A process that is gone.

    Attributes:
        code: its exit code.
        text: what it printed as its result.
        errors: what it printed besides.
        seconds: from before its start to its end.
        seconds_after: from the interrupt to its end; None where it was not interrupted.
        had_model: whether a model file was there when it was interrupted.
    """

    code: int
    text: str
    errors: str
    seconds: float
    seconds_after: float | None
    had_model: bool


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run left: how it used its time, and its model's scores on the test pictures."""

    plan: Plan
    scores: Scores
    auc: float | None


def train(
    archive: Path, promise: str, seed: int, folder: Path, interrupt_after: float | None
) -> Ended:
    """Run `ken train` with everything that it writes in an empty folder."""
    command = [sys.executable, "-m", "kenspeckle", "train", str(archive), "--time", promise]
    command += [
        "--seed",
        str(seed),
        "--cache-dir",
        "cache",
        "--run-folder",
        "run",
        "--out",
        "m.ken",
    ]
    patience = 2 * seconds_of(promise) + 120  # one that hangs fails, and the others go on
    started, interrupted, had_model = time.perf_counter(), None, False
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        text, errors = process.communicate(timeout=interrupt_after or patience)
    except subprocess.TimeoutExpired:
        had_model = (folder / "m.ken").exists()
        interrupted = time.perf_counter()
        process.send_signal(signal.SIGINT if interrupt_after else signal.SIGKILL)
        text, errors = process.communicate(timeout=patience)
    finally:
        process.kill()  # of no effect on one that is gone
    now = time.perf_counter()
    after = None if interrupted is None else now - interrupted
    return Ended(process.returncode, text, errors, now - started, after, had_model)


def examine(folder: Path) -> Outcome:
    """Ask the model of a run about its test pictures; the report must say the same."""
    report = Report.from_dict(json.loads((folder / "run/report.json").read_bytes()))
    dataset = open_dataset(folder / "run/split.csv")
    test = np.flatnonzero([item.split == "test" for item in dataset.items])
    model = load(folder / "m.ken")
    rows = np.concatenate([part.probabilities for part in predict_dataset(model, dataset, test)])
    numbers = np.array([model.classes.index(name) for name in dataset.classes])
    labels = numbers[dataset.labels[test]]
    scores = evaluate(rows, labels, model.classes)
    assert report.plan is not None
    assert report.test is not None
    differing = abs(scores.accuracy.value - report.test.accuracy.value) * len(test)
    assert differing < 1.5, "the report says another accuracy than the model file gives"
    auc = float(roc_auc_score(labels, rows[:, 1])) if len(model.classes) == 2 else None
    return Outcome(report.plan, scores, auc)


def verdict(ended: Ended, promised: float, plan: Plan) -> str:
    """Return whether the promise was kept, in words."""
    over = ended.seconds - promised
    if over >= MOST_SECONDS_OVER or over > MOST_OFF * promised:
        return f"MISSED, {over:.1f} s over"
    if over >= -MOST_OFF * promised:
        return "kept"
    said = plan.ended_because and printable(plan.ended_because) in ended.text
    return f"earlier: {plan.ended_because}" if said else "MISSED: earlier, without a reason"


def words(outcome: Outcome) -> str:
    """Return the scores of a model and the step that gave it, as cells of the table."""
    accuracy, step = outcome.scores.accuracy, kept(outcome.plan)
    return (
        f"{accuracy.value:.4f} ({accuracy.low:.4f} to {accuracy.high:.4f})  "
        f"{outcome.scores.balanced_accuracy.value:>8.4f}  "
        f"{'-' if outcome.auc is None else f'{outcome.auc:.4f}':>6}  "
        f"{'nothing' if step is None else step.name:<30}"
    )


def climb(archive: Path, promises: list[str], seed: int) -> dict[str, Scores]:
    """Run every time once, print a line each, and return the scores of the models."""
    found = {}
    for promise in promises:
        with tempfile.TemporaryDirectory() as name:
            ended = train(archive, promise, seed, Path(name), None)
            promised = seconds_of(promise)
            start = (
                f"{archive.stem:<15} {seed:>4}  {promise:>7}  {ended.seconds:>6.1f}  "
                f"{ended.seconds / promised:>5.2f}  "
            )
            if ended.code:
                print(f"{start}MISSED: exit code {ended.code}: {_last_line(ended)}", flush=True)
                continue
            outcome = examine(Path(name))
        found[promise] = outcome.scores
        print(f"{start}{words(outcome)}  {verdict(ended, promised, outcome.plan)}", flush=True)
    return found


def _last_line(ended: Ended) -> str:
    return (ended.errors.strip().splitlines() or ["no word"])[-1]


def falls(found: dict[str, Scores]) -> list[str]:
    """Return where more time gave less than the interval of less time allows; times ascend."""
    return [
        f"{long} {b.accuracy.value:.4f} against {short} from {a.accuracy.low:.4f} on"
        for (short, a), (long, b) in itertools.combinations(found.items(), 2)
        if b.accuracy.value < a.accuracy.low
    ]


def main(archives: list[Path], promises: list[str], seeds: list[int]) -> None:
    """Print a line for every run, and then what more time brought."""
    promises = sorted(promises, key=seconds_of)
    print(
        f"{'set':<15} seed  promise  wall s  share  {'test accuracy (95 %)':<25}  balanced  "
        f"{'AUC':>6}  {'kept':<30}  the promise (bar ± 10 %, 15 s)"
    )
    for archive in archives:
        runs = {seed: climb(archive, promises, seed) for seed in seeds}
        for seed, found in runs.items():
            if len(found) > 1:
                fallen = "; ".join(falls(found))
                how = f"FALLS: {fallen}" if fallen else "does not fall by more than its interval"
                print(f"{archive.stem}, seed {seed}, {len(found)} models: with time accuracy {how}")
        for promise in promises:
            values = [r[promise].accuracy.value for r in runs.values() if promise in r]
            if len(values) > 1:
                print(
                    f"{archive.stem}, {promise}: {statistics.mean(values):.4f} ± "
                    f"{statistics.stdev(values):.4f} over {len(values)} seeds"
                )


def interrupt(archives: list[Path], promises: list[str], seeds: list[int], after: float) -> None:
    """Interrupt every run, and print what it left."""
    for archive, promise, seed in itertools.product(archives, promises, seeds):
        with tempfile.TemporaryDirectory() as name:
            ended = train(archive, promise, seed, Path(name), after)
            start = f"{archive.stem}, seed {seed}, {promise}, Ctrl-C after {after:.0f} s: "
            if ended.seconds_after is None:
                print(f"{start}it had ended by itself", flush=True)
                continue
            start += f"exit code {ended.code} {ended.seconds_after:.1f} s later; "
            if not (Path(name) / "m.ken").exists():
                lost = "MISSED: the model is gone" if ended.had_model else "there was no model yet"
                print(f"{start}{lost}: {_last_line(ended)}", flush=True)
                continue
            differences = verify(Path(name) / "m.ken")
            agreeing = sum(difference.agrees for difference in differences)
            outcome = examine(Path(name))
        whole = agreeing == len(differences) and ended.code == 130
        print(
            f"{start}{'a valid model' if whole else 'MISSED'}, {agreeing} of {len(differences)} "
            f"stored answers reproduced; {words(outcome)}; {outcome.plan.ended_because}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", default=["flowers.zip", "pneumonia.zip"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--budgets", nargs="+", default=["30s", "1m", "5m", "20m"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--interrupt-after", type=float, metavar="SECONDS")
    options = parser.parse_args()
    archives = [(options.data / name).resolve() for name in options.sets]
    if options.interrupt_after is None:
        main(archives, options.budgets, options.seeds)
    else:
        interrupt(archives, options.budgets, options.seeds, options.interrupt_after)
