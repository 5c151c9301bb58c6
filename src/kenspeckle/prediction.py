"""Answers from a model file, with ONNX Runtime alone: no torch, a fraction of a second to start."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kenspeckle.core import (
    DataError,
    ImageError,
    KenError,
    MissingPathError,
    ModelFileError,
    Pixels,
    Predictions,
)
from kenspeckle.costs import Costs, decide
from kenspeckle.files import read_file
from kenspeckle.images import Limits, prepare
from kenspeckle.modelfile import Manifest, ModelFile, read
from kenspeckle.sources import Dataset

__all__ = ["Answer", "Difference", "Model", "Source", "load", "predict_dataset", "verify"]

Source = str | Path | bytes | NDArray[np.generic]
"""A picture: a path, the bytes of a picture file, or pixels ``(H, W)``, ``(H, W, 3 or 4)``."""

OUTPUTS = ("logits", "probabilities", "embedding")
TOLERANCE = 1e-4
"""Largest difference of a probability between two machines that is still the same answer."""


@dataclass(frozen=True)
class Answer:
    """What the model says of one picture.

    Attributes:
        name: the picture's, as it was given.
        label: the class that is answered: the most probable one or, where the model knows what
            mistakes cost, the one of least expected cost.
        probability: of that class, calibrated.
        ranking: every class with its probability, the most probable first. Costs do not change
            it, so that `label` need not lead it.
    """

    name: str
    label: str
    probability: float
    ranking: tuple[tuple[str, float], ...]

    def top(self, num: int) -> tuple[tuple[str, float], ...]:
        """Return `num` classes with their probabilities: the answer, then the most probable others.

        Example:
            >>> Answer("a.jpg", "red", 0.1, (("green", 0.9), ("red", 0.1))).top(2)
            (('red', 0.1), ('green', 0.9))
        """
        others = [entry for entry in self.ranking if entry[0] != self.label]
        return ((self.label, self.probability), *others)[:num]


class Model:
    """A model file, ready to answer.

    Args:
        file: a checked model file that holds ``model.onnx``.
        num_threads: threads of ONNX Runtime; 0 takes all cores.

    Raises:
        ModelFileError: ONNX Runtime refuses the graph, or its inputs and outputs are not those
            that the manifest states.
    """

    def __init__(self, file: ModelFile, num_threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or (os.cpu_count() or 1)
        options.log_severity_level = 4  # what goes wrong is raised; a log line beside it confuses
        try:
            self._session = onnxruntime.InferenceSession(
                file.members["model.onnx"], options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors share no narrower class
            raise ModelFileError(f"{file.path}: ONNX Runtime refuses the graph: {error}") from error
        self.file = file
        matrix = file.manifest.costs
        self._costs = None if matrix is None else Costs(matrix)
        self._check_interface()

    def _check_interface(self) -> None:
        height, width = self.manifest.geometry.size
        inputs = [(one.name, one.type, one.shape[1:]) for one in self._session.get_inputs()]
        outputs = {one.name: (one.type, one.shape[1:]) for one in self._session.get_outputs()}
        row = ("tensor(float)", [len(self.classes)])
        fits = (
            inputs == [("images", "tensor(uint8)", [height, width, 3])]
            and set(OUTPUTS) <= set(outputs)
            and outputs["logits"] == outputs["probabilities"] == row
        )
        if not fits:
            raise ModelFileError(f"{self.file.path}: its graph does not fit its manifest; refused")

    @property
    def manifest(self) -> Manifest:
        """What the model file says of itself."""
        return self.file.manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs."""
        return self.manifest.classes

    @property
    def costs(self) -> Costs | None:
        """What mistakes cost; None where every mistake is alike."""
        return self._costs

    def run(self, pixels: Pixels) -> Predictions:
        """Return what the network says of prepared pictures, ``uint8 (N, H, W, 3)``.

        Raises:
            ModelFileError: the graph fails on them, or gives no probabilities.
        """
        try:
            found = self._session.run(list(OUTPUTS), {"images": np.ascontiguousarray(pixels)})
        except Exception as error:  # ONNX Runtime's errors share no narrower class
            raise ModelFileError(f"{self.file.path}: the graph fails: {error}") from error
        answer = Predictions(*found)
        rows = answer.probabilities
        shape_fits = rows.shape == (len(pixels), len(self.classes))
        # So written, nan is refused too.
        if not (shape_fits and (rows >= 0).all() and (np.abs(rows.sum(axis=1) - 1) < 1e-3).all()):
            raise ModelFileError(
                f"{self.file.path}: the graph's outputs are not probabilities of "
                f"{len(self.classes)} classes; get a fresh copy, or train again"
            )
        return answer

    def prepare(self, source: Source, limits: Limits | None = None) -> Pixels:
        """Return one picture as the network sees it, ``uint8 (H, W, 3)``.

        Raises:
            ImageError: it cannot be decoded.
            DataError: its file cannot be read.
            MissingPathError: its file is not there.
        """
        limits = limits or Limits()
        if isinstance(source, str | Path):
            data = read_file(Path(source), limits.max_bytes)
            return prepare(data, str(source), self.manifest.geometry, limits)
        return prepare(source, _name(source), self.manifest.geometry, limits)

    def predict(self, source: Source) -> Answer:
        """Return the answer for one picture.

        Raises:
            ImageError: it cannot be decoded.
            DataError: its file cannot be read.
            MissingPathError: its file is not there.
            ModelFileError: the graph fails.
        """
        probabilities = self.run(self.prepare(source)[np.newaxis]).probabilities[0]
        return self.answer(_name(source), probabilities)

    def predict_many(
        self, sources: Iterable[Source], batch_size: int = 16
    ) -> Iterator[Answer | KenError]:
        """Yield an answer, or the error that stands in its place, for each picture in order.

        Raises:
            ModelFileError: the graph fails.
        """
        waiting: list[tuple[str, Pixels | KenError]] = []
        for source in sources:
            waiting.append((_name(source), self._try_prepare(source)))
            if len(waiting) == batch_size:
                yield from self._answers(waiting)
                waiting = []
        yield from self._answers(waiting)

    def _try_prepare(self, source: Source) -> Pixels | KenError:
        try:
            return self.prepare(source)
        except (DataError, MissingPathError) as error:
            return error

    def _answers(
        self, prepared: Sequence[tuple[str, Pixels | KenError]]
    ) -> Iterator[Answer | KenError]:
        good = [pixels for _, pixels in prepared if not isinstance(pixels, KenError)]
        rows = iter(self.run(np.stack(good)).probabilities if good else ())
        for name, pixels in prepared:
            yield pixels if isinstance(pixels, KenError) else self.answer(name, next(rows))

    def answer(self, name: str, probabilities: NDArray[np.float32]) -> Answer:
        """Return the answer that a row of probabilities, ``float32 (K,)``, stands for."""
        order = np.argsort(-probabilities, kind="stable")
        ranking = tuple((self.classes[k], float(probabilities[k])) for k in order)
        label = int(decide(probabilities[np.newaxis], self.costs)[0])
        return Answer(name, self.classes[label], float(probabilities[label]), ranking)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "<picture>"


