"""Measure a model file on labelled pictures, with ONNX Runtime alone; classes match by name."""

from pathlib import Path

import numpy as np

from kenspeckle.core import DataError, nearest
from kenspeckle.costs import Costs
from kenspeckle.evaluation import evaluate
from kenspeckle.names import listed
from kenspeckle.prediction import load, predict_dataset
from kenspeckle.results import Scores
from kenspeckle.sources import Dataset

__all__ = ["judge"]


def judge(model_path: Path, dataset: Dataset, split: str, costs: Costs | None = None) -> Scores:
    """Measure a model on one part of a data set, or on all of it.

    Args:
        model_path: the model file.
        dataset: labelled pictures.
        split: ``train``, ``validation``, ``test`` or ``all``.
        costs: decide the answers, instead of those that the model knows.

    Raises:
        InvalidValueError: the costs are not those of the model's classes.
        MissingPathError: the model is not there.
        ModelFileError: the model file is damaged or hostile.
        DataError: the data hold a class that the model does not know, have no labelled pictures
            in that part, or a file cannot be read.
        ImageError: a picture cannot be decoded.
    """
    model = load(model_path)
    index_of = {name: index for index, name in enumerate(model.classes)}
    chosen = [
        i
        for i, item in enumerate(dataset.items)
        if item.label is not None and split in {"all", item.split}
    ]
    if not chosen:
        raise DataError(f"{dataset.location}: has no labelled pictures in the part '{split}'")
    _check_classes(model_path, model.classes, dataset, chosen)
    labels = np.array(
        [index_of[dataset.classes[dataset.items[i].label or 0]] for i in chosen], np.int64
    )
    found = predict_dataset(model, dataset, np.array(chosen, np.int64))
    probabilities = np.concatenate([part.probabilities for part in found])
    return evaluate(probabilities, labels, model.classes, costs=costs or model.costs)


def _check_classes(
    path: Path, classes: tuple[str, ...], dataset: Dataset, chosen: list[int]
) -> None:
    used = {dataset.classes[dataset.items[i].label or 0] for i in chosen}
    unknown = sorted(used - set(classes))
    if unknown:
        raise DataError(
            f"{dataset.location}: {path} does not know the class {listed(unknown)}; "
            f"{nearest(unknown[0], classes)}"
        )
