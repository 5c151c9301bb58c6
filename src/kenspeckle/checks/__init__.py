"""What a check looks for, a file a subject; each turns measurements into findings with names."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kenspeckle.duplicates import NearPairs
from kenspeckle.findings import Exhibit
from kenspeckle.sources import Dataset
from kenspeckle.survey import Survey

__all__ = ["Copies", "Subject"]


@dataclass(frozen=True, eq=False)
class Copies:
    """Which pictures are the same.

    Attributes:
        exact: ``int64 (N,)``, equal numbers have equal pixels.
        near: pairs that are the same picture resized, re-encoded or trimmed; one of each exact
            group stands for all.
        together: ``int64 (N,)``, equal numbers must stay on one side of a split.
        too_alike: whether so many pictures resemble one another that near pairs are not kept
            together, since nothing would be left to split.
    """

    exact: NDArray[np.int64]
    near: NearPairs
    together: NDArray[np.int64]
    too_alike: bool


@dataclass(frozen=True, eq=False)
class Subject:
    """What is looked at.

    Attributes:
        dataset: the pictures.
        survey: what is known of each.
        copies: which are the same.
    """

    dataset: Dataset
    survey: Survey
    copies: Copies

    def exhibit(self, index: int | np.integer[Any]) -> Exhibit:
        """Return picture number `index` as a finding names it."""
        item = self.dataset.items[int(index)]
        label = None if item.label is None else self.dataset.classes[item.label]
        return Exhibit(int(index), item.name, label, item.split)

    def exhibits(self, indices: Iterable[int | np.integer[Any]]) -> tuple[Exhibit, ...]:
        """Return several pictures as a finding names them."""
        return tuple(self.exhibit(index) for index in indices)
