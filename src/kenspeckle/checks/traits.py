"""Findings on shortcuts: what besides the thing itself tells the class."""

from collections.abc import Iterator

from kenspeckle.checks import Subject
from kenspeckle.core import printable
from kenspeckle.findings import Case, Finding
from kenspeckle.shortcuts import Shortcut, find_shortcuts

__all__ = ["shortcut_findings", "tested_shortcuts"]

_NUM_EXAMPLES = 6


def tested_shortcuts(subject: Subject, seed: int) -> tuple[Shortcut, ...]:
    """Return for every trait how well it alone tells the class.

    Args:
        subject: what is looked at.
        seed: of the choice of pictures and the folds.
    """
    dataset = subject.dataset
    return find_shortcuts(
        subject.survey.traits,
        dataset.labels,
        subject.copies.together,
        len(dataset.classes),
        seed,
    )


def shortcut_findings(subject: Subject, shortcuts: tuple[Shortcut, ...]) -> Iterator[Finding]:
    """Yield the traits that tell the class suspiciously well."""
    classes = subject.dataset.classes
    for shortcut in shortcuts:
        if not shortcut.suspicious:
            continue
        given_away = shortcut.given_away
        which = "" if given_away is None else f", '{printable(classes[given_away])}' above all"
        accuracy = shortcut.accuracy
        examples = [
            Case(subject.exhibits([i]), f"told by its {shortcut.name}")
            for i in shortcut.examples[:_NUM_EXAMPLES]
        ]
        contrasts = [
            Case(subject.exhibits([i]), f"another class, another {shortcut.name}")
            for i in shortcut.contrasts[:_NUM_EXAMPLES]
        ]
        yield Finding(
            kind="shortcut",
            severity="warning",
            title=f"The {shortcut.name} alone tells the class{which}: balanced accuracy "
            f"{100 * accuracy.value:.0f} % ({100 * accuracy.low:.0f} to {100 * accuracy.high:.0f}) "
            f"where guessing has {100 * shortcut.chance:.0f} %.",
            why=f"{shortcut.words.rstrip('.').capitalize()}. A network learns what is easiest: "
            "it can be right here for that reason alone, and wrong wherever it is absent.",
            remedy="Find out where it comes from (another camera, source, date or marking), and "
            "make it alike in all classes: crop, mask or re-encode all pictures the same way.",
            training="changes nothing; the finding stands in the report.",
            num_pictures=len(subject.dataset.items),
            cases=tuple(examples + contrasts),
        )