def load(path: str | Path, num_threads: int = 0) -> Model:
    """Read a model file and make it ready to answer.

    Raises:
        MissingPathError: there is no such file.
        ModelFileError: damaged, hostile, not a model file, or of a later format version.

    Args:
        path: the ``.ken`` file.
        num_threads: threads of ONNX Runtime; 0 takes all cores.
    """
    return Model(read(Path(path)), num_threads)


def predict_dataset(
    model: Model, dataset: Dataset, indices: NDArray[np.int64], batch_size: int = 64
) -> Iterator[Predictions]:
    """Yield predictions for items of a data set, batch by batch in order.

    Raises:
        ImageError: a picture cannot be decoded.
        DataError: a file cannot be read.
        ModelFileError: the graph fails.
    """
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        pictures = [
            prepare(
                dataset.reader.read(int(i)), dataset.items[int(i)].name, model.manifest.geometry
            )
            for i in part
        ]
        yield model.run(np.stack(pictures))


@dataclass(frozen=True)
class Difference:
    """How far this machine's answer for one reference picture is from the stored one.

    Attributes:
        name: the reference picture.
        probability: largest absolute difference over the classes.
    """

    name: str
    probability: float

    @property
    def agrees(self) -> bool:
        """Whether the answers are the same within `TOLERANCE`."""
        return self.probability <= TOLERANCE


def verify(path: str | Path) -> tuple[Difference, ...]:
    """Replay the reference pictures of a model file on this machine.

    Raises:
        MissingPathError: there is no such file.
        ModelFileError: the file is damaged, or a reference picture cannot be replayed.
    """
    file = read(Path(path), ("model.onnx", "reference/"))
    model = Model(file)
    expected = file.json("reference/expected.json")
    try:
        stored = {str(name): np.array(row, np.float32) for name, row in expected.items()}
        shapes_fit = all(row.shape == (len(model.classes),) for row in stored.values())
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: reference/expected.json is not one: {error}") from error
    if not stored or not shapes_fit:
        raise ModelFileError(f"{path}: reference/expected.json does not fit the classes")
    differences = []
    for name, row in stored.items():
        data = file.members.get(f"reference/{name}")
        if data is None:
            raise ModelFileError(f"{path}: holds no reference picture {name!r}")
        try:
            found = model.run(model.prepare(data)[np.newaxis]).probabilities[0]
        except ImageError as error:
            raise ModelFileError(f"{path}: reference/{name}: {error.reason}") from error
        differences.append(Difference(name, float(np.abs(found - row).max())))
    return tuple(differences)
