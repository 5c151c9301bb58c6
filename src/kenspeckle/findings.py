"""What a check of a data set found, as plain frozen values that go to JSON.

A `Finding` is one kind of trouble; a `Case` is one instance of it, with the pictures that belong to
it side by side (the copies of a picture, say); an `Exhibit` names one picture.
"""

from dataclasses import dataclass
from typing import Any, Literal

from kenspeckle.forecast import Forecast
from kenspeckle.results import to_plain

__all__ = ["Case", "Check", "Exhibit", "Finding", "Health", "Severity"]

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Exhibit:
    """One picture.

    Attributes:
        index: among the pictures that can be decoded, in the data set's order; None for others.
        name: as the user knows it.
        label: its class, or None.
        split: ``train``, ``validation``, ``test``, or None.
    """

    index: int | None
    name: str
    label: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Case:
    """One instance of a finding.

    Attributes:
        pictures: those that belong to it; several where they are to be compared.
        words: what is to be seen here.
        score: what the cases are ranked by, the worst first, or None.
        suggested: the class that a picture seems to be of, or None.
    """

    pictures: tuple[Exhibit, ...]
    words: str = ""
    score: float | None = None
    suggested: str | None = None


@dataclass(frozen=True)
class Finding:
    """One kind of trouble with the data.

    Attributes:
        kind: a stable name such as ``exact-duplicates``, for programs.
        severity: ``error`` stops training, ``warning`` makes its numbers doubtful, ``note`` is
            worth knowing.
        title: what was found and how often, one sentence.
        why: why it matters.
        remedy: what to do.
        training: what training does by default.
        num_pictures: pictures concerned.
        cases: all of them, the worst first.
    """

    kind: str
    severity: Severity
    title: str
    why: str
    remedy: str
    training: str
    num_pictures: int
    cases: tuple[Case, ...] = ()


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Attributes:
        name: in words.
        outcome: what it found in a few words, or why it did not run.
        seconds: wall time; 0 when it did not run.
        ran: whether it ran.
    """

    name: str
    outcome: str
    seconds: float
    ran: bool = True


@dataclass(frozen=True)
class Health:
    """Everything a check found.

    Attributes:
        name: of the data set.
        location: where it was read from.
        created: date and time, ISO 8601.
        num_pictures: pictures that the data set names.
        classes: names.
        counts: per split (``all`` where the data bring none) the pictures of every class, in order.
        shape: facts such as sizes, formats and colour, in words, by name.
        notices: what was left out or decided while reading, one line each.
        findings: the worst first.
        checks: what was looked for, and what was not and why.
        forecast: what twice the pictures would bring, if it was computed.
        seconds: wall time.
    """

    name: str
    location: str
    created: str
    num_pictures: int
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    shape: dict[str, str]
    notices: tuple[str, ...]
    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]
    forecast: Forecast | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; undefined numbers are None."""
        return dict(to_plain(self))
