"""What the command says: answers, scores and models as lines of text, JSON and CSV."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kenspeckle.core import Interval, KenError, printable
from kenspeckle.costs import Costs
from kenspeckle.modelfile import Manifest
from kenspeckle.names import to_cell
from kenspeckle.planpage import time_used
from kenspeckle.plans import Plan
from kenspeckle.prediction import Answer, Difference, Model
from kenspeckle.reports import summary
from kenspeckle.results import Report, Scores

if TYPE_CHECKING:
    from kenspeckle.fit import Finished

__all__ = [
    "csv_rows",
    "finished_text",
    "info_text",
    "json_rows",
    "scores_text",
    "text_rows",
    "verification",
]

Row = tuple[str | None, KenError | None]
"""A piece of text to print, and the error of a picture that could not be used."""


def json_rows(model: Model, paths: list[Path], top: int) -> Iterator[Row]:
    """Yield the answers as one JSON list, an entry per picture."""
    yield "[", None
    for number, (path, answer) in enumerate(_answers(model, paths)):
        entry: dict[str, Any] = {"picture": str(path)}
        if isinstance(answer, KenError):
            entry["error"] = str(answer)
        else:
            ranking = [{"label": name, "probability": p} for name, p in answer.top(top)]
            entry |= {"label": answer.label, "probability": answer.probability, "top": ranking}
        comma = ",\n " if number else "\n "
        yield comma + json.dumps(entry), answer if isinstance(answer, KenError) else None
    yield "\n]\n", None


def csv_rows(model: Model, paths: list[Path], top: int) -> Iterator[Row]:
    """Yield the answers as CSV lines, the header first."""
    names = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("label", "probability")]
    yield _csv_line(["picture", "label", "probability", *names]), None
    for path, answer in _answers(model, paths):
        if isinstance(answer, KenError):
            yield None, answer
            continue
        cells = [cell for name, p in answer.top(top) for cell in (name, f"{p:.6f}")]
        yield _csv_line([str(path), *cells]), None


def _csv_line(cells: Iterable[str]) -> str:
    """Return one CSV line."""
    text = io.StringIO()
    csv.writer(text).writerow(map(to_cell, cells))
    return text.getvalue()


def text_rows(model: Model, paths: list[Path], top: int) -> Iterator[Row]:
    """Yield the answers as a table of text, a line per picture."""
    width = max((len(printable(str(path))) for path in paths), default=0)
    for path, answer in _answers(model, paths):
        if isinstance(answer, KenError):
            yield None, answer
            continue
        ranking = "  ".join(f"{printable(name)} {p:.1%}" for name, p in answer.top(top))
        yield f"{printable(str(path)):<{width}}  {ranking}\n", None


def _answers(model: Model, paths: list[Path]) -> Iterator[tuple[Path, Answer | KenError]]:
    return zip(paths, model.predict_many(paths), strict=True)


def verification(differences: tuple[Difference, ...]) -> Iterator[str]:
    """Yield what replaying the reference pictures showed."""
    if not differences:
        return
    for d in differences:
        if not d.agrees:
            yield f"DIFFERS  reference/{d.name}: a probability is off by {d.probability:.2g}"
    agreeing = sum(d.agrees for d in differences)
    worst = max(d.probability for d in differences)
    yield (
        f"verified: {agreeing} of {len(differences)} reference pictures give the stored answer "
        f"on this machine (largest difference {worst:.1g})"
    )


def finished_text(finished: "Finished") -> str:
    """Return the end of a training: verdict, where everything is, and what to do next."""
    report = finished.report
    lines = [
        "",
        *map(printable, summary(report).splitlines()),
        "",
        f"model   {finished.model_path}  ({(report.model.file_size_bytes or 0) / 1e6:.1f} MB)",
        f"report  {finished.report_path}",
        f"run     {finished.run_folder}  (log, split, recipe, best weights)",
        "",
        *(_plan_lines(report.plan, report.training.seconds) if report.plan else []),
        "next:",
        *(f"  {command}" for command in report.next_commands),
    ]
    return "\n".join(lines) + "\n"


def _plan_lines(plan: Plan, taken: float) -> list[str]:
    """Return how the time was used, and an empty line."""
    return [*map(printable, time_used(plan, taken)), printable(plan.ended_because), ""]


def scores_text(scores: Scores) -> str:
    """Return the measures as a table, and one line per class."""

    def row(name: str, interval: Interval | None) -> str:
        if interval is None or interval.value != interval.value:
            return f"{name:<26}  undefined"
        return f"{name:<26}  {interval.value:7.4f}   {interval.low:.4f} to {interval.high:.4f}"

    lines = [f"{scores.num_items:,} pictures          value   95 % interval"]
    lines += [row("accuracy", scores.accuracy)]
    if scores.top_k:
        lines += [row(f"top-{scores.top_k} accuracy", scores.top_k_accuracy)]
    lines += [row("balanced accuracy", scores.balanced_accuracy)]
    for name in ("precision", "recall", "f1"):
        averages = getattr(scores, name)
        lines += [
            row(f"{name}, macro", averages.macro),
            row(f"{name}, weighted", averages.weighted),
        ]
    lines += [row("log loss", scores.log_loss)]
    if scores.mean_cost:
        lines += [row("mean cost", scores.mean_cost)]
    majority = f"always '{printable(scores.majority_class)}'"
    lines += [f"{'majority baseline':<26}  {scores.majority_accuracy:7.4f}   {majority}", ""]
    width = max(len(printable(name)) for name in ("class", *scores.classes))
    lines += [f"{'class':<{width}}  pictures  precision  recall      f1"]
    for c in scores.per_class:
        values = "  ".join(f"{v.value:8.4f}" for v in (c.precision, c.recall, c.f1))
        lines += [f"{printable(c.name):<{width}}  {c.num_items:8,}   {values}"]
    return "\n".join(lines).replace("nan", "  -") + "\n"


def info_text(manifest: Manifest, report: Report) -> str:
    """Return what a model is, how it was made, and how good it is."""
    height, width = manifest.geometry.size
    shown = ", ".join(printable(name) for name in manifest.classes[:12])
    more = f", and {len(manifest.classes) - 12} more" if len(manifest.classes) > 12 else ""
    made = manifest.provenance
    rows = {
        "classes": f"{len(manifest.classes)}: {shown}{more}",
        "input": f"{height}x{width} pixels, {manifest.geometry.fit}, "
        f"{manifest.geometry.interpolation}, on {manifest.geometry.background}",
        "network": f"{manifest.backbone.get('family')}, "
        f"{manifest.backbone.get('num_parameters'):,} parameters",
        "temperature": f"{manifest.temperature:.3f}",
        "costs": _decision_rule(manifest),
        "unknown": "never answered" if manifest.rejection is None else str(manifest.rejection),
        "recipe": f"{manifest.recipe.get('name')} ({made.get('recipe_hash')})",
        "data": f"{made.get('data')} {made.get('num_pictures')}",
        "fingerprint": made.get("data_fingerprint"),
        "weights": made.get("weights_sha256"),
        "made": f"{made.get('created')}, {made.get('machine')}, seed {made.get('seed')}",
        "versions": made.get("versions"),
        "command": report.command,
        "licence": manifest.licence or "not stated",
    }
    table = "".join(f"{name:<12}  {printable(str(value))}\n" for name, value in rows.items())
    return f"{table}\n{summary(report)}\n"


def _decision_rule(manifest: Manifest) -> str:
    if manifest.costs is None:
        return "every mistake alike"
    true, answered = Costs(manifest.costs).dearest
    return (
        f"least expected cost; dearest: '{manifest.classes[true]}' called "
        f"'{manifest.classes[answered]}', {manifest.costs[true][answered]:g}"
    )
