"""From a trained network to the model file and its report: what is measured is what is shipped."""

import datetime as dt
import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kenspeckle.calibration import fit_temperature, softmax
from kenspeckle.costs import Costs
from kenspeckle.evaluation import evaluate, worst_mistakes
from kenspeckle.export import Deployed, check_parity, deployable, reference_members, to_safetensors
from kenspeckle.images import Limits, thumbnail
from kenspeckle.modelfile import Manifest, ModelFile, pack
from kenspeckle.pixels import batches, original
from kenspeckle.plans import Plan
from kenspeckle.prediction import Model
from kenspeckle.preparation import Prepared
from kenspeckle.results import (
    ClassCounts,
    DataSummary,
    Mistake,
    ModelSummary,
    Report,
    Scores,
    TrainingSummary,
)
from kenspeckle.settings import recipe_hash, to_dict
from kenspeckle.transfer import Trained

__all__ = ["Origin", "ship"]

THUMBNAIL_SIDE = 96
NUM_MISTAKES = 24
NUM_PARITY = 256  # validation pictures on which graph and network must agree, if they are small
PARITY_PIXELS = NUM_PARITY * 40 * 40  # of large ones fewer: torch takes its time
LEAST_PARITY = 16
NUM_TIMED = 15


@dataclass(frozen=True)
class Origin:
    """What is known of a run besides its result.

    Attributes:
        command: what the user typed.
        started: `time.perf_counter` at the start of the run, in seconds.
        num_threads: compute threads of ONNX Runtime; 0 takes all cores.
        thumbnails: keep small pictures of the worst mistakes in the report.
        limits: what pictures are refused.
        costs: of each mistake, which then decide; None where all are alike.
        findings: what is wrong with the data, a sentence each.
    """

    command: str
    started: float
    num_threads: int
    thumbnails: bool
    limits: Limits
    costs: Costs | None = None
    findings: tuple[str, ...] = ()


