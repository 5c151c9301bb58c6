"""Findings on copies: the same picture twice, under two labels, or on both sides of a split."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kenspeckle.checks import Copies, Subject
from kenspeckle.duplicates import connected, equal_groups, near_pairs, neighbour_pairs
from kenspeckle.findings import Case, Finding
from kenspeckle.survey import Survey

__all__ = ["copy_findings", "find_copies", "leaked"]

_TOO_LARGE_SHARE = 0.1  # of all pictures in one chain of near pairs
_TOO_LARGE_NUMBER = 50
_MOST_NEIGHBOURS = 50_000  # pictures among which crops are sought by features: 40 s on 2 cores


def find_copies(survey: Survey, features: NDArray[np.float32] | None = None) -> Copies:
    """Return which pictures are the same.

    Args:
        survey: of N pictures.
        features: ``float32 (N, D)`` of a frozen network, where they are known: slight crops are
            then found too, among up to 50,000 different pictures: time grows with their square.
    """
    num_items = len(survey.digests)
    exact = equal_groups(survey.digests)
    first = np.full(exact.max(initial=0) + 1, num_items)
    np.minimum.at(first, exact, np.arange(num_items))
    kept = np.unique(first[exact])
    candidates = None
    if features is not None and len(kept) <= _MOST_NEIGHBOURS:
        candidates = kept[neighbour_pairs(features[kept])]
    near = near_pairs(survey.hashes, survey.traits.sketches, kept, candidates)
    same = np.stack([first[exact], np.arange(num_items)], axis=1)
    together = connected(num_items, np.concatenate([same, near.pairs]))
    largest = int(np.bincount(together).max(initial=0))
    too_alike = largest > max(_TOO_LARGE_NUMBER, _TOO_LARGE_SHARE * num_items)
    return Copies(exact, near, first[exact] if too_alike else together, too_alike)


def leaked(subject: Subject, part: str) -> NDArray[np.int64]:
    """Return the pictures of `part` of which the training pictures hold a copy."""
    items, copies = subject.dataset.items, subject.copies
    trained = np.array([item.split == "train" for item in items], bool)
    asked = np.array([item.split == part for item in items], bool)
    found = asked & np.isin(copies.exact, copies.exact[trained])
    if not copies.too_alike:
        # One picture stands for its exact copies in a pair.
        pairs = copies.exact[copies.near.pairs]
        for left, right in (pairs.T, pairs.T[::-1]):
            known = np.isin(left, copies.exact[trained])
            found |= asked & np.isin(copies.exact, right[known])
    return np.flatnonzero(found)


def copy_findings(subject: Subject) -> Iterator[Finding]:
    """Yield duplicates, near-duplicates, pictures under two labels and leaks."""
    exact = _groups(subject.copies.exact)
    near = _near_groups(subject)
    yield from _conflicts(subject, exact, near)
    yield from _leaks(subject)
    if exact:
        extra = sum(len(group) - 1 for group in exact)
        yield Finding(
            kind="exact-duplicates",
            severity="warning",
            title=f"{extra:,} exact duplicate{'s' * (extra != 1)}, in {len(exact):,} "
            f"group{'s' * (len(exact) != 1)} of equal pictures.",
            why="Copies weigh a picture double, and on two sides of a split they make the result "
            "look better than it is.",
            remedy="Keep one of each, unless the repetition means something.",
            training="keeps copies on one side of the split that it draws, and learns from all.",
            num_pictures=sum(map(len, exact)),
            cases=tuple(Case(subject.exhibits(group), "equal pixels") for group in exact),
        )
    if near:
        num = sum(len(group) for group, _ in near)
        apart = subject.copies.too_alike
        yield Finding(
            kind="near-duplicates",
            severity="note" if apart else "warning",
            title=f"{num:,} pictures are near-duplicates of another: {len(near):,} groups.",
            why="The same picture resized, re-encoded, recoloured or slightly trimmed, or the next "
            "frame of a film, is no independent evidence.",
            remedy="Keep one of each, or name what belongs together by --group or a column group."
            if not apart
            else "Pictures of this set are so alike that this cannot tell copies; if some belong "
            "together (one part, one patient), name them by --group or a column group.",
            training="keeps them on one side of the split that it draws."
            if not apart
            else "keeps only exact duplicates together.",
            num_pictures=num,
            cases=tuple(
                Case(subject.exhibits(group), f"similarity {score:.3f}", score)
                for group, score in near
            ),
        )


def _groups(numbers: NDArray[np.int64]) -> list[list[int]]:
    """Return the indices of equal numbers, where there are several."""
    order = np.argsort(numbers, kind="stable")
    cuts = np.flatnonzero(np.diff(numbers[order])) + 1
    groups = [group.tolist() for group in np.split(order, cuts) if len(group) > 1]
    return sorted(groups)


def _near_groups(subject: Subject) -> list[tuple[list[int], float]]:
    """Return chains of near pairs with the best similarity in each, the most similar first."""
    near = subject.copies.near
    if not len(near.pairs):
        return []
    roots = connected(len(subject.dataset.items), near.pairs)
    best: dict[int, float] = {}
    for (left, _), similarity in zip(near.pairs, near.similarity, strict=True):
        best.setdefault(int(roots[left]), float(similarity))
    groups = [(group, best[int(roots[group[0]])]) for group in _groups(roots)]
    return sorted(groups, key=lambda entry: -entry[1])


def _conflicts(
    subject: Subject, exact: Sequence[list[int]], near: Sequence[tuple[list[int], float]]
) -> Iterator[Finding]:
    labels = subject.dataset.labels
    cases = [
        Case(subject.exhibits(group), "equal pixels", 1.0)
        for group in exact
        if len(set(labels[group].tolist())) > 1
    ]
    if not subject.copies.too_alike:
        pairs, scores = subject.copies.near.pairs, subject.copies.near.similarity
        for (left, right), score in zip(pairs.tolist(), scores.tolist(), strict=True):
            if labels[left] != labels[right]:
                cases.append(
                    Case(subject.exhibits([left, right]), f"similarity {score:.3f}", score)
                )
    if not cases:
        return
    pictures = {exhibit.index for case in cases for exhibit in case.pictures}
    yield Finding(
        kind="conflicting-labels",
        severity="warning",
        title=f"{len(cases):,} picture{'s stand' if len(cases) > 1 else ' stands'} under two "
        "labels.",
        why="At most one of the labels can be right, unless a picture may be of both classes; the "
        "other teaches a mistake and counts one.",
        remedy="Remove the wrong copy; --write-fixes makes a manifest to edit.",
        training="learns from both, on one side of the split that it draws.",
        num_pictures=len(pictures),
        cases=tuple(cases),
    )


def _leaks(subject: Subject) -> Iterator[Finding]:
    items = subject.dataset.items
    together = subject.copies.together
    for part in ("test", "validation"):
        found = leaked(subject, part)
        if not len(found):
            continue
        num_asked = sum(item.split == part for item in items)
        inside = set(found.tolist())
        cases = []
        for members in _groups(together):
            sides = [i for i in members if i in inside or items[i].split == "train"]
            if inside.intersection(sides):
                cases.append(Case(subject.exhibits(sides)))
        yield Finding(
            kind=f"leaks-into-{part}",
            severity="warning",
            title=f"{len(found):,} of {num_asked:,} {part} pictures stand in the training pictures "
            f"too ({100 * len(found) / num_asked:.2g} %).",
            why="A model that learnt a picture by heart is right on its copy: the number is better "
            "than it would be on new pictures.",
            remedy=f"Remove them from the {part} pictures, or merge the parts, so "
            "that training draws a split of its own.",
            training="keeps the split as it is given, and reports the accuracy with and without "
            "these pictures.",
            num_pictures=len(found),
            cases=tuple(cases),
        )