def ship(
    trained: Trained, origin: Origin, path: Path, plan: Plan | None = None
) -> tuple[Report, bytes]:
    """Calibrate, export, compare, and evaluate what is shipped.

    Args:
        trained: the network, which is moved to the CPU, and what it learnt from.
        origin: how the run was started.
        path: where the model file will stand.
        plan: how the time was used, where the run was planned.

    Returns:
        The report, and the content of the model file.

    Raises:
        ModelFileError: the exported graph does not answer as the network does.
    """
    prepared, task, network = trained.prepared, trained.prepared.task, trained.network
    temperature = fit_temperature(trained.learned.validation_logits, task.labels[task.validation])
    deployed = Deployed(network.cpu(), task.normalisation, temperature)
    weights = to_safetensors(network.state_dict())
    manifest = Manifest(
        classes=prepared.dataset.classes,
        geometry=prepared.geometry,
        normalisation=task.normalisation,
        temperature=temperature,
        rejection=None,
        backbone=_backbone(trained),
        recipe=to_dict(trained.recipe),
        provenance=_provenance(trained, origin, weights),
        licence=trained.frozen.backbone.licence if trained.frozen else None,
        costs=None if origin.costs is None else origin.costs.matrix,
    )
    template = trained.frozen.template if trained.frozen else None
    graph = deployable(deployed, prepared.geometry, template)
    model = Model(ModelFile(path, manifest, {"model.onnx": graph}), origin.num_threads)
    height, width = prepared.geometry.size
    num_parity = min(NUM_PARITY, max(LEAST_PARITY, PARITY_PIXELS // (height * width)))
    check_parity(deployed, model, task.store.gather(task.validation[:num_parity]))
    report = _report(model, trained, origin, path, plan)
    members = {
        "model.onnx": graph,
        "weights.safetensors": weights,
        "report.json": json.dumps(report.to_dict(), allow_nan=False).encode(),
        **report.pictures(),
        **reference_members(model),
    }
    packed = pack(manifest, members)
    return replace(report, model=replace(report.model, file_size_bytes=len(packed))), packed


def _backbone(trained: Trained) -> dict[str, Any]:
    """Return what the network is and, for pretrained weights, where they are from."""
    found: dict[str, Any] = {
        "family": trained.recipe.model.family,
        "num_parameters": sum(p.numel() for p in trained.network.parameters()),
    }
    if trained.frozen is not None:
        backbone = trained.frozen.backbone
        found |= {"name": backbone.name, "weights_sha256": backbone.sha256}
    return found


def _report(
    model: Model, trained: Trained, origin: Origin, path: Path, plan: Plan | None
) -> Report:
    prepared, learned = trained.prepared, trained.learned
    validation, _, mistakes = _judge(model, trained, "validation", origin)
    test = without_leaks = None
    if len(prepared.part("test")):
        test, without_leaks, mistakes = _judge(model, trained, "test", origin)
    return Report(
        title=path.name,
        created=f"{dt.datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
        data=_data_summary(prepared, origin.findings),
        model=ModelSummary(
            family=trained.recipe.model.family,
            num_parameters=int(model.manifest.backbone["num_parameters"]),
            input_size=prepared.geometry.size,
            temperature=model.manifest.temperature,
            milliseconds_per_picture=_milliseconds(model, prepared),
        ),
        training=TrainingSummary(
            seconds=time.perf_counter() - origin.started,
            history=learned.history,
            best_epoch=learned.best_epoch,
            stopped_because=learned.stopped_because,
        ),
        validation=validation,
        test=test,
        test_without_leaks=without_leaks,
        mistakes=mistakes,
        recipe=to_dict(trained.recipe),
        provenance=dict(model.manifest.provenance),
        command=origin.command,
        next_commands=(
            f"ken predict {path} PICTURE",
            f"ken info {path} --verify",
            f"ken evaluate {path} NEW_PICTURES",
        ),
        plan=plan,
    )


def _judge(
    model: Model, trained: Trained, part: str, origin: Origin
) -> tuple[Scores, Scores | None, tuple[Mistake, ...]]:
    """Return what the shipped graph is worth on one part, and its worst mistakes there.

    The second scores are those without the pictures that leak, None where there are none of either.
    """
    prepared, seed, costs = trained.prepared, trained.recipe.seed, origin.costs
    items = prepared.part(part)
    probabilities = _probabilities(model, trained, items)
    labels = prepared.task.labels[items]
    scores = evaluate(probabilities, labels, model.classes, seed, costs)
    honest = None
    fresh = ~prepared.leaked[items]
    if fresh.any() and not fresh.all():
        honest = evaluate(probabilities[fresh], labels[fresh], model.classes, seed, costs)
    names = tuple(prepared.dataset.items[i].name for i in items)
    mistakes = worst_mistakes(probabilities, labels, names, NUM_MISTAKES, costs)
    if not origin.thumbnails:
        return scores, honest, mistakes
    shown = tuple(
        replace(mistake, picture=_thumbnail(prepared, int(items[mistake.index]), origin.limits))
        for mistake in mistakes
    )
    return scores, honest, shown


def _probabilities(
    model: Model, trained: Trained, items: NDArray[np.int64]
) -> NDArray[np.floating[Any]]:
    """Return what the shipped graph says of pictures, ``(len(items), K)``.

    The graph of a head on frozen features is that which computed the features, and its parity was
    checked: they are not computed again.
    """
    if trained.embeddings is None:
        stored = batches(trained.prepared.task.store, items, 256)
        return np.concatenate([model.run(batch.images).probabilities for batch in stored])
    last = trained.network.last_layer()
    with torch.no_grad():
        logits = last(torch.from_numpy(trained.embeddings[items])).numpy()
    return softmax(logits, model.manifest.temperature)


def _thumbnail(prepared: Prepared, index: int, limits: Limits) -> bytes:
    return thumbnail(original(prepared.dataset, index, limits, THUMBNAIL_SIDE), THUMBNAIL_SIDE)


def _data_summary(prepared: Prepared, findings: tuple[str, ...]) -> DataSummary:
    labels, dataset = prepared.task.labels, prepared.dataset

    def counts(part: str) -> NDArray[np.int64]:
        return np.bincount(labels[prepared.part(part)], minlength=len(dataset.classes))

    rows = zip(dataset.classes, counts("train"), counts("validation"), counts("test"), strict=True)
    return DataSummary(
        name=dataset.name,
        location=dataset.location,
        classes=tuple(ClassCounts(name, int(a), int(b), int(c)) for name, a, b, c in rows),
        notices=prepared.notices,
        findings=findings,
    )


def _milliseconds(model: Model, prepared: Prepared) -> float:
    """Return the shortest of some answers for one prepared picture, in milliseconds."""
    picture = prepared.task.store.gather(prepared.task.validation[:1])
    model.run(picture)
    times = []
    for _ in range(NUM_TIMED):
        start = time.perf_counter()
        model.run(picture)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def _provenance(trained: Trained, origin: Origin, weights: bytes) -> dict[str, Any]:
    prepared = trained.prepared
    packages = ("kenspeckle", "torch", "numpy", "pillow", "onnxruntime")
    return {
        "created": f"{dt.datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
        "data": prepared.dataset.name,
        "data_fingerprint": prepared.fingerprint,
        "num_pictures": {p: len(prepared.part(p)) for p in ("train", "validation", "test")},
        "recipe_hash": recipe_hash(trained.recipe),
        "seed": trained.recipe.seed,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "num_threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - origin.started, 1),
    }
